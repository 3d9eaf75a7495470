"""What `stream.mode: "fake"` puts in the place of a verifier and a data set: made up from seeds, so that the training
half of a run can be tried alone, and goes on after a resume as if nothing had been.

V vocabulary of the verifier · H its hidden size.
"""

from __future__ import annotations

from typing import Any, Final

import datasets
import numpy as np
import torch
from torch import Tensor

from dflash_scale.config.sections import DataSection
from dflash_scale.data.dataset import Prepared, PreparedSplit, load_prepared
from dflash_scale.data.dataset_writer import FEATURES
from dflash_scale.verifier.head import VerifierHead
from dflash_scale.verifier.shape import VerifierShape

TRAIN, VALIDATION = 64, 16  # samples
UNSUPERVISED: Final = 2  # tokens of a sample that stand for its question
DATA_SEED, HEAD_SEED = 1, 2


def run_data(data: DataSection, vocab_size: int) -> Prepared:
    """The data set of a run, made up where the configuration names none. Raises ValueError for a folder without one."""
    return fake_data(vocab_size, data.row_tokens) if data.path is None else load_prepared(data.path)


def fake_data(vocab_size: int, row_tokens: int) -> Prepared:
    """Samples that count upwards from a token of their own, an eighth to half a row long: easy to learn."""
    rng = np.random.default_rng(DATA_SEED)
    lengths = rng.integers(max(4, row_tokens // 8), max(5, row_tokens // 2), TRAIN + VALIDATION)
    starts = rng.integers(0, vocab_size, TRAIN + VALIDATION)
    samples = [_sample(int(start), int(length), vocab_size) for start, length in zip(starts, lengths, strict=True)]
    manifest = {"fingerprint": f"made up, {vocab_size} {row_tokens}", "longest": int(lengths.max())}
    return Prepared(_split(samples[:TRAIN]), _split(samples[TRAIN:]), manifest)


def _sample(start: int, length: int, vocab_size: int) -> dict[str, Any]:
    at = np.arange(length)
    counting = (start + at) % (vocab_size - 1)  # the last token is left for the mask slots
    return {"input_ids": counting.astype(np.int32), "loss_mask": (at >= UNSUPERVISED).astype(np.int8)}


def _split(samples: list[dict[str, Any]]) -> PreparedSplit:
    return PreparedSplit(datasets.Dataset.from_list(samples, features=FEATURES).data)


def fake_head(shape: VerifierShape, dtype: torch.dtype, device: torch.device) -> VerifierHead:
    """Random embedding and head, (V, H) each, the same numbers in every dtype; a norm that scales nothing."""
    generator = torch.Generator(device).manual_seed(HEAD_SEED)

    def matrix() -> Tensor:
        drawn = torch.randn(shape.vocab_size, shape.hidden_size, device=device, generator=generator)
        return (drawn * shape.hidden_size**-0.5).to(dtype)

    embedding = matrix()
    norm = torch.nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps, device=device, dtype=dtype)
    return VerifierHead(embedding, norm, embedding if shape.tie_word_embeddings else matrix())
