"""The drafter's output: from its hidden states to logits over its vocabulary, and to the tokens that it drafts.

Training, decoding and export have no head but this one. It is the verifier's, frozen: no optimizer sees it, and the
loss gives a gradient to the hidden states alone.

N hidden states · H their size · V rows of the head, the drafter's vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_scale.drafter.vocabulary import DraftVocabulary


@dataclass(frozen=True, slots=True)
class OutputHead:
    """The rows of the verifier's LM head that the drafter keeps.

    weight: (V, H). ids: (V,) int64, the target id of each row; draft_ids: the row of each target id, int32, -1 outside;
    both None where all rows are kept.
    """

    weight: Tensor
    ids: Tensor | None = None
    draft_ids: Tensor | None = None

    @classmethod
    def pruned(cls, weight: Tensor, vocabulary: DraftVocabulary | None) -> OutputHead:
        """From the verifier's whole `weight` what a vocabulary keeps of it; all of it, not copied, for None."""
        if vocabulary is None:
            return cls(weight)
        return cls.of_rows(weight[torch.from_numpy(vocabulary.ids).to(weight.device)], vocabulary)

    @classmethod
    def of_rows(cls, weight: Tensor, vocabulary: DraftVocabulary) -> OutputHead:
        """From the rows that a vocabulary kept; raises ValueError unless there is one for each of its tokens."""
        if len(weight) != len(vocabulary.ids):
            raise ValueError(f"got {len(weight)} rows of lm_head for {len(vocabulary.ids)} of d2t, wanted one each")
        maps = (torch.from_numpy(array).to(weight.device) for array in (vocabulary.ids, vocabulary.draft_ids))
        return cls(weight, *maps)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], rows: int) -> OutputHead | None:
        """The inverse of `state`, for a verifier of `rows` tokens; None where it holds no head of its own."""
        if "d2t" not in state:
            return None
        return cls.of_rows(state["lm_head.weight"], DraftVocabulary.of_offsets(state["d2t"].numpy(), rows))

    def state(self) -> dict[str, Tensor]:
        """What an exported folder holds of it, as vLLM reads it: of a whole head nothing; of a pruned one its rows, d2t
        (V,) int64 and t2d (verifier's rows,) bool."""
        if self.ids is None or self.draft_ids is None:
            return {}
        offsets = self.ids - torch.arange(len(self.ids), device=self.ids.device)
        return {"lm_head.weight": self.weight, "d2t": offsets, "t2d": self.draft_ids >= 0}

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> OutputHead:
        """The same on another device, or with weights of another dtype."""
        maps = (None if ids is None else ids.to(device) for ids in (self.ids, self.draft_ids))
        return OutputHead(self.weight.to(device, dtype), *maps)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the logits."""
        return self.weight.dtype

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, H) of the head's dtype -> (N, V), into `out` where it is given."""
        return torch.mm(hidden, self.weight.T, out=out)

    def hidden_grad(self, logits_grad: Tensor) -> Tensor:
        """The backward of `logits`: (N, V) -> (N, H)."""
        return logits_grad @ self.weight

    def greedy(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N,) target ids of the largest logits."""
        rows = self.logits(hidden).argmax(-1)
        return rows if self.ids is None else self.ids[rows]

    def labels(self, tokens: Tensor) -> Tensor:
        """Target ids of any shape as rows of the logits, -1 where none is."""
        return tokens if self.draft_ids is None else self.draft_ids[tokens.long()]

    def kept(self, logits: Tensor) -> Tensor:
        """(n, verifier's vocabulary) -> (n, V): the verifier's logits of the tokens that the drafter has."""
        return logits if self.ids is None else logits.index_select(1, self.ids)
