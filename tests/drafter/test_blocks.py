"""Anchors: validity, trained slots, and that the draw depends on nothing but its seed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_scale.drafter.blocks import anchor_seed, draw_anchors, plan_anchors, supervised_run

masks = st.lists(st.booleans(), min_size=1, max_size=60).map(lambda bits: np.array(bits, bool))


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
    doc_ids = np.concatenate([np.full(len(m), i, np.int32) for i, m in enumerate(docs)] + [np.full(3, -1, np.int32)])
    loss_mask = np.concatenate([*docs, np.ones(3, bool)])  # padding is never supervised, whatever the mask says
    seeds = [anchor_seed(7, seed, i) for i in range(len(docs))]
    anchors, trained = plan_anchors(doc_ids, loss_mask, block_size=size, per_document=quota, seeds=seeds)
    assert (np.diff(anchors) > 0).all()
    start = 0
    for document, mask in enumerate(docs):
        here = anchors[(anchors >= start) & (anchors < start + len(mask))] - start
        valid = [a for a in range(len(mask) - 1) if mask[a] and mask[a + 1]]
        assert len(here) == min(quota, len(valid))
        assert set(here) <= set(valid)
        assert here.tolist() == draw_anchors(mask, per_document=quota, seed=seeds[document]).tolist()
        start += len(mask)
    for anchor, reach in zip(anchors, trained, strict=True):
        after = [doc_ids[p] == doc_ids[anchor] and loss_mask[p] for p in range(anchor + 1, len(doc_ids))]
        run = next((i for i, ok in enumerate(after) if not ok), len(after))
        assert reach == min(size - 1, run) and reach >= 1


def test_draws_differ_by_epoch_and_sample_and_repeat_by_seed() -> None:
    mask = np.ones(500, bool)
    draw = {key: tuple(draw_anchors(mask, per_document=20, seed=anchor_seed(*key))) for key in np.ndindex(2, 3, 4)}
    assert len(set(draw.values())) == len(draw)
    assert draw[1, 2, 3] == tuple(draw_anchors(mask, per_document=20, seed=anchor_seed(1, 2, 3)))
