"""The file of quarantined samples, and what a later run leaves out of its schedule."""

import os
import resource
import signal
from pathlib import Path

import pytest

from dflash_scale.config.run import parse_config
from dflash_scale.data.dataset import Samples
from dflash_scale.data.quarantine import Exclusion, QuarantineFile, read_exclusion
from dflash_scale.data.schedule import RowSchedule, ScheduleSpec
from tests.support.lengths import Lengths


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "quarantined.jsonl"
    for epoch, sample in ((0, 3), (1, 3), (1, 9)):
        QuarantineFile(path, "d1").write(epoch, sample, "too\nlong", ["http://s0", "http://s1"])
    assert len(path.read_text().splitlines()) == 3
    exclusion = read_exclusion(str(path))
    assert exclusion == Exclusion(frozenset({3, 9}), "d1")
    exclusion.check("d1")
    with pytest.raises(ValueError, match=r"samples of the data set d1, wanted those of data.path, which is d2"):
        exclusion.check("d2")
    assert read_exclusion(None).fingerprint("d1") == "d1"
    prints = {Exclusion(frozenset(samples), "d1").fingerprint("d1") for samples in ({3}, {3, 9}, {9})}
    assert len(prints) == 3
    assert all(name.startswith("d1 without ") for name in prints)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"sample": 1}', '{"sample": true, "data": "d"}', '{"sample": -1, "data": ""}']
)
def test_another_file_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "file"
    QuarantineFile(path, "d1").write(0, 3, "", [])
    with path.open("a") as file:
        file.write(line + os.linesep)
    with pytest.raises(ValueError, match=r"line 2 of .*file is not an object with data and sample"):
        read_exclusion(str(path))


def test_a_line_that_the_disk_takes_in_part_is_an_error(tmp_path: Path) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # the kernel writes as far as it goes, as when full
    try:
        with pytest.raises(OSError, match="File too large"):
            QuarantineFile(tmp_path / "quarantined.jsonl", "d1").write(0, 3, "no server", [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_missing_file_and_two_data_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent cannot be read \(No such file"):
        read_exclusion(str(tmp_path / "absent"))
    for data in ("d1", "d2"):
        QuarantineFile(tmp_path / "file", data).write(0, 3, "", [])
    with pytest.raises(ValueError, match="names samples of 2 data sets"):
        read_exclusion(str(tmp_path / "file"))


def test_a_run_does_not_exclude_what_it_writes_itself(tmp_path: Path) -> None:
    content = {"verifier": {"model": "m"}, "data": {"path": "d"}, "train": {"output_dir": str(tmp_path)}}
    content["data"]["exclude"] = str(tmp_path / "copy.jsonl")
    assert parse_config(content).data.exclude == str(tmp_path / "copy.jsonl")
    content["data"]["exclude"] = str(tmp_path / "." / "quarantined.jsonl")
    with pytest.raises(ValueError, match=r"data.exclude: got .*which this run itself appends to.*copy it"):
        parse_config(content)


def test_excluded_samples_are_in_no_row_and_the_others_are_in_one() -> None:
    samples = Samples(Lengths(*range(5, 25)), Lengths(7, 8, 9))
    excluded = frozenset({0, 7, 21})
    spec = ScheduleSpec(32, 2, 1, seed=3, epochs=1, max_steps=None, validate_every=1000, excluded=excluded)
    rows = list(RowSchedule(samples, spec).rows(0))
    seen = sorted(place.sample for row in rows for place in row.places)
    assert seen == [sample for sample in range(23) if sample not in excluded]
