"""The drafter's pruned vocabulary: what is in it, what is not trained, and what an exported folder says of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dflash_scale.config.run import parse_config
from dflash_scale.data.dataset import Samples
from dflash_scale.data.schedule import Row, pack
from dflash_scale.drafter.blocks import AnchorSpec, RowPlan, plan_row
from dflash_scale.drafter.heads import OutputHead
from dflash_scale.drafter.pretrained import export_drafter, load_drafter, load_output
from dflash_scale.drafter.vocabulary import DraftVocabulary, choose_vocabulary
from dflash_scale.evaluation.speculative import GreedyVerifier, speculate
from dflash_scale.training.loss import LossSpec, drafter_loss, kept_slots, normaliser, trained_mask
from dflash_scale.verifier.layers import causal_model
from tests.support.drafters import HIDDEN, KEPT, VOCABULARY, make_drafter, make_spec, make_verifier


@pytest.fixture
def verifier(tmp_path: Path) -> Path:
    return make_verifier(tmp_path / "verifier")


def test_the_most_frequent_and_the_special_ones() -> None:
    counts = np.array([5, 0, 9, 9, 1, 0, 7, 9])
    chosen = choose_vocabulary(counts, [5, 5, 99], 4)
    assert chosen.ids.tolist() == [2, 3, 5, 7]  # of three nines all, and token 5 although nobody said it
    assert chosen.coverage == pytest.approx(27 / 40)
    assert choose_vocabulary(counts, [5], 3).ids.tolist() == [2, 3, 5]  # equally frequent: the lower ids
    for size, special in ((1, [0, 5]), (8, [])):
        with pytest.raises(ValueError, match=r"drafter\.vocab_size: got"):
            choose_vocabulary(counts, special, size)


def test_maps_are_those_of_the_speculators_convention() -> None:
    chosen = DraftVocabulary(KEPT, VOCABULARY)
    for draft, target in enumerate(KEPT):
        assert draft + chosen.d2t[draft] == target
        assert chosen.draft_ids[target] == draft
    assert chosen.t2d.nonzero()[0].tolist() == KEPT.tolist()
    assert (chosen.draft_ids[~chosen.t2d] == -1).all()
    assert (chosen.d2t.dtype, chosen.t2d.dtype) == (np.int64, bool)
    assert DraftVocabulary.of_offsets(chosen.d2t, VOCABULARY).ids.tolist() == KEPT.tolist()
    for bad in (np.array([5, 3]), np.array([0, 200]), np.zeros(0, np.int64)):
        with pytest.raises(ValueError, match="d2t"):
            DraftVocabulary.of_offsets(bad, VOCABULARY)


class Documents:
    def __init__(self, count: int) -> None:
        self.lengths = np.full(count, 20, np.int32)

    def tokens(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 12, 20).astype(np.int32)

    def loss_mask(self, index: int) -> np.ndarray:
        return np.random.default_rng((1, index)).random(20) < 0.9


def plans(inside: np.ndarray | None) -> RowPlan:
    samples = Samples(Documents(6), Documents(0))
    row = Row("train", 0, 1, 0, pack(range(6), samples.lengths, 200)[0])
    return plan_row(row, samples, AnchorSpec(block_size=5, per_document=9, seed=3, inside=inside))


def test_a_block_ends_before_its_first_token_outside() -> None:
    vocabulary = DraftVocabulary(np.array([0, 1, 2, 3, 5, 8, 9, 10]), 12)
    whole, pruned = plans(None), plans(vocabulary.t2d)
    assert np.array_equal(whole.anchors, pruned.anchors)
    tokens, lost = np.concatenate([Documents(6).tokens(place.sample) for place in whole.row.places]), 0
    for index, anchor in enumerate(whole.anchors):
        reach = 0
        while reach < whole.trained[index] and tokens[anchor + reach + 1] in vocabulary.ids:
            reach += 1
        assert pruned.trained[index] == reach
        lost += whole.trained[index] - reach
        assert pruned.block_tokens[index].tolist() == [*whole.block_tokens[index, : reach + 1], *[0] * (4 - reach)]
    assert pruned.outside == lost > 0 and (pruned.trained == 0).any() and whole.outside == 0


def test_the_loss_is_that_of_the_kept_rows() -> None:
    """Loop over slots with the whole head: softmax over the kept rows, acceptance ends at the first one outside."""
    vocabulary = DraftVocabulary(np.array([0, 1, 2, 3, 5, 8, 9, 10]), 12)
    plan = plans(vocabulary.t2d)
    torch.manual_seed(0)
    spec, (count, size) = LossSpec(gamma=4.0), plan.block_tokens.shape
    hidden, head = torch.randn(count * size, 16), torch.randn(12, 16)
    output = OutputHead.pruned(head, vocabulary)
    labels = output.labels(torch.from_numpy(plan.block_tokens))
    mask = trained_mask(plan.trained, size)
    loss, sums = drafter_loss(hidden[kept_slots(mask)], output, labels, mask, spec, torch.ones(()))
    wanted, accepted, z = 0.0, 0, 0.0
    for block in range(count):
        right = True
        for slot in range(1, plan.trained[block] + 1):
            logits = hidden[block * size + slot] @ head.T
            logits[[t for t in range(12) if t not in vocabulary.ids]] = -torch.inf
            target = int(plan.block_tokens[block, slot])
            weight = float(np.exp(-(slot - 1) / 4.0))
            wanted, z = wanted + weight * float(F.cross_entropy(logits, torch.tensor(target))), z + weight
            right = right and int(logits.argmax()) == target
            accepted += right
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert int(sums.accepted.sum()) == accepted and int(sums.blocks) == count
    assert normaliser(mask, spec) == pytest.approx(z)


def test_a_pruned_head_says_what_the_whole_one_says_of_its_rows() -> None:
    chosen, weight = DraftVocabulary(KEPT, VOCABULARY), torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)
    whole, pruned = OutputHead.pruned(weight, None), OutputHead.pruned(weight, chosen)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    logits = whole.logits(hidden)
    assert whole.kept(logits) is logits and whole.state() == {} and OutputHead.of_state({}, VOCABULARY) is None
    torch.testing.assert_close(pruned.kept(logits), pruned.logits(hidden))
    (wanted,) = torch.autograd.grad(logits[:, KEPT].square().sum() / 2, hidden)
    torch.testing.assert_close(pruned.hidden_grad(pruned.logits(hidden)), wanted)
    assert pruned.greedy(hidden).tolist() == [KEPT[i] for i in logits[:, KEPT].argmax(1)]
    assert pruned.labels(torch.tensor([[KEPT[2], 1]])).tolist() == [[2, -1]]
    again = OutputHead.of_state(pruned.state(), VOCABULARY)
    assert again is not None and again.ids is not None and again.draft_ids is not None
    assert again.ids.tolist() == KEPT.tolist() and again.draft_ids.tolist() == chosen.draft_ids.tolist()
    with pytest.raises(ValueError, match=r"got 7 rows of lm_head for 8 of d2t"):
        OutputHead.of_rows(weight[:7], chosen)


def test_export_holds_rows_and_maps(tmp_path: Path, verifier: Path) -> None:
    spec, chosen = make_spec(), DraftVocabulary(KEPT, VOCABULARY)
    state = make_drafter(spec).state_dict()
    folder = export_drafter(state, spec, str(verifier), tmp_path / "drafter", vocabulary=chosen)
    tensors, content = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    head = load_file(verifier / "model.safetensors")["lm_head.weight"]
    assert content["draft_vocab_size"] == len(KEPT)
    assert content["transformer_layer_config"]["vocab_size"] == VOCABULARY
    assert tensors["lm_head.weight"].shape == (len(KEPT), HIDDEN)
    for draft in range(len(KEPT)):
        target = draft + int(tensors["d2t"][draft])
        assert target == KEPT[draft] and bool(tensors["t2d"][target])
        assert torch.equal(tensors["lm_head.weight"][draft], head[target])
    assert tensors["t2d"].sum() == len(KEPT) and tensors["t2d"].shape == (VOCABULARY,)
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    loaded = load_drafter(folder)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    whole = export_drafter(state, spec, str(verifier), tmp_path / "whole")
    assert load_output(whole) is None
    with pytest.raises(ValueError, match="got a verifier of 96 tokens, wanted 97"):
        export_drafter(state, spec, str(verifier), tmp_path / "other", vocabulary=replace(chosen, rows=97))


def test_decoding_drafts_target_ids(tmp_path: Path, verifier: Path) -> None:
    """A drafter can only say what it kept; what it says is what the whole head says, the others masked."""
    spec, chosen = make_spec(), DraftVocabulary(KEPT, VOCABULARY)
    drafter = make_drafter(spec)
    folder = export_drafter(drafter.state_dict(), spec, str(verifier), tmp_path / "drafter", vocabulary=chosen)
    reader = GreedyVerifier(causal_model(str(verifier), torch.float32), spec.layer_ids, load_output(folder))
    hidden = torch.randn(50, HIDDEN)
    masked = (hidden @ reader.model.get_output_embeddings().weight.T).detach()
    masked[:, ~torch.from_numpy(chosen.t2d)] = -torch.inf
    assert torch.equal(reader.head.greedy(hidden), masked.argmax(-1))
    trace = speculate(reader, drafter.eval(), [1, 2, 3], 12)
    plain = GreedyVerifier(reader.model, spec.layer_ids).greedy([1, 2, 3], 12)
    assert list(trace.output) == plain


def test_labels_that_only_the_step_knows_are_refused() -> None:
    base = {"verifier": {"model": "m"}, "data": {"path": "d"}, "drafter": {"vocab_size": 100}}
    assert parse_config(base).drafter.vocab_size == 100
    with pytest.raises(ValueError, match=r"loss\.labels: got \"verifier\" with drafter\.vocab_size = 100"):
        parse_config({**base, "loss": {"labels": "verifier"}})
