"""Writes the files of a prepared data set (dataset.py): samples go to their split, lines are counted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from datasets.arrow_writer import ArrowWriter

from dflash_scale.data.conversations import Encoded

log = logging.getLogger(__name__)

FORMAT = 1
SPLITS = ("train", "validation")
FEATURES = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "loss_mask": datasets.List(datasets.Value("int8"))}
)
NAMED_BAD_LINES = 100  # in the log and in the manifest; all are counted

Outcome = tuple[str, int, Encoded | str]  # file, line number, the sample or why there is none


def check_fraction(validation_fraction: float) -> None:
    """Raises ValueError for what is no share of samples to hold out."""
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"got validation_fraction {validation_fraction}, wanted 0 to below 1")


class PreparedWriter:
    """Sends every sample to its split and counts what happened to every line.

    Args:
        folder: an empty folder.
        validation_fraction: share of the samples for validation.
        seed: of the split.
    """

    def __init__(self, folder: Path, validation_fraction: float, seed: int) -> None:
        self._folder, self._fraction, self._seed = folder, validation_fraction, seed
        self._writers = {name: ArrowWriter(features=FEATURES, path=str(folder / f"{name}.arrow")) for name in SPLITS}
        self._counts: Counter[str] = Counter(
            dict.fromkeys(["lines", "train", "validation", "bad", "untrainable", "truncated"], 0)
        )
        self._tokens: Counter[str] = Counter(dict.fromkeys(["train", "validation", "supervised"], 0))
        self._longest = 0
        self._digest = hashlib.blake2b(digest_size=8)
        self._bad: list[str] = []
        self._usable: Counter[str] = Counter()

    def add(self, outcome: Outcome, by: npt.NDArray[np.int32] | None = None) -> tuple[str, int] | None:
        """One line more. The split depends on the tokens `by`, None: on all of the sample's.

        Returns:
            The sample's split and its place there; None if the line gave no sample.
        """
        file, number, sample = outcome
        self._counts["lines"] += 1
        self._usable.setdefault(file, 0)
        if isinstance(sample, str):
            self._counts["bad"] += 1
            if len(self._bad) < NAMED_BAD_LINES:
                self._bad.append(f"{file}:{number}: {sample}")
                log.warning("skipped %s", self._bad[-1])
            return None
        if not sample.trainable:
            self._counts["untrainable"] += 1
            return None
        split = "validation" if self._for_validation(sample.tokens if by is None else by) else "train"
        for part in (split.encode(), sample.tokens.tobytes(), sample.loss_mask.tobytes()):
            self._digest.update(len(part).to_bytes(8, "little") + part)
        self._writers[split].write({"input_ids": sample.tokens, "loss_mask": sample.loss_mask.view(np.int8)})
        self._usable[file] += 1
        self._counts[split] += 1
        self._counts["truncated"] += sample.truncated
        self._tokens[split] += len(sample.tokens)
        self._tokens["supervised"] += int(sample.loss_mask.sum())
        self._longest = max(self._longest, len(sample.tokens))
        return split, self._counts[split] - 1

    def _for_validation(self, tokens: npt.NDArray[np.int32]) -> bool:
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8, key=str(self._seed).encode()).digest()
        return int.from_bytes(digest, "little") < self._fraction * 2.0**64

    def check_sources(self, files: Iterable[Path]) -> None:
        """Raises ValueError if one of the files gave no sample."""
        for file in map(str, files):
            if not self._usable[file]:
                named = "; ".join(line for line in self._bad if line.startswith(f"{file}:"))[:500]
                raise ValueError(f"{file} has no usable line{': ' + named if named else ''}")

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Writes the splits and the manifest, which is `about` and the counts; gives the manifest.

        Raises:
            ValueError: there is nothing to train on.
        """
        if not self._counts["train"]:
            raise ValueError(
                f"all {self._counts['validation']} samples fell to validation, wanted some to train on; "
                "give more conversations or a smaller validation fraction"
            )
        if self._fraction and not self._counts["validation"]:
            log.warning("no sample fell to validation: the data set is small for this fraction")
        for name, writer in self._writers.items():
            writer.finalize()
            # save_to_disk writes the folder that load_from_disk reads, in shards, from the memory-mapped file.
            raw = self._folder / f"{name}.arrow"
            split = datasets.Dataset.from_file(str(raw)) if self._counts[name] else _no_samples()
            # load_from_disk cannot read a folder of no shards, which is what no samples would make
            split.save_to_disk(str(self._folder / name), num_shards=None if self._counts[name] else 1)
            raw.unlink()
        manifest = {
            "format": FORMAT,
            **about,
            "counts": dict(self._counts),
            "tokens": dict(self._tokens),
            "longest": self._longest,
            "fingerprint": self._digest.hexdigest(),
            "bad_lines": self._bad,
        }
        (self._folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        return manifest


def _no_samples() -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
