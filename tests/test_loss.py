"""The chunked loss against plain torch on random shapes: value, gradient, metrics; and its normalisation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_scale.loss import BlockSums, LossSpec, drafter_loss, drafter_loss_reference, normaliser

cases = st.fixed_dictionaries(
    {
        "blocks": st.integers(1, 12),
        "size": st.integers(2, 9),
        "hidden": st.sampled_from([8, 24]),
        "vocab": st.integers(2, 70),
        "weights": st.sampled_from(["decay", "dpace"]),
        "chunk": st.integers(1, 40),
        "seed": st.integers(0, 2**31),
    }
)


def make(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray, LossSpec]:
    torch.manual_seed(case["seed"])
    rng = np.random.default_rng(case["seed"])
    hidden = torch.randn(case["blocks"] * case["size"], case["hidden"], requires_grad=True)
    head = torch.randn(case["vocab"], case["hidden"])
    labels = torch.randint(0, case["vocab"], (case["blocks"], case["size"]), dtype=torch.int32)
    trained = rng.integers(1, case["size"], case["blocks"]).astype(np.int32)
    return hidden, head, labels, trained, LossSpec(case["weights"], 3.0, 0.5, case["chunk"])


@given(cases)
@settings(max_examples=60, deadline=None)
def test_chunked_loss_equals_the_reference(case: dict) -> None:
    hidden, head, labels, trained, spec = make(case)
    scale = torch.tensor(0.37)
    loss, sums = drafter_loss(hidden, head, labels, trained, spec, scale)
    (grad,) = torch.autograd.grad(loss, hidden)
    wanted, wanted_sums = drafter_loss_reference(hidden, head, labels, trained, spec, scale)
    (wanted_grad,) = torch.autograd.grad(wanted, hidden)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-4, atol=1e-5, msg=f"loss of {case}")
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-5, msg=f"gradient of {case}")
    torch.testing.assert_close(sums.packed(), wanted_sums.packed(), rtol=1e-4, atol=1e-4, msg=f"sums of {case}")


@given(cases)
@settings(max_examples=40, deadline=None)
def test_weights_and_metrics_equal_a_loop_over_slots(case: dict) -> None:
    hidden, head, labels, trained, spec = make(case)
    logp = (hidden.detach() @ head.T).double().log_softmax(-1).view(case["blocks"], case["size"], -1)
    total, accepted, correct = 0.0, np.zeros(case["size"] - 1), np.zeros(case["size"] - 1)
    for block in range(case["blocks"]):
        reach, run, prefix = [], 1.0, True
        for slot in range(1, trained[block] + 1):
            label_logp = logp[block, slot, int(labels[block, slot])]
            run *= 0.5 * float(label_logp.exp()) + 0.5
            reach.append(run)
            right = int(logp[block, slot].argmax()) == int(labels[block, slot])
            prefix = prefix and right
            correct[slot - 1] += right
            accepted[slot - 1] += prefix
        for slot in range(1, trained[block] + 1):
            weight = np.exp(-(slot - 1) / 3.0) if spec.weights == "decay" else sum(reach[slot - 1 :])
            total -= weight * float(logp[block, slot, int(labels[block, slot])])
    _, sums = drafter_loss(hidden, head, labels, trained, spec, torch.ones(()))
    assert float(sums.loss) == pytest.approx(total, rel=1e-4, abs=1e-4), case
    assert sums.correct.tolist() == correct.tolist(), case
    assert sums.accepted.tolist() == accepted.tolist(), case
    assert float(sums.blocks) == case["blocks"]


def test_normaliser_is_the_sum_of_the_weights_of_trained_slots() -> None:
    trained = np.array([1, 3, 2], np.int32)
    decay = np.exp(-np.arange(3) / 2.0)
    expected = decay[:1].sum() + decay[:3].sum() + decay[:2].sum()
    assert normaliser(trained, 4, LossSpec("decay", 2.0)) == pytest.approx(expected)
    assert normaliser(trained, 4, LossSpec("dpace")) == 6
    assert normaliser(np.zeros(0, np.int32), 4, LossSpec()) == 0


def test_a_row_without_anchors_has_no_loss_and_a_gradient_of_no_rows() -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    labels, trained = torch.zeros(0, 4, dtype=torch.int32), np.zeros(0, np.int32)
    loss, sums = drafter_loss(hidden, torch.randn(5, 8), labels, trained, LossSpec(), torch.ones(()))
    loss.backward()
    assert loss.item() == 0 and sums.blocks == 0 and hidden.grad is not None and hidden.grad.shape == (0, 8)


def test_sums_survive_packing() -> None:
    hidden, head, labels, trained, spec = make(
        {"blocks": 5, "size": 4, "hidden": 8, "vocab": 11, "weights": "decay", "chunk": 3, "seed": 1}
    )
    _, sums = drafter_loss(hidden, head, labels, trained, spec, torch.ones(()))
    again = BlockSums.unpacked(sums.packed())
    assert torch.equal(again.packed(), sums.packed()) and torch.equal(again.correct, sums.correct)
