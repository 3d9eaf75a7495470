"""Conversations -> one prepared data set: token ids and loss masks in Arrow files, and a manifest.

    prepare(["chats.jsonl"], "Qwen/Qwen3-8B", "data/qwen3-8b", validation_fraction=0.01, max_tokens=3072, seed=0,
            workers=8)
    data = load_prepared("data/qwen3-8b");  data.train.tokens(0)

A prepared folder holds train/ and validation/ (readable by `datasets.load_from_disk`) and manifest.json. A folder
that exists is complete.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dflash_scale.data.conversations import BadLine, Encoder
from dflash_scale.data.dataset import tokenizer_hash
from dflash_scale.data.dataset_writer import Outcome, PreparedWriter, check_fraction
from dflash_scale.files import new_folder
from dflash_scale.verifier.files import load_tokenizer

log = logging.getLogger(__name__)

LINES_PER_TASK = 64
Line = tuple[str, int, str]  # file, line number from 1, text
_worker_encoder: Encoder | None = None  # one per worker process, set before its first task


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
        validation_fraction: share of the conversations for validation, in [0, 1). A conversation's side depends on its
            tokens and the seed alone, so duplicates never sit on both sides.
        max_tokens: longer samples are truncated to this length.
        seed: of the split.
        workers: processes that tokenise.

    Returns:
        The manifest.

    Raises:
        ValueError: no source, a source without one usable line, no tokenizer, or an output folder that exists.
    """
    out = Path(out_dir)
    if out.exists():
        raise ValueError(f"{out} exists, wanted a new folder; remove it or name another")
    check_fraction(validation_fraction)
    if max_tokens < 2 or workers < 1:
        raise ValueError(f"got max_tokens {max_tokens} and workers {workers}, wanted at least 2 and 1")
    files = find_files(sources)
    encoder = make_encoder(model, max_tokens)  # before there is a folder, or a process that would fail in its place
    with new_folder(out) as aside:
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


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _worker_encoder = encoder


def _work(task: Sequence[Line]) -> list[Outcome]:
    assert _worker_encoder is not None
    return _encode(_worker_encoder, task)
