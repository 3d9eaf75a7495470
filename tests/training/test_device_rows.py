"""Row buffers filled from a real ring by a stand-in whose copies end when the test says (late_copier.py)."""

import os
from collections.abc import Iterator

import pytest
import torch

from dflash_scale.training.copiers import HostCopier
from dflash_scale.training.device_rows import DeviceRows, RowBuffer
from dflash_scale.transport.ring import COMMITTED, QUARANTINED, Ring, own_ring_name
from tests.support.late_copier import LateCopier

RUN = f"rows{os.getpid()}"
PIECE = 960  # bytes of a payload: 1024 with its header, so four fill the ring exactly


@pytest.fixture
def pair() -> Iterator[tuple[Ring, Ring]]:
    with Ring.create(own_ring_name(RUN, 0), 4096) as writer, Ring.open(writer.name) as reader:
        writer.unlink()
        yield writer, reader


@pytest.fixture
def copier() -> LateCopier:
    return LateCopier()


@pytest.fixture
def memory(pair: tuple[Ring, Ring], copier: LateCopier) -> DeviceRows:
    return DeviceRows(pair[1], copier, rows=2, row_bytes=2 * PIECE)


def put(ring: Ring, sample: int, status: int = COMMITTED) -> bool:
    payload = bytes([sample]) * PIECE if status == COMMITTED else b""
    if (slot := ring.reserve(len(payload))) is None:
        return False
    slot[:] = payload
    ring.commit(sample=sample, epoch=0, status=status, tokens=1)
    return True


def taken(memory: DeviceRows) -> RowBuffer:
    buffer = memory.take()
    assert buffer is not None
    return buffer


def fill(memory: DeviceRows, reader: Ring, buffer: RowBuffer, piece: int) -> None:
    record = reader.read()
    assert record is not None
    memory.fill(buffer, piece * PIECE, (piece + 1) * PIECE, record)


def pieces(raw: torch.Tensor) -> list[int]:
    """The value that fills each piece."""
    values = [piece.unique().tolist() for piece in raw.split(PIECE)]
    assert all(len(value) == 1 for value in values), values
    return [value[0] for value in values]


def test_a_record_is_released_when_its_copy_has_ended_and_the_next_is_copied_meanwhile(
    pair: tuple[Ring, Ring], memory: DeviceRows, copier: LateCopier
) -> None:
    writer, reader = pair
    assert [put(writer, sample) for sample in range(1, 6)] == [True] * 4 + [False]
    rows = [taken(memory), taken(memory)]
    for piece in range(4):
        fill(memory, reader, rows[piece // 2], piece % 2)
        memory.release_copied()
    assert (len(copier.begun), reader.released, memory.copying) == (4, 0, True)
    assert not put(writer, 5), "the bytes of a copy under way are not the writer's"
    for ended in range(1, 5):
        copier.end()
        memory.release_copied()
        assert reader.released == ended
        assert put(writer, 100 + ended), "what was released is"
    assert not memory.copying
    assert pieces(memory.hand_over(rows[0], 2 * PIECE)) == [1, 2]
    assert pieces(memory.hand_over(rows[1], 2 * PIECE)) == [3, 4]


def test_copies_that_end_out_of_their_order_are_released_in_it(
    pair: tuple[Ring, Ring], memory: DeviceRows, copier: LateCopier
) -> None:
    writer, reader = pair
    row = taken(memory)
    for piece in range(2):
        assert put(writer, piece)
        fill(memory, reader, row, piece)
    copier.end(1)
    memory.release_copied()
    assert reader.released == 0
    copier.end(0)
    memory.release_copied()
    assert reader.released == 2


def test_training_waits_for_the_copies_of_its_row_alone(
    pair: tuple[Ring, Ring], memory: DeviceRows, copier: LateCopier
) -> None:
    writer, reader = pair
    first, second = taken(memory), taken(memory)
    for sample, row, piece in ((1, first, 0), (2, second, 0), (3, first, 1), (4, second, 1)):
        assert put(writer, sample)
        fill(memory, reader, row, piece)
    assert pieces(memory.hand_over(first, 2 * PIECE)) == [1, 3]
    assert len(copier.begun) == 1, "the copy of sample 4 is still under way"
    assert pieces(memory.hand_over(second, 2 * PIECE)) == [2, 4]


def test_a_buffer_is_free_when_all_that_used_it_has_ended(
    pair: tuple[Ring, Ring], memory: DeviceRows, copier: LateCopier
) -> None:
    writer, reader = pair
    row, other = taken(memory), taken(memory)
    assert memory.take() is None
    assert put(writer, 1)
    fill(memory, reader, row, 0)
    memory.hand_over(row, PIECE)
    memory.give_back(row)
    assert memory.take() is None, "the device still works on it"
    copier.end_use()
    assert memory.take() is row
    memory.give_back(other)
    memory.give_back(row)
    copier.end_use()
    assert memory.take() is other, "in the order in which they were given back"
    assert memory.take() is None


def test_a_quarantined_sample_is_zeros_and_is_released_in_its_turn(
    pair: tuple[Ring, Ring], memory: DeviceRows, copier: LateCopier
) -> None:
    writer, reader = pair
    row = taken(memory)
    assert put(writer, 1) and put(writer, 2, QUARANTINED)
    fill(memory, reader, row, 0)
    fill(memory, reader, row, 1)
    memory.release_copied()
    assert reader.released == 0
    assert row.bytes[-1] == 0xFF, "it was not zero before"
    assert pieces(memory.hand_over(row, 2 * PIECE)) == [1, 0]
    memory.release_copied()
    assert reader.released == 2


def test_the_end_waits_for_the_copies_and_then_closes_the_copier(
    pair: tuple[Ring, Ring], memory: DeviceRows, copier: LateCopier
) -> None:
    writer, reader = pair
    row = taken(memory)
    for piece in range(2):
        assert put(writer, piece + 1)
        fill(memory, reader, row, piece)
    memory.close()
    assert copier.closed_with == [0], "closed once, with no copy under way"
    assert pieces(row.bytes) == [1, 2]
    assert writer.released == 2


def test_a_payload_of_another_size_is_an_error(pair: tuple[Ring, Ring], memory: DeviceRows) -> None:
    writer, reader = pair
    assert put(writer, 9)
    record = reader.read()
    assert record is not None
    with pytest.raises(RuntimeError, match="sample 9: got 960 bytes, wanted 100"):
        memory.fill(taken(memory), 0, 100, record)
    memory.close()
    assert writer.released == 0


def test_on_the_host_every_copy_has_ended_when_it_returns(pair: tuple[Ring, Ring]) -> None:
    writer, reader = pair
    memory = DeviceRows(reader, HostCopier(), rows=1, row_bytes=2 * PIECE)
    for lap in range(20):
        row = taken(memory)
        assert put(writer, lap + 1) and put(writer, 0, QUARANTINED)
        fill(memory, reader, row, 0)
        fill(memory, reader, row, 1)
        memory.release_copied()
        assert writer.released == 2 * (lap + 1) and not memory.copying
        assert pieces(memory.hand_over(row, 2 * PIECE)) == [lap + 1, 0]
        memory.give_back(row)
    memory.close()
