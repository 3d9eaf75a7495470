"""A real vLLM with a small random verifier, for the benchmarks that need one.

It is started by launch/serve_vllm.py and asked over HTTP; its hidden states are received over ZeroMQ.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import zmq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dflash_scale.transport import messages, sockets

SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "serve_vllm.py"


@dataclass(frozen=True, slots=True)
class Sizes:
    vocabulary: int = 160
    hidden: int = 64
    layers: int = 4
    heads: int = 4
    length: int = 256


def write_verifier(folder: Path, sizes: Sizes) -> Path:
    """A random Qwen3 in float32 with a word-level tokenizer, in `folder`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads // 2,
        head_dim=32,
        max_position_embeddings=sizes.length,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(sizes.vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def prompt(length: int, seed: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (length,), generator=generator).tolist()


def free_ports(count: int) -> int:
    """The first of `count` TCP ports side by side on loopback that were free a moment ago."""
    while True:
        with ExitStack() as held:
            first = int(held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])
            try:
                for port in range(first + 1, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except (OSError, OverflowError):  # taken, or above 65535
                continue
            return first


class ServerFailed(RuntimeError):
    """It ended, or did not answer in time; the message is a line of its log."""


@dataclass(frozen=True, slots=True)
class VllmServer:
    model: str
    http: str
    zmq: str
    log: Path
    pid: int = 0

    def cpu_seconds(self) -> float:
        """What its processes have computed so far, all threads."""
        whole = psutil.Process(self.pid)
        times = [process.cpu_times() for process in (whole, *whole.children(recursive=True))]
        return float(sum(time.user + time.system for time in times))

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.http + "/health", timeout=10) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def complete(self, token_ids: Sequence[int], ticket: messages.Ticket | None, max_tokens: int) -> dict[str, Any]:
        """The reply to one greedy completion; raises HTTPError for a refusal."""
        content: dict[str, Any] = {"model": self.model, "prompt": list(token_ids), "max_tokens": max_tokens}
        content |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        if ticket is not None:
            content["kv_transfer_params"] = {"dflash": ticket.to_params()}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.http + "/v1/completions", json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as reply:
            return dict(json.loads(reply.read()))


@contextmanager
def vllm_server(
    model: Path, aux_layers: Sequence[int], python: str, *extra: str, environment: Mapping[str, str] | None = None
) -> Iterator[VllmServer]:
    """A server that answers /health; raises ServerFailed if it does not come up. extra: vLLM's own flags.

    Its zmq has room for the address of a second engine.
    """
    port = free_ports(3)
    log = model.parent / f"{model.name}-{port}.log"
    server = VllmServer(str(model), f"http://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}", log)
    command = [sys.executable, str(SCRIPT), str(model), "--port", str(port), "--zmq", server.zmq]
    command += ["--layer-ids", ",".join(map(str, aux_layers)), "--python", python, "--", "--dtype", "float32", *extra]
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=surroundings, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while not server.healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(reason(log))
            time.sleep(1)
        yield replace(server, pid=process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session that start_new_session made
            process.wait()


def reason(log: Path) -> str:
    """The line of a log that names what ended the server: the first exception, without colours and prefixes.

    Later ones only say that the engine is gone.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    raised = re.findall(r"(?:^|[\])] |\s)([\w.]*(?:Error|Exception): .*|AssertionError)$", text, re.MULTILINE)
    refused = re.findall(r"^(?:dflash-scale serve: .*)$", text, re.MULTILINE)
    return (raised[:1] or refused[-1:] or ["its log names no error"])[0][:300]


@contextmanager
def dealer(server: VllmServer, receiver: str) -> Iterator["zmq.Socket[bytes]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = sockets.connect_dealer(context, server.zmq, receiver, max_message_bytes=1 << 28)
    try:
        yield socket
    finally:
        socket.close(0)
        context.term()
