"""A model's files, of one snapshot; digests of verifier and tokenizer: the same for every copy, another for another."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dflash_scale.transport.messages import Origin
from dflash_scale.verifier.files import load_tokenizer, model_file, model_folder
from dflash_scale.verifier.identity import origin_of
from tests.support.chats import save_tokenizer
from tests.support.verifier_families import FAMILIES, make_verifier


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


def test_models_that_are_nowhere_have_no_digest(cache: Path) -> None:
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


def snapshot(cache: Path, commit: str, **files: str) -> Path:
    """A snapshot of some/model in a hub cache that holds nothing but small files."""
    folder = cache / "models--some--model" / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return folder


def point(cache: Path, branch: str, commit: str) -> None:
    refs = cache / "models--some--model" / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / branch).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_the_hubs_cache(cache: Path, tmp_path: Path) -> None:
    """The snapshot that the asked branch names, never just any."""
    aaa, bbb = (snapshot(cache, commit, config="{}") for commit in ("aaa", "bbb"))
    assert model_folder("some/model") is None, "without the branch main nobody knows which"
    for commit, folder in (("bbb", bbb), ("aaa", aaa)):
        point(cache, "main", commit)
        assert model_folder("some/model") == folder
    assert model_folder("some/model", "bbb") == bbb
    point(cache, "v2", "bbb")
    assert model_folder("some/model", "v2") == bbb
    point(cache, "main", "ccc")
    assert model_folder("some/model") is None
    assert model_folder("other/model") is None
    assert model_folder(str(tmp_path)) == tmp_path
    assert model_folder("no/such/folder") is None


def test_all_files_are_of_one_snapshot(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the hub has moved on: weights of a newer revision do not belong to the config.json that is here."""
    old = snapshot(cache, "old", config="{}", tokenizer="{}")
    point(cache, "main", "old")
    asked: list[tuple[str, str | None]] = []

    def download(model: str, name: str, revision: str | None = None) -> str:
        asked.append((name, revision))
        return str(snapshot(cache, revision or "new", **{name.removesuffix(".json"): "{}"}) / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert model_file("some/model", "model.index.json") is None
    assert model_file("some/model", "tokenizer.json", allow_network=True) == old / "tokenizer.json"
    assert not asked
    assert model_file("some/model", "model.index.json", allow_network=True) == old / "model.index.json"
    assert asked == [("model.index.json", "old")]
    assert model_file("some/model", "model.index.json") == old / "model.index.json"


def test_the_first_download_decides_on_the_snapshot(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config.json comes first, even where another file is wanted: origin_of finds the weights by it."""
    asked: list[tuple[str, str | None]] = []

    def download(model: str, name: str, revision: str | None = None) -> str:
        asked.append((name, revision))
        return str(snapshot(cache, "new", **{name.removesuffix(".json"): "{}"}) / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert model_file("some/model", "model.index.json", allow_network=True) is not None
    assert asked == [("config.json", None), ("model.index.json", "new")]


def test_a_hub_that_refuses_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise PermissionError("401 Client Error\n\nlong story")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ValueError, match=r"hf download some/model.*hf auth login") as caught:
        model_file("some/model", "config.json", allow_network=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["some/model", "/no/such/folder", "no/such/folder"])
def test_a_tokenizer_that_is_nowhere(model: str, cache: Path) -> None:
    with pytest.raises(ValueError, match=f"^model '{model}': .*hf download {model}.*hf auth login") as caught:
        load_tokenizer(model, allow_network=False)
    assert "\n" not in str(caught.value)


def test_tokenizers_of_a_folder_and_of_the_caches_snapshot(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty': its tokenizer cannot be loaded: [^\n]+$"):
        load_tokenizer(str(tmp_path / "empty"))
    save_tokenizer(snapshot(cache, "aaa", config='{"model_type": "qwen3"}'))
    snapshot(cache, "bbb", config='{"model_type": "qwen3"}')
    point(cache, "main", "aaa")
    folder = cache / "models--some--model" / "snapshots" / "aaa"
    assert load_tokenizer("some/model", allow_network=False).get_vocab() == load_tokenizer(str(folder)).get_vocab()


def test_the_digests_of_caches_and_servers_that_are_out_there(tmp_path: Path) -> None:
    """Their values stand in caches on disk and in the greetings of older servers: another way to count breaks both."""
    header = b'{"model.embed_tokens.weight":{"dtype":"U8","shape":[32,64],"data_offsets":[0,2048]}}'
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 64, "vocab_size": 32}')
    weights = bytes(i * i % 251 for i in range(2048))
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<end>", "special": True}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert origin_of(str(tmp_path)) == Origin("5b964fdf600d197c", "526758efa99b6ca8")
