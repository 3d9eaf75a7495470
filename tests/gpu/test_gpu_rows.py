"""From a real ring to row buffers on a GPU: page-locked or not, the rows are the bytes that were written.

`torch.cuda._sleep` keeps a stream busy, so that what does not wait for it comes too early; nothing here is timed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("dflash_scale._ring", reason="not built for this Python", exc_type=ImportError)

from dflash_scale.training.copiers import CudaCopier
from dflash_scale.training.device_rows import DeviceRows, RowBuffer
from dflash_scale.transport.ring import COMMITTED, QUARANTINED, Ring, own_ring_name, record_span

RUN = f"gpurows{os.getpid()}"
DEVICE = torch.device("cuda", 0)
PIECE = 8 << 20  # bytes of a payload
PIECES = 4  # in a row
A_WHILE = 100_000_000  # clock cycles, some 50 ms
Ends = tuple[Ring, Ring]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A ring that six records fill."""
    with Ring.create(own_ring_name(RUN, 0), 6 * record_span(PIECE)) as writer, Ring.open(writer.name) as reader:
        writer.unlink()
        yield writer, reader


def put(ring: Ring, value: int, status: int = COMMITTED) -> bool:
    slot = ring.reserve(PIECE if status == COMMITTED else 0)
    if slot is None:
        return False
    if len(slot) > 0:
        torch.frombuffer(slot, dtype=torch.uint8).fill_(value)
    ring.commit(sample=value, epoch=0, status=status, tokens=1)
    return True


def fill(memory: DeviceRows, reader: Ring, buffer: RowBuffer, piece: int) -> None:
    record = reader.read()
    assert record is not None
    memory.fill(buffer, piece * PIECE, (piece + 1) * PIECE, record)


def taken(memory: DeviceRows) -> RowBuffer:
    while (buffer := memory.take()) is None:
        pass
    return buffer


def pieces(raw: torch.Tensor) -> list[int]:
    values = raw.view(-1, PIECE)
    assert torch.equal(values.amin(1), values.amax(1)), "a piece of two samples"
    return values[:, 0].tolist()


def delay(copier: CudaCopier) -> None:
    with torch.cuda.stream(copier.stream):
        torch.cuda._sleep(A_WHILE)


def check_rows(writer: Ring, memory: DeviceRows, reader: Ring, copier: CudaCopier) -> None:
    """Rows through a ring that is overwritten as soon as it is released, with copies and training that are late."""
    written = iter(range(10_000))
    trained = []
    for lap in range(12):
        values = [next(written) % 251 for _ in range(PIECES)]
        row = taken(memory)
        if lap % 3 == 0:
            delay(copier)
        for piece, value in enumerate(values):
            while not put(writer, value):
                memory.release_copied()
            fill(memory, reader, row, piece)
            memory.release_copied()
        raw = memory.hand_over(row, PIECES * PIECE)
        torch.cuda._sleep(A_WHILE // 4)
        trained.append((values, raw.clone()))
        memory.give_back(row)
    for values, states in trained:
        assert pieces(states) == values


def test_rows_are_the_bytes_of_a_locked_ring(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    writer, reader = ends
    copier = CudaCopier(reader, DEVICE)
    assert copier.locked, caplog.text
    memory = DeviceRows(reader, copier, rows=3, row_bytes=PIECES * PIECE)
    check_rows(writer, memory, reader, copier)
    memory.close()
    assert writer.released == 12 * PIECES


def test_a_record_is_not_released_before_its_copy_has_ended(ends: Ends) -> None:
    writer, reader = ends
    copier = CudaCopier(reader, DEVICE)
    memory = DeviceRows(reader, copier, rows=1, row_bytes=PIECES * PIECE)
    row = taken(memory)
    delay(copier)
    seen = []
    for piece in range(PIECES):
        assert put(writer, piece)
        fill(memory, reader, row, piece)
        seen.append(row.filled)
    while memory.copying:
        memory.release_copied()
        assert reader.released <= sum(event is not None and event.query() for event in seen)
    assert pieces(memory.hand_over(row, PIECES * PIECE)) == list(range(PIECES))
    memory.close()


def test_a_quarantined_sample_is_zeros(ends: Ends) -> None:
    writer, reader = ends
    memory = DeviceRows(reader, CudaCopier(reader, DEVICE), rows=1, row_bytes=2 * PIECE)
    row = taken(memory)
    row.bytes.fill_(255)
    torch.cuda.synchronize()
    assert put(writer, 7) and put(writer, 0, QUARANTINED)
    fill(memory, reader, row, 0)
    fill(memory, reader, row, 1)
    assert pieces(memory.hand_over(row, 2 * PIECE)) == [7, 0]
    memory.close()


def test_a_ring_that_cannot_be_locked_is_copied_all_the_same(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    writer, reader = ends
    first = CudaCopier(reader, DEVICE)
    assert first.locked
    with caplog.at_level(logging.WARNING):
        copier = CudaCopier(reader, DEVICE)  # the pages are locked already, which CUDA refuses to do again
    assert not copier.locked
    assert "not page-locked, copies from it are slower" in caplog.text and "(712)" in caplog.text
    first.close()
    assert (torch.ones(3, device=DEVICE) * 2).sum().item() == 6, "the refusal is no error of the next kernel"
    memory = DeviceRows(reader, copier, rows=3, row_bytes=PIECES * PIECE)
    check_rows(writer, memory, reader, copier)
    memory.close()


def test_closing_unlocks_the_pages_also_behind_a_closed_ring(ends: Ends) -> None:
    writer, reader = ends
    for _ in range(2):
        copier = CudaCopier(reader, DEVICE)
        assert copier.locked, "what was locked before is unlocked"
        copier.close()
        copier.close()
    copier = CudaCopier(reader, DEVICE)
    memory = DeviceRows(reader, copier, rows=1, row_bytes=PIECE)
    assert put(writer, 3)
    fill(memory, reader, row := taken(memory), 0)
    memory.release_copied(wait=True)
    reader.close()  # the pages stay mapped for who has locked them
    memory.close()
    assert pieces(row.bytes) == [3]
