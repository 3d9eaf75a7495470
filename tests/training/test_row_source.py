"""Random rows of the right shape, the same in every run; made-up samples and verifier weights to go with them."""

import torch

from dflash_scale.data.dataset import Samples
from dflash_scale.data.schedule import Row, RowSchedule, ScheduleSpec
from dflash_scale.receiver.layouts import RowLayouts
from dflash_scale.training.fake import TRAIN, VALIDATION, fake_data, fake_head
from dflash_scale.training.row_source import FakeSource
from dflash_scale.transport.layout import Layout
from dflash_scale.verifier.shape import verifier_shape

CPU = torch.device("cpu")
LAYOUTS = RowLayouts(Layout((1, 3), 32, "bfloat16"), Layout((1, 3, 4), 32, "bfloat16"))


def rows(first_step: int = 1) -> list[Row]:
    data = fake_data(64, 64)
    spec = ScheduleSpec(64, rows_per_step=9, world_size=1, seed=0, epochs=2, max_steps=None, validate_every=2)
    return list(RowSchedule(Samples(data.train, data.validation), spec).rows(0, first_step))


def test_random_rows_have_the_layouts_shape_and_depend_on_the_sample_alone() -> None:
    seen: dict[int, torch.Tensor] = {}
    source, kinds = FakeSource(iter(rows()), LAYOUTS, CPU), set()
    for row in rows():
        assert source.wait(0)
        got = source.next()
        assert got is not None and got.row == row
        layout = LAYOUTS.of(row)
        assert got.states.shape == (row.tokens, len(layout.layer_ids), layout.hidden_size)
        assert got.states.dtype == torch.bfloat16 and got.usable == [place.sample for place in row.places]
        kinds.add(row.kind)
        for place in row.places:
            states = got.states[place.start : place.start + place.length, :2]
            assert torch.equal(seen.setdefault(place.sample, states), states)
    assert source.next() is None
    assert kinds == {"train", "validation"} and sorted(seen) == list(range(TRAIN + VALIDATION))
    resumed = FakeSource(iter(rows(first_step=3)), LAYOUTS, CPU).next()
    assert resumed is not None and resumed.row.step == 3
    for place in resumed.row.places:
        states = resumed.states[place.start : place.start + place.length]
        assert torch.equal(seen[place.sample], states) and 0.8 < states.float().std() < 1.2


def test_made_up_samples_are_learnable_supervised_and_without_the_mask_token() -> None:
    data, again = fake_data(64, 64), fake_data(64, 64)
    assert data.fingerprint == again.fingerprint != fake_data(64, 128).fingerprint
    assert (len(data.train), len(data.validation)) == (TRAIN, VALIDATION)
    assert data.manifest["longest"] == max(data.train.lengths.max(), data.validation.lengths.max()) <= 32
    for index in range(TRAIN):
        tokens = data.train.tokens(index)
        assert ((tokens[:-1] + 1) % 63 == tokens[1:]).all() and tokens.max() < 63
        assert data.train.loss_mask(index).sum() == len(tokens) - 2
        assert tokens.tolist() == again.train.tokens(index).tolist()
    assert data.train.token_counts(64).sum() == data.train.lengths.sum() - 2 * TRAIN


def test_made_up_weights_are_the_same_numbers_in_every_dtype() -> None:
    shape = verifier_shape("tiny-qwen3")
    whole, half = (fake_head(shape, dtype, CPU) for dtype in (torch.float32, torch.bfloat16))
    assert whole.embedding.shape == whole.weight.shape == (shape.vocab_size, shape.hidden_size)
    assert torch.equal(whole.weight.bfloat16(), half.weight) and not torch.equal(whole.weight, whole.embedding)
    logits = half.logits(torch.randn(3, shape.hidden_size))
    assert logits.shape == (3, shape.vocab_size) and logits.dtype == torch.bfloat16 and logits.isfinite().all()
