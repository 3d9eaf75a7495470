"""The shared-memory ring: layout rules in one process, and two real processes that stress and kill each other."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dflash_scale.stream.ring import (
    COMMITTED,
    QUARANTINED,
    PeerDied,
    Ring,
    own_ring_name,
    process_start,
    reclaim,
    record_span,
    ring_name,
)

RUN = f"ringtest{os.getpid()}"


def segments(run: str = RUN) -> list[str]:
    return [entry.name for entry in Path("/dev/shm").iterdir() if entry.name.startswith(f"dflash-{run}")]


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    yield
    assert segments() == []


@pytest.fixture
def pair() -> Iterator[tuple[Ring, Ring]]:
    writer = Ring.create(own_ring_name(RUN, 0), 4096)
    reader = Ring.open(writer.name)
    writer.unlink()
    yield writer, reader
    reader.close()
    writer.close()


def put(ring: Ring, sample: int, payload: bytes) -> bool:
    slot = ring.reserve(len(payload))
    if slot is None:
        return False
    slot[:] = payload
    ring.commit(sample=sample, epoch=3, status=COMMITTED, tokens=len(payload))
    return True


def take(ring: Ring) -> tuple[int, bytes] | None:
    record = ring.peek()
    if record is None:
        return None
    found = record.sample, bytes(record.payload)
    ring.release()
    return found


def test_a_record_comes_out_as_it_went_in(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    assert reader.peek() is None
    assert put(writer, 7, b"hidden states")
    record = reader.peek()
    assert record is not None
    assert (record.sample, record.epoch, record.status, record.tokens) == (7, 3, COMMITTED, 13)
    assert bytes(record.payload) == b"hidden states"
    assert record.payload.readonly
    assert np.frombuffer(record.payload, np.uint8).ctypes.data % 64 == 0
    assert (writer.committed, writer.released) == (1, 0)
    reader.release()
    assert (reader.committed, reader.released) == (1, 1)
    assert reader.peek() is None
    assert writer.free_bytes == writer.capacity


def test_nothing_is_visible_before_the_commit(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    slot = writer.reserve(100)
    assert slot is not None
    slot[:] = b"x" * 100
    assert reader.peek() is None
    writer.abandon()
    assert reader.peek() is None
    assert writer.free_bytes == writer.capacity
    assert put(writer, 1, b"next")
    assert take(reader) == (1, b"next")


def test_an_empty_record_carries_its_status(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    assert writer.reserve(0) is not None
    writer.commit(sample=5, epoch=1, status=QUARANTINED, tokens=0)
    record = reader.peek()
    assert record is not None
    assert (record.sample, record.status, len(record.payload)) == (5, QUARANTINED, 0)
    reader.release()


def test_a_full_ring_gives_none_until_the_reader_releases(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    payload = b"a" * 960  # 1024 with its header: four fill the ring exactly
    assert [put(writer, i, payload) for i in range(5)] == [True] * 4 + [False]
    assert writer.free_bytes == 0
    assert take(reader) == (0, payload)
    assert put(writer, 4, payload)
    assert [take(reader) for _ in range(5)] == [(i, payload) for i in (1, 2, 3, 4)] + [None]


@pytest.mark.parametrize("abandon_share", [0.0, 0.3])
def test_wrap_around_keeps_order_and_bytes(pair: tuple[Ring, Ring], abandon_share: float) -> None:
    writer, reader = pair
    draw = random.Random(1)
    waiting: list[tuple[int, bytes]] = []
    for sample in range(3000):
        payload = draw.randbytes(draw.randint(0, 1800))
        if draw.random() < abandon_share and writer.reserve(len(payload)) is not None:
            writer.abandon()
        while not put(writer, sample, payload):
            assert take(reader) == waiting.pop(0), f"at sample {sample}"
        waiting.append((sample, payload))
    while waiting:
        assert take(reader) == waiting.pop(0)
    assert reader.peek() is None


def test_spans_within_capacity_minus_the_largest_record_always_fit(pair: tuple[Ring, Ring]) -> None:
    """What the receiver relies on: a skip record never takes more than one record's span."""
    writer, reader = pair
    draw = random.Random(2)
    largest = 1000
    spans: list[int] = []
    for sample in range(2000):
        payload = draw.randbytes(draw.randint(0, largest))
        while sum(spans) + record_span(len(payload)) > writer.capacity - record_span(largest):
            assert take(reader) is not None
            spans.pop(0)
        assert put(writer, sample, payload), f"sample {sample} of {len(payload)} bytes behind {spans}"
        spans.append(record_span(len(payload)))
    while take(reader) is not None:
        pass


def test_misuse_is_an_error_that_names_the_ring(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    with pytest.raises(ValueError, match="commit\\(\\) without reserve"):
        writer.commit(sample=0, epoch=0, status=0, tokens=0)
    with pytest.raises(ValueError, match="for the writer"):
        reader.reserve(1)
    with pytest.raises(ValueError, match="for the reader"):
        writer.peek()
    with pytest.raises(ValueError, match="without a peek"):
        reader.release()
    with pytest.raises(ValueError, match="never fits"):
        writer.reserve(4096)
    assert writer.reserve(8) is not None
    with pytest.raises(ValueError, match="before commit"):
        writer.reserve(8)
    writer.abandon()


def test_views_outlive_the_ring() -> None:
    writer = Ring.create(own_ring_name(RUN, 0), 4096)
    reader = Ring.open(writer.name)
    writer.unlink()
    put(writer, 1, b"still here")
    record = reader.peek()
    assert record is not None
    reader.close()
    writer.close()
    assert bytes(record.payload) == b"still here"
    with pytest.raises(ValueError, match="closed"):
        reader.peek()


@pytest.mark.parametrize("name", ["dflash-../etc", "other-name", "dflash-a b", "dflash-" + "x" * 300, ""])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="ring name"):
        Ring.create(name, 4096)


def test_open_refuses_what_is_not_a_ring() -> None:
    path = Path(f"/dev/shm/dflash-{RUN}-odd")
    try:
        with pytest.raises(FileNotFoundError):
            Ring.open(path.name)
        path.write_bytes(b"")
        with pytest.raises(FileNotFoundError, match="being made"):
            Ring.open(path.name)
        path.write_bytes(b"\1" * 12288)
        with pytest.raises(ValueError, match="magic/version"):
            Ring.open(path.name)
    finally:
        path.unlink()


def test_open_refuses_a_truncated_segment() -> None:
    writer = Ring.create(own_ring_name(RUN, 0), 16384)
    os.truncate(f"/dev/shm{writer.name}", 12288)
    with pytest.raises(ValueError, match="capacity 16384"):
        Ring.open(writer.name)
    writer.unlink()


def test_a_ring_has_one_reader_and_a_name_one_owner(pair: tuple[Ring, Ring]) -> None:
    writer = Ring.create(own_ring_name(RUN, 1), 4096)
    try:
        reader = Ring.open(writer.name)
        with pytest.raises(ValueError, match="already has a reader"):
            Ring.open(writer.name)
        with pytest.raises(FileExistsError):
            Ring.create(writer.name, 4096)
        assert reader.peer_alive()
        reader.close()
        assert not writer.peer_alive()
        Ring.open(writer.name)  # a closed reader's place is free
    finally:
        writer.unlink()


def test_too_little_shared_memory_is_refused_with_numbers() -> None:
    with pytest.raises(OSError, match=r"needs .* MiB of shared memory, /dev/shm has .* free of .* --shm-size"):
        Ring.create(own_ring_name(RUN, 0), 1 << 45)


def test_mark_and_beat_cross_over(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    reader.reader_mark = 41
    assert writer.reader_mark == 41
    with pytest.raises(ValueError, match="for the reader"):
        writer.reader_mark = 1
    writer.beat()
    assert reader.writer_beat == 1


WRITER = """
import hashlib, os, random, sys, time
from dflash_scale.stream.ring import Ring, own_ring_name
ring = Ring.create(own_ring_name(sys.argv[1], 0), int(sys.argv[2]))
print(ring.name, flush=True)
draw, records = random.Random(5), int(sys.argv[3])
for sample in range(records):
    payload = draw.randbytes(draw.choice((0, 1, 63, 64, 65, 1000, 30000)))
    while (slot := ring.reserve(len(payload))) is None:
        time.sleep(0)
    half = len(payload) // 2
    slot[:half] = payload[:half]
    if sys.argv[4] == "hang" and sample == records - 1:
        print("half", flush=True)
        time.sleep(60)
    slot[half:] = payload[half:]
    ring.commit(sample=sample, epoch=int.from_bytes(hashlib.sha1(payload).digest()[:4]), status=0, tokens=len(payload))
while ring.free_bytes != ring.capacity:
    time.sleep(0.001)
ring.close()
"""


def start_writer(records: int, ending: str) -> tuple[subprocess.Popen[str], Ring]:
    command = [sys.executable, "-c", WRITER, RUN, str(1 << 17), str(records), ending]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ring = Ring.open(process.stdout.readline().strip())
    ring.unlink()
    return process, ring


def read_to_the_end(ring: Ring) -> int:
    """Reads until the writer is gone; checks the order and every byte. Gives the number of records."""
    seen = 0
    try:
        while (record := ring.next_record(timeout=20)) is not None:
            assert record.sample == seen
            assert len(record.payload) == record.tokens
            assert int.from_bytes(hashlib.sha1(record.payload).digest()[:4]) == record.epoch, f"record {seen}"
            ring.release()
            seen += 1
    except PeerDied:
        return seen
    raise AssertionError(f"no record for 20 s after {seen}")


def test_two_processes_exchange_every_byte() -> None:
    process, ring = start_writer(20_000, "close")
    assert read_to_the_end(ring) == 20_000
    assert process.wait(10) == 0
    ring.close()


def test_a_writer_killed_in_a_reservation_leaves_only_whole_records() -> None:
    process, ring = start_writer(200, "hang")
    assert process.stdout is not None
    seen = 0
    while seen < 199 and (record := ring.next_record(timeout=20)) is not None:
        assert record.sample == seen
        ring.release()
        seen += 1
    assert process.stdout.readline() == "half\n"
    assert ring.next_record(timeout=0.05) is None
    process.send_signal(signal.SIGKILL)
    with pytest.raises(PeerDied, match=f"pid {process.pid}.*after 199 records"):
        ring.next_record(timeout=10)  # the writer is a zombie now: that counts as gone
    process.wait()
    ring.close()


def test_reclaim_takes_the_dead_owners_segments_only() -> None:
    mine = Ring.create(own_ring_name(RUN, 0), 4096)
    command = [sys.executable, "-c", WRITER, RUN, "65536", "1", "hang"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = process.stdout.readline().strip()
    assert theirs == ring_name(RUN, process.pid, 0)
    assert reclaim(f"dflash-{RUN}-") == []
    process.kill()
    process.wait()
    stranger = Path(f"/dev/shm/dflash-{RUN}-not-a-ring")
    stranger.touch()
    reused = Path(f"/dev/shm/dflash-{RUN}-{os.getpid()}-1-0")  # our pid, but of a process that started at boot
    reused.touch()
    assert sorted(reclaim(f"dflash-{RUN}-")) == sorted([theirs, f"/{reused.name}"])
    assert sorted(segments()) == sorted([mine.name[1:], stranger.name])
    stranger.unlink()
    mine.unlink()


def test_process_start_of_nobody_is_none() -> None:
    assert process_start(os.getpid()) is not None
    assert process_start((1 << 22) + 1) is None
    with pytest.raises(ProcessLookupError):
        ring_name(RUN, (1 << 22) + 1, 0)
