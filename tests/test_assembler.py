"""Row assembly from a real ring: any order of arrival, quarantined samples, a dead or confused writer."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dflash_scale.assembler import AssemblerSpec, RowAssembler, without
from dflash_scale.packer import AnchorSpec, Row, RowSchedule, Samples, ScheduleSpec, plan_row
from dflash_scale.stream.layouts import RowLayouts
from dflash_scale.stream.ring import COMMITTED, QUARANTINED, PeerDied, Ring, own_ring_name
from dflash_scale.stream.wire import Layout

LAYOUTS = RowLayouts(Layout((1, 3), 8, "float32"), Layout((1, 3, 4), 8, "float32"))
ANCHORS = AnchorSpec(block_size=4, per_document=3, seed=1)
LOOKAHEAD = 3


class Tokens:
    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int32)

    def tokens(self, index: int) -> np.ndarray:
        return np.arange(self.lengths[index], dtype=np.int32)

    def loss_mask(self, index: int) -> np.ndarray:
        return np.ones(self.lengths[index], bool)


def states_of(sample: int, tokens: int, layout: Layout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sample)
    return torch.randn(tokens, len(layout.layer_ids), layout.hidden_size, generator=generator)


@pytest.fixture
def writer() -> Iterator[Ring]:
    ring = Ring.create(own_ring_name("assembler", 0), 1 << 20)
    yield ring
    ring.unlink()
    ring.close()


def make(writer: Ring) -> tuple[Samples, list[Row], RowAssembler]:
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 20, 30)]
    samples = Samples(Tokens(lengths), Tokens(lengths[:5]))
    spec = ScheduleSpec(40, rows_per_step=2, world_size=1, seed=0, epochs=1, max_steps=None, validate_every=3)
    rows = list(RowSchedule(samples, spec).rows(0))
    assert {row.kind for row in rows[: 3 * LOOKAHEAD]} == {"train", "validation"}
    room = AssemblerSpec(LAYOUTS, 40, LOOKAHEAD, ANCHORS, torch.device("cpu"))
    return samples, rows, RowAssembler(Ring.open(writer.name), iter(rows), samples, room)


def put(ring: Ring, samples: Samples, row: Row, sample: int, status: int = COMMITTED) -> None:
    tokens = int(samples.lengths[sample])
    payload = states_of(sample, tokens, LAYOUTS.of(row)).numpy().tobytes() if status == COMMITTED else b""
    slot = ring.reserve(len(payload))
    assert slot is not None
    slot[:] = payload
    ring.commit(sample=sample, epoch=row.epoch, status=status, tokens=tokens)


def test_rows_come_in_order_whatever_the_order_of_arrival(writer: Ring) -> None:
    samples, rows, assembler = make(writer)
    shuffle = random.Random(3)
    batches = iter(assembler)
    for first in range(0, len(rows), LOOKAHEAD):
        group = rows[first : first + LOOKAHEAD]
        while writer.reader_mark + LOOKAHEAD < first + len(group):  # as the receiver does
            time.sleep(0.001)
        arriving = [(row, place.sample) for row in group for place in row.places]
        shuffle.shuffle(arriving)
        for row, sample in arriving:
            put(writer, samples, row, sample)
        for row in group:
            batch = next(batches)
            assert batch.plan.row == row
            assert batch.quarantined == ()
            for place in row.places:
                here = batch.states[place.start : place.start + place.length]
                assert torch.equal(here, states_of(place.sample, place.length, LAYOUTS.of(row)))
    assert next(batches, None) is None
    assembler.close()


def test_a_quarantined_sample_leaves_the_row_and_no_stale_states(writer: Ring) -> None:
    samples, rows, assembler = make(writer)
    lost = rows[0].places[1]
    for place in rows[0].places:
        put(writer, samples, rows[0], place.sample, QUARANTINED if place is lost else COMMITTED)
    batch = next(iter(assembler))
    assert batch.quarantined == (lost.sample,)
    here = slice(lost.start, lost.start + lost.length)
    assert not batch.states[here].any()
    assert (batch.plan.doc_ids[here] == -1).all()
    whole = plan_row(rows[0], samples, ANCHORS)
    kept = (whole.anchors < lost.start) | (whole.anchors >= lost.start + lost.length)
    assert 0 < kept.sum() < len(kept)
    assert batch.plan.anchors.tolist() == whole.anchors[kept].tolist()
    assert batch.plan.block_tokens.tolist() == whole.block_tokens[kept].tolist()
    assembler.close()


def test_without_nothing_is_the_plan_itself() -> None:
    samples = Samples(Tokens([9, 7]), Tokens([]))
    spec = ScheduleSpec(20, rows_per_step=1, world_size=1, seed=0, epochs=1, max_steps=None, validate_every=0)
    plan = plan_row(RowSchedule(samples, spec).train_rows(0, 1)[0], samples, ANCHORS)
    assert without(plan, []).anchors.tolist() == plan.anchors.tolist()


def test_a_sample_that_no_row_wants_is_an_error_in_the_training_thread(writer: Ring) -> None:
    samples, rows, assembler = make(writer)
    put(writer, samples, rows[-1], rows[-1].places[0].sample)
    with pytest.raises(RuntimeError, match="which no open row wants"):
        next(iter(assembler))
    assembler.close()


def test_a_dead_receiver_is_an_error_in_the_training_thread() -> None:
    code = (
        "import sys; from dflash_scale.stream.ring import Ring, own_ring_name\n"
        "ring = Ring.create(own_ring_name('dead', 0), 1 << 20); print(ring.name, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    samples = Samples(Tokens([9, 7]), Tokens([]))
    spec = ScheduleSpec(20, rows_per_step=1, world_size=1, seed=0, epochs=1, max_steps=None, validate_every=0)
    rows = RowSchedule(samples, spec).rows(0)
    reader = Ring.open(name)
    assembler = RowAssembler(reader, rows, samples, AssemblerSpec(LAYOUTS, 20, 2, ANCHORS, torch.device("cpu")))
    process.kill()
    process.wait()
    with pytest.raises(PeerDied, match=f"pid {process.pid}"):
        next(iter(assembler))
    assembler.close()
    os.unlink(f"/dev/shm{name}")
