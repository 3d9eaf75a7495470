"""The books of a run: each sample of an epoch was trained once, or is named as quarantined.

What was to be trained is computed from the schedule; what was, is read from the ledger as it lies on the disk, which
goes over all resumptions of a run.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_scale.data.schedule import RowSchedule

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Balance:
    """Samples of one rank in some steps. The books balance when none is missing and none came too often."""

    wanted: int
    trained: int
    quarantined: int
    missing: int  # in no line
    surplus: int  # a second time, or in a step that does not want them


def balance(schedule: RowSchedule, rank: int, last_step: int, ledger: Path) -> Balance:
    """Compares a rank's ledger with the schedule, over the epoch of `last_step` and no further than that."""
    steps = range((last_step - 1) // schedule.steps_per_epoch * schedule.steps_per_epoch + 1, last_step + 1)
    wanted: Counter[tuple[int, int]] = Counter()
    for step in steps:
        wanted.update((step, place.sample) for row in schedule.train_rows(rank, step) for place in row.places)
    found: Counter[tuple[int, int]] = Counter()
    trained = quarantined = 0
    for line in _lines(ledger):
        if line["step"] in steps:
            trained += len(line["samples"])
            quarantined += len(line["quarantined"])
            found.update((line["step"], sample) for sample in [*line["samples"], *line["quarantined"]])
    return Balance(wanted.total(), trained, quarantined, (wanted - found).total(), (found - wanted).total())


def report(step: int, books: Balance) -> int:
    """Logs the books of all ranks after a step; gives how many samples ledger and schedule disagree on."""
    text = (
        f"step {step} ends an epoch: {books.wanted} samples, {books.trained} trained, {books.quarantined} quarantined"
    )
    if books.missing or books.surplus:
        log.error("%s; the books do not balance: %d missing, %d too often", text, books.missing, books.surplus)
    else:
        log.info("%s; the books balance", text)
    return books.missing + books.surplus


def _lines(ledger: Path) -> Iterator[dict[str, Any]]:
    with ledger.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
