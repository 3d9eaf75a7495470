"""The embedded verifier server: its hidden states are Transformers' own, over HTTP and the wire, whatever runs beside.

T tokens · L aux layers · H hidden size.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dflash_scale.commands import cli
from dflash_scale.commands.serve_embedded import options
from dflash_scale.server.transformers_server import Options, TransformersServer, TransformersVerifier, _next_token
from dflash_scale.transport import keys, messages, sockets
from dflash_scale.transport.encoding import encode
from dflash_scale.transport.layout import FP8, Layout
from dflash_scale.verifier.head import load_verifier_head
from dflash_scale.verifier.layers import default_layer_ids
from tests.support.data_messages import decode_data
from tests.support.verifier_families import FAMILIES, HIDDEN, LAYERS, make_verifier, residuals_and_logits

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "dtype": "float32",
}


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    if request.param == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TransformersServer]:
    server = TransformersServer(Options(str(folder), "127.0.0.1:0", "tcp://127.0.0.1:*", (0, 1, 3)))
    yield server
    server.close()


def post(url: str, content: Any) -> tuple[int, dict[str, Any]]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist()


def states_by_transformers(folder: Path, token_ids: list[int], layer_ids: tuple[int, ...]) -> torch.Tensor:
    """(T, L+1, H): output_hidden_states for the aux layers, a hook on the last decoder layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    last: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(
        lambda _module, _args, out: last.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.inference_mode():
        hidden = model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    assert not torch.equal(last[0], hidden[-1]), "the last element is expected to be after the final norm"
    return torch.stack([*(hidden[k][0] for k in layer_ids), last[0][0]], dim=1)


def as_tensor(raw: memoryview, tokens: int, layout: Layout) -> torch.Tensor:
    assert layout.dtype == "float32"
    flat = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    return flat.view(tokens, len(layout.layer_ids), layout.hidden_size)


def test_states_equal_transformers(folder: Path) -> None:
    verifier = TransformersVerifier(str(folder), (0, 1, 3), "float32")
    assert verifier.layout == Layout((0, 1, 3, 4), 32, "float32")
    for length in (1, 2, 37, 200):
        states, answer = verifier.run(prompt(length), 1, True, verifier.layout.layer_ids)
        want = states_by_transformers(folder, prompt(length), (0, 1, 3))
        assert states.shape == (length, 4, 32), states.shape
        torch.testing.assert_close(states, want, rtol=1e-5, atol=1e-6)
        assert len(answer) == 1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_aux_layers_of_every_family_equal_hooks(family: str, tmp_path: Path) -> None:
    want, logits = residuals_and_logits(make_verifier(family, tmp_path, shard="1GB"), list(range(10, 34)))
    verifier = TransformersVerifier(str(tmp_path), default_layer_ids(LAYERS), "float32")
    states, answer = verifier.run(list(range(10, 34)), 1, True, verifier.layout.layer_ids)
    assert verifier.layout == Layout((2, 4), HIDDEN, "float32")
    torch.testing.assert_close(states, want[[2, 4]].transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert answer == [int(logits[-1].argmax())]
    head = load_verifier_head(str(tmp_path), torch.float32, "cpu")
    torch.testing.assert_close(head.logits(states[:, -1]), logits, rtol=1e-5, atol=1e-5)


def test_greedy_answer_equals_generate(folder: Path) -> None:
    verifier = TransformersVerifier(str(folder), (1,), "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    inputs = torch.tensor([prompt(9)])
    want = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False)
    states, answer = verifier.run(prompt(9), 12, True, verifier.layout.layer_ids)
    assert answer == want[0, 9:].tolist()
    assert states.shape[0] == 9, "hidden states are the prompt's, not the answer's"


@pytest.mark.parametrize(("max_tokens", "temperature"), [(1, 0.0), (2, 0.0), (40, 0.0), (1, 1.0), (40, 1.3)])
def test_states_of_prompt_and_answer_equal_one_forward(folder: Path, max_tokens: int, temperature: float) -> None:
    """Of all tokens but the last, which was sampled and never fed: zeros."""
    verifier = TransformersVerifier(str(folder), (0, 1, 3), "float32")
    layer_ids = verifier.layout.layer_ids
    states, answer = verifier.run(
        prompt(9), max_tokens, True, layer_ids, answer_too=True, temperature=temperature, seed=5
    )
    assert len(answer) == max_tokens
    want = states_by_transformers(folder, [*prompt(9), *answer[:-1]], (0, 1, 3))
    assert states.shape == (9 + max_tokens, 4, 32)
    torch.testing.assert_close(states[:-1], want, rtol=1e-4, atol=1e-5)
    assert not states[-1].any()


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.7, 2.0):
        said = torch.tensor([_next_token(logits, temperature, generator) for _ in range(4000)])
        want = (logits / temperature).softmax(0)
        spread = (want * (1 - want) / len(said)).sqrt()
        got = torch.bincount(said, minlength=5) / len(said)
        assert ((got - want).abs() < 5 * spread).all(), (temperature, got, want)
    assert {_next_token(logits, temperature, generator) for temperature in (0.0, 1e-9) for _ in range(20)} == {3}


def test_answers_without_a_seed_differ(folder: Path) -> None:
    verifier = TransformersVerifier(str(folder), (1,), "float32")
    assert len({tuple(verifier.run(prompt(9), 12, True, (), temperature=1.0)[1]) for _ in range(4)}) > 1


def test_a_ticket_for_the_answer_brings_its_states(folder: Path, server: TransformersServer) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = sockets.connect_dealer(context, server.zmq, "rx-2", max_message_bytes=1 << 22)
    try:
        ticket = messages.Ticket("run", "rx-2", 0, 1, 0, server.layout.layer_ids, server.layout.dtype, answer=True)
        content = {"prompt": prompt(20), "max_tokens": 7, "ignore_eos": True, "temperature": 0.9, "seed": 3}
        _, reply = post(server.http, {**content, "kv_transfer_params": {"dflash": ticket.to_params()}})
        _, again = post(server.http, content)
        answer = reply["choices"][0]["token_ids"]
        assert answer == again["choices"][0]["token_ids"], "temperature and seed do not reach the model"
        assert socket.poll(10_000)
        header, ids, raw = decode_data(socket.recv_multipart(), layout=server.layout, max_tokens=27)
        assert header.ticket == ticket
        assert memoryview(ids).cast("i").tolist() == [*prompt(20), *answer]
        want = states_by_transformers(folder, [*prompt(20), *answer[:-1]], (0, 1, 3))
        got = as_tensor(raw, 27, server.layout)
        torch.testing.assert_close(got[:-1], want, rtol=1e-4, atol=1e-5)
        assert not got[-1].any()
    finally:
        socket.close(0)
        context.term()


def test_eos_ends_the_answer(folder: Path) -> None:
    verifier = TransformersVerifier(str(folder), (1,), "float32")
    _, answer = verifier.run(prompt(9), 12, True, verifier.layout.layer_ids)
    verifier._eos = {answer[2]}
    cut = answer[: answer.index(answer[2]) + 1]
    assert verifier.run(prompt(9), 12, False, ())[1] == cut
    assert verifier.stopped(cut)


def test_bfloat16_layout(folder: Path) -> None:
    verifier = TransformersVerifier(str(folder), (2,), "bfloat16")
    assert verifier.layout.dtype == "bfloat16"
    assert verifier.run(prompt(5), 1, True, verifier.layout.layer_ids)[0].dtype == torch.bfloat16


def test_concurrent_requests_arrive_whole_and_equal_to_lone_ones(folder: Path, server: TransformersServer) -> None:
    """Bitwise: what else the server does must not change a sample's hidden states."""
    prompts = {sample: prompt(1 + 13 * sample, seed=sample) for sample in range(12)}
    threads = torch.get_num_threads()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = sockets.connect_dealer(context, server.zmq, "rx-1", max_message_bytes=1 << 22)
    try:
        socket.send(messages.encode(messages.Hello("run", "rx-1")))
        assert socket.poll(10_000), "no hello reply"
        hello = messages.decode(socket.recv(), max_tokens=0)
        assert isinstance(hello, messages.HelloReply)
        assert hello.layout == server.layout
        assert hello.model == str(folder)

        def ticket_of(sample: int) -> messages.Ticket:
            dtype = ("float32", "bfloat16", FP8)[sample % 3]
            return messages.Ticket("run", "rx-1", 0, sample, 0, server.layout.layer_ids[sample % 3 :], dtype)

        def ask(sample: int) -> tuple[int, dict[str, Any]]:
            ticket = ticket_of(sample)
            content = {"model": str(folder), "prompt": prompts[sample], "max_tokens": 1, "temperature": 0}
            return post(server.http, {**content, "kv_transfer_params": {"dflash": ticket.to_params()}})

        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(ask, prompts))
        assert [status for status, _ in replies] == [200] * len(prompts)
        torch.set_num_threads(1)  # as the server's model thread: another split of the sums rounds otherwise
        alone = TransformersVerifier(str(folder), (0, 1, 3), "float32")
        seen = set()
        for _ in prompts:
            assert socket.poll(10_000), f"only {len(seen)} of {len(prompts)} samples arrived"
            frames = socket.recv_multipart()
            header = messages.decode(frames[0], max_tokens=256)
            assert isinstance(header, messages.Header)
            sample = header.ticket.sample
            layout = ticket_of(sample).part_of(hello.layout)
            header, ids, raw = decode_data(frames, layout=layout, max_tokens=256)
            seen.add(sample)
            assert memoryview(ids).cast("i").tolist() == prompts[sample]
            want, answer = alone.run(prompts[sample], 1, True, hello.layout.layer_ids[sample % 3 :])
            got = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(header.tokens, -1)
            assert torch.equal(got, encode(want, layout.dtype)), f"sample {sample}"
            assert replies[sample][1]["choices"][0]["token_ids"] == answer
        assert seen == set(prompts)
    finally:
        torch.set_num_threads(threads)
        socket.close(0)
        context.term()


def test_routes(folder: Path, server: TransformersServer) -> None:
    with urllib.request.urlopen(server.http + "/health", timeout=10) as reply:
        assert reply.status == 200
    with urllib.request.urlopen(server.http + "/v1/models", timeout=10) as reply:
        assert json.loads(reply.read())["data"][0]["id"] == str(folder)
    status, content = post(server.http, {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True})
    assert status == 200
    assert content["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(server.http + "/nowhere", timeout=10)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        ({"prompt": "text"}, "list of token ids"),
        ({"prompt": []}, "list of token ids"),
        ({"prompt": [1, True]}, "list of token ids"),
        ({"prompt": [97]}, "outside"),
        ({"prompt": [-1]}, "outside"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [1] * 250, "max_tokens": 7}, "exceed"),
        ({"prompt": [1], "model": "other"}, "other"),
        ({"prompt": [1], "temperature": -0.1}, "temperature"),
        ({"prompt": [1], "temperature": "0.7"}, "temperature"),
        (b'{"prompt": [1], "temperature": NaN}', "temperature"),
        ({"prompt": [1], "seed": 1.5}, "seed"),
        ({"prompt": [1], "seed": 1 << 63}, "seed"),
        ({"prompt": [1], "kv_transfer_params": {"dflash": {"run_id": "r"}}}, "ticket"),
        ({"prompt": [1], "kv_transfer_params": []}, "kv_transfer_params"),
    ],
)
def test_what_cannot_be_done_is_refused(server: TransformersServer, content: Any, reason: str) -> None:
    status, reply = post(server.http, content)
    assert status == 400
    assert reason in reply["error"]["message"]


@pytest.mark.parametrize("layer_ids", [(), (2, 1), (1, 1), (4,), (-1, 2)])
def test_layer_ids_that_the_verifier_does_not_have(folder: Path, layer_ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^--layer-ids: got .*from 0 \(embeddings\) to 3; the last layer, id 4"):
        TransformersVerifier(str(folder), layer_ids, "float32")


def test_addresses_are_loopback(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--http: got '0\.0\.0\.0'"):
        TransformersServer(Options(str(folder), "0.0.0.0:0", "tcp://127.0.0.1:*", (1,)))
    with pytest.raises(ValueError, match=r"--zmq: got 'tcp://\*:0'"):
        TransformersServer(Options(str(folder), "127.0.0.1:0", "tcp://*:0", (1,)))
    with pytest.raises(ValueError, match="--max-unsent-bytes must be above 0"):
        TransformersServer(Options(str(folder), "127.0.0.1:0", "tcp://127.0.0.1:*", (1,), max_unsent_bytes=0))
    with pytest.raises(ValueError, match=r"^--http: got '192\.0\.2\.1:0', which cannot be bound \(Cannot assign"):
        TransformersServer(Options(str(folder), "192.0.2.1:0", "tcp://127.0.0.1:*", (1,), insecure=True))


def test_ipv6_with_keys(folder: Path, tmp_path: Path) -> None:
    keys.make_keys(tmp_path / "keys")
    given = f"--http [::1]:0 --zmq tcp://[::]:* --layer-ids 1 --keys {tmp_path / 'keys'} --max-unsent-bytes 12345678"
    args = cli.make_parser().parse_args(["serve --embedded", "--model", str(folder), *given.split()])
    server = TransformersServer(options(args))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        assert server._sender.max_bytes == 12345678
        address = server.zmq.replace("[::]", "[::1]")
        receiver = keys.receiver_keys(tmp_path / "keys")
        socket = sockets.connect_dealer(context, address, "rx-1", max_message_bytes=1 << 22, keys=receiver)
        ticket = messages.Ticket("run", "rx-1", 0, 1, 0, (1,), server.layout.dtype)
        assert server.http.startswith("http://[::1]:")
        status, _ = post(server.http, {"prompt": prompt(5), "kv_transfer_params": {"dflash": ticket.to_params()}})
        assert status == 200
        assert socket.poll(10_000), "nothing came"
        layout = server.layout.only((1,))
        assert decode_data(socket.recv_multipart(), layout=layout, max_tokens=5)[0].ticket == ticket
    finally:
        context.destroy(linger=0)
        server.close()


def command(folder: Path) -> list[str]:
    words = "serve --embedded --http 127.0.0.1:0 --zmq tcp://127.0.0.1:* --layer-ids 1 --model"
    return [sys.executable, "-m", "dflash_scale.commands.cli", *words.split(), str(folder)]


def start(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 90
    while b"Serving" not in log.read_bytes():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_cleanly_on_a_signal(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start(command(folder), tmp_path / "log")
    process.send_signal(number)
    assert process.wait(20) == 0, (tmp_path / "log").read_text()


def test_ends_with_its_parent(folder: Path, tmp_path: Path) -> None:
    parent = """
import subprocess, sys
from dflash_scale.server.process import end_with_parent
process = subprocess.Popen(sys.argv[1:], preexec_fn=end_with_parent)
print("pid", process.pid, flush=True)
process.wait()
"""
    log = tmp_path / "log"
    process = start([sys.executable, "-c", parent, *command(folder)], log)
    try:
        pid = next(line for line in log.read_text().splitlines() if line.startswith("pid ")).split()[1]
        server = os.pidfd_open(int(pid))
    finally:
        process.kill()
        process.wait()
    ended = select.poll()
    ended.register(server, select.POLLIN)
    assert ended.poll(20_000), log.read_text()
    os.close(server)
