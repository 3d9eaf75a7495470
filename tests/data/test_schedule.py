"""The schedule: every sample once an epoch, equal micro-steps on all ranks, independent of the world size."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dflash_scale.data.dataset import Samples
from dflash_scale.data.schedule import Place, RowSchedule, ScheduleSpec, pack
from dflash_scale.drafter.blocks import AnchorSpec, plan_row
from dflash_scale.training.loss import LossSpec, normaliser, trained_mask


class Tokens:
    """A split in memory; token t of sample i is 1000 * i + t."""

    def __init__(self, lengths: list[int], first: int = 0) -> None:
        self.lengths, self._first = np.array(lengths, np.int32), first

    def tokens(self, index: int) -> np.ndarray:
        return np.arange(self.lengths[index], dtype=np.int32) + 1000 * (self._first + index)

    def loss_mask(self, index: int) -> np.ndarray:
        return np.arange(self.lengths[index]) >= 2


def make(train: int = 37, validation: int = 5) -> Samples:
    rng = np.random.default_rng(3)
    lengths = [int(n) for n in rng.integers(4, 60, train + validation)]
    return Samples(Tokens(lengths[:train]), Tokens(lengths[train:], train))


SPEC = ScheduleSpec(64, rows_per_step=4, world_size=2, seed=5, epochs=3, max_steps=None, validate_every=3)


def test_packing_fills_rows_without_overlap() -> None:
    lengths = np.random.default_rng(0).integers(1, 33, 400).astype(np.int32)
    rows = pack(np.arange(400), lengths, 64)
    assert Counter(p.sample for row in rows for p in row) == Counter(range(400))
    for row in rows:
        assert [p.start for p in row] == list(np.cumsum([0] + [p.length for p in row])[:-1])
        assert sum(p.length for p in row) <= 64
    assert lengths.sum() / (64 * len(rows)) > 0.93
    with pytest.raises(ValueError, match=r"sample 0 has 70 tokens.*row_tokens = 64"):
        pack([0], np.array([70], np.int32), 64)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_sample_once_an_epoch_and_equal_ranks(world: int) -> None:
    samples = make()
    schedule = RowSchedule(samples, replace(SPEC, world_size=world))
    ranks = [list(schedule.rows(rank)) for rank in range(world)]
    shape = [[(r.kind, r.step, r.micro) for r in rows] for rows in ranks]
    assert all(s == shape[0] for s in shape)
    for epoch in range(SPEC.epochs):
        seen = Counter(
            p.sample for rows in ranks for r in rows if r.kind == "train" and r.epoch == epoch for p in r.places
        )
        assert seen == Counter(range(samples.train_count))
    rounds = Counter(p.sample for rows in ranks for r in rows if r.kind == "validation" for p in r.places)
    times = sum(schedule.validates_after(s) for s in range(1, schedule.total_steps + 1))
    assert rounds == Counter(dict.fromkeys(range(samples.train_count, len(samples.lengths)), times))


def test_a_step_holds_the_same_rows_on_any_world_size() -> None:
    samples = make()
    steps = []
    for world in (1, 2, 4):
        schedule = RowSchedule(samples, replace(SPEC, world_size=world))
        rows = [schedule.train_rows(rank, 5) for rank in range(world)]
        steps.append([row.places for micro in zip(*rows, strict=True) for row in micro])
    assert steps[0] == steps[1] == steps[2]


def test_resuming_continues_the_sequence() -> None:
    schedule = RowSchedule(make(), SPEC)
    everything = list(schedule.rows(1))
    assert list(schedule.rows(1, first_step=4)) == [row for row in everything if row.step >= 4]


def test_rows_per_step_must_fit_the_ranks() -> None:
    with pytest.raises(ValueError, match="not a multiple of the 3 ranks"):
        RowSchedule(make(), replace(SPEC, world_size=3))


def test_a_planned_row_holds_its_samples_tokens_and_the_denominator_is_the_same_however_packed() -> None:
    samples = make()
    anchors = AnchorSpec(block_size=4, per_document=3, seed=1)
    row = RowSchedule(samples, SPEC).train_rows(0, 1)[0]
    plan = plan_row(row, samples, anchors)
    for document, place in enumerate(row.places):
        here = slice(place.start, place.start + place.length)
        assert plan.positions[here].tolist() == list(range(place.length))
        assert (plan.doc_ids[here] == document).all()
    row_tokens = np.concatenate([samples.tokens(place.sample) for place in row.places])
    assert len(row_tokens) == row.tokens == len(plan.doc_ids)
    for anchor, trained, tokens in zip(plan.anchors, plan.trained, plan.block_tokens, strict=True):
        assert tokens[: trained + 1].tolist() == row_tokens[anchor : anchor + trained + 1].tolist()
    alone = [plan_row(replace(row, places=(Place(p.sample, 0, p.length),)), samples, anchors) for p in row.places]
    assert sum(normaliser(trained_mask(p.trained, 4), LossSpec()) for p in alone) == pytest.approx(
        normaliser(trained_mask(plan.trained, 4), LossSpec())
    )
    empty = plan_row(replace(row, places=()), samples, anchors)
    assert empty.row.tokens == len(empty.doc_ids) == len(empty.anchors) == 0 and empty.block_tokens.shape == (0, 4)


def test_a_plan_without_a_sample_has_its_tokens_as_padding_and_none_of_its_anchors() -> None:
    samples = make()
    row = RowSchedule(samples, SPEC).train_rows(0, 1)[0]
    whole, lost = plan_row(row, samples, AnchorSpec(block_size=4, per_document=3, seed=1)), row.places[1]
    here = slice(lost.start, lost.start + lost.length)
    plan = whole.without([lost.sample])
    assert (plan.doc_ids[here] == -1).all()
    assert (plan.doc_ids >= 0).sum() == row.tokens - lost.length
    kept = (whole.anchors < here.start) | (whole.anchors >= here.stop)
    assert 0 < kept.sum() < len(kept)
    for name in ("anchors", "trained", "block_tokens"):
        assert getattr(plan, name).tolist() == getattr(whole, name)[kept].tolist(), name
    assert (whole.doc_ids[here] >= 0).all() and whole.without([]) is whole
