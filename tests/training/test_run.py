"""What a run resolves to, in its checkpoint: it comes back, it is what is exported, and a resumed run is held to it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from dflash_scale.commands.cli import main
from dflash_scale.config.run import parse_config
from dflash_scale.drafter.model import Drafter
from dflash_scale.training.export import export_checkpoint
from dflash_scale.training.run import ResolvedRun, resolve_run, resolve_verifier
from tests.support.chats import save_tokenizer

ROWS = 320


class Counts:
    """A split in which the lower token is said more often."""

    def token_counts(self, rows: int) -> np.ndarray:
        return np.arange(rows, 0, -1)


@pytest.fixture
def verifier(tmp_path: Path) -> Path:
    """A configuration and a tokenizer; no weights."""
    save_tokenizer(tmp_path / "verifier")
    content = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 9,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": ROWS,
        "rope_theta": 7000.0,
        "dtype": "float32",
    }
    (tmp_path / "verifier" / "config.json").write_text(json.dumps(content))
    return tmp_path / "verifier"


def resolved(verifier: Path, drafter: dict[str, Any] | None = None, **sections: dict[str, Any]) -> ResolvedRun:
    content: dict[str, Any] = {"verifier": {"model": str(verifier)}, "data": {"path": "unused"}, **sections}
    config = parse_config({**content, "drafter": {"layers": 2, "block_size": 4, **(drafter or {})}})
    return resolve_run(config, resolve_verifier(config), AutoTokenizer.from_pretrained(verifier), Counts())


def saved(run: ResolvedRun, folder: Path) -> Path:
    folder.mkdir()
    run.save(folder)
    return folder


@pytest.mark.parametrize(
    "drafter",
    [
        {},
        {"vocab_size": 40, "causal_block": True},
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "head_dim": 16},
    ],
)
def test_what_is_saved_comes_back(verifier: Path, tmp_path: Path, drafter: dict[str, Any]) -> None:
    run = resolved(verifier, drafter, train={"precision": "fp32"}, loss={"terms": {"kl": 1.0}})
    folder = saved(run, tmp_path / "step")
    loaded = ResolvedRun.load(folder)
    assert loaded.dump() == run.dump() and loaded.config == run.config
    assert (loaded.verifier, loaded.dtype) == (run.verifier, run.dtype)
    assert replace(loaded.spec, layers=run.spec.layers) == run.spec
    assert (folder / "d2t.npy").is_file() == ("vocab_size" in drafter)
    if loaded.vocabulary is not None:
        assert run.vocabulary is not None
        assert loaded.vocabulary.ids.tolist() == run.vocabulary.ids.tolist() and len(loaded.vocabulary.ids) == 40
    run.check_same(loaded, folder)
    assert parse_config(json.loads((folder / "config.json").read_text())) == run.config


def test_an_export_is_what_was_trained_whatever_the_defaults_are_today(
    verifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved(verifier)
    checkpoint = saved(run, tmp_path / "step-000001")
    drafter = Drafter(run.spec)
    drafter.initialise(0)
    monkeypatch.setattr("dflash_scale.training.export.checkpoint_state", lambda folder: drafter.state_dict())
    before = export_checkpoint(checkpoint, tmp_path / "before")
    monkeypatch.setattr("dflash_scale.verifier.layers.default_layer_ids", lambda layers: (1, 2, 3, 4, 5))
    monkeypatch.setattr("dflash_scale.training.run.mask_token_id", lambda *given: 3)
    monkeypatch.setattr(
        "dflash_scale.drafter.model.drafter_rope", lambda *given: {"rope_type": "default", "rope_theta": 5.0}
    )
    other = resolved(verifier).spec
    assert (other.layer_ids, other.mask_token_id) != (run.spec.layer_ids, run.spec.mask_token_id)
    assert other.layers.rope_parameters != run.spec.layers.rope_parameters
    for path in verifier.glob("*token*"):
        path.unlink()
    after = export_checkpoint(checkpoint, tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (after / name).read_bytes() == (before / name).read_bytes(), name
    content = json.loads((after / "config.json").read_text())
    assert content["aux_hidden_state_layer_ids"] == [2, 3, 4, 6, 7]
    assert content["transformer_layer_config"]["rope_parameters"]["rope_theta"] == 7000.0


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("config.json", "got no config.json, wanted the step folder of a run; check the path"),
        ("run.json", "got no run.json, wanted .* export or resume it with the version that wrote it"),
        ("d2t.npy", "got no d2t.npy, wanted it for drafter.vocab_size; it is incomplete"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_in_a_sentence(
    verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], removed: str, said: str
) -> None:
    folder = saved(resolved(verifier, {"vocab_size": 40}), tmp_path / "step")
    (folder / removed).unlink()
    with pytest.raises(ValueError, match=said):
        ResolvedRun.load(folder)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dflash-scale export: checkpoint {folder}: got no {removed}") and error.count("\n") == 1


def test_a_run_json_of_another_format_is_refused_in_a_sentence(verifier: Path, tmp_path: Path) -> None:
    folder = saved(resolved(verifier), tmp_path / "step")
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ValueError, match=f"checkpoint {folder}: got run.json of format 2, wanted 1; export or resume"):
        ResolvedRun.load(folder)


@pytest.mark.parametrize(
    ("drafter", "sections", "key"),
    [
        ({"block_size": 5}, {}, "drafter.block_size is 5, but .* was trained with 4"),
        ({"mask_token_id": 7}, {}, "drafter.mask_token_id is 7, but .* was trained with"),
        ({"heads": 8}, {}, "drafter.transformer_layer_config.num_attention_heads is 8, but .* was trained with 4"),
        ({"causal_block": True}, {}, "drafter.causal_block is True, but .* was trained with False"),
        ({"vocab_size": 41}, {}, "drafter.draft_vocab_size is 41, but .* was trained with 40"),
        ({"rope_parameters": {"rope_theta": 9}}, {}, r"rope_parameters.rope_theta is 9.0, but .* with 7000.0"),
        ({}, {"train": {"precision": "fp32"}}, "dtype is torch.float32, but .* was trained with torch.bfloat16"),
    ],
)
def test_a_resumed_run_names_what_differs(
    verifier: Path, tmp_path: Path, drafter: dict[str, Any], sections: dict[str, Any], key: str
) -> None:
    folder = saved(resolved(verifier, {"vocab_size": 40}), tmp_path / "step")
    with pytest.raises(ValueError, match=f"--resume: .*{key}"):
        resolved(verifier, {"vocab_size": 40, **drafter}, **sections).check_same(ResolvedRun.load(folder), folder)


def test_a_resumed_run_is_held_to_the_tokens_that_its_drafter_has(verifier: Path, tmp_path: Path) -> None:
    run = resolved(verifier, {"vocab_size": 40})
    folder = saved(run, tmp_path / "step")
    assert run.vocabulary is not None
    others = replace(run.vocabulary, ids=run.vocabulary.ids[::-1].copy())
    with pytest.raises(ValueError, match=r"--resume: drafter.d2t \(digest\) is"):
        replace(run, vocabulary=others).check_same(ResolvedRun.load(folder), folder)


def test_what_only_changes_how_it_is_trained_may_change(verifier: Path, tmp_path: Path) -> None:
    folder = saved(resolved(verifier), tmp_path / "step")
    stream, loss = {"transport": "bf16"}, {"terms": {"kl": 1.0}}
    changed = resolved(verifier, {"pointwise": "torch", "attention_backend": "cpu"}, stream=stream, loss=loss)
    changed.check_same(ResolvedRun.load(folder), folder)


def test_a_verifier_is_told_by_its_weights_and_else_by_its_name(verifier: Path, tmp_path: Path) -> None:
    run = resolved(verifier)
    folder = saved(run, tmp_path / "step")
    stored, moved = ResolvedRun.load(folder), replace(run.verifier, model="elsewhere")
    with pytest.raises(ValueError, match=f"--resume: verifier.model is elsewhere, but .* was trained with {verifier}"):
        replace(run, verifier=moved).check_same(stored, folder)
    stored = replace(stored, verifier=replace(stored.verifier, digest="0" * 16))
    replace(run, verifier=replace(moved, digest="0" * 16)).check_same(stored, folder)
    with pytest.raises(ValueError, match=r"--resume: verifier\.digest is 1{16}, but .* was trained with 0{16}"):
        replace(run, verifier=replace(run.verifier, digest="1" * 16)).check_same(stored, folder)
