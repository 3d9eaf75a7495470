"""A whole run in small: a tiny verifier, a data set, embedded servers, and the real launcher."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dflash_scale.data.dataset import load_prepared
from dflash_scale.data.prepare import prepare
from dflash_scale.receiver.status import read_status
from dflash_scale.server.process import end_with_parent, free_port
from dflash_scale.transport.ring import reclaim

REPO = Path(__file__).resolve().parents[2]
BINARIES = Path(sys.executable).parent
VOCAB, LAYERS, AUX_LAYERS = 128, 4, (1, 2)
TIMES = ("tokens_per_s", "samples_per_s", "wait_data", "seconds", "servers")


def tiny_verifier(folder: Path) -> Path:
    """A random Qwen3 verifier with a word-level tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB - 2)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", mask_token="<mask>").save_pretrained(folder)
    return folder


def random_data(folder: Path, verifier: Path, conversations: int) -> Path:
    """Random conversations, prepared; lengths differ."""
    rng = np.random.default_rng(1)
    lines = []
    for _ in range(conversations):
        prompt, answer = rng.integers(1, VOCAB - 3, rng.integers(3, 9)), rng.integers(1, VOCAB - 3, rng.integers(8, 40))
        lines.append(json.dumps({"prompt_ids": prompt.tolist(), "answer_ids": answer.tolist()}))
    source = folder / "conversations.jsonl"
    source.write_text("\n".join(lines))
    prepare([source], str(verifier), folder / "data", validation_fraction=0.05)
    return folder / "data"


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


@dataclass
class Embedded:
    """One embedded server, started and ended by its pid; at `host`, with the words of `prefix` before its command and
    those of `flags` behind it."""

    verifier: Path
    http: int = field(default_factory=free_port)
    zmq: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None
    host: str = "127.0.0.1"
    prefix: Sequence[str] = ()
    flags: Sequence[str] = ()

    @property
    def address(self) -> dict[str, str]:
        """Its entry in stream.servers."""
        return {"http": f"http://{self.host}:{self.http}", "zmq": f"tcp://{self.host}:{self.zmq}"}

    def start(self) -> None:
        layer_ids = ",".join(map(str, AUX_LAYERS))
        command = [
            *self.prefix,
            sys.executable,
            "-m",
            "dflash_scale.commands.cli",
            "serve",
            "--embedded",
            "--model",
            str(self.verifier),
        ]
        command += ["--http", f"{self.host}:{self.http}", "--zmq", self.address["zmq"], "--layer-ids", layer_ids]
        self.process = subprocess.Popen([*command, *self.flags], cwd=REPO, preexec_fn=end_with_parent)

    def healthy(self) -> bool:
        assert self.process is None or self.process.poll() is None, "an embedded server ended at its start"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/health", timeout=1) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def embedded_fleet(verifier: Path) -> Iterator[list[Embedded]]:
    """Two servers that answer; killed in the end."""
    fleet = [Embedded(verifier) for _ in range(2)]
    try:
        for server in fleet:
            server.start()
        for server in fleet:
            wait_for(server.healthy, 60, "an embedded server")
        yield fleet
    finally:
        for server in fleet:
            server.kill()


@dataclass
class Run:
    """One run of launch/train.py under the deepspeed launcher; `launch` may be called again to resume it."""

    folder: Path
    config: dict[str, Any]
    process: "subprocess.Popen[bytes] | None" = None

    def launch(self, *flags: str, ranks: int = 2) -> None:
        command = [str(BINARIES / "deepspeed"), f"--num_accelerators={ranks}", f"--master_port={free_port()}"]
        self.process = self.start([*command, str(REPO / "launch" / "train.py")], *flags)

    def start(self, launcher: list[str], *flags: str, log: str = "log.txt") -> "subprocess.Popen[bytes]":
        """Starts a launcher with this run's configuration; its output goes to a file in the run's folder."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / "run.json"
        path.write_text(json.dumps(self.config))
        command = [*launcher, "--config", str(path), *flags]
        environment = {**os.environ, "PATH": f"{BINARIES}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=REPO)

    def wait(self, seconds: float = 240) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def step(self) -> int:
        """The last step in rank 0's ledger."""
        path = self.folder / "out" / "ledger" / "rank-0.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def blocked_on(self) -> str:
        """What the receiver waits for."""
        paths = sorted((self.folder / "out" / "stream").glob("*-rank0.json"), key=lambda path: path.stat().st_mtime)
        status = read_status(paths[-1]) if paths else None
        return status.blocked_on if status is not None else ""

    def processes(self) -> list[psutil.Process]:
        """All processes of this run: they have its folder in their command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any(str(self.folder) in word for word in words):
                found.append(process)
        return found

    def pid_of(self, word: str, rank: int | None = None) -> int:
        """The one process of this run with `word` in its command line (and this local rank)."""
        matches = [
            p
            for p in self.processes()
            if any(word in w for w in p.cmdline())
            and (rank is None or f"--local_rank={rank}" in p.cmdline())
            and not any("deepspeed" in w for w in p.cmdline())
        ]
        assert len(matches) == 1, (word, rank, [p.cmdline() for p in matches])
        return matches[0].pid

    def trained(self) -> dict[int, Counter[int]]:
        """epoch -> how often each sample was trained, from the ledgers of all ranks."""
        epochs: dict[int, Counter[int]] = {}
        for path in sorted((self.folder / "out" / "ledger").glob("rank-*.jsonl")):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                epochs.setdefault(entry["epoch"], Counter()).update(entry["samples"])
        return epochs

    def assert_nothing_left(self, seconds: float = 90) -> None:
        """No process of the run, and no shared memory once the next start has reclaimed what a kill left."""
        wait_for(lambda: not self.processes(), seconds, f"end of {[p.cmdline() for p in self.processes()]}")
        reclaim()
        statuses = (self.folder / "out" / "stream").glob("*-rank0.json")
        rings = {name for path in statuses for name in read_status(path).rings}
        assert rings and not rings & set(os.listdir("/dev/shm"))

    def assert_every_sample_once_an_epoch(self) -> None:
        samples = len(load_prepared(self.config["data"]["path"]).train)
        wanted = {epoch: Counter(range(samples)) for epoch in range(self.config["train"]["epochs"])}
        assert self.trained() == wanted


def run_config(verifier: Path, data: Path, servers: list[Embedded], folder: Path, **train: Any) -> dict[str, Any]:
    """Two aux layers, small rows, two ranks, ZeRO-2 on the CPU."""
    return {
        "verifier": {"model": str(verifier), "layer_ids": list(AUX_LAYERS)},
        "drafter": {"layers": 1, "block_size": 4},
        "data": {"path": str(data), "row_tokens": 128, "anchors_per_document": 8},
        "stream": {
            "servers": [server.address for server in servers],
            "ring_bytes": 1 << 20,
            "credit_bytes": 1 << 20,
            "server_credit_bytes": 1 << 19,
            "request_timeout_s": 20.0,
            "probe_s": 0.5,
            "no_server_timeout_s": 60.0,
        },
        "train": {
            "output_dir": str(folder / "out"),
            "epochs": 3,
            "rows_per_step": 2,
            "precision": "fp32",
            "checkpoint_every": 10,
            "validate_every": 40,
            "log_every": 5,
            **train,
        },
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }


def losses(run: Run) -> list[dict[str, Any]]:
    """All that was measured, without the times and how the servers did."""
    lines = (run.folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def train(run: Run) -> list[dict[str, Any]]:
    try:
        run.launch(ranks=1)
        assert run.wait() == 0, run.log[-6000:]
    finally:
        for process in run.processes():
            process.kill()
    run.assert_every_sample_once_an_epoch()
    return losses(run)
