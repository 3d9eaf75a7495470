"""How many bytes per second go from server processes into a training rank, and how that compares.

    python benchmarks/bench_stream.py [--sample-mib 1 16 200] [--senders 1 2 4] [--json FILE]

tcp      sender processes (the real HTTP face and Sender, hidden states made once), ZeroMQ, the real receiver loop in
         a process of its own (header checks, token ids, checksum, ring), read here: every byte is copied out of the
         ring into a buffer
ipc      the same through Unix sockets
keys     the same through TCP, encrypted with CURVE
fp8      the same through TCP in the short form: each sender converts every sample, and it is converted back here, into
         the buffer. Bytes count as the verifier has them, twice what travels. A server with a GPU converts there
files    writer processes save the same payloads as safetensors in /dev/shm and rename them; they are loaded here,
         copied into the same buffer and deleted; at most as many files exist as the stream has samples in flight.
         It has no request, no checksum and no polling delay in it
latency  of tcp: from the receiver's HTTP request for a sample to the record in the rank's hands, with one sample on its
         way at a time (alone) and with as many as in the measurement of the rate (loaded: most of it is queueing)
memcpy   one copy of a payload from memory to memory, in one thread: the upper bound of anything that copies once
xxh3     the checksum alone, in one thread: the stream computes it twice, at both ends

Copies of a byte on its way, by the stream: sender's memory to the kernel, kernel to ZeroMQ's message, message to the
ring, ring to the buffer; and by the file: memory to the file, file to an array, array to the buffer.
All of it runs on one machine, so the processes share its cores; the number of cores stands in the result.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
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

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:  # started as a script
    sys.path.insert(0, str(REPO))

from benchmarks.machine import stamp  # noqa: E402
from dflash_scale.config.stream import ServerAddress, StreamSection  # noqa: E402
from dflash_scale.data.dataset import Samples  # noqa: E402
from dflash_scale.data.quarantine import QuarantineFile  # noqa: E402
from dflash_scale.data.schedule import Place, Row  # noqa: E402
from dflash_scale.fleet.state import Limits  # noqa: E402
from dflash_scale.receiver.connections import Identity  # noqa: E402
from dflash_scale.receiver.endpoints import Endpoints  # noqa: E402
from dflash_scale.receiver.layouts import RowLayouts  # noqa: E402
from dflash_scale.receiver.loop import ReceiverLoop  # noqa: E402
from dflash_scale.receiver.prefetch import Prefetch  # noqa: E402
from dflash_scale.receiver.process import keep_freed_memory  # noqa: E402
from dflash_scale.receiver.requests import SampleRequests  # noqa: E402
from dflash_scale.receiver.ring_sink import RingSink  # noqa: E402
from dflash_scale.receiver.status import Status  # noqa: E402
from dflash_scale.server.completions import CompletionServer, Reply, Request, RequestLimits  # noqa: E402
from dflash_scale.server.sender import Offer, Sender  # noqa: E402
from dflash_scale.transport.encoding import decode, encode  # noqa: E402
from dflash_scale.transport.keys import make_keys, receiver_keys, server_keys  # noqa: E402
from dflash_scale.transport.layout import FP8, Layout  # noqa: E402
from dflash_scale.transport.messages import Origin  # noqa: E402
from dflash_scale.transport.ring import PeerDied, Ring, own_ring_name, record_span  # noqa: E402

LAYOUT: Final = Layout((2, 9, 17, 25, 33, 36), 4096, "bfloat16")  # an 8B verifier: 48 KiB per token
RUN: Final = f"bench{os.getpid()}"
WARM: Final = 8  # records before the clock starts: first touches, first connections
IN_FLIGHT: Final = 12  # samples, both ways
ALONE: Final = 64  # samples, one at a time
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
    in_flight: int = IN_FLIGHT  # samples

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


class BenchRequests(SampleRequests):
    """When the receiver asked for each sample, in seconds of the clock that all processes share."""

    def __init__(self, size: Size) -> None:
        super().__init__(Samples(OneLength(size, size.samples), OneLength(size, 0)))
        self.at: dict[int, float] = {}

    def body(self, sample: int) -> dict[str, Any]:
        self.at[sample] = time.monotonic()
        return super().body(sample)


@dataclass(frozen=True)
class Transfer:
    """Of the samples after the first WARM."""

    rate: float  # bytes per second
    latencies: npt.NDArray[np.float64]  # seconds


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
    sender = Sender(address, Offer(LAYOUT, "bench"), keys=server_keys(keys) if keys is not None else None)

    def submit(request: Request) -> "Future[Reply]":
        assert request.ticket is not None
        raw = states if size.dtype == LAYOUT.dtype else encode(tensor, size.dtype).numpy().reshape(-1)
        sender.send(request.ticket, np.asarray(request.token_ids, "<i4").tobytes(), raw.data)
        done: Future[Reply] = Future()
        done.set_result(Reply([0], "length"))
        return done

    server = CompletionServer("127.0.0.1:0", "bench", RequestLimits(1 << 20, 1 << 20, LAYOUT), submit)
    pipe.send((server.url, sender.endpoint))
    pipe.recv()
    server.close()
    sender.close()


def receive(size: Size, servers: list[tuple[str, str]], keys: Path | None, pipe: Connection) -> None:
    """The receiver process without its command line."""
    keep_freed_memory()
    ring = Ring.create(own_ring_name(RUN, 0), (1 + size.in_flight) * record_span(size.sent_bytes))
    pipe.send(ring.name)
    requests = BenchRequests(size)
    rows = iter([Row("train", 0, 1 + i, 0, (Place(i, 0, size.tokens),)) for i in range(size.samples)])
    prefetch = Prefetch(ring, rows, requests.lengths, RowLayouts(size.layout, size.layout), lookahead=size.in_flight)
    credit = size.in_flight * size.sent_bytes
    limits = Limits(credit, credit, 16, 30.0, 3, 1.0, 30.0)
    pair = receiver_keys(keys) if keys is not None else None
    identity = Identity(RUN, f"{RUN}:0", LAYOUT, Origin(), pair)
    fleet = Endpoints(StreamSection(servers=tuple(ServerAddress(http=http, zmq=address) for http, address in servers)))
    quarantine = QuarantineFile(Path(RUN) / "absent", "")  # a sample that is quarantined fails the benchmark
    sink = RingSink([prefetch])
    loop = ReceiverLoop(fleet, limits, identity, sink, requests, quarantine)
    while not sink.complete:
        loop.step()
    status = Status("complete", os.getpid(), [ring.name])
    loop.report(status)
    sink.report(status)
    pipe.send((status, requests.at))
    pipe.recv()
    ring.close()
    loop.close()


def rate(size: Size, started: float) -> float:
    return (size.samples - WARM) * size.nbytes / (time.perf_counter() - started)


def bench_stream(size: Size, way: str, buffer: Bytes) -> Transfer:
    """From the senders' memory into `buffer`."""
    if way == "fp8":
        size = replace(size, dtype=FP8)
    with tempfile.TemporaryDirectory(prefix="dflash-bench-") as folder:
        keys = Path(folder) / "keys" if way == "keys" else None
        if keys is not None:
            make_keys(keys)
        addresses = [f"ipc://{folder}/{i}" if way == "ipc" else "tcp://127.0.0.1:0" for i in range(size.senders)]
        return transfer(size, addresses, keys, buffer)


def transfer(size: Size, addresses: list[str], keys: Path | None, buffer: Bytes) -> Transfer:
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
    started, seen, came = 0.0, 0, {}
    with Ring.open(mine.recv()) as ring:
        while seen < size.samples:
            record = ring.next_record(timeout=30)
            if record is None:
                raise PeerDied(f"nothing came for 30 s after {seen} samples")
            came[record.sample] = time.monotonic()
            take(size, record.payload, buffer)
            ring.release()
            seen += 1
            ring.reader_mark = seen
            if seen == WARM:
                started = time.perf_counter()
        result = rate(size, started)
        status, asked = mine.recv()
        assert status.committed == size.samples, status
        assert status.retried == 0, status
    for end, _ in pipes:
        end.send("stop")
    for process in processes:
        process.join()
    return Transfer(result, np.array([came[sample] - at for sample, at in asked.items() if sample >= WARM]))


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


@dataclass(frozen=True)
class Measured:
    """Of one size: bytes per second of every way in every round, and the latency of tcp in milliseconds."""

    rates: dict[str, list[float]]
    latency: dict[str, dict[str, float]]


def measure(size: Size, rounds: int) -> Measured:
    """The ways take turns, so that a busy moment meets all of them."""
    source, buffer = payload(size), np.zeros(size.nbytes, np.uint8)
    rates: dict[str, list[float]] = {
        "memcpy": [repeat(size, lambda: np.copyto(buffer, source))],
        "xxh3": [repeat(size, lambda: xxhash.xxh3_64_intdigest(source.data))],
        **{way: [] for way in (*WAYS, "files")},
    }
    loaded = []
    for _ in range(rounds):
        for way in WAYS:
            transfer = bench_stream(size, way, buffer)
            rates[way].append(transfer.rate)
            if way == "tcp":
                loaded.append(transfer.latencies)
        rates["files"].append(bench_files(size, buffer))
    alone = bench_stream(replace(size, samples=ALONE, in_flight=1), "tcp", buffer)
    return Measured(rates, {"alone": percentiles(alone.latencies), "loaded": percentiles(np.concatenate(loaded))})


def percentiles(seconds: npt.NDArray[np.float64]) -> dict[str, float]:
    """In milliseconds."""
    return {f"p{p}_ms": round(float(np.percentile(seconds, p)) * 1e3, 2) for p in (50, 99)}


def show(size: Size, measured: Measured) -> None:
    best = {way: max(found) for way, found in measured.rates.items()}
    print(f"\n{size.senders} senders, {size.samples} samples of {size.nbytes / 2**20:.1f} MiB")
    print(f"{'':8}{'GB/s':>8}{'of files':>10}{'of memcpy':>11}   target, of files; all rounds, GB/s")
    for way, value in best.items():
        each = " ".join(f"{found / 1e9:.2f}" for found in measured.rates[way])
        target = f"{LEAST_OF_FILES[way]:.1f}" if way in LEAST_OF_FILES else ""
        print(
            f"{way:8}{value / 1e9:8.2f}{value / best['files']:10.2f}{value / best['memcpy']:11.2f}   {target:4} {each}"
        )
    for how, found in measured.latency.items():
        print(f"latency of tcp, {how:6} " + ", ".join(f"{name} {value}" for name, value in found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample-mib", type=float, nargs="+", default=[16.0])
    parser.add_argument("--senders", type=int, nargs="+", default=[2])
    parser.add_argument("--gigabytes", type=float, default=1.6, help="per round, as samples; at least 32 of them")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways in turn; the best of each counts")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    machine = stamp(("pyzmq", "numpy", "safetensors", "xxhash", "msgpack"))
    print(f"{machine['cores']} cores, {machine['device']}")
    cases = []
    for mib in args.sample_mib:
        tokens = max(1, round(mib * 2**20 / LAYOUT.bytes_per_token))
        samples = max(4 * WARM, round(args.gigabytes * 1e9 / (tokens * LAYOUT.bytes_per_token)))
        for senders in args.senders:
            size = Size(tokens, samples, senders)
            measured = measure(size, args.rounds)
            show(size, measured)
            case = {"sample_bytes": size.nbytes, "samples": samples, "senders": senders}
            rounded = {way: [round(found) for found in each] for way, each in measured.rates.items()}
            cases.append({**case, "bytes_per_s": rounded, "tcp_latency": measured.latency})
    if args.json:
        result = {**machine, "libzmq": zmq.zmq_version(), "cases": cases}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
