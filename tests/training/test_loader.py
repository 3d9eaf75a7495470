"""Row assembly from a real ring: any order of arrival, quarantined samples, a dead or confused writer.

All with each way of copying that this machine has, and with a stand-in for a GPU whose copies end late.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from dflash_scale.data.dataset import Samples
from dflash_scale.data.schedule import Row, RowSchedule, ScheduleSpec
from dflash_scale.receiver.layouts import RowLayouts
from dflash_scale.training.copiers import Copier, CudaCopier, HostCopier
from dflash_scale.training.loader import LoaderSpec, RowLoader
from dflash_scale.transport.layout import Layout
from dflash_scale.transport.ring import COMMITTED, QUARANTINED, PeerDied, Ring, own_ring_name
from tests.support.late_copier import AtRandom, LateCopier

LAYOUTS = RowLayouts(Layout((1, 3), 8, "float32"), Layout((1, 3, 4), 8, "float32"))
LOOKAHEAD = 3
COPIERS: dict[str, Callable[[Ring], Copier]] = {"host": lambda ring: HostCopier(), "late": lambda ring: AtRandom(1)}
if torch.cuda.is_available():
    COPIERS["cuda"] = lambda ring: CudaCopier(ring, torch.device("cuda", torch.cuda.current_device()))


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
    """Four of the longest samples at most, so that what is released too early is soon overwritten."""
    ring = Ring.create(own_ring_name("loader", 0), 1 << 13)
    yield ring
    ring.unlink()
    ring.close()


@pytest.fixture(params=COPIERS)
def copier_of(request: pytest.FixtureRequest) -> Callable[[Ring], Copier]:
    return COPIERS[request.param]


Made = tuple[Samples, list[Row], RowLoader]


def prepared() -> tuple[Samples, list[Row]]:
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 20, 30)]
    samples = Samples(Tokens(lengths), Tokens(lengths[:5]))
    spec = ScheduleSpec(40, rows_per_step=2, world_size=1, seed=0, epochs=1, max_steps=None, validate_every=3)
    rows = list(RowSchedule(samples, spec).rows(0))
    assert {row.kind for row in rows[: 3 * LOOKAHEAD]} == {"train", "validation"}
    return samples, rows


@pytest.fixture
def made(writer: Ring, copier_of: Callable[[Ring], Copier]) -> Made:
    samples, rows = prepared()
    reader = Ring.open(writer.name)
    spec = LoaderSpec(LAYOUTS, 40, LOOKAHEAD)
    return samples, rows, RowLoader(reader, iter(rows), spec, copier_of(reader))


def put(ring: Ring, samples: Samples, row: Row, sample: int, status: int = COMMITTED) -> None:
    tokens = int(samples.lengths[sample])
    payload = states_of(sample, tokens, LAYOUTS.of(row)).numpy().tobytes() if status == COMMITTED else b""
    while (slot := ring.reserve(len(payload))) is None:
        time.sleep(0.001)
    slot[:] = payload
    ring.commit(sample=sample, epoch=row.epoch, status=status, tokens=tokens)


def test_rows_come_in_order_whatever_the_order_of_arrival(writer: Ring, made: Made) -> None:
    samples, rows, loader = made
    shuffle = random.Random(3)
    for first in range(0, len(rows), LOOKAHEAD):
        group = rows[first : first + LOOKAHEAD]
        while writer.reader_mark + LOOKAHEAD < first + len(group):  # as the receiver does
            time.sleep(0.001)
        arriving = [(row, place.sample) for row in group for place in row.places]
        shuffle.shuffle(arriving)
        for row, sample in arriving:
            put(writer, samples, row, sample)
        for row in group:
            got = loader.next()
            assert got is not None and got.row == row
            assert got.quarantined == ()
            for place in row.places:
                here = got.states[place.start : place.start + place.length]
                assert torch.equal(here.cpu(), states_of(place.sample, place.length, LAYOUTS.of(row)))
    assert loader.next() is None
    assert writer.released == sum(len(row.places) for row in rows), "all was released before the end was said"
    loader.close()


def test_a_quarantined_sample_leaves_the_row_and_no_stale_states(writer: Ring, made: Made) -> None:
    samples, rows, loader = made
    lost = rows[0].places[1]
    for place in rows[0].places:
        put(writer, samples, rows[0], place.sample, QUARANTINED if place is lost else COMMITTED)
    got = loader.next()
    assert got is not None and got.quarantined == (lost.sample,)
    assert got.usable == [place.sample for place in rows[0].places if place is not lost]
    assert not got.states[lost.start : lost.start + lost.length].any()
    loader.close()


def test_what_lies_behind_a_late_copy_is_copied_too_and_the_end_waits_for_all(writer: Ring) -> None:
    samples, rows = prepared()
    reader, copier = Ring.open(writer.name), LateCopier()
    loader = RowLoader(reader, iter(rows), LoaderSpec(LAYOUTS, 40, LOOKAHEAD), copier)
    for place in rows[0].places:
        put(writer, samples, rows[0], place.sample)
    first = loader.next()  # waits for its copies, as the device would
    assert first is not None and not copier.uses, "given back while it is in training"
    for place in rows[1].places:
        put(writer, samples, rows[1], place.sample)
    while len(copier.begun) < len(rows[1].places):
        time.sleep(0.001)
    assert len(rows[1].places) > 1
    assert writer.released <= len(rows[0].places)
    loader.close()
    assert copier.closed_with == [0], "closed once, with no copy under way"
    assert writer.released == len(rows[0].places) + len(rows[1].places)
    whole = [states_of(place.sample, place.length, LAYOUTS.of(rows[0])) for place in rows[0].places]
    assert torch.equal(first.states, torch.cat(whole))


def test_a_sample_that_no_row_wants_is_an_error_in_the_training_thread(writer: Ring, made: Made) -> None:
    samples, rows, loader = made
    put(writer, samples, rows[-1], rows[-1].places[0].sample)
    with pytest.raises(RuntimeError, match="which no open row wants"):
        loader.next()
    loader.close()


def test_a_dead_receiver_is_an_error_in_the_training_thread(copier_of: Callable[[Ring], Copier]) -> None:
    code = (
        "import sys; from dflash_scale.transport.ring import Ring, own_ring_name\n"
        "ring = Ring.create(own_ring_name('dead', 0), 1 << 20); print(ring.name, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    samples = Samples(Tokens([9, 7]), Tokens([]))
    spec = ScheduleSpec(20, rows_per_step=1, world_size=1, seed=0, epochs=1, max_steps=None, validate_every=0)
    rows = RowSchedule(samples, spec).rows(0)
    reader = Ring.open(name)
    loader = RowLoader(reader, rows, LoaderSpec(LAYOUTS, 20, 2), copier_of(reader))
    process.kill()
    process.wait()
    with pytest.raises(PeerDied, match=f"pid {process.pid}"):
        loader.next()
    loader.close()
    os.unlink(f"/dev/shm{name}")
