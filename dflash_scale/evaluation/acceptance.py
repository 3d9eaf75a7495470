"""Counts of speculative decoding, counted as vLLM counts them, so that figures from every source compare.

S block size; a step verifies S-1 drafts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Sums over verify steps (vLLM, v1/spec_decode/metrics.py `SpecDecodingStats`).

    drafts: steps that verified drafts. draft_tokens: drafts in them. accepted: of those, accepted. per_position (S-1,):
    steps in which at least that many were accepted.

    A step that reaches the end of the answer counts in full: vLLM's scheduler adds a step's accepted tokens before it
    cuts the answer at max_tokens or after the end-of-sequence token (v1/core/sched/scheduler.py,
    `update_from_output`), so accepted may exceed what the answer shows.
    """

    drafts: int
    draft_tokens: int
    accepted: int
    per_position: tuple[int, ...]

    @classmethod
    def of(cls, accepted: Iterable[int], slots: int) -> Acceptance:
        """From the number of accepted drafts of every step; each drafted `slots` = S-1 tokens."""
        counts = list(accepted)
        reached = tuple(sum(count > position for count in counts) for position in range(slots))
        return cls(len(counts), slots * len(counts), sum(counts), reached)

    def __sub__(self, other: Acceptance) -> Acceptance:
        reached = tuple(a - b for a, b in zip(self.per_position, other.per_position, strict=True))
        return Acceptance(
            self.drafts - other.drafts,
            self.draft_tokens - other.draft_tokens,
            self.accepted - other.accepted,
            reached,
        )

    @property
    def length(self) -> float:
        """Acceptance length: accepted drafts per step, and the bonus token."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @property
    def rates(self) -> tuple[float, ...]:
        """(S-1,) share of steps in which that position was accepted."""
        return tuple(count / self.drafts if self.drafts else 0.0 for count in self.per_position)

    def gap(self, other: Acceptance) -> float:
        """The largest difference between the two's rates at any position, in percentage points."""
        return 100 * max(abs(a - b) for a, b in zip(self.rates, other.rates, strict=True))
