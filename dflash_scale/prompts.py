"""Conversations -> one prepared data set: token ids and loss masks in Arrow files, and a manifest.

    prepare(["chats.jsonl"], "Qwen/Qwen3-8B", "data/qwen3-8b", validation_fraction=0.01, max_tokens=3072, seed=0,
            workers=8)
    data = load_prepared("data/qwen3-8b");  data.train.tokens(0)

A prepared folder holds train/ and validation/ (readable by `datasets.load_from_disk`) and manifest.json. It is written
aside and renamed, so that a folder that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dflash_scale.conversations import BadLine, Encoder
from dflash_scale.prepared_writer import FORMAT, SPLITS, Outcome, PreparedWriter, check_fraction
from dflash_scale.verifier.files import load_tokenizer

log = logging.getLogger(__name__)

LINES_PER_TASK = 64
COUNTED_AT_ONCE = 1 << 24  # tokens whose counting copies them

Line = tuple[str, int, str]  # file, line number from 1, text


class Split:
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

    train: Split
    validation: Split
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
    train, validation = (Split(datasets.load_from_disk(str(folder / name)).data) for name in SPLITS)
    return Prepared(train, validation, manifest)


def prepare(
    sources: Sequence[str | Path],
    model: str,
    out_dir: str | Path,
    *,
    validation_fraction: float = 0.01,
    max_tokens: int = 3072,
    seed: int = 0,
    workers: int = 1,
) -> dict[str, Any]:
    """Tokenises conversations with the verifier's chat template and writes a prepared folder.

    Args:
        sources: JSONL files, or folders of them; see conversations.py for the forms of a line.
        model: folder or hub id of the verifier, or of its tokenizer.
        out_dir: the folder to write; it must not exist.
        validation_fraction: share of the conversations held out, 0 to below 1. A conversation's side depends on its
            tokens and the seed alone, so duplicates never sit on both sides.
        max_tokens: samples are cut to this length.
        seed: of the split.
        workers: processes that tokenise.

    Returns:
        The manifest.

    Raises:
        ValueError: no source, a source without one usable line, no tokenizer, or an output folder that exists.
    """
    out = Path(out_dir)
    if out.exists():
        raise ValueError(f"prepare: {out} exists, wanted a new folder; remove it or name another")
    check_fraction(validation_fraction)
    if max_tokens < 2 or workers < 1:
        raise ValueError(f"prepare: got max_tokens {max_tokens} and workers {workers}, wanted at least 2 and 1")
    files = find_files(sources)
    encoder = make_encoder(model, max_tokens)  # before there is a folder, or a process that would fail in its place
    aside = out.with_name(f"{out.name}.partial-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        writer = PreparedWriter(aside, validation_fraction, seed)
        for outcome in _encode_all(files, encoder, workers):
            writer.add(outcome)
        about = {
            "model": model,
            "tokenizer": tokenizer_hash(load_tokenizer(model)),
            "sources": [str(path) for path in files],
            "validation_fraction": validation_fraction,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        writer.check_sources(files)
        manifest = writer.finish(about)
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log.info("prepared %s: %s", out, json.dumps(manifest["counts"]))
    return manifest


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """The JSONL files that the sources name; raises ValueError if one names none."""
    files: list[Path] = []
    for source in map(Path, sources):
        found = sorted(source.rglob("*.jsonl")) if source.is_dir() else [source] * source.is_file()
        if not found:
            raise ValueError(f"got the source {source}, wanted a JSONL file or a folder that holds *.jsonl")
        files += found
    if not files:
        raise ValueError("got no source, wanted at least one JSONL file or folder")
    return files


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


def lines_of(files: Sequence[Path]) -> Iterator[Line]:
    """The lines that are not empty, with a progress bar."""
    size = sum(path.stat().st_size for path in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for path in files:
            with path.open("rb") as stream:
                for number, raw in enumerate(stream, start=1):
                    bar.update(len(raw))
                    if raw.strip():
                        yield str(path), number, raw.decode("utf-8", errors="replace")


def _encode_all(files: Sequence[Path], encoder: Encoder, workers: int) -> Iterator[Outcome]:
    """Encodes every line, in the order of the files."""
    lines = lines_of(files)
    tasks = iter(lambda: list(islice(lines, LINES_PER_TASK)), [])
    if workers == 1:
        for task in tasks:
            yield from _encode(encoder, task)
        return
    room = threading.Semaphore(4 * workers)  # imap would read the files as fast as the disk, into memory
    spawn = multiprocessing.get_context("spawn")  # a forked tokenizer would run without its threads, or hang
    with spawn.Pool(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
        for outcomes in pool.imap(_work, (task for task in tasks if room.acquire())):
            room.release()
            yield from outcomes


def make_encoder(model: str, max_tokens: int) -> Encoder:
    """The encoder of a verifier, or of a folder that holds only its tokenizer; raises ValueError if there is none."""
    from dflash_scale.verifier.shape import verifier_shape  # seconds; the receiver imports this module too

    tokenizer = load_tokenizer(model)
    try:
        vocab_rows = verifier_shape(model).vocab_size
    except ValueError:  # a folder without config.json: its tokens are all that is known
        vocab_rows = max(tokenizer.get_vocab().values()) + 1
    return Encoder(tokenizer, vocab_rows, max_tokens)


def _encode(encoder: Encoder, task: Sequence[Line]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for file, number, text in task:
        try:
            outcomes.append((file, number, encoder.encode(text)))
        except BadLine as error:
            outcomes.append((file, number, str(error)))
    return outcomes


_worker_encoder: Encoder | None = None  # one per worker process, set before its first task


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _worker_encoder = encoder


def _work(task: Sequence[Line]) -> list[Outcome]:
    assert _worker_encoder is not None
    return _encode(_worker_encoder, task)
