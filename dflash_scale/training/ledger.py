"""The ledger of a run: which samples each rank trained, line by line, and whether each one was trained exactly once.

An append-only file of one JSON object a line with a `step`. A resumed run first drops the lines of steps that its
checkpoint does not hold, so that the file never counts a step twice. What was to be trained is computed from the
schedule; what was, is read from the ledger as it lies on the disk, which goes over all resumptions of a run.
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
from dflash_scale.files import write_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EpochCount:
    """Samples of one rank in some steps. Every sample is accounted for when none is missing and none is surplus."""

    wanted: int
    trained: int
    quarantined: int
    missing: int  # in no line
    surplus: int  # a second time, or in a step that does not want them


def count_epoch(schedule: RowSchedule, rank: int, last_step: int, ledger: Path) -> EpochCount:
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
    return EpochCount(wanted.total(), trained, quarantined, (wanted - found).total(), (found - wanted).total())


def report_epoch(step: int, count: EpochCount) -> int:
    """Logs the count of all ranks after a step; gives how many samples ledger and schedule disagree on."""
    text = (
        f"step {step} ends an epoch: {count.wanted} samples, {count.trained} trained, {count.quarantined} quarantined"
    )
    if count.missing or count.surplus:
        unaccounted = "%s; %d samples of this epoch are unaccounted for, %d were trained twice or in another step"
        log.error(unaccounted, text, count.missing, count.surplus)
    else:
        log.info("%s; every sample is accounted for", text)
    return count.missing + count.surplus


def _lines(ledger: Path) -> Iterator[dict[str, Any]]:
    with ledger.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of later steps than `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            known = json.loads(line)["step"] <= step
        except json.JSONDecodeError:
            known = False
        if known:
            kept.append(line + "\n")
    write_file(path, "".join(kept))


class JsonLines:
    """Appends one object a line; a line is complete or absent after a kill of the writer."""

    def __init__(self, path: Path, first_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_until(path, first_step - 1)
        self.path = path
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()
