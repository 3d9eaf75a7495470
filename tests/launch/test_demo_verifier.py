"""The demo's verifier and its answers, at a hundredth of their size."""

import functools
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dflash_scale.verifier.shape import mask_token_id
from launch.demo import answers, verifier
from launch.demo.answers import CODE_TOKENS, AnswerSpec, cut_prompts, make_answers
from launch.demo.verifier import INSTRUCTION, Turns, conversations, encode_files, library_files, line_starts

FILES = 12
OPENING, TURN_OVER = f"<|im_start|>user\n{INSTRUCTION}", "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def files() -> tuple[list[Path], list[Path]]:
    held_in, held_out = library_files()
    return held_in[:FILES], held_out[:FILES]


@pytest.fixture(scope="module")
def texts(files: tuple[list[Path], list[Path]]) -> list[str]:
    return verifier.read_sources(files[0])


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    return verifier.train_tokenizer(texts)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, files: tuple[list[Path], list[Path]]) -> None:
    """Three steps on a few files instead of minutes on hundreds."""
    spec = functools.partial(verifier.TrainSpec, batch=2, tokens=64)
    monkeypatch.setattr(verifier, "TrainSpec", spec)
    for module in (verifier, answers):
        monkeypatch.setattr(module, "library_files", lambda: files)


def test_files_are_split_once() -> None:
    held_in, held_out = library_files()
    assert not set(held_in) & set(held_out)
    assert 0.03 < len(held_out) / len(held_in) < 0.2
    assert (held_in, held_out) == library_files()
    assert not any("test" in path.parts or "site-packages" in path.parts for path in held_in + held_out)


def test_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    for text, ids in zip(texts, encode_files(tokenizer, texts), strict=True):
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("\tif é == '\U0001f600':\r\n")) == "\tif é == '\U0001f600':\r\n"
    assert len(tokenizer) == verifier.VOCABULARY
    assert mask_token_id(tokenizer, verifier.VOCABULARY, None) == tokenizer.convert_tokens_to_ids(verifier.MASK)


def test_prompts_are_what_the_chat_template_makes(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    turns = Turns.of(tokenizer)
    ids = encode_files(tokenizer, texts)[0]
    for start in line_starts(tokenizer, ids[:-CODE_TOKENS])[:20]:
        code = ids[start : start + CODE_TOKENS]
        text = tokenizer.decode(code)
        if tokenizer.encode(text) != code.tolist():
            continue  # cut inside a line's indentation
        messages = [{"role": "user", "content": INSTRUCTION + text}]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert turns.prompt(code).tolist() == wanted


def test_template_marks_the_assistant(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "import re"}]
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "import re<|im_end|>"


def test_sequences_are_conversations(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    encoded = encode_files(tokenizer, texts)
    starts = [line_starts(tokenizer, ids[:-96]) for ids in encoded]
    turns = Turns.of(tokenizer)
    twice = [list(islice(conversations(encoded, starts, turns, 7, 150), 5)) for _ in range(2)]
    assert np.array_equal(twice[0], twice[1]), "the seed decides"
    for ids in twice[0]:
        text = tokenizer.decode(ids)
        assert len(ids) == 151
        assert text.startswith(OPENING)
        code, answer = text.removeprefix(OPENING).split(TURN_OVER)[:2]
        assert any(code + answer.split("<|im_end|>")[0].rstrip("�") in whole for whole in texts)


@pytest.mark.usefixtures("small")
def test_made_once_and_answered(tmp_path: Path, files: tuple[list[Path], list[Path]]) -> None:
    folder = verifier.make_verifier(tmp_path / "verifier", steps=3, threads=1)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert verifier.make_verifier(folder, steps=3, threads=1) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made, "the same recipe is not made twice"
    record = json.loads((folder / "recipe.json").read_text())
    assert record["steps"] == 3
    assert 0 < record["held_out_loss"] < 9

    spec = AnswerSpec(prompts=10, heldout=3, answer_tokens=6, threads=1)
    train, heldout = tmp_path / "answers" / "train.jsonl", tmp_path / "answers" / "heldout.jsonl"
    make_answers(folder, train, heldout, spec)
    lines = [json.loads(line) for line in (heldout.read_text() + train.read_text()).splitlines()]
    assert len(lines) == 13
    assert len({len(line["prompt_ids"]) for line in lines}) == 1
    assert len({tuple(line["prompt_ids"]) for line in lines}) == 13
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for line in lines[::4]:
        ids = torch.tensor([line["prompt_ids"]])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert line["answer_ids"] == wanted[0, ids.shape[1] :].tolist()
    sources = [path.read_text() for path in files[1]]
    for line in lines[:3]:
        code = tokenizer.decode(line["prompt_ids"]).removeprefix(OPENING).split(TURN_OVER)[0]
        assert any(code.rstrip("�") in source for source in sources), "evaluation prompts come from held-out files"
    with pytest.raises(ValueError, match="different prompts"):
        cut_prompts(tokenizer, files[0][:1], 100_000, seed=0)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no verifier of the demo"):
        verifier.make_verifier(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
