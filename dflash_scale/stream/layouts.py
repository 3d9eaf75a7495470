"""What the rows of a run carry of the verifier: layouts by kind of row."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_scale.data.schedule import Row
from dflash_scale.transport.layout import Layout


@dataclass(frozen=True, slots=True)
class RowLayouts:
    """`validation` has every layer of `train`, and the last layer (id = number of layers), which tells whether labels
    and verifier agree."""

    train: Layout
    validation: Layout

    @property
    def taps(self) -> tuple[int, ...]:
        """The aux layers, which the drafter sees."""
        return self.validation.layer_ids[:-1]

    def of(self, row: Row) -> Layout:
        return self.train if row.kind == "train" else self.validation

    @classmethod
    def from_params(cls, params: dict[str, object]) -> RowLayouts:
        """From `dataclasses.asdict`, by way of JSON. Raises WireError."""
        return cls(Layout.from_params(params["train"]), Layout.from_params(params["validation"]))
