"""The HTTP face of the embedded verifier server: the part of vLLM's routes that receivers and evaluations use.

GET /health, GET /v1/models, and POST /v1/completions with {model, prompt: [token ids], max_tokens, temperature, seed,
ignore_eos, kv_transfer_params: {"dflash": ticket}}. Without a temperature it is 0, greedy. Replies carry token ids and
no text. Knows nothing of the model: a request goes to `submit`, which gives a future.
"""

import json
import logging
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Final

from dflash_scale.transport import messages
from dflash_scale.transport.addresses import cannot_bind, split_address
from dflash_scale.transport.layout import MAX_INT, Layout

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 16 << 20
MAX_TEMPERATURE: Final = 100.0


@dataclass(frozen=True, slots=True)
class Request:
    token_ids: tuple[int, ...]
    max_tokens: int
    ignore_eos: bool
    ticket: messages.Ticket | None
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What requests are checked against: ids below `vocab_size`, prompt and answer of `max_tokens` together, and layers
    of `layout`."""

    vocab_size: int
    max_tokens: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class Reply:
    token_ids: list[int]
    finish_reason: str  # "stop" | "length"


class CompletionServer:
    """Listens from construction until `close`. Raises ValueError for an address that it cannot have."""

    def __init__(
        self, address: str, model: str, limits: RequestLimits, submit: Callable[[Request], "Future[Reply]"]
    ) -> None:
        host, port = split_address("--http", f"http://{address}", "http")

        class Handler(_Handler):
            pass

        Handler.model, Handler.limits, Handler.submit = model, limits, staticmethod(submit)
        try:
            self._server = (_Server6 if ":" in host else _Server)((host, port), Handler)
        except OSError as error:
            raise ValueError(cannot_bind("--http", address, error.strerror)) from error
        self.url = f"http://{address.rpartition(':')[0]}:{self._server.server_address[1]}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.1,), name="dflash-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client may hold its connection open for ever
    request_queue_size = 256


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet: unbuffered, each reply waits 40 ms for a delayed ACK
    model: str
    limits: RequestLimits
    submit: Callable[[Request], "Future[Reply]"]

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(HTTPStatus.OK, {})
        elif self.path == "/v1/models":
            entry = {"id": self.model, "object": "model", "max_model_len": self.limits.max_tokens}
            self._reply(HTTPStatus.OK, {"object": "list", "data": [entry]})
        else:
            self._fail(HTTPStatus.NOT_FOUND, f"no route {self.path!r:.80}")

    def do_POST(self) -> None:
        body = self._body()
        if body is None:
            return
        if self.path != "/v1/completions":
            self._fail(HTTPStatus.NOT_FOUND, f"no route {self.path!r:.80}")
            return
        try:
            request = parse_request(body, self.model, self.limits)
        except ValueError as error:
            self._fail(HTTPStatus.BAD_REQUEST, str(error))
            return
        try:
            reply = type(self).submit(request).result()
        except Exception as error:  # noqa: BLE001 - the model thread has logged it with its traceback
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
            return
        self._reply(HTTPStatus.OK, _completion(self.model, request, reply))

    def _body(self) -> bytes | None:
        """The request's body, None after a refusal, which closes the connection because the body is unread."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length) or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Content-Length must be at most {MAX_BODY_BYTES}")
            return None
        return self.rfile.read(int(length))

    def _reply(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        raw = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)
            self.wfile.flush()
        except OSError:  # the client has gone; what it asked for is done all the same
            self.close_connection = True

    def _fail(self, status: HTTPStatus, message: str) -> None:
        self._reply(status, {"error": {"message": message, "type": status.phrase, "code": int(status)}})

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def parse_request(body: bytes, model: str, limits: RequestLimits) -> Request:
    """Raises ValueError for what this server cannot do as asked; keys that it does not know are ignored, as in vLLM."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError("the body must be a JSON object")
    token_ids = content.get("prompt")
    if not isinstance(token_ids, list) or not token_ids or not all(type(i) is int for i in token_ids):
        raise ValueError("prompt must be a non-empty list of token ids")
    if min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
        raise ValueError(f"prompt has token ids outside 0..{limits.vocab_size - 1}")
    max_tokens = content.get("max_tokens", 16)
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError(f"max_tokens must be an integer from 1 on, got {max_tokens!r:.40}")
    if len(token_ids) + max_tokens > limits.max_tokens:
        raise ValueError(f"{len(token_ids)} + {max_tokens} tokens exceed the model's {limits.max_tokens}")
    if content.get("model", model) != model:
        raise ValueError(f"this server has the model {model!r}, not {content['model']!r:.200}")
    temperature, seed = content.get("temperature", 0), content.get("seed")
    if type(temperature) not in (int, float) or not 0 <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature must be a number from 0 to {MAX_TEMPERATURE:g}, got {temperature!r:.40}")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_INT):
        raise ValueError(f"seed must be an integer from 0 to {MAX_INT}, got {seed!r:.40}")
    ticket = messages.Ticket.from_request(content.get("kv_transfer_params"))
    if ticket is not None:
        ticket.part_of(limits.layout)
    ignore_eos = content.get("ignore_eos") is True
    return Request(tuple(token_ids), max_tokens, ignore_eos, ticket, float(temperature), seed)


def _completion(model: str, request: Request, reply: Reply) -> dict[str, Any]:
    prompt, answer = len(request.token_ids), len(reply.token_ids)
    choice = {
        "index": 0,
        "text": "",
        "token_ids": reply.token_ids,
        "prompt_token_ids": list(request.token_ids),
        "finish_reason": reply.finish_reason,
    }
    return {
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
    }
