"""How many bytes per second go from server processes into a training rank, and how that compares.

    python benchmarks/bench_stream.py [--sample-mib 1 16 200] [--senders 1 2 4] [--json FILE]

tcp      sender processes (the real HTTP face and Publisher, hidden states made once), ZeroMQ, the real receiver loop in
         a process of its own (header checks, token ids, checksum, ring), read here: every byte is copied out of the
         ring into a buffer
ipc      the same through Unix sockets
keys     the same through TCP, encrypted with CURVE
fp8      the same through TCP in the short form: each sender converts every sample, and it is converted back here, into
         the buffer. Bytes count as the verifier has them, twice what travels. A server with a GPU converts there
files    writer processes save the same payloads as safetensors in /dev/shm and rename them; they are loaded here,
         copied into the same buffer and deleted; at most as many files exist as the stream has samples in flight.
         It has no request, no checksum and no polling delay in it
memcpy   one copy of a payload from memory to memory, in one thread: the upper bound of anything that copies once
xxh3     the checksum alone, in one thread: the stream computes it twice, at both ends

Copies of a byte on its way, by the stream: sender's memory to the kernel, kernel to ZeroMQ's message, message to the
ring, ring to the buffer; and by the file: memory to the file, file to an array, array to the buffer.
All of it runs on one machine, so the processes share its cores; the number of cores stands in the result.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import xxhash
import zmq
from safetensors import safe_open
from safetensors.numpy import save_file

from dflash_scale.config_stream import Server, StreamSection
from dflash_scale.packer import Place, Row, Samples
from dflash_scale.quarantine import QuarantineFile
from dflash_scale.stream.delivery import Delivery
from dflash_scale.stream.embedded_http import CompletionServer, Reply, Request
from dflash_scale.stream.embedded_http import Limits as RequestLimits
from dflash_scale.stream.encoding import decode, encode
from dflash_scale.stream.endpoints import Endpoints
from dflash_scale.stream.greetings import Identity
from dflash_scale.stream.intake import Intake
from dflash_scale.stream.jobs import Limits
from dflash_scale.stream.keys import make_keys, receiver_keys, server_keys
from dflash_scale.stream.layouts import RowLayouts
from dflash_scale.stream.links import keep_freed_memory
from dflash_scale.stream.publisher import Publisher
from dflash_scale.stream.questions import SampleQuestions
from dflash_scale.stream.ring import PeerDied, Ring, own_ring_name, record_span
from dflash_scale.stream.window import Window
from dflash_scale.stream.wire import FP8, Layout, Origin

LAYOUT: Final = Layout((2, 9, 17, 25, 33, 36), 4096, "bfloat16")  # an 8B verifier: 48 KiB per token
RUN: Final = f"bench{os.getpid()}"
WARM: Final = 8  # records before the clock starts: first touches, first connections
IN_FLIGHT: Final = 12  # samples, both ways
WAYS: Final = ("tcp", "ipc", "keys", "fp8")  # of the stream
LEAST_OF_FILES: Final = {"tcp": 1.5, "ipc": 2.0}  # the targets, on two cores

Bytes = npt.NDArray[np.uint8]
spawn = get_context("spawn")


@dataclass(frozen=True)
class Size:
    """How much is sent, and by how many processes."""

    tokens: int
    samples: int
    senders: int
    dtype: str = LAYOUT.dtype  # that travels

    @property
    def layout(self) -> Layout:
        return LAYOUT.only(LAYOUT.layer_ids, self.dtype)

    @property
    def nbytes(self) -> int:
        """Of a sample as the verifier has it."""
        return self.tokens * LAYOUT.bytes_per_token

    @property
    def sent_bytes(self) -> int:
        return self.tokens * self.layout.bytes_per_token


class OneLength:
    """A split of equal samples; the token ids name the sample."""

    def __init__(self, size: Size, count: int) -> None:
        self._size = size
        self.lengths = np.full(count, size.tokens, np.int32)

    def tokens(self, index: int) -> npt.NDArray[np.int32]:
        return np.full(self._size.tokens, index, np.int32)

    def loss_mask(self, index: int) -> npt.NDArray[np.bool_]:
        return np.ones(self._size.tokens, bool)


def payload(size: Size) -> Bytes:
    """(bytes,) a sample as the verifier has it."""
    generator = torch.Generator().manual_seed(0)
    states = torch.empty(size.nbytes // 2, dtype=torch.bfloat16).normal_(generator=generator)
    return states.view(torch.uint8).numpy()


def send(size: Size, address: str, keys: Path | None, pipe: Connection) -> None:
    """A server without a model."""
    torch.set_num_threads(1)
    states = payload(size)
    tensor = torch.from_numpy(states).view(torch.bfloat16).view(size.tokens, len(LAYOUT.layer_ids), -1)
    publisher = Publisher(address, LAYOUT, "bench", keys=server_keys(keys) if keys is not None else None)

    def submit(request: Request) -> "Future[Reply]":
        assert request.ticket is not None
        raw = states if size.dtype == LAYOUT.dtype else encode(tensor, size.dtype).numpy().reshape(-1)
        publisher.send(request.ticket, np.asarray(request.token_ids, "<i4").tobytes(), raw.data)
        done: Future[Reply] = Future()
        done.set_result(Reply([0], "length"))
        return done

    server = CompletionServer("127.0.0.1:0", "bench", RequestLimits(1 << 20, 1 << 20, LAYOUT), submit)
    pipe.send((server.url, publisher.endpoint))
    pipe.recv()
    server.close()
    publisher.close()


def receive(size: Size, servers: list[tuple[str, str]], keys: Path | None, pipe: Connection) -> None:
    """The receiver process without its command line."""
    keep_freed_memory()
    ring = Ring.create(own_ring_name(RUN, 0), IN_FLIGHT * record_span(size.sent_bytes))
    pipe.send(ring.name)
    samples = Samples(OneLength(size, size.samples), OneLength(size, 0))
    rows = iter([Row("train", 0, 1 + i, 0, (Place(i, 0, size.tokens),)) for i in range(size.samples)])
    window = Window(ring, rows, samples.lengths, RowLayouts(size.layout, size.layout), lookahead=IN_FLIGHT)
    credit = IN_FLIGHT * size.sent_bytes
    limits = Limits(credit, credit, 16, 30.0, 3, 1.0, 30.0)
    pair = receiver_keys(keys) if keys is not None else None
    identity = Identity(RUN, f"{RUN}:0", LAYOUT, Origin(), pair)
    fleet = Endpoints(StreamSection(servers=tuple(Server(http=http, zmq=address) for http, address in servers)))
    quarantine = QuarantineFile(Path(RUN) / "absent", "")  # a sample that is quarantined fails the benchmark
    intake = Intake(fleet, limits, identity, Delivery([window]), SampleQuestions(samples), quarantine)
    while not intake.delivery.complete:
        intake.step()
    pipe.send(intake.status())
    pipe.recv()
    ring.close()
    intake.close()


def rate(size: Size, started: float) -> float:
    return (size.samples - WARM) * size.nbytes / (time.perf_counter() - started)


def bench_stream(size: Size, way: str, buffer: Bytes) -> float:
    """Bytes per second from the senders' memory into `buffer`."""
    if way == "fp8":
        size = replace(size, dtype=FP8)
    with tempfile.TemporaryDirectory(prefix="dflash-bench-") as folder:
        keys = Path(folder) / "keys" if way == "keys" else None
        if keys is not None:
            make_keys(keys)
        addresses = [f"ipc://{folder}/{i}" if way == "ipc" else "tcp://127.0.0.1:0" for i in range(size.senders)]
        return transfer(size, addresses, keys, buffer)


def transfer(size: Size, addresses: list[str], keys: Path | None, buffer: Bytes) -> float:
    pipes = [spawn.Pipe() for _ in range(size.senders + 1)]
    processes = [
        spawn.Process(target=send, args=(size, address, keys, theirs))
        for address, (_, theirs) in zip(addresses, pipes[:-1], strict=True)
    ]
    for process in processes:
        process.start()
    servers = [mine.recv() for mine, _ in pipes[:-1]]
    mine, theirs = pipes[-1]
    processes.append(spawn.Process(target=receive, args=(size, servers, keys, theirs)))
    processes[-1].start()
    started, seen = 0.0, 0
    with Ring.open(mine.recv()) as ring:
        while seen < size.samples:
            record = ring.next_record(timeout=30)
            if record is None:
                raise PeerDied(f"nothing came for 30 s after {seen} samples")
            take(size, record.payload, buffer)
            ring.release()
            seen += 1
            ring.reader_mark = seen
            if seen == WARM:
                started = time.perf_counter()
        result = rate(size, started)
        status = mine.recv()
        assert status["committed"] == size.samples, status
        assert status["retried"] == 0, status
    for end, _ in pipes:
        end.send("stop")
    for process in processes:
        process.join()
    return result


def take(size: Size, record: memoryview, buffer: Bytes) -> None:
    """A record's hidden states into `buffer`, as the verifier had them."""
    raw = np.frombuffer(record, np.uint8)
    if size.dtype == LAYOUT.dtype:
        np.copyto(buffer, raw)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
            rows = torch.from_numpy(raw).view(size.tokens, -1)
        torch.from_numpy(buffer).view(torch.bfloat16).copy_(decode(rows, size.layout).flatten())


def write_files(size: Size, folder: str, first: int, room: Any, names: Any) -> None:
    states: dict[str, npt.NDArray[Any]] = {
        "hidden_states": payload(size).reshape(size.tokens, -1),
        "token_ids": np.arange(size.tokens, dtype=np.int32),
    }
    for sample in range(first, size.samples, size.senders):
        room.acquire()
        aside, path = f"{folder}/.{sample}", f"{folder}/{sample}.safetensors"
        save_file(states, aside)
        os.rename(aside, path)
        names.put(path)


def bench_files(size: Size, buffer: Bytes) -> float:
    """Bytes per second by way of safetensors files in shared memory."""
    folder = tempfile.mkdtemp(prefix="dflash-bench-", dir="/dev/shm")
    try:
        room, names = spawn.Semaphore(IN_FLIGHT), spawn.SimpleQueue()
        processes = [
            spawn.Process(target=write_files, args=(size, folder, first, room, names)) for first in range(size.senders)
        ]
        for process in processes:
            process.start()
        started = 0.0
        for seen in range(size.samples):
            if seen == WARM:
                started = time.perf_counter()
            path = names.get()
            with safe_open(path, "numpy") as file:
                np.copyto(buffer, file.get_tensor("hidden_states").reshape(-1))
            os.unlink(path)
            room.release()
        result = rate(size, started)
        for process in processes:
            process.join()
        return result
    finally:
        shutil.rmtree(folder)


def repeat(size: Size, work: Callable[[], object], seconds: float = 1.0) -> float:
    """Bytes per second of something that goes through one payload."""
    work()
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        work()
        rounds += 1
    return rounds * size.nbytes / (time.perf_counter() - started)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def measure(size: Size, rounds: int) -> dict[str, list[float]]:
    """Bytes per second of every way, each round; the ways take turns, so that a busy moment meets all of them."""
    source, buffer = payload(size), np.zeros(size.nbytes, np.uint8)
    rates: dict[str, list[float]] = {
        "memcpy": [repeat(size, lambda: np.copyto(buffer, source))],
        "xxh3": [repeat(size, lambda: xxhash.xxh3_64_intdigest(source.data))],
        **{way: [] for way in (*WAYS, "files")},
    }
    for _ in range(rounds):
        for way in WAYS:
            rates[way].append(bench_stream(size, way, buffer))
        rates["files"].append(bench_files(size, buffer))
    return rates


def show(size: Size, rates: dict[str, list[float]]) -> None:
    best = {way: max(found) for way, found in rates.items()}
    print(f"\n{size.senders} senders, {size.samples} samples of {size.nbytes / 2**20:.1f} MiB")
    print(f"{'':8}{'GB/s':>8}{'of files':>10}{'of memcpy':>11}   target, of files; all rounds, GB/s")
    for way, value in best.items():
        each = " ".join(f"{found / 1e9:.2f}" for found in rates[way])
        target = f"{LEAST_OF_FILES[way]:.1f}" if way in LEAST_OF_FILES else ""
        print(
            f"{way:8}{value / 1e9:8.2f}{value / best['files']:10.2f}{value / best['memcpy']:11.2f}   {target:4} {each}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample-mib", type=float, nargs="+", default=[16.0])
    parser.add_argument("--senders", type=int, nargs="+", default=[2])
    parser.add_argument("--gigabytes", type=float, default=1.6, help="per round, as samples; at least 32 of them")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways in turn; the best of each counts")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    load = os.getloadavg()[0]  # above 0, the figures are those of a machine that others use as well
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {cpu_name()}")
    cases = []
    for mib in args.sample_mib:
        tokens = max(1, round(mib * 2**20 / LAYOUT.bytes_per_token))
        samples = max(4 * WARM, round(args.gigabytes * 1e9 / (tokens * LAYOUT.bytes_per_token)))
        for senders in args.senders:
            size = Size(tokens, samples, senders)
            rates = measure(size, args.rounds)
            show(size, rates)
            rounded = {way: [round(found) for found in each] for way, each in rates.items()}
            cases.append({"sample_bytes": size.nbytes, "samples": samples, "senders": senders, "bytes_per_s": rounded})
    if args.json:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpu": cpu_name(),
            "cores": cores,
            "load_average_before": load,
            "kernel": platform.release(),
            "python": platform.python_version(),
            "libzmq": zmq.zmq_version(),
            "versions": {
                name: version(name) for name in ("pyzmq", "numpy", "torch", "safetensors", "xxhash", "msgpack")
            },
            "cases": cases,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
