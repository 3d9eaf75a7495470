import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest

from dflash_scale.data.conversations import Encoder
from dflash_scale.data.dataset import Prepared, Samples, load_prepared
from dflash_scale.data.prepare import prepare
from tests.support.chats import CHATML, byte_tokenizer, chat, save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def all_tokens(data: Prepared) -> list[tuple[int, ...]]:
    splits = (data.train, data.validation)
    return sorted(tuple(split.tokens(i).tolist()) for split in splits for i in range(len(split)))


def test_what_is_read_is_what_was_encoded(model: str, tmp_path: Path) -> None:
    lines = [chat(f"q{i}", "a" * (i % 7 + 1)) for i in range(2500)]  # more than one Arrow batch
    manifest = prepare([write(tmp_path / "in.jsonl", *lines)], model, tmp_path / "out", validation_fraction=0.1)
    data = load_prepared(tmp_path / "out")
    tokenizer = byte_tokenizer(CHATML)
    encoder = Encoder(tokenizer, len(tokenizer), 3072)
    expected = [encoder.encode(line) for line in lines]
    assert all_tokens(data) == sorted(tuple(sample.tokens.tolist()) for sample in expected)
    by_tokens = {tuple(sample.tokens.tolist()): sample.loss_mask for sample in expected}
    for split in (data.train, data.validation):
        assert split.lengths.dtype == np.int32
        for i in range(len(split)):
            tokens, mask = split.tokens(i), split.loss_mask(i)
            assert (tokens.dtype, mask.dtype, len(tokens)) == (np.int32, np.bool_, split.lengths[i])
            assert np.array_equal(mask, by_tokens[tuple(tokens.tolist())])
    assert manifest["counts"]["train"] == len(data.train) > 2000
    assert 150 < len(data.validation) < 350  # 0.1 of 2500
    assert manifest["longest"] == max(data.train.lengths.max(), data.validation.lengths.max())
    assert manifest == data.manifest


def test_samples_are_views_of_the_file_and_read_only(model: str, tmp_path: Path) -> None:
    prepare([write(tmp_path / "in.jsonl", chat("q", "answer"))], model, tmp_path / "out", validation_fraction=0)
    train = load_prepared(tmp_path / "out").train
    assert train.tokens(0).base is not None
    with pytest.raises(ValueError, match="read-only"):
        train.tokens(0)[0] = 1
    with pytest.raises(IndexError, match="sample 1 of 1"):
        train.tokens(1)
    assert len(Samples(train, load_prepared(tmp_path / "out").validation).lengths) == 1  # an empty split is fine


def test_datasets_can_open_it(model: str, tmp_path: Path) -> None:
    prepare([write(tmp_path / "in.jsonl", chat("q", "answer"))], model, tmp_path / "out", validation_fraction=0)
    row = datasets.load_from_disk(str(tmp_path / "out" / "train"))[0]
    assert len(row["input_ids"]) == len(row["loss_mask"])


def test_duplicates_never_sit_on_both_sides(model: str, tmp_path: Path) -> None:
    lines = [chat(f"question {i % 40}", "an answer") for i in range(400)]
    prepare([write(tmp_path / "in.jsonl", *lines)], model, tmp_path / "out", validation_fraction=0.5)
    data = load_prepared(tmp_path / "out")
    sides = [{tuple(split.tokens(i).tolist()) for i in range(len(split))} for split in (data.train, data.validation)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_the_split_follows_the_seed_alone(model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *[chat(f"q{i}", "answer") for i in range(100)])
    reverse = write(tmp_path / "re.jsonl", *reversed(source.read_text().splitlines()))

    def held_out(name: str, file: Path, seed: int) -> set[tuple[int, ...]]:
        prepare([file], model, tmp_path / name, validation_fraction=0.5, seed=seed)
        split = load_prepared(tmp_path / name).validation
        return {tuple(split.tokens(i).tolist()) for i in range(len(split))}

    first = held_out("a", source, 0)
    assert first == held_out("b", reverse, 0)
    assert first != held_out("c", source, 1)


def test_bad_lines_are_named_counted_and_skipped(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [chat("q", "good"), "{oops", "", chat("q", "x" * 50), '{"prompt_ids": [1], "answer_ids": [2]}', '{"a": 1}']
    source = write(tmp_path / "in.jsonl", *lines)
    with caplog.at_level(logging.WARNING):
        manifest = prepare([source], model, tmp_path / "out", validation_fraction=0, max_tokens=60)
    assert manifest["counts"] == {
        "lines": 5,
        "train": 2,
        "validation": 0,
        "bad": 2,
        "untrainable": 1,
        "truncated": 1,
    }
    assert [line.split(": ")[0] for line in manifest["bad_lines"]] == [f"{source}:2", f"{source}:6"]
    assert f"skipped {source}:2: not valid JSON" in caplog.text
    assert load_prepared(tmp_path / "out").train.lengths.max() == 60


def test_a_file_without_a_usable_line_is_an_error_and_leaves_nothing(model: str, tmp_path: Path) -> None:
    good = write(tmp_path / "in" / "good.jsonl", chat("q", "answer"))
    bad = write(tmp_path / "in" / "sub" / "bad.jsonl", '{"a": 1}')
    with pytest.raises(ValueError, match=r"bad\.jsonl has no usable line: .*bad\.jsonl:1: got the keys \['a'\]"):
        prepare([tmp_path / "in"], model, tmp_path / "out")
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl has no usable line"):
        prepare([good, empty], model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "in"]
    assert bad.exists()


def test_workers_change_nothing(model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *[chat(f"q{i}", f"answer {i}") for i in range(300)], "bad")
    one = prepare([source], model, tmp_path / "one", validation_fraction=0.2, workers=1)
    two = prepare([source], model, tmp_path / "two", validation_fraction=0.2, workers=2)
    assert one == two
    assert all_tokens(load_prepared(tmp_path / "one")) == all_tokens(load_prepared(tmp_path / "two"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"validation_fraction": 1.0}, "got validation_fraction 1.0"),
        ({"max_tokens": 1}, "got max_tokens 1"),
        ({"sources": []}, "got no source"),
        ({"sources": ["absent.jsonl"]}, r"got the source absent\.jsonl, wanted a JSONL file or a folder"),
    ],
)
def test_wrong_arguments(model: str, tmp_path: Path, change: dict, text: str) -> None:
    given = {"sources": [write(tmp_path / "in.jsonl", chat("q", "answer"))], **change}
    with pytest.raises(ValueError, match=text):
        prepare(given.pop("sources"), model, tmp_path / "out", **given)


def test_the_fingerprint_changes_with_the_samples_and_their_sides(model: str, tmp_path: Path) -> None:
    lines = [chat(f"q{i}", "answer") for i in range(20)]

    def fingerprint(name: str, lines: list[str], **options: float) -> str:
        prepare([write(tmp_path / f"{name}.jsonl", *lines)], model, tmp_path / name, **options)
        return load_prepared(tmp_path / name).fingerprint

    first = fingerprint("a", lines, validation_fraction=0.5)
    assert first == fingerprint("b", lines, validation_fraction=0.5)
    others = [
        fingerprint("c", lines[::-1], validation_fraction=0.5),
        fingerprint("d", lines[:-1], validation_fraction=0.5),
        fingerprint("e", lines, validation_fraction=0.1),
    ]
    assert len({first, *others}) == 4


def test_an_existing_folder_is_not_overwritten(model: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists, wanted a new folder"):
        prepare([write(tmp_path / "in.jsonl", chat("q", "answer"))], model, tmp_path / "out")


def test_all_held_out_is_an_error(model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", chat("q", "answer"))

    def prepare_until_refused() -> None:
        for seed in range(1000):  # each holds the one sample out with 9 chances of 10
            prepare([source], model, tmp_path / f"out{seed}", validation_fraction=0.9, seed=seed)

    with pytest.raises(ValueError, match="all 1 samples fell to validation"):
        prepare_until_refused()


def test_a_folder_that_was_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path: got .* wanted a folder with a manifest\.json"):
        load_prepared(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="has format 99, wanted 1"):
        load_prepared(tmp_path)
