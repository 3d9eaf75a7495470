"""What is trained when: the row schedule.

Samples are packed once, first fit, into rows of at most T tokens; every epoch shuffles the rows. The schedule is a pure
function of the data set and the configuration: every rank and the receiver compute the same one, so nothing is
negotiated while a run goes on, every rank has the same number of micro-steps, and a resumed run continues at a step
number alone. A step holds the same rows on any number of ranks.

T tokens in a packed row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from dflash_scale.data.dataset import Ints, Samples
from dflash_scale.data.quarantine import read_exclusion

if TYPE_CHECKING:
    from dflash_scale.config.run import Config

Kind = Literal["train", "validation"]
OPEN_ROWS = 64  # rows that first fit looks at; bounds the packing to O(samples), at a cost below 1 % of fill


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies in a row: `length` tokens from `start`."""

    sample: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Row:
    """One row of one rank. `step` counts from 1; a validation row's `epoch` is the step it follows."""

    kind: Kind
    epoch: int
    step: int
    micro: int
    places: tuple[Place, ...]

    @property
    def tokens(self) -> int:
        """T: the samples lie one after the other, so all tokens up to the last one are in use."""
        return sum(place.length for place in self.places)


def pack(samples: Iterable[int], lengths: Ints, row_tokens: int) -> list[tuple[Place, ...]]:
    """Packs samples, first fit, into rows of at most `row_tokens` tokens.

    Raises:
        ValueError: a sample is longer than a row.
    """
    done: list[tuple[Place, ...]] = []
    opened: list[tuple[int, list[Place]]] = []  # (tokens used, places)
    for sample in samples:
        length = int(lengths[sample])
        if length > row_tokens:
            raise ValueError(
                f"sample {sample} has {length} tokens, more than data.row_tokens = {row_tokens}: "
                "raise data.row_tokens or prepare the data set with a smaller --max-tokens"
            )
        for slot, (used, places) in enumerate(opened):
            if used + length <= row_tokens:
                places.append(Place(sample, used, length))
                opened[slot] = (used + length, places)
                break
        else:
            if len(opened) == OPEN_ROWS:
                fullest = max(range(OPEN_ROWS), key=lambda slot: opened[slot][0])
                done.append(tuple(opened.pop(fullest)[1]))
            opened.append((length, [Place(sample, 0, length)]))
    return done + [tuple(places) for _, places in opened]


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """What the schedule depends on, with the samples' lengths. `max_steps` None: all epochs · excluded: samples that
    are left out."""

    row_tokens: int
    rows_per_step: int
    world_size: int
    seed: int
    epochs: int
    max_steps: int | None
    validate_every: int
    excluded: frozenset[int] = frozenset()


def schedule_spec(config: Config, world_size: int) -> ScheduleSpec:
    """What a run's configuration says of the schedule; ranks and receiver must both ask here. Raises ValueError."""
    train = config.train
    return ScheduleSpec(
        row_tokens=config.data.row_tokens,
        rows_per_step=train.rows_per_step,
        world_size=world_size,
        seed=train.seed,
        epochs=train.epochs,
        max_steps=train.max_steps,
        validate_every=train.validate_every,
        excluded=read_exclusion(config.data.exclude).samples,
    )


class RowSchedule:
    """The rows of every rank, in the order in which it consumes them."""

    def __init__(self, samples: Samples, spec: ScheduleSpec) -> None:
        if spec.rows_per_step % spec.world_size:
            raise ValueError(
                f"train.rows_per_step = {spec.rows_per_step} is not a multiple of the {spec.world_size} ranks: "
                "every rank trains the same number of rows in a step; change one of the two"
            )
        self.spec = spec
        order = np.random.default_rng((spec.seed, 0)).permutation(samples.train_count)
        shuffled = [sample for sample in order.tolist() if sample not in spec.excluded]
        self._train = pack(shuffled, samples.lengths, spec.row_tokens)
        validation = [i for i in range(samples.train_count, len(samples.lengths)) if i not in spec.excluded]
        self._validation = pack(validation, samples.lengths, spec.row_tokens)
        if not self._train:
            raise ValueError("the data set has no training sample: prepare one with `dflash-scale prepare`")
        self.micros = spec.rows_per_step // spec.world_size
        self.steps_per_epoch = -(-len(self._train) // spec.rows_per_step)
        every = spec.epochs * self.steps_per_epoch
        self.total_steps = every if spec.max_steps is None else min(every, spec.max_steps)
        self.validation_micros = -(-len(self._validation) // spec.world_size)
        self._row_order = lru_cache(maxsize=2)(self._shuffle_rows)

    def _shuffle_rows(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((self.spec.seed, 1, epoch)).permutation(len(self._train))

    def validates_after(self, step: int) -> bool:
        """Whether validation follows the optimizer step `step`; it always follows the last one."""
        every = self.spec.validate_every
        return every > 0 and self.validation_micros > 0 and (step % every == 0 or step == self.total_steps)

    def train_rows(self, rank: int, step: int) -> list[Row]:
        """The rows of one rank in one optimizer step (1-based), one per micro-step; the last step of an epoch may
        hold empty rows, so that every sample is trained and no rank has fewer micro-steps than another."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        first, last = within * self.spec.rows_per_step, (within + 1) * self.spec.rows_per_step
        mine = self._row_order(epoch)[first:last][rank :: self.spec.world_size]
        return self._rows("train", epoch, step, [self._train[index] for index in mine], self.micros)

    def validation_rows(self, rank: int, step: int) -> list[Row]:
        """The validation rows of one rank after the optimizer step `step`; the same rows every time."""
        mine = self._validation[rank :: self.spec.world_size]
        return self._rows("validation", step, step, mine, self.validation_micros)

    @staticmethod
    def _rows(kind: Kind, epoch: int, step: int, packed: list[tuple[Place, ...]], count: int) -> list[Row]:
        """`count` rows, the last of them empty where fewer are packed."""
        padded = [*packed, *[()] * (count - len(packed))]
        return [Row(kind, epoch, step, micro, places) for micro, places in enumerate(padded)]

    def rows(self, rank: int, first_step: int = 1) -> Iterator[Row]:
        """All rows of one rank from the optimizer step `first_step` on, in the order it consumes them."""
        for step in range(first_step, self.total_steps + 1):
            yield from self.train_rows(rank, step)
            if self.validates_after(step):
                yield from self.validation_rows(rank, step)
