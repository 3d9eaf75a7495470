"""A prepared data set, as `dflash-scale prepare` wrote it: its two splits, and both under one numbering."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import numpy.typing as npt

from dflash_scale.data.dataset_writer import FORMAT, SPLITS
from dflash_scale.verifier.files import load_tokenizer

COUNTED_AT_ONCE = 1 << 24  # tokens whose counting copies them
Ints = npt.NDArray[np.int32]


class PreparedSplit:
    """One split, memory-mapped: a sample is a view into the file, not a copy."""

    def __init__(self, table: Any) -> None:
        self._chunks = []
        for ids, mask in zip(table.column("input_ids").chunks, table.column("loss_mask").chunks, strict=True):
            tokens = ids.values.to_numpy(zero_copy_only=True)
            self._chunks.append((ids.offsets.to_numpy(), tokens, mask.values.to_numpy(zero_copy_only=True)))
        empty = np.zeros(0, np.int32)
        sizes = [len(offsets) - 1 for offsets, _, _ in self._chunks]
        self._first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.lengths: npt.NDArray[np.int32] = np.concatenate(
            [empty, *(np.diff(offsets).astype(np.int32) for offsets, _, _ in self._chunks)]
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def _where(self, index: int) -> tuple[int, slice]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        chunk = int(np.searchsorted(self._first, index, side="right")) - 1
        offsets = self._chunks[chunk][0]
        row = index - int(self._first[chunk])
        return chunk, slice(int(offsets[row]), int(offsets[row + 1]))

    def tokens(self, index: int) -> npt.NDArray[np.int32]:
        """(n,) int32 token ids, read-only."""
        chunk, here = self._where(index)
        return self._chunks[chunk][1][here]

    def token_counts(self, rows: int) -> npt.NDArray[np.int64]:
        """(rows,) how often each token id is supervised; reads the whole split once."""
        counts = np.zeros(rows, np.int64)
        for offsets, tokens, mask in self._chunks:
            for start in range(int(offsets[0]), int(offsets[-1]), COUNTED_AT_ONCE):
                here = slice(start, min(start + COUNTED_AT_ONCE, int(offsets[-1])))
                counts += np.bincount(tokens[here][mask[here].view(np.bool_)], minlength=rows)
        return counts

    def loss_mask(self, index: int) -> npt.NDArray[np.bool_]:
        """(n,) bool, True where the verifier said the token, read-only."""
        chunk, here = self._where(index)
        return self._chunks[chunk][2][here].view(np.bool_)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared data set."""

    train: PreparedSplit
    validation: PreparedSplit
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all samples in their order: a run may only be resumed on the data it began with."""
        return str(self.manifest["fingerprint"])


def load_prepared(path: str | Path) -> Prepared:
    """Opens a prepared folder; raises ValueError if it is none."""
    folder = Path(path)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"data.path: got {folder}, wanted a folder with a manifest.json; write one with `dflash-scale prepare`"
        ) from None
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"data.path: {folder} has format {manifest.get('format')}, wanted {FORMAT}; prepare the data set again"
        )
    train, validation = (PreparedSplit(datasets.load_from_disk(str(folder / name)).data) for name in SPLITS)
    return Prepared(train, validation, manifest)


def tokenizer_hash(tokenizer: Any) -> str:
    """What the data set was made with: 16 hex digits over the tokenizer and its chat template."""
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.chat_template)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_tokenizer(prepared: Prepared, model: str) -> Any:
    """The verifier's tokenizer; raises ValueError if there is none, or the data set was prepared with another."""
    tokenizer = load_tokenizer(model)
    if tokenizer_hash(tokenizer) != prepared.manifest["tokenizer"]:
        raise ValueError(
            f"data.path: the data set was prepared with the tokenizer of {prepared.manifest['model']}, not with that "
            f"of verifier.model = {model}; prepare the data set again with --model"
        )
    return tokenizer


class Split(Protocol):
    """One split of a prepared data set (`load_prepared`)."""

    @property
    def lengths(self) -> Ints: ...
    def tokens(self, index: int) -> Ints: ...
    def loss_mask(self, index: int) -> npt.NDArray[np.bool_]: ...


class Samples:
    """Both splits under one numbering: the training samples first, then the validation samples."""

    def __init__(self, train: Split, validation: Split) -> None:
        self._train, self._validation = train, validation
        self.train_count = len(train.lengths)
        self.lengths: Ints = np.concatenate([train.lengths, validation.lengths]).astype(np.int32)

    def _split(self, sample: int) -> tuple[Split, int]:
        inside = sample < self.train_count
        return (self._train, sample) if inside else (self._validation, sample - self.train_count)

    def tokens(self, sample: int) -> Ints:
        """(n,) int32 token ids."""
        split, index = self._split(sample)
        return split.tokens(index)

    def loss_mask(self, sample: int) -> npt.NDArray[np.bool_]:
        """(n,) bool, True where the token is supervised."""
        split, index = self._split(sample)
        return split.loss_mask(index)
