"""Samples that no server could answer: the file they are written to, and leaving them out of a later run.

    OUTPUT_DIR/quarantined.jsonl    one JSON object a line: data (the data set's fingerprint), epoch, sample (its number
                                    in the data set, validation behind training), reason, servers (that were asked)

The file is only appended to, so a sample may stand there several times. `data.exclude` names such a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class QuarantineFile:
    """Appends to the file of a run; each line is on the disk when `write` returns. Several processes may append."""

    def __init__(self, path: Path, data: str) -> None:
        self._path, self._data = path, data

    def write(self, epoch: int, sample: int, reason: str, servers: Sequence[str]) -> None:
        line = {"data": self._data, "epoch": epoch, "sample": sample, "reason": reason, "servers": list(servers)}
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            raw = (json.dumps(line) + "\n").encode()
            while raw:  # one write: lines of several processes do not mix; a second one says why it was not enough
                raw = raw[os.write(file, raw) :]
            os.fsync(file)
        finally:
            os.close(file)


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Samples that a run leaves out, and the fingerprint of the data set whose numbers they are."""

    samples: frozenset[int] = frozenset()
    data: str = ""

    def fingerprint(self, data: str) -> str:
        """What a run's data are: the data set's fingerprint, and what is left out of it."""
        if not self.samples:
            return data
        return f"{data} without {hashlib.sha256(repr(sorted(self.samples)).encode()).hexdigest()[:16]}"

    def check(self, data: str) -> None:
        """Raises ValueError if the numbers are those of another data set than `data`."""
        if self.data not in ("", data):
            raise ValueError(
                f"data.exclude: got samples of the data set {self.data}, wanted those of data.path, which is {data}; "
                "give the file of a run on the same data set"
            )


def read_exclusion(path: str | None) -> Exclusion:
    """The samples of a file; none for None. Raises ValueError if it cannot be read or is no such file."""
    if path is None:
        return Exclusion()
    samples, data = set(), set()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"data.exclude: {path} cannot be read ({error.strerror}); give a quarantined.jsonl") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            sample, fingerprint = entry["sample"], entry["data"]
        except (ValueError, TypeError, KeyError):
            sample, fingerprint = None, None
        if type(sample) is not int or sample < 0 or not isinstance(fingerprint, str):
            raise ValueError(
                f"data.exclude: line {number} of {path} is not an object with data and sample; give a quarantined.jsonl"
            )
        samples.add(sample)
        data.add(fingerprint)
    if len(data) > 1:
        raise ValueError(f"data.exclude: {path} names samples of {len(data)} data sets, wanted one; split the file")
    return Exclusion(frozenset(samples), data.pop() if data else "")
