"""A small verifier server on Transformers, for machines and models that are too small to be worth a vLLM.

    dflash-scale serve --embedded --model DIR --http 127.0.0.1:8001 --zmq tcp://127.0.0.1:5601 --layer-ids 2,4

It answers the routes that a receiver uses of vLLM (/health, /v1/models, POST /v1/completions with token ids)
and sends hidden states over the same wire. One model thread takes requests in the order they arrive and runs one
sample per forward: batching would change the rounding of a sample with the samples it happens to meet, and a run
could not be repeated bit for bit.

Shape letters: T tokens of the prompt · L aux layers · H hidden size.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from dflash_scale.server.completions import CompletionServer, Reply, Request, RequestLimits
from dflash_scale.server.sender import MAX_BYTES, Offer, Sender
from dflash_scale.transport.addresses import check_bind, check_bind_http, split_address
from dflash_scale.transport.encoding import bytes_of, encode
from dflash_scale.transport.keys import server_keys
from dflash_scale.transport.layout import Layout
from dflash_scale.verifier.identity import origin_of
from dflash_scale.verifier.layers import aux_layers, causal_model, decoder_layers

log = logging.getLogger(__name__)

GREEDY_BELOW: Final = 1e-5  # of the temperature, as in vLLM: a smaller one overflows
MAX_WAITING: Final = 4096  # requests; more make their HTTP threads wait


@dataclass(frozen=True, slots=True)
class Options:
    """Port 0 (HTTP) and tcp://127.0.0.1:* (ZeroMQ) choose free ports; see TransformersServer.http and .zmq."""

    model: str
    http: str
    zmq: str
    layer_ids: tuple[int, ...]  # aux layers; the last layer is added
    dtype: str = "auto"
    threads: int = 1
    insecure: bool = False
    keys: Path | None = None
    max_unsent_bytes: int = MAX_BYTES


class TransformersVerifier:
    """A Transformers causal LM whose forward also keeps the residual stream after some layers.

    Of a multimodal model, those of its text part. Raises ValueError for families whose layers are not found and for
    layer ids that the verifier lacks.
    """

    def __init__(self, model: str, layer_ids: tuple[int, ...], dtype: str) -> None:
        self._model = causal_model(model, dtype)
        layers = decoder_layers(self._model)[1]
        layer_ids = aux_layers(layer_ids, len(layers), "--layer-ids")
        config = self._model.config.get_text_config(decoder=True)
        name = str(self._model.dtype).removeprefix("torch.")
        self.layout = Layout((*layer_ids, len(layers)), config.hidden_size, name)
        self.vocab_size: int = config.vocab_size
        self.max_tokens: int = config.max_position_embeddings
        eos = self._model.generation_config.eos_token_id
        self._eos = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self._kept: dict[int, list[torch.Tensor]] = {k: [] for k in self.layout.layer_ids}  # one for each forward
        if 0 in layer_ids:
            layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
        for k in self.layout.layer_ids:
            if k > 0:
                layers[k - 1].register_forward_hook(self._record(k))

    def _keep_input(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kept[0].append((args[0] if args else kwargs["hidden_states"])[0])

    def _record(self, k: int) -> Any:
        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._kept[k].append((output[0] if isinstance(output, tuple) else output)[0])

        return keep

    @torch.inference_mode()
    def run(
        self,
        token_ids: Sequence[int],
        max_tokens: int,
        ignore_eos: bool,
        layer_ids: Sequence[int],
        *,
        answer_too: bool = False,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """(T,) prompt ids -> hidden states (T, L, H) after `layer_ids`, none if there are none, and up to max_tokens
        token ids. With `answer_too` the T tokens are the prompt's and the answer's; the last was never fed, and zeros
        stand for its hidden states. temperature 0 is greedy; above, the same seed gives the same answer, and None
        another one each time."""
        for kept in self._kept.values():
            kept.clear()
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        inputs = torch.tensor([list(token_ids)])
        output = self._model(inputs, use_cache=max_tokens > 1, logits_to_keep=1)
        answer = [_next_token(output.logits[0, -1], temperature, generator)]
        while len(answer) < max_tokens and (ignore_eos or answer[-1] not in self._eos):
            step = torch.tensor([answer[-1:]])
            output = self._model(step, past_key_values=output.past_key_values, use_cache=True)
            answer.append(_next_token(output.logits[0, -1], temperature, generator))
        if answer_too:
            layers = [torch.cat([*self._kept[k], torch.zeros_like(self._kept[k][0][:1])]) for k in layer_ids]
        else:
            layers = [self._kept[k][0] for k in layer_ids]
        return torch.stack(layers, dim=1) if layers else torch.empty(0), answer

    def stopped(self, answer: Sequence[int]) -> bool:
        return answer[-1] in self._eos


class TransformersServer:
    """HTTP threads -> one queue -> one model thread -> Sender. Runs from construction until `close`."""

    def __init__(self, options: Options) -> None:
        self._check(options)
        keys = server_keys(options.keys) if options.keys is not None else None
        self._verifier = TransformersVerifier(options.model, options.layer_ids, options.dtype)
        self._queue: queue.Queue[tuple[Request, Future[Reply]] | None] = queue.Queue(MAX_WAITING)
        self._sender = Sender(
            options.zmq,
            Offer(self._verifier.layout, options.model, origin_of(options.model)),
            insecure=options.insecure,
            keys=keys,
            max_bytes=options.max_unsent_bytes,
        )
        self.zmq = self._sender.endpoint
        limits = RequestLimits(self._verifier.vocab_size, self._verifier.max_tokens, self._verifier.layout)
        try:
            self._http = CompletionServer(options.http, options.model, limits, self._submit)
        except ValueError:
            self._sender.close()
            raise
        self.http = self._http.url
        self.layout = self._verifier.layout
        self._thread = threading.Thread(target=self._serve, args=(options.threads,), name="dflash-model", daemon=True)
        self._thread.start()

    @staticmethod
    def _check(options: Options) -> None:
        if not Path(options.model).is_dir():
            raise ValueError(f"--model must be a folder with a Transformers model, got {options.model!r}.")
        check_bind_http(
            "--http", split_address("--http", f"http://{options.http}", "http")[0], insecure=options.insecure
        )
        check_bind("--zmq", options.zmq, open_to_others=options.insecure or options.keys is not None)
        if options.max_unsent_bytes < 1:
            raise ValueError(f"--max-unsent-bytes must be above 0, got {options.max_unsent_bytes}.")

    def _submit(self, request: Request) -> "Future[Reply]":
        future: Future[Reply] = Future()
        self._queue.put((request, future))
        return future

    def _serve(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while (item := self._queue.get()) is not None:
            request, future = item
            try:
                future.set_result(self._answer(request))
            except Exception as error:  # a request must not take the server down; its client gets a 500
                log.exception("A request of %d tokens failed", len(request.token_ids))
                if request.ticket is not None:
                    self._sender.refuse(request.ticket, f"{type(error).__name__}: {error}")
                future.set_exception(error)

    def _answer(self, request: Request) -> Reply:
        ticket = request.ticket
        states, answer = self._verifier.run(
            request.token_ids,
            request.max_tokens,
            request.ignore_eos,
            ticket.layer_ids if ticket is not None else (),
            answer_too=ticket is not None and ticket.answer,
            temperature=request.temperature,
            seed=request.seed,
        )
        if ticket is not None:
            tokens = [*request.token_ids, *answer] if ticket.answer else request.token_ids
            token_ids = torch.tensor(tokens, dtype=torch.int32)
            self._sender.send(ticket, bytes_of(token_ids), bytes_of(encode(states, ticket.dtype)))
        stopped = not request.ignore_eos and self._verifier.stopped(answer)
        return Reply(answer, "stop" if stopped else "length")

    def close(self) -> None:
        """Stops listening, finishes the request in hand, fails the waiting ones, sends what is queued."""
        self._http.close()
        waiting: list[tuple[Request, Future[Reply]] | None] = []
        while not self._queue.empty():
            waiting.append(self._queue.get())
        self._queue.put(None)
        self._thread.join()
        for item in waiting:
            if item is not None:
                item[1].set_exception(RuntimeError("the server is shutting down"))
        self._sender.close()


def _next_token(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """One token of (vocabulary,) logits."""
    if temperature < GREEDY_BELOW:
        return int(logits.argmax())
    probabilities = (logits.float() / temperature).softmax(0)
    return int(probabilities.multinomial(1, generator=generator))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory as bytes; the view keeps the tensor alive."""
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data
