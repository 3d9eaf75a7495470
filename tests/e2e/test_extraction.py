"""A real vLLM, started by launch/serve_vllm.py, sends the same hidden states as Transformers.

DFLASH_SCALE_VLLM_PYTHON names the interpreter that has vLLM; the default is .venv-vllm/bin/python in the repository.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dflash_scale.data.dataset import Samples, load_prepared
from dflash_scale.server.process import free_port
from dflash_scale.server.transformers_server import TransformersVerifier
from dflash_scale.transport import messages, sockets
from dflash_scale.transport.encoding import decode
from dflash_scale.transport.keys import make_keys, receiver_keys
from dflash_scale.transport.layout import FP8, Layout
from dflash_scale.verifier.identity import origin_of
from tests.support.data_messages import decode_data

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("DFLASH_SCALE_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
VOCABULARY, AUX_LAYERS, LAYERS, MAX_LENGTH = 160, (0, 2, 3), 4, 256
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 100, 130, 200, 255)  # cache blocks have 32 tokens, a prefill chunk 64
POOL_BYTES = 600_000  # two of the longest samples, where the others wait in 100 cache blocks
START_S = 420.0  # 30 s on an idle machine, minutes where other servers start beside it


@dataclass(frozen=True, slots=True)
class Server:
    model: Path
    http: str
    zmq: str
    keys: Path
    process: "subprocess.Popen[bytes]"
    log: Path


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)


def get(url: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return reply.status, reply.read()


def healthy(url: str) -> bool:
    try:
        return get(url + "/health")[0] == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert Path(VLLM_PYTHON).exists(), f"no vLLM interpreter at {VLLM_PYTHON}: set DFLASH_SCALE_VLLM_PYTHON"
    folder = tmp_path_factory.mktemp("vllm")
    model, log = folder / "model", folder / "log"
    write_model(model)
    http, address = free_port(), f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, str(ROOT / "launch" / "serve_vllm.py"), str(model), "--port", str(http)]
    make_keys(folder / "keys")
    command += ["--zmq", address, "--keys", str(folder / "keys"), "--layer-ids", ",".join(map(str, AUX_LAYERS))]
    command += ["--pool-bytes", str(POOL_BYTES), "--python", VLLM_PYTHON, "--", "--num-gpu-blocks-override", "100"]
    command += ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "8"]
    command += ["--block-size", "32", "--max-num-batched-tokens", "64"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    server = Server(model, f"http://127.0.0.1:{http}", address, folder / "keys", process, log)
    try:
        deadline = time.monotonic() + START_S
        while not healthy(server.http):
            assert process.poll() is None, f"vLLM ended while starting:\n{log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"vLLM did not start in {START_S} s:\n{log.read_text()[-6000:]}"
            time.sleep(1)
        yield server
        process.terminate()
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the session that start_new_session made
            process.wait()


@pytest.fixture
def receiver(server: Server) -> Iterator["zmq.Socket[bytes]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    keys = receiver_keys(server.keys)
    dealer = sockets.connect_dealer(context, server.zmq, "rx-1", max_message_bytes=1 << 24, keys=keys)
    yield dealer
    dealer.close(0)
    context.term()


def post(server: Server, token_ids: list[int], params: Any, **changes: Any) -> tuple[int, dict[str, Any]]:
    content = {"model": str(server.model), "prompt": token_ids, "max_tokens": 1, "temperature": 0, **changes}
    body = json.dumps({**content, "kv_transfer_params": params}).encode()
    request = urllib.request.Request(server.http + "/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()


def layers_of(sample: int) -> tuple[int, ...]:
    """All, all but the last, and two that are not side by side, by turns."""
    return ((*AUX_LAYERS, LAYERS), AUX_LAYERS, (AUX_LAYERS[0], LAYERS))[sample % 3]


def dtype_of(sample: int) -> str:
    return ("float32", "bfloat16", FP8)[sample // 3 % 3]


def params(sample: int, receiver: str = "rx-1", attempt: int = 0, *, answer: bool = False) -> dict[str, Any]:
    ticket = messages.Ticket("run-1", receiver, 0, sample, attempt, layers_of(sample), dtype_of(sample), answer)
    return {"dflash": ticket.to_params()}


def receive(receiver: "zmq.Socket[bytes]", server: Server, verifier: TransformersVerifier) -> tuple[int, list[int]]:
    """The next sample's number and token ids, after comparing its hidden states with Transformers'."""
    assert receiver.poll(60_000), f"nothing came:\n{server.log.read_text()[-3000:]}"
    frames = receiver.recv_multipart()
    header = messages.decode(frames[0], max_tokens=MAX_LENGTH)
    assert isinstance(header, messages.Header), header
    sample = header.ticket.sample
    layout = verifier.layout.only(layers_of(sample), dtype_of(sample))
    header, ids, raw = decode_data(frames, layout=layout, max_tokens=MAX_LENGTH)
    token_ids = memoryview(ids).cast("i").tolist()
    got = decode(torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(header.tokens, -1), layout).float()
    if header.ticket.answer:
        assert not got[-1].any(), "the last token of an answer is never fed"
        got = got[:-1]
    want, _ = verifier.run(token_ids[: len(got)], 1, True, layout.layer_ids)
    error = ((got - want).norm(dim=-1) / want.norm(dim=-1)).max().item()  # the worst token of the worst layer
    bound = {"float32": 1e-3, "bfloat16": 5e-3, FP8: 5e-2}[layout.dtype]
    assert error < bound, f"sample {sample} of {header.tokens} tokens: relative error {error}"
    return sample, token_ids


def metric(server: Server, name: str) -> float:
    lines = [line for line in get(server.http + "/metrics")[1].decode().splitlines() if line.startswith(name + "{")]
    assert lines, f"no {name} in /metrics"
    return sum(float(line.split()[-1]) for line in lines)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def resident(server: Server) -> int:
    """Bytes of memory of the server's processes."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in processes)


def test_hello(server: Server, receiver: "zmq.Socket[bytes]") -> None:
    receiver.send(messages.encode(messages.Hello("run-1", "rx-1")))
    assert receiver.poll(20_000), "no hello reply"
    reply = messages.decode(receiver.recv(), max_tokens=0)
    assert isinstance(reply, messages.HelloReply)
    assert reply.layout == Layout((*AUX_LAYERS, LAYERS), 64, "float32")
    assert reply.model == str(server.model)
    assert reply.origin == origin_of(str(server.model))
    assert reply.origin.verifier
    assert reply.origin.tokenizer


def test_a_receiver_without_keys_is_not_served(server: Server) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = sockets.connect_dealer(context, server.zmq, "rx-2", max_message_bytes=1 << 24)
    dealer.send(messages.encode(messages.Hello("run-1", "rx-2")))
    assert not dealer.poll(2_000), "served without keys"
    context.destroy(linger=0)


def test_hidden_states_equal_transformers(server: Server, receiver: "zmq.Socket[bytes]") -> None:
    """Concurrent requests, prompts longer than a cache block and than a prefill chunk, each sent twice."""
    verifier = TransformersVerifier(str(server.model), AUX_LAYERS, "float32")
    prompts = {sample: prompt(LENGTHS[sample % len(LENGTHS)], seed=sample) for sample in range(2 * len(LENGTHS))}
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda item: post(server, item[1], params(item[0])), prompts.items()))
    assert [status for status, _ in replies] == [200] * len(prompts), replies
    seen = dict(receive(receiver, server, verifier) for _ in prompts)
    assert seen == prompts
    assert not receiver.poll(200), "something arrived twice"


def test_prompt_and_answer_of_one_request(server: Server, receiver: "zmq.Socket[bytes]") -> None:
    """Greedy and sampled answers of one token and of many: their hidden states equal one forward over all tokens.

    One ends at the longest length there is, where vLLM may leave its drafters out, and with them the hidden states.
    """
    verifier = TransformersVerifier(str(server.model), AUX_LAYERS, "float32")
    asked = {sample: {"max_tokens": (1, 2, 40)[sample % 3], "temperature": sample // 3 % 2} for sample in range(18)}
    asked[17]["max_tokens"] = MAX_LENGTH - (3 + 11 * 17)

    def ask(sample: int) -> tuple[int, dict[str, Any]]:
        given = {**asked[sample], "return_token_ids": True, "ignore_eos": True}
        return post(server, prompt(3 + 11 * sample, sample), params(sample, answer=True), **given)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, asked))
    assert [status for status, _ in replies] == [200] * len(asked), replies
    answers = [reply["choices"][0]["token_ids"] for _, reply in replies]
    assert [len(answer) for answer in answers] == [asked[sample]["max_tokens"] for sample in asked]
    seen = dict(receive(receiver, server, verifier) for _ in asked)
    assert seen == {sample: [*prompt(3 + 11 * sample, sample), *answers[sample]] for sample in asked}


def test_the_command_answer(server: Server, tmp_path: Path) -> None:
    """Sampled answers of a real vLLM over a wire with keys: each goes on from its prompt, and its states are one
    forward's over its tokens."""
    prompts = [prompt(1 + 9 * number, number) for number in range(20)]
    source, config = tmp_path / "prompts.jsonl", tmp_path / "run.json"
    source.write_text("\n".join(json.dumps({"prompt_ids": ids}) for ids in prompts))
    verifier = {"model": str(server.model), "layer_ids": list(AUX_LAYERS), "dtype": "float32"}
    stream = {"servers": [{"http": server.http, "zmq": server.zmq}], "keys": str(server.keys)}
    config.write_text(json.dumps({"verifier": verifier, "data": {"path": str(tmp_path / "data")}, "stream": stream}))
    command = [sys.executable, "-m", "dflash_scale.commands.cli", "answer", str(source), "--config", str(config)]
    command += ["--states", str(tmp_path / "states"), "--answer-tokens", "30", "--max-tokens", "180"]
    command += ["--temperature", "0.9", "--validation-fraction", "0.4"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    prepared = load_prepared(tmp_path / "data")
    counts, samples = prepared.manifest["counts"], Samples(prepared.train, prepared.validation)
    assert counts["train"] + counts["validation"] + counts["untrainable"] == len(prompts)
    assert counts["validation"] > 0 and counts["truncated"] > len(prompts) // 2  # ends are rare in a random verifier
    reference = TransformersVerifier(str(server.model), AUX_LAYERS, "float32")
    for number in range(len(samples.lengths)):
        tokens = samples.tokens(number).tolist()
        file = load_file(tmp_path / "states" / f"hs_{number}.safetensors")
        assert file["token_ids"].tolist() == tokens
        assert any(ids == tokens[: len(ids)] and len(tokens) - len(ids) <= 30 for ids in prompts)
        got = file["hidden_states"]
        want, _ = reference.run(tokens[:-1], 1, True, reference.layout.layer_ids)
        assert ((got[:-1] - want).norm(dim=-1) / want.norm(dim=-1)).max() < 1e-3
        assert not got[-1].any()


def test_a_slow_receiver_slows_the_server_down_and_loses_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads nothing until the pool is full, the cache blocks are held and requests wait; then it reads all."""
    verifier = TransformersVerifier(str(server.model), AUX_LAYERS, "float32")
    samples = {3 * number: prompt(255, number) for number in range(80)}  # all layers: 261 kB each, 21 MB together
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    monkeypatch.setattr(sockets, "HIGH_WATER", 1)  # this end takes little into its own memory
    keys = receiver_keys(server.keys)
    socket = sockets.connect_dealer(context, server.zmq, "rx-slow", max_message_bytes=1 << 24, keys=keys)
    try:
        socket.send(messages.encode(messages.Hello("run-1", "rx-slow")))
        assert socket.poll(20_000), "no hello reply"
        socket.recv()
        before = resident(server)
        with ThreadPoolExecutor(len(samples)) as pool:
            replies = [pool.submit(post, server, ids, params(n, "rx-slow")) for n, ids in samples.items()]
            wait_for(
                lambda: (
                    metric(server, "vllm:num_requests_waiting") > 0
                    and metric(server, "vllm:num_requests_running") == 0
                    and metric(server, "vllm:kv_cache_usage_perc") > 0.5
                ),
                "the pool does not fill, or its blocks are not held",
            )
            grown = resident(server) - before
            assert not all(reply.done() for reply in replies), "no request had to wait"
            seen = dict(receive(socket, server, verifier) for _ in samples)
            assert [reply.result()[0] for reply in replies] == [200] * len(samples)
        assert seen == samples
        assert grown < 64 << 20, f"the server grew by {grown} bytes while its receiver did not read"
        assert not socket.poll(200), "something arrived twice"
    finally:
        socket.close(0)
        context.term()
    assert "messages refused" not in server.log.read_text()


def test_bad_tickets_and_absent_receivers_disturb_nobody(server: Server, receiver: "zmq.Socket[bytes]") -> None:
    status, reply = post(server, prompt(9, 1), {"dflash": {"run_id": "r"}})
    assert status == 200
    assert "ticket" in reply["kv_transfer_params"]["dflash_error"]
    assert post(server, prompt(9, 1), params(1, receiver="nobody"))[0] == 200
    assert post(server, prompt(9, 1), None)[0] == 200
    assert post(server, prompt(40, 2), params(7, attempt=3))[0] == 200
    assert receiver.poll(60_000)
    header = messages.decode(receiver.recv_multipart()[0], max_tokens=MAX_LENGTH)
    assert isinstance(header, messages.Header)
    assert header.ticket == messages.Ticket("run-1", "rx-1", 0, 7, 3, layers_of(7), dtype_of(7))


def test_the_server_is_well_afterwards(server: Server) -> None:
    assert get(server.http + "/health")[0] == 200
    # blocks are held until the copy is reported, so their count must come back to nothing
    wait_for(lambda: metric(server, "vllm:kv_cache_usage_perc") == 0.0, "cache blocks are still held")


def test_the_connector_is_imported_by_a_vllm_without_deepspeed() -> None:
    """Where vLLM is, nothing of training's has to be; which modules these are, tests/test_packages.py looks at."""
    program = "import sys, dflash_scale.server.connector; print('deepspeed' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [VLLM_PYTHON, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "False"
