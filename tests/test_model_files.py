"""Digests of a verifier and its tokenizer: the same for every copy of one, and different for another."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dflash_scale.model_files import model_folder, origin_of
from dflash_scale.stream.wire import Origin
from tests.test_conversations import save_tokenizer
from tests.verifier_families import FAMILIES, make_verifier


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_copies_in_one_file_and_in_shards_are_alike(family: str, tmp_path: Path) -> None:
    for name, shard in (("one", "1GB"), ("shards", "8KB")):
        make_verifier(family, tmp_path / name, shard=shard)
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    digest = origin_of(str(tmp_path / "one")).verifier
    assert len(digest) == 16
    assert origin_of(str(tmp_path / "shards")).verifier == digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_verifier("qwen3", tmp_path / "model", shard="1GB")
    return tmp_path / "model"


def test_another_verifier_has_another_digest(folder: Path) -> None:
    before = origin_of(str(folder)).verifier
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0", "dtype": "float64"}))
    assert origin_of(str(folder)).verifier == before, "what Transformers writes of itself is not the verifier"
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 99}))
    assert origin_of(str(folder)).verifier != before
    (folder / "config.json").write_text(json.dumps(config))
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, folder / "model.safetensors")
    assert origin_of(str(folder)).verifier == before, "layers are not read: they may be quantised"
    weights["model.embed_tokens.weight"] += 1
    save_file(weights, folder / "model.safetensors")
    assert origin_of(str(folder)).verifier != before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"\xff"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}"),
    ],
)
def test_files_that_cannot_be_read_have_no_digest(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    assert origin_of(str(folder)) == Origin()


def test_models_that_are_nowhere_have_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert origin_of("some/model") == Origin()


def test_a_tokenizer_is_what_its_ids_mean(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    digest = origin_of(str(tmp_path)).tokenizer
    assert len(digest) == 16
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert origin_of(str(tmp_path / "again")).tokenizer == digest
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    other = {**content, "padding": {"anything": 1}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other, indent=7))
    assert origin_of(str(tmp_path)).tokenizer == digest
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert origin_of(str(tmp_path)).tokenizer not in ("", digest)


def test_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot that the branch main names, and without that branch the newest."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--some--model"
    for commit in ("aaa", "bbb"):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
    assert model_folder("some/model") in set((cache / "snapshots").iterdir())
    (cache / "refs").mkdir()
    for commit in ("bbb", "aaa"):
        (cache / "refs" / "main").write_text(commit)
        assert model_folder("some/model") == cache / "snapshots" / commit
    (cache / "refs" / "main").write_text("ccc")
    assert model_folder("some/model") in set((cache / "snapshots").iterdir())
    assert model_folder("other/model") is None
    assert model_folder(str(tmp_path)) == tmp_path
