"""Anchors: validity, trained slots, and that the draw depends on nothing but its seed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_scale.data.dataset import Samples
from dflash_scale.data.schedule import Place, Row
from dflash_scale.drafter.blocks import AnchorSpec, draw_anchors, plan_row, supervised_run

masks = st.lists(st.booleans(), min_size=1, max_size=60).map(lambda bits: np.array(bits, bool))


class Documents:
    """A split of these loss masks; the tokens do not matter."""

    def __init__(self, masks: list[np.ndarray]) -> None:
        self._masks = masks
        self.lengths = np.array([len(mask) for mask in masks], np.int32)

    def tokens(self, index: int) -> np.ndarray:
        return np.zeros(self.lengths[index], np.int32)

    def loss_mask(self, index: int) -> np.ndarray:
        return self._masks[index]


@given(masks)
def test_supervised_run_equals_a_loop(mask: np.ndarray) -> None:
    for a, run in enumerate(supervised_run(mask)):
        expected = 0
        while a + expected + 1 < len(mask) and mask[a + expected + 1]:
            expected += 1
        assert run == expected, (mask.tolist(), a)


@given(st.lists(masks, min_size=1, max_size=5), st.integers(2, 9), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=80)
def test_a_row_draws_what_its_documents_draw(docs: list[np.ndarray], size: int, quota: int, seed: int) -> None:
    starts = np.cumsum([0, *map(len, docs)]).tolist()
    places = tuple(Place(i, starts[i], len(mask)) for i, mask in enumerate(docs))
    samples = Samples(Documents(docs), Documents([]))
    plan = plan_row(Row("train", seed, 1, 0, places), samples, AnchorSpec(size, quota, 7))
    anchors, trained, doc_ids, loss_mask = plan.anchors, plan.trained, plan.doc_ids, np.concatenate(docs)
    assert (np.diff(anchors) > 0).all()
    start = 0
    for document, mask in enumerate(docs):
        here = anchors[(anchors >= start) & (anchors < start + len(mask))] - start
        valid = [a for a in range(len(mask) - 1) if mask[a] and mask[a + 1]]
        assert len(here) == min(quota, len(valid))
        assert set(here) <= set(valid)
        own, _ = draw_anchors(mask, block_size=size, per_document=quota, seed=(7, seed, document))
        assert here.tolist() == own.tolist()
        start += len(mask)
    for anchor, reach in zip(anchors, trained, strict=True):
        after = [doc_ids[p] == doc_ids[anchor] and loss_mask[p] for p in range(anchor + 1, len(doc_ids))]
        run = next((i for i, ok in enumerate(after) if not ok), len(after))
        assert reach == min(size - 1, run) and reach >= 1


def test_draws_differ_by_epoch_and_sample_and_repeat_by_seed() -> None:
    mask = np.ones(500, bool)

    def draw(*key: int) -> tuple[int, ...]:
        return tuple(draw_anchors(mask, block_size=4, per_document=20, seed=key)[0])

    draws = {key: draw(*key) for key in np.ndindex(2, 3, 4)}
    assert len(set(draws.values())) == len(draws)
    assert draws[1, 2, 3] == draw(1, 2, 3)
