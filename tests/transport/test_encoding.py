"""Hidden states as bytes and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.transport.encoding import decode, encode
from dflash_scale.transport.layout import CONVERSIONS, FP8, Layout

# What is lost: of an element, and of the largest one of its token and layer.
RELATIVE = {"bfloat16": 2.0**-8, FP8: 2.0**-4 + 2.0**-8}
OF_LARGEST = {"bfloat16": 0.0, FP8: 2.0**-10 / 448}


@st.composite
def hidden_states(draw: st.DrawFn) -> tuple[Tensor, str]:
    """(T, L, H) of a verifier, with outliers and with layers of very different size, and the dtype to send."""
    native = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    shape = [draw(st.integers(1, most)) for most in (7, 5, 65)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    states = torch.randn(shape, generator=generator)
    states *= 10.0 ** torch.randint(-3, 3, (*shape[:2], 1), generator=generator)
    states[torch.rand(shape, generator=generator) < 0.02] *= 50
    states[torch.rand(shape[:2], generator=generator) < 0.1] = 0
    return states.to(getattr(torch, native)), draw(st.sampled_from(CONVERSIONS[native]))


@given(hidden_states())
@settings(max_examples=300, deadline=None)
def test_what_comes_back(drawn: tuple[Tensor, str]) -> None:
    states, dtype = drawn
    layout = Layout(tuple(range(states.shape[1])), states.shape[2], dtype)
    raw = encode(states, dtype)
    assert raw.dtype == torch.uint8 and raw.shape == (len(states), layout.bytes_per_token)
    got = decode(raw, layout)
    if states.dtype == getattr(torch, dtype):
        assert got.dtype == states.dtype and torch.equal(got, states)
        return
    assert got.dtype == torch.bfloat16
    want, got = states.double(), got.double()
    allowed = RELATIVE[dtype] * want.abs() + OF_LARGEST[dtype] * want.abs().amax(2, keepdim=True)
    assert ((got - want).abs() <= allowed * (1 + 1e-6)).all()


def test_every_token_and_layer_has_a_scale_of_its_own() -> None:
    states = torch.ones(2, 2, 4)
    states[0, 0], states[1, 1] = 1e-4, 1e4
    raw = encode(states, FP8)
    assert torch.equal(decode(raw, Layout((1, 2), 4, FP8)).float().log10().round(), states.log10().round())
    assert torch.equal(decode(raw[1:], Layout((1, 2), 4, FP8)), decode(raw, Layout((1, 2), 4, FP8))[1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    states = torch.ones(2, 1, 4)
    states[1, 0, 2] = bad
    got = decode(encode(states, FP8), Layout((1,), 4, FP8))
    assert got[0].isfinite().all() and not got[1].isfinite().all()


def test_zeros_are_zeros() -> None:
    """A quarantined sample's place in a row is filled with zero bytes."""
    layout = Layout((1, 2), 4, FP8)
    assert not decode(torch.zeros(3, layout.bytes_per_token, dtype=torch.uint8), layout).any()
