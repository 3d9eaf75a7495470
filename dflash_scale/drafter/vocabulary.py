"""The drafter's own, smaller vocabulary: the tokens that the data set's answers use most, and the special ones.

    drafter.vocab_size = 32000
    draft id  0 1 2 ...                 rows of the drafter's head, those of the verifier's head at `ids`
    target id ids[draft id] = draft id + d2t[draft id]

The drafter still reads every token: only its output is pruned. A token outside is one that it can never draft, so
serving accepts nothing from there on: such a slot is not trained, nor are the later slots of its block.

V vocabulary of the verifier · N of the drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Longs = npt.NDArray[np.int64]

D2T = "d2t.npy"  # its file in a checkpoint


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """ids (N,) int64: target ids, ascending. rows: V. coverage: share of the supervised tokens that are inside."""

    ids: Longs
    rows: int
    coverage: float = 1.0

    @property
    def d2t(self) -> Longs:
        """(N,) offsets: target id = draft id + d2t[draft id]."""
        return self.ids - np.arange(len(self.ids))

    @property
    def t2d(self) -> Bools:
        """(V,) True where a target id has a draft id."""
        inside = np.zeros(self.rows, bool)
        inside[self.ids] = True
        return inside

    @property
    def draft_ids(self) -> npt.NDArray[np.int32]:
        """(V,) draft id of a target id, -1 outside."""
        found = np.full(self.rows, -1, np.int32)
        found[self.ids] = np.arange(len(self.ids))
        return found

    @classmethod
    def of_offsets(cls, d2t: Longs, rows: int) -> DraftVocabulary:
        """From `d2t` as a file holds it.

        Raises:
            ValueError: the target ids are not ascending ids below `rows`.
        """
        ids = d2t.astype(np.int64) + np.arange(len(d2t))
        if not len(ids) or ids[0] < 0 or ids[-1] >= rows or (np.diff(ids) <= 0).any():
            raise ValueError(f"d2t: got offsets that are no ascending ids below {rows}, wanted those of an export")
        return cls(ids, rows)


def choose_vocabulary(counts: Longs, special: Sequence[int], size: int) -> DraftVocabulary:
    """The `special` tokens and the most frequent others; of equally frequent ones, the lower ids.

    Args:
        counts: (V,) how often each token is supervised.
        special: target ids that have to be in it, such as the end of an answer.
        size: N.

    Raises:
        ValueError: N is not between the special tokens and V.
    """
    rows = len(counts)
    forced = np.unique([token for token in special if 0 <= token < rows]).astype(np.int64)
    if not max(len(forced), 1) <= size < rows:
        raise ValueError(
            f"drafter.vocab_size: got {size}, wanted at least the {len(forced)} special tokens and less than the "
            f"verifier's {rows}; null keeps the whole vocabulary"
        )
    order = np.argsort(-counts, kind="stable")
    others = order[~np.isin(order, forced)][: size - len(forced)]
    ids = np.sort(np.concatenate([forced, others]))
    return DraftVocabulary(ids, rows, float(counts[ids].sum() / max(counts.sum(), 1)))


def cut_at_unknown(tokens: npt.NDArray[np.int32], trained: npt.NDArray[np.int32], inside: Bools) -> Longs:
    """Slots that are left where a block ends before its first token outside the drafter's vocabulary.

    Args:
        tokens: (A, S) token ids of the slots.
        trained: (A,) slots 1..trained are trained.
        inside: (V,) `DraftVocabulary.t2d`.

    Returns:
        (A,) the same, or less.
    """
    known = inside[tokens[:, 1:]] & (np.arange(1, tokens.shape[1]) <= trained[:, None])
    return known.cumprod(axis=1).sum(axis=1)
