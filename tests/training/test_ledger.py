"""The samples of an epoch: schedule against ledger."""

import json
from pathlib import Path

import pytest

from dflash_scale.data.dataset import Samples
from dflash_scale.data.schedule import RowSchedule, ScheduleSpec
from dflash_scale.training.ledger import EpochCount, count_epoch, report_epoch
from tests.support.lengths import Lengths


def test_missing_and_doubled_samples_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = Samples(Lengths(*range(5, 25)), Lengths())
    spec = ScheduleSpec(32, 2, 1, seed=3, epochs=2, max_steps=None, validate_every=0)
    schedule = RowSchedule(samples, spec)
    steps = schedule.steps_per_epoch
    path = tmp_path / "rank-0.jsonl"
    lines = []
    for step in range(1, schedule.total_steps + 1):
        trained = [place.sample for row in schedule.train_rows(0, step) for place in row.places]
        lines.append({"step": step, "samples": trained[1:], "quarantined": trained[:1]})

    def count() -> EpochCount:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return count_epoch(schedule, 0, steps, path)

    assert count() == EpochCount(20, 20 - steps, steps, 0, 0), "the lines of the second epoch are not looked at"
    gone = lines[1]["samples"].pop()
    assert count() == EpochCount(20, 19 - steps, steps, 1, 0)
    lines[2]["samples"].append(gone)
    assert count() == EpochCount(20, 20 - steps, steps, 1, 1), "in another step than its own"
    lines.insert(1, lines[0])
    assert report_epoch(steps, count()) == 2 + len(lines[0]["samples"]) + len(lines[0]["quarantined"])
    assert "; 1 samples of this epoch are unaccounted for" in caplog.text
    assert [record.levelname for record in caplog.records] == ["ERROR"]
