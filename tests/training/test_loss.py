"""The chunked loss against plain torch on random shapes: value, gradient, metrics; and its normalisation."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.drafter.heads import OutputHead
from dflash_scale.ops.softmax_loss import term_weights
from dflash_scale.training.loss import (
    CHUNK_SLOTS,
    LossSpec,
    VerifierStates,
    chunks,
    drafter_loss,
    drafter_loss_reference,
    fitting_rows,
    kept_slots,
    normaliser,
    trained_mask,
)
from dflash_scale.training.sums import BlockSums

TERMS = [
    term_weights(weights)
    for weights in (
        {"ce": 1.0},
        {"kl": 1.0},
        {"ce": 0.5, "reverse_kl": 1.0},
        {"tv": 1.0},
        {"ce": 1.0, "kl": 0.5, "reverse_kl": 0.3, "tv": 0.7},
    )
]
TV = term_weights({"tv": 1.0}).index(1.0)
cases = st.fixed_dictionaries(
    {
        "blocks": st.integers(1, 12),
        "size": st.integers(2, 9),
        "hidden": st.sampled_from([8, 24]),
        "vocab": st.integers(2, 70),
        "weights": st.sampled_from(["decay", "dpace"]),
        "chunk": st.integers(1, 40),
        "terms": st.sampled_from(TERMS),
        "labels": st.sampled_from(["data", "verifier"]),
        "holes": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)
CASE = {"blocks": 5, "size": 4, "hidden": 8, "vocab": 11, "weights": "decay", "chunk": 3, "seed": 1}
CASE |= {"terms": TERMS[0], "labels": "data", "holes": False}


def make(case: dict[str, Any], dtype: torch.dtype = torch.float64, kernel: str = "auto") -> dict[str, Any]:
    """The arguments of drafter_loss; the verifier's head is one of its own."""
    torch.manual_seed(case["seed"])
    rng = np.random.default_rng(case["seed"])
    trained = trained_mask(rng.integers(0, case["size"], case["blocks"]).astype(np.int32), case["size"])
    if case["holes"]:  # labels outside a pruned vocabulary
        trained &= rng.random(trained.shape) < 0.7
    tokens = case["blocks"] * 2 + case["size"]
    anchors = np.sort(rng.choice(tokens - case["size"] + 1, case["blocks"], replace=False)).astype(np.int32)
    other = torch.randn(case["vocab"], 6, dtype=dtype)
    spec = LossSpec(case["weights"], 3.0, 0.5, case["chunk"], case["terms"], case["labels"], kernel)
    return {
        "hidden": torch.randn(int(trained.sum()), case["hidden"], dtype=dtype).requires_grad_(),
        "head": OutputHead(torch.randn(case["vocab"], case["hidden"], dtype=dtype)),
        "labels": torch.randint(0, case["vocab"], (case["blocks"], case["size"]), dtype=torch.int32),
        "trained": trained,
        "spec": spec,
        "scale": torch.tensor(0.37, dtype=dtype),
        "verifier": VerifierStates(torch.randn(tokens, 6, dtype=dtype), anchors, lambda x: x @ other.T),
    }


def both(arguments: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(loss, gradient, packed sums) of the loss and of its reference."""
    results = []
    for loss_of in (drafter_loss, drafter_loss_reference):
        loss, sums = loss_of(**arguments)
        (grad,) = torch.autograd.grad(loss, arguments["hidden"])
        results.append((loss.detach(), grad, sums.packed()))
    return results


@given(cases)
@settings(max_examples=150, deadline=None)
@example({**CASE, "blocks": 2, "size": 3, "hidden": 4, "vocab": 262144, "terms": TERMS[4]})
def test_chunked_loss_equals_the_reference(case: dict[str, Any]) -> None:
    for got, wanted, what in zip(*both(make(case)), ("loss", "gradient", "sums"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=f"{what} of {case}")


@given(cases)
@settings(max_examples=150, deadline=None)
@example({**CASE, "blocks": 2, "size": 3, "hidden": 4, "vocab": 262144, "terms": TERMS[0]})
def test_the_compiled_kernel_gives_the_same_to_rounding(case: dict[str, Any]) -> None:
    terms = (
        *case["terms"][:TV],
        0.0,
        *case["terms"][TV + 1 :],
    )  # tv's gradient turns on signs: tests/ops/test_softmax_loss.py
    if not any(terms):
        terms = TERMS[0]
    for got, wanted, what in zip(
        *both(make({**case, "terms": terms}, torch.float32, "cpu")), ("loss", "gradient", "sums"), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-4, msg=f"{what} of {case}")


@given(cases, st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_the_chunk_size_changes_rounding_alone(case: dict[str, Any], other: int) -> None:
    arguments = make(case)
    results = []
    for size in (case["chunk"], other, case["chunk"]):
        loss, sums = drafter_loss(**{**arguments, "spec": replace(arguments["spec"], chunk_slots=size)})
        (grad,) = torch.autograd.grad(loss, arguments["hidden"])
        results.append((loss.detach(), grad, sums.packed()))
    for first, second, again in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10, msg=f"{case} and {other}")
        assert torch.equal(first, again), case


@given(cases)
@settings(max_examples=60, deadline=None)
def test_weights_and_metrics_equal_a_loop_over_slots(case: dict[str, Any]) -> None:
    arguments = make({**case, "terms": TERMS[0]})
    spec, trained, verifier, width = arguments["spec"], arguments["trained"], arguments["verifier"], case["size"] - 1
    logp = (arguments["hidden"].detach() @ arguments["head"].weight.T).log_softmax(-1)
    picks = verifier.logits(verifier.states).argmax(-1)
    total, hits = 0.0, [0, 0]
    accepted, correct = np.zeros(width), np.zeros(width)
    row = 0
    for block in range(case["blocks"]):
        reach, run, prefix, losses = {}, 1.0, True, {}
        for slot in range(1, width + 1):
            if not trained[block, slot - 1]:
                prefix = False
                continue
            data = int(arguments["labels"][block, slot])
            label = data if case["labels"] == "data" else int(picks[verifier.anchors[block] + slot - 1])
            losses[slot] = -float(logp[row, label])
            run *= 0.5 * np.exp(-losses[slot]) + 0.5
            reach[slot] = run
            better = int((logp[row] > logp[row, label]).sum())
            right = better == 0
            prefix = prefix and right
            correct[slot - 1] += right
            accepted[slot - 1] += prefix
            hits = [hits[0] + (better < 4), hits[1] + (better < 8)]
            row += 1
        for slot, loss in losses.items():
            later = sum(p for other, p in reach.items() if other >= slot)
            total += loss * (np.exp(-(slot - 1) / 3.0) if spec.weights == "decay" else later)
    _, sums = drafter_loss(**arguments)
    assert float(sums.loss) == pytest.approx(total, rel=1e-9, abs=1e-9), case
    assert sums.correct.tolist() == correct.tolist(), case
    assert sums.accepted.tolist() == accepted.tolist(), case
    assert sums.top.tolist() == hits, case
    assert float(sums.blocks) == case["blocks"]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("labels", ["data", "verifier"])
def test_gradcheck(terms: tuple[float, ...], labels: str) -> None:
    arguments = make({**CASE, "terms": terms, "labels": labels, "holes": True})
    hidden = arguments.pop("hidden")
    torch.autograd.gradcheck(lambda x: drafter_loss(hidden=x, **arguments)[0], (hidden,))


@given(cases)
@settings(max_examples=40, deadline=None)
def test_a_position_is_looked_at_once_in_a_chunk(case: dict[str, Any]) -> None:
    arguments = make(case)
    anchors, trained = arguments["verifier"].anchors, arguments["trained"]
    seen = 0
    parts = list(chunks(arguments["labels"], trained, case["chunk"], anchors))
    for chunk in parts:
        assert chunk.positions is not None and chunk.source is not None
        positions = chunk.positions.tolist()
        assert positions == sorted(set(positions)), case
        first = sum(part.grid[0] for part in parts[: parts.index(chunk)])
        wanted = anchors[first + chunk.block.numpy()] + chunk.slot.numpy()
        assert [positions[i] for i in chunk.source.tolist()] == wanted.tolist(), case
        seen += len(positions)
    block, slot = np.nonzero(trained)
    everywhere = len(set((anchors[block] + slot).tolist()))
    assert everywhere <= seen <= everywhere + (len(parts) - 1) * (case["size"] - 1), case


def test_hard_labels_of_the_data_ask_the_verifier_nothing() -> None:
    def never(states: Tensor) -> Tensor:
        raise AssertionError("asked")

    arguments = make(CASE)
    drafter_loss(**{**arguments, "verifier": None})[0].backward()
    with pytest.raises(ValueError, match="need its states, got none"):
        drafter_loss(**{**arguments, "verifier": None, "spec": replace(arguments["spec"], labels="verifier")})
    spec = replace(arguments["spec"], terms=TERMS[1])
    with pytest.raises(AssertionError, match="asked"):
        drafter_loss(**{**arguments, "spec": spec, "verifier": replace(arguments["verifier"], logits=never)})
    with pytest.raises(ValueError, match="the verifier's logits are 6 wide, wanted 11 as the drafter's"):
        drafter_loss(**{**arguments, "spec": spec, "verifier": replace(arguments["verifier"], logits=torch.clone)})


def test_without_a_gradient_labels_are_compared_and_nothing_is_multiplied_back() -> None:
    arguments = make(CASE)
    _, sums = drafter_loss(**arguments)
    assert sums.compared == 0
    hidden = arguments["hidden"].detach()
    loss, sums = drafter_loss(**{**arguments, "hidden": hidden})
    assert not loss.requires_grad
    picks = arguments["verifier"].logits(arguments["verifier"].states).argmax(-1)
    block, slot = np.nonzero(arguments["trained"])
    labels = arguments["labels"][block, slot + 1]
    same = int((picks[arguments["verifier"].anchors[block] + slot] == labels).sum())
    assert (int(sums.compared), int(sums.agreed)) == (len(labels), same)
    _, wanted = drafter_loss_reference(**{**arguments, "hidden": hidden})
    torch.testing.assert_close(sums.packed(), wanted.packed())


def test_bfloat16_and_autocast_follow_float64() -> None:
    case = {**CASE, "hidden": 24, "vocab": 61, "terms": TERMS[4], "blocks": 12}
    exact = make(case)
    wanted, wanted_sums = drafter_loss(**exact)
    (wanted_grad,) = torch.autograd.grad(wanted, exact["hidden"])
    half = {**exact, "scale": exact["scale"].float()}
    half["hidden"] = exact["hidden"].detach().bfloat16().requires_grad_()
    half["head"] = exact["head"].to(dtype=torch.bfloat16)
    results = [(half, drafter_loss(**half))]
    full = {
        **half,
        "hidden": exact["hidden"].detach().float().requires_grad_(),
        "head": exact["head"].to(dtype=torch.float32),
    }
    with torch.autocast("cpu", torch.bfloat16):
        results.append((full, drafter_loss(**full)))
    for given_, (loss, sums) in results:
        (grad,) = torch.autograd.grad(loss, given_["hidden"])
        assert grad.dtype == given_["hidden"].dtype and sums.loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=0.02)
        assert float((grad - wanted_grad).norm() / wanted_grad.norm()) < 0.02
        assert sums.trained.tolist() == wanted_sums.trained.tolist()


def test_a_kernel_that_cannot_run_is_not_replaced() -> None:
    with pytest.raises(ValueError, match=r'loss\.kernel: got "cuda", which needs CUDA tensors, got cpu'):
        drafter_loss(**make(CASE, torch.float32, "cuda"))


def test_normaliser_is_the_sum_of_the_weights_of_trained_slots() -> None:
    trained = trained_mask(np.array([1, 3, 2], np.int32), 4)
    decay = np.exp(-np.arange(3) / 2.0)
    expected = decay[:1].sum() + decay[:3].sum() + decay[:2].sum()
    assert normaliser(trained, LossSpec("decay", 2.0)) == pytest.approx(expected)
    assert normaliser(trained, LossSpec("dpace")) == 6
    assert normaliser(np.array([[False, True], [True, False]]), LossSpec("decay", 2.0)) == pytest.approx(
        decay[:2].sum()
    )
    assert normaliser(trained[:0], LossSpec()) == 0


def test_kept_slots_are_the_trained_ones() -> None:
    assert kept_slots(trained_mask(np.array([1, 0, 3], np.int32), 4)).tolist() == [1, 9, 10, 11]
    arguments = make(CASE)
    with pytest.raises(ValueError, match=r"hidden has 3 rows, wanted the \d+ trained slots; index by kept_slots"):
        drafter_loss(**{**arguments, "hidden": torch.randn(3, 8, dtype=torch.float64)})


def test_a_row_without_anchors_has_no_loss_and_a_gradient_of_no_rows() -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    labels, trained = torch.zeros(0, 4, dtype=torch.int32), np.zeros((0, 3), bool)
    loss, sums = drafter_loss(hidden, OutputHead(torch.randn(5, 8)), labels, trained, LossSpec(), torch.ones(()))
    loss.backward()
    assert loss.item() == 0 and sums.blocks == 0 and hidden.grad is not None and hidden.grad.shape == (0, 8)


def test_sums_survive_packing() -> None:
    _, sums = drafter_loss(**make({**CASE, "terms": TERMS[4]}))
    packed = sums.packed()
    again = BlockSums.unpacked(packed)
    assert len(packed) == BlockSums.size(4)
    for name in ("loss", "blocks", "compared", "agreed", "terms", "top", "trained", "correct", "accepted"):
        assert torch.equal(getattr(again, name), getattr(sums, name)), name


def test_chunks_that_memory_allows_are_powers_of_two_within_bounds() -> None:
    least, most = CHUNK_SLOTS
    assert fitting_rows(320 << 20, 2 * 151936) == 1024
    assert fitting_rows(320 << 20, 4 * 151936) == 512
    assert fitting_rows(0, 100) == least and fitting_rows(1 << 40, 100) == most
