"""The shared-memory ring: layout rules in one process, and two real processes that stress and kill each other."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dflash_scale.transport import ring as ring_module
from dflash_scale.transport.ring import COMMITTED, QUARANTINED, PeerDied, PeerStuck, Ring, own_ring_name, record_span

RUN = f"ringtest{os.getpid()}"


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    yield
    assert [entry.name for entry in Path("/dev/shm").iterdir() if entry.name.startswith(f"dflash-{RUN}")] == []


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
    record = ring.read()
    if record is None:
        return None
    found = record.sample, bytes(record.payload)
    ring.release()
    return found


def test_a_record_comes_out_as_it_went_in(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    assert reader.read() is None
    assert put(writer, 7, b"hidden states")
    record = reader.read()
    assert record is not None
    assert (record.sample, record.epoch, record.status, record.tokens) == (7, 3, COMMITTED, 13)
    assert bytes(record.payload) == b"hidden states"
    assert record.payload.readonly
    assert np.frombuffer(record.payload, np.uint8).ctypes.data % 64 == 0
    assert writer.released == 0
    reader.release()
    assert (writer.released, reader.released) == (1, 1)
    assert reader.read() is None


def test_nothing_is_visible_before_the_commit(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    slot = writer.reserve(100)
    assert slot is not None
    slot[:] = b"x" * 100
    assert reader.read() is None
    writer.abandon()
    assert reader.read() is None
    halves = [bytes([sample]) * (writer.capacity // 2 - 64) for sample in range(2)]
    assert [put(writer, sample, half) for sample, half in enumerate(halves)] == [True] * 2, "all of it is free again"
    assert [take(reader), take(reader)] == list(enumerate(halves))


def test_an_empty_record_carries_its_status(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    assert writer.reserve(0) is not None
    writer.commit(sample=5, epoch=1, status=QUARANTINED, tokens=0)
    record = reader.read()
    assert record is not None
    assert (record.sample, record.status, len(record.payload)) == (5, QUARANTINED, 0)
    reader.release()


def test_a_full_ring_gives_none_until_the_reader_releases(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    payload = b"a" * 960  # 1024 with its header: four fill the ring exactly
    assert [put(writer, i, payload) for i in range(5)] == [True] * 4 + [False]
    assert take(reader) == (0, payload)
    assert put(writer, 4, payload)
    assert [take(reader) for _ in range(5)] == [(i, payload) for i in (1, 2, 3, 4)] + [None]


def test_a_reader_holds_several_records_and_releases_the_oldest(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    payloads = [bytes([sample]) * 960 for sample in range(5)]  # 1024 with its header: four fill the ring exactly
    assert [put(writer, sample, payload) for sample, payload in enumerate(payloads)] == [True] * 4 + [False]
    held = [reader.read() for _ in range(5)]
    assert [record and record.sample for record in held] == [0, 1, 2, 3, None]
    assert writer.released == 0
    for released in range(1, 4):
        reader.release()
        assert writer.released == released
    assert [put(writer, 4, payloads[4]) for _ in range(4)] == [True] * 3 + [False]
    assert held[3] is not None and bytes(held[3].payload) == payloads[3], "what is held is not overwritten"
    assert [reader.read() is not None for _ in range(4)] == [True] * 3 + [False]
    for _ in range(4):
        reader.release()
    assert writer.released == 7
    with pytest.raises(ValueError, match="without a record"):
        reader.release()


def test_all_payloads_lie_in_the_records_memory(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    memory = reader.records()
    assert (len(memory), memory.readonly) == (writer.capacity, False)
    assert np.frombuffer(memory, np.uint8).ctypes.data % 4096 == 0, "pages are locked whole"
    for sample in range(20):
        payload = random.Random(sample).randbytes(700)
        assert put(writer, sample, payload)
        record = reader.read()
        assert record is not None
        assert bytes(memory[record.offset : record.offset + 700]) == payload
        reader.release()
    with pytest.raises(ValueError, match="for the reader"):
        writer.records()
    assert put(writer, 20, b"mapped as long as the view is held")
    record = reader.read()
    assert record is not None
    offset = record.offset
    del record
    reader.close()
    writer.close()
    assert bytes(memory[offset : offset + 6]) == b"mapped"


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
    assert reader.read() is None


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
        writer.read()
    with pytest.raises(ValueError, match="without a record"):
        reader.release()
    with pytest.raises(ValueError, match="never fits into half of"):
        writer.reserve(2048 - 63)
    assert writer.reserve(8) is not None
    with pytest.raises(ValueError, match="before commit"):
        writer.reserve(8)
    writer.abandon()


def test_views_outlive_the_ring() -> None:
    writer = Ring.create(own_ring_name(RUN, 0), 4096)
    reader = Ring.open(writer.name)
    writer.unlink()
    put(writer, 1, b"still here")
    record = reader.read()
    assert record is not None
    reader.close()
    writer.close()
    assert bytes(record.payload) == b"still here"
    with pytest.raises(ValueError, match="closed"):
        reader.read()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # and nobody writes
def test_a_tensor_over_a_record_is_the_ring_itself(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    states = torch.arange(60, dtype=torch.bfloat16).view(5, 3, 4)
    slot = writer.reserve(states.nbytes)
    assert slot is not None
    slot[:] = states.view(torch.uint8).flatten().numpy()
    writer.commit(sample=0, epoch=0, status=COMMITTED, tokens=5)
    record = reader.read()
    assert record is not None
    view = torch.frombuffer(record.payload, dtype=torch.bfloat16).view(5, 3, 4)
    assert view.data_ptr() == np.frombuffer(record.payload, np.uint8).ctypes.data
    assert torch.equal(view, states)
    while put(writer, 1, b"\xff" * 960):  # all the room there is, and none of it is the held record's
        pass
    assert torch.equal(view, states)
    # What the writer stores through its own mapping is what the tensor holds: there is one copy of these bytes.
    slot[:2] = states.new_tensor([-7]).view(torch.uint8).numpy()
    assert view[0, 0, 0] == -7
    address = view.data_ptr()
    reader.release()
    while take(reader) is not None:
        pass
    assert put(writer, 2, b"\0" * 768)  # 832 with its header: the rest of this lap
    assert put(writer, 3, b"\1" * 960)
    assert (view.view(torch.uint8) == 1).all(), "after the release the bytes are the writer's again"
    assert view.data_ptr() == address


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


def test_the_mark_crosses_over(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    reader.reader_mark = 41
    assert writer.reader_mark == 41
    with pytest.raises(ValueError, match="for the reader"):
        writer.reader_mark = 1


def test_a_writer_that_does_not_beat_is_stuck(pair: tuple[Ring, Ring], monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = pair
    monkeypatch.setattr(ring_module, "SILENCE_S", 0.05)
    assert reader.next_record(timeout=0.1) is None, "what comes before the first beat takes long"
    for _ in range(4):  # a beat between two looks of the reader is enough, records are not needed
        writer.beat()
        assert reader.next_record(timeout=0.04) is None
    with pytest.raises(PeerStuck, match=f"pid {os.getpid()}.* has not moved for"):
        reader.next_record(timeout=10)


def test_a_writer_that_never_beats_has_longer(pair: tuple[Ring, Ring], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "START_SILENCE_S", 0.05)
    with pytest.raises(PeerStuck, match="has not moved"):
        pair[1].next_record(timeout=10)


def test_silence_is_what_the_reader_has_waited(pair: tuple[Ring, Ring], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides may be stopped together, or the machine sleep: the clock goes on, and nobody is stuck."""
    writer, reader = pair
    monkeypatch.setattr(ring_module, "SILENCE_S", 60.0)
    clock = time.monotonic
    writer.beat()
    assert reader.next_record(timeout=0.01) is None
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 3600)
    assert reader.next_record(timeout=0.01) is None
    assert put(writer, 1, b"next")
    assert take(reader) == (1, b"next")


WRITER = """
import hashlib, os, random, sys, time
from dflash_scale.transport.ring import Ring, own_ring_name
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
while ring.released != records:
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


def test_the_next_reader_goes_on_where_a_killed_one_stopped() -> None:
    writer = Ring.create(own_ring_name(RUN, 0), 4096)
    for sample in range(3):
        assert put(writer, sample, bytes([sample]))
    code = (
        "import sys; from dflash_scale.transport.ring import Ring\n"
        "ring = Ring.open(sys.argv[1]); ring.read(); ring.release(); ring.read(); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, writer.name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert writer.peer_alive()
    with pytest.raises(ValueError, match=f"already has a reader, pid {process.pid}"):
        Ring.open(writer.name)
    process.kill()
    process.wait()
    assert writer.peer_attached() and not writer.peer_alive()
    with Ring.open(writer.name) as reader:
        writer.unlink()
        assert [take(reader) for _ in range(3)] == [(1, b"\1"), (2, b"\2"), None]
    writer.close()
