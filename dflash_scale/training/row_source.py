"""Where the rows of a rank come from: one seam between training and everything that makes hidden states.

`loader.RingSource` takes them from the ring that the node's receiver fills, whatever the receiver gets them from:
servers, a cache, or both. `FakeSource` draws them at random, on the rank itself. A source follows the rank's row
schedule and knows nothing of tokens, anchors and loss: the trainer plans each row itself (`blocks.plan_row`).

T tokens in use in a row · L verifier layers in its layout · H the verifier's hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dflash_scale.data.schedule import Row
from dflash_scale.receiver.layouts import RowLayouts


@dataclass(frozen=True, slots=True)
class RowStates:
    """The hidden states of one row: (T, L, H) on the training device, gone when the next row is asked for."""

    row: Row
    states: Tensor
    quarantined: tuple[int, ...] = ()  # samples that no server could answer; their states are zeros

    @property
    def usable(self) -> list[int]:
        """The row's samples that are not quarantined."""
        return [place.sample for place in self.row.places if place.sample not in self.quarantined]


class RowSource(Protocol):
    """Gives a rank its rows, in the order of the schedule. One thread calls it."""

    def wait(self, seconds: float) -> bool:
        """Whether `next` would return or raise at once; waits for that at most this long."""
        ...

    def next(self) -> RowStates | None:
        """The next row, None behind the last one. Raises what keeps the source from going on."""
        ...

    def status(self) -> list[dict[str, Any]]:
        """How the servers behind the source do, one dictionary each, for the metrics."""
        ...

    def close(self) -> None:
        """Ends what the source has started; rows that were not asked for are dropped."""
        ...


class FakeSource:
    """Rows of random hidden states: a sample has the same ones in every epoch and after every resume.

    Args:
        rows: the rows of this rank, in the order it trains them.
        layouts: layers, hidden size and dtype of either kind of row.
        device: where the states are drawn; another kind of device draws others.
    """

    def __init__(self, rows: Iterator[Row], layouts: RowLayouts, device: torch.device) -> None:
        self._rows = rows
        self._layouts = layouts
        self._device = device

    def wait(self, seconds: float) -> bool:
        return True

    def next(self) -> RowStates | None:
        row = next(self._rows, None)
        return None if row is None else RowStates(row, self._states(row))

    def _states(self, row: Row) -> Tensor:
        whole, layers = self._layouts.validation, len(self._layouts.of(row).layer_ids)
        size, dtype = (len(whole.layer_ids), whole.hidden_size), getattr(torch, whole.dtype)
        states = torch.empty(row.tokens, layers, whole.hidden_size, dtype=dtype, device=self._device)
        for place in row.places:
            generator = torch.Generator(self._device).manual_seed(place.sample)
            drawn = torch.randn(place.length, *size, dtype=dtype, device=self._device, generator=generator)
            states[place.start : place.start + place.length] = drawn[:, :layers]  # training rows lack the last one
        return states

    def status(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        return
