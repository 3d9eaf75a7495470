"""The demo's data: chat prompts cut from source files, and the verifier's own greedy answers to them.

A drafter learns what its verifier says, so the answers are the verifier's, never the file's. Training prompts come from
held-in files, evaluation prompts from files that neither the verifier nor the drafter has seen. All prompts have the
same number of tokens: a batch then needs no padding, and padding would change the rounding of the verifier's numbers
and, at a near tie, its greedy choice. An answer ends after `answer_tokens` tokens or with the verifier's end of turn,
which it learnt to say at the end of a file and so says seldom.

Lines: {"prompt_ids": [...], "answer_ids": [...]}, which `dflash-scale prepare` takes as they are.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dflash_scale.files import write_file
from launch.demo.verifier import Turns, encode_files, library_files, line_starts, read_sources

log = logging.getLogger(__name__)

CODE_TOKENS = 48  # of the file, in a prompt
BATCH = 96  # prompts generated at once: small enough for the progress bar, large enough to fill two cores


@dataclass(frozen=True, slots=True)
class AnswerSpec:
    """How many conversations, how long, and who makes them. `threads` CPU threads, one process each."""

    prompts: int = 1920
    heldout: int = 64
    answer_tokens: int = 112
    seed: int = 0
    threads: int = 2


def cut_prompts(tokenizer: PreTrainedTokenizerFast, files: list[Path], count: int, seed: int) -> npt.NDArray[np.int32]:
    """`count` different prompts of equal length, (count, n) int32, from places spread over `files`.

    Each starts with a statement or a decorator: the library's long comment blocks would otherwise be most of them, and
    a small verifier answers those by repeating one line.

    Raises:
        ValueError: the files have fewer places than `count`.
    """
    turns = Turns.of(tokenizer)
    encoded = encode_files(tokenizer, read_sources(files))
    statements = {id_ for token, id_ in tokenizer.get_vocab().items() if token[0].isalpha() and token[0].isascii()}
    statements.add(tokenizer.get_vocab()["@"])
    places = [
        (file, int(start))
        for file, ids in enumerate(encoded)
        for start in line_starts(tokenizer, ids[: max(len(ids) - CODE_TOKENS, 1)])
        if start + CODE_TOKENS <= len(ids) and int(ids[start]) in statements
    ]
    cut: dict[bytes, npt.NDArray[np.int32]] = {}
    for index in np.random.default_rng(seed).permutation(len(places)):
        file, start = places[index]
        code = encoded[file][start : start + CODE_TOKENS]
        cut.setdefault(code.tobytes(), turns.prompt(code))  # files begin alike
        if len(cut) == count:
            return np.stack(list(cut.values()))
    raise ValueError(f"got {len(cut)} different prompts in {len(files)} files, wanted {count}; ask for fewer")


class Answerer:
    """A verifier that answers batches of prompts, in this process."""

    def __init__(self, verifier_dir: Path, answer_tokens: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(verifier_dir, dtype=torch.float32).eval()
        self._answer_tokens = answer_tokens

    @torch.inference_mode()
    def __call__(self, prompts: npt.NDArray[np.int32]) -> list[list[int]]:
        """Greedy answers to prompts (B, n), each up to and with its end of turn."""
        ids = torch.from_numpy(prompts).long()
        end = self._model.config.eos_token_id
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._answer_tokens,
            do_sample=False,
        )
        answers = [answer.tolist() for answer in output[:, ids.shape[1] :]]
        return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]


_answerer: Answerer | None = None  # one per worker process, made once


def _start_worker(verifier_dir: Path, answer_tokens: int) -> None:
    global _answerer
    _answerer = Answerer(verifier_dir, answer_tokens, threads=1)


def _answer(prompts: npt.NDArray[np.int32]) -> list[list[int]]:
    assert _answerer is not None
    return _answerer(prompts)


def answers_in_order(
    verifier_dir: Path, batches: list[npt.NDArray[np.int32]], spec: AnswerSpec
) -> Iterator[list[list[int]]]:
    """The answers to every batch, in order, from `spec.threads` processes.

    Decoding a small model is a long chain of small operations; two processes of one thread each are nearly twice as
    fast as one process of two threads.
    """
    workers = min(spec.threads, len(batches))
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (verifier_dir, spec.answer_tokens)) as pool:
        yield from pool.imap(_answer, batches)


def make_answers(verifier_dir: Path, train_jsonl: Path, heldout_jsonl: Path, spec: AnswerSpec = AnswerSpec()) -> None:
    """Writes both files, each in one step when it is complete; files that are there already are made again.

    Raises:
        ValueError: there are not as many different prompts as asked for.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(verifier_dir)
    held_in, held_out = library_files()
    todo = (
        (heldout_jsonl, cut_prompts(tokenizer, held_out, spec.heldout, spec.seed)),
        (train_jsonl, cut_prompts(tokenizer, held_in, spec.prompts, spec.seed)),
    )
    batches = [prompts[i : i + BATCH] for _, prompts in todo for i in range(0, len(prompts), BATCH)]
    answers = []
    with tqdm(total=spec.heldout + spec.prompts, unit="answer", desc="answers") as bar:
        for batch in answers_in_order(verifier_dir, batches, spec):
            answers += batch
            bar.update(len(batch))
    for path, prompts in todo:
        _write(path, prompts, answers[: len(prompts)])
        del answers[: len(prompts)]


def _write(path: Path, prompts: npt.NDArray[np.int32], answers: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = zip(prompts.tolist(), answers, strict=True)
    lines = (json.dumps({"prompt_ids": prompt, "answer_ids": answer}) + "\n" for prompt, answer in pairs)
    write_file(path, "".join(lines))
