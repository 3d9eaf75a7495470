"""The packed rows that bench_train.py trains on, the drafter of each, and the arithmetic that a row cannot do without.

T tokens in a packed row · A anchors in it · S block size · N trained slots · L aux layers · H hidden size ·
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config

from benchmarks.attention_problems import BACKWARD_FLOP, visible_pairs
from dflash_scale.drafter.model import Drafter, DrafterSpec
from dflash_scale.ops.attention_plan import build_plan
from dflash_scale.ops.softmax_loss import term_weights
from dflash_scale.training.loss import LossSpec, VerifierStates, kept_slots, trained_mask

MASK_TOKEN = 1


@dataclass(frozen=True)
class Case:
    """A row of documents of one length, `anchors` drawn from each, or one from each token with a successor if it has
    fewer; `term` is the loss; `recompute` is activation checkpointing. The defaults are Qwen3-8B's."""

    name: str
    documents: int = 1
    anchors: int = 512
    tokens: int = 8192
    term: str = "ce"
    dtype: str = "bfloat16"
    hidden: int = 4096
    inner: int = 12288
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 5
    aux_layers: int = 5
    vocabulary: int = 151936
    block: int = 16
    recompute: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def loss(self, kernel: str) -> LossSpec:
        return LossSpec(terms=term_weights({self.term: 1.0}), kernel=kernel)


GPU_CASES = (
    Case("1 document"),
    Case("1 document, kl", term="kl"),
    Case("3 documents", documents=3),
    Case("12 documents", documents=12),
    Case("12 documents, recomputed", documents=12, recompute=True),
    Case("1 document, 1024 anchors", anchors=1024),
)
SMALL: dict[str, Any] = dict(hidden=64, inner=128, heads=4, kv_heads=2, head_dim=32, layers=2, aux_layers=2)
SMALL |= {"vocabulary": 1024, "block": 8}
CPU_CASES = (
    Case("1 document, float32", 1, 32, 256, dtype="float32", **SMALL),
    Case("1 document, kl, float32", 1, 32, 256, "kl", dtype="float32", **SMALL),
    # Of 16 tokens: fewer than the anchors that a padded row holds of each.
    Case("4 documents, float32", 4, 24, 64, dtype="float32", **SMALL),
    Case("1 document, bfloat16", 1, 32, 256, **SMALL),
    Case("1 document, recomputed, bfloat16", 1, 32, 256, recompute=True, **SMALL),
    Case("4 documents, kl, bfloat16", 4, 24, 64, "kl", **SMALL),
)


@dataclass(frozen=True)
class Row:
    """states (T, L*H) and last (T, H), the verifier's · positions, doc_ids (T,) int32 · anchors (A,) int32 · labels
    (A, S) int32, the first of each being the anchor's token · trained (A, S-1) on the CPU · kept (N,) int64."""

    states: Tensor
    last: Tensor
    positions: Tensor
    doc_ids: Tensor
    anchors: Tensor
    labels: Tensor
    trained: np.ndarray[Any, Any]
    kept: Tensor

    def verifier(self, head: Tensor) -> VerifierStates:
        return VerifierStates(self.last, self.anchors.cpu().numpy(), lambda states: states @ head.T)


def make_row(case: Case, device: str) -> Row:
    draw = np.random.default_rng(0)
    doc_ids = np.arange(case.tokens) * case.documents // case.tokens
    starts = np.searchsorted(doc_ids, np.arange(case.documents))
    ends = np.append(starts[1:], case.tokens)
    # The last token of a document has no successor to predict.
    drawn = [
        start + np.sort(draw.choice(end - 1 - start, min(case.anchors, end - 1 - start), replace=False))
        for start, end in zip(starts, ends, strict=True)
    ]
    anchors = np.concatenate(drawn).astype(np.int32)
    reach = ends[doc_ids[anchors]] - 1 - anchors
    trained = trained_mask(np.minimum(reach, case.block - 1).astype(np.int32), case.block)
    numbers = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "generator": numbers}
    shape = (len(anchors), case.block)
    return Row(
        states=torch.randn(case.tokens, case.aux_layers * case.hidden, dtype=case.torch_dtype, **options),
        last=torch.randn(case.tokens, case.hidden, dtype=case.torch_dtype, **options),
        positions=torch.from_numpy((np.arange(case.tokens) - starts[doc_ids]).astype(np.int32)).to(device),
        doc_ids=torch.from_numpy(doc_ids.astype(np.int32)).to(device),
        anchors=torch.from_numpy(anchors).to(device),
        labels=torch.randint(0, case.vocabulary, shape, dtype=torch.int32, **options),
        trained=trained,
        kept=torch.from_numpy(kept_slots(trained)).to(device),
    )


def padded(row: Row, anchors: int) -> Row:
    """The row with so many anchors. Those added stand at its first token, where they see no context, and train nothing;
    in front, because anchors ascend."""
    more = anchors - len(row.anchors)
    trained = np.concatenate([np.zeros((more, row.trained.shape[1]), bool), row.trained])
    return replace(
        row,
        anchors=torch.cat([row.anchors.new_zeros(more), row.anchors]),
        labels=torch.cat([row.labels.new_zeros(more, row.labels.shape[1]), row.labels]),
        trained=trained,
        kept=row.kept + more * row.labels.shape[1],
    )


def drafter_spec(case: Case) -> DrafterSpec:
    layers = Qwen3Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.inner,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        layer_types=["full_attention"] * case.layers,
        tie_word_embeddings=False,
    )
    return DrafterSpec(layers, tuple(range(case.aux_layers)), case.hidden, case.block, MASK_TOKEN)


def make_drafter(case: Case, backend: str, pointwise: str, device: str) -> Drafter:
    """Drawn as `Drafter.initialise` draws, but on the device: a billion numbers take a CPU long."""
    with torch.device(device):
        drafter = Drafter(drafter_spec(case), backend, pointwise, recompute=case.recompute)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() == 2:
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
    return drafter.to(case.torch_dtype)


def make_ends(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """The verifier's embedding and head, (V, H) each."""
    generator = torch.Generator(device).manual_seed(2)
    options: dict[str, Any] = {"device": device, "dtype": case.torch_dtype}
    embedding = torch.empty(case.vocabulary, case.hidden, **options).normal_(generator=generator)
    bound = case.hidden**-0.5
    head = torch.empty(case.vocabulary, case.hidden, **options).uniform_(-bound, bound, generator=generator)
    return embedding, head


def row_flop(case: Case, row: Row) -> dict[str, float]:
    """Forward and backward of one row, by part: what the definition asks for, with no product done twice.

    A product's backward is two products: of its weights' gradient and of its input's. The states have no gradient and
    the head has none. Attention counts the pairs that the mask lets through.
    """
    slots, kept = row.labels.numel(), len(row.kept)
    queries, keys = case.heads * case.head_dim, case.kv_heads * case.head_dim
    every = slots * case.hidden * (queries + 2 * keys) + case.tokens * case.hidden * 2 * keys
    after = queries * case.hidden + 3 * case.hidden * case.inner  # what follows the attention, of one slot
    products = case.layers * every + ((case.layers - 1) * slots + kept) * after
    plan = build_plan(row.anchors, row.doc_ids, block_size=case.block)
    attention = 4.0 * case.head_dim * case.heads * visible_pairs(plan) * case.layers
    return {
        "products": 3 * 2.0 * products,
        "fc": 2 * 2.0 * case.tokens * case.aux_layers * case.hidden * case.hidden,
        "attention": (1 + BACKWARD_FLOP) * attention,
        "head": 2.0 * (2 * kept + verifier_positions(case, row)) * case.hidden * case.vocabulary,
    }


def verifier_positions(case: Case, row: Row) -> int:
    """The different positions whose verifier's logits the loss needs."""
    if not case.loss("auto").soft:
        return 0
    block, slot = np.nonzero(row.trained)
    return len(np.unique(row.anchors.cpu().numpy()[block] + slot))
