"""Beginning from an exported drafter of either format, and being told all at once why it does not fit."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

from dflash_scale.drafter.model import Drafter
from dflash_scale.drafter.pretrained import export_drafter, load_drafter, load_start
from dflash_scale.drafter.vocabulary import DraftVocabulary
from tests.support.drafters import HIDDEN, KEPT, VOCABULARY, make_drafter, make_spec, make_verifier


def zlab(folder: Path, state: dict[str, torch.Tensor], **changed: Any) -> Path:
    """As z-lab publishes drafters: a flat Qwen3 dictionary, layer outputs counted from 0, theta by its old name."""
    spec = make_spec()
    layers = spec.layers.to_dict()
    rope = layers.pop("rope_parameters")
    content = {
        **layers,
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "block_size": 5,
        "num_target_layers": 4,
        "dflash_config": {"mask_token_id": 95, "target_layer_ids": [0, 1]},
        **changed,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    names = sorted(state)
    for part, half in enumerate((names[::2], names[1::2])):  # two files, as of a larger drafter
        save_file({name: state[name] for name in half}, folder / f"model-{part + 1:05d}-of-00002.safetensors")
    return folder


@pytest.fixture
def verifier(tmp_path: Path) -> Path:
    return make_verifier(tmp_path / "verifier")


def test_both_formats_give_the_weights_back(tmp_path: Path, verifier: Path) -> None:
    spec = make_spec()
    state = make_drafter(spec).state_dict()
    pruned = DraftVocabulary(KEPT, VOCABULARY)
    folders = [
        export_drafter(state, spec, str(verifier), tmp_path / "speculators"),
        export_drafter(state, spec, str(verifier), tmp_path / "pruned", vocabulary=pruned),
        zlab(tmp_path / "zlab", {**state, "embed_tokens.weight": torch.zeros(VOCABULARY, HIDDEN)}),
    ]
    for folder in folders:
        drafter = Drafter(spec)
        drafter.load_state_dict(load_start(folder, spec))
        assert all(torch.equal(tensor, state[name]) for name, tensor in drafter.state_dict().items()), folder


@pytest.mark.parametrize("window", [None, 6])
def test_a_zlab_folder_is_evaluated_as_vllm_would_serve_it(tmp_path: Path, window: int | None) -> None:
    """Without `causal` vLLM takes sliding layers as causal, whatever `use_sliding_window` says."""
    kinds = ["full_attention" if window is None else "sliding_attention"] * 2
    sliding = {"layer_types": kinds, "sliding_window": window, "use_sliding_window": False}
    state = make_drafter(make_spec()).state_dict()
    drafter = load_drafter(zlab(tmp_path / "zlab", state, **sliding))
    assert all(torch.equal(tensor, state[name]) for name, tensor in drafter.state_dict().items())
    wanted = make_spec(causal=window is not None)
    assert replace(drafter.spec, layers=wanted.layers) == wanted
    assert [drafter.spec.window(layer) for layer in range(2)] == [window] * 2
    assert drafter.spec.layers.rope_parameters == wanted.layers.rope_parameters
    said = {"mask_token_id": 95, "target_layer_ids": [0, 1]}
    for folder, changed, why in (
        ("mixed", {"layer_types": ["full_attention", "sliding_attention"]}, "full and sliding layers without"),
        ("unsaid", {"block_size": None}, "without block_size or mask_token_id"),
    ):
        with pytest.raises(ValueError, match=f"{folder}.*{why}"):
            load_drafter(zlab(tmp_path / folder, state, **{**sliding, "dflash_config": said, **changed}))


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    state = make_drafter(make_spec()).state_dict()
    folder = zlab(tmp_path / "zlab", state, rope_theta=7.0)
    other = make_spec()
    layers = Qwen3Config(
        **{**other.layers.to_dict(), "num_hidden_layers": 1, "layer_types": None, "intermediate_size": 72}
    )
    spec = replace(other, layers=layers, layer_ids=(1, 2, 3), mask_token_id=94)
    with pytest.raises(ValueError, match="holds another drafter") as caught:
        load_start(folder, spec)
    text = str(caught.value)
    for expected in (
        "aux layers: got [1, 2], wanted [1, 2, 3]; set verifier.layer_ids",
        "mask token: got 95, wanted 94; set drafter.mask_token_id",
        "rotary embedding: got {'rope_type': 'default', 'rope_theta': 7.0}",
        "fc.weight: got (48, 96), wanted (48, 144)",
        "layers.0.mlp.up_proj.weight: got (80, 48), wanted (72, 48)",
        "layers.1.mlp.up_proj.weight: got (80, 48), wanted no such weight",
    ):
        assert expected in text, text
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"fc\.weight: got no such weight, wanted \(48, 96\)"):
        load_start(folder, make_spec())


def test_layer_ids_differ_by_one_between_the_formats(tmp_path: Path) -> None:
    state = make_drafter(make_spec()).state_dict()
    folder = zlab(tmp_path / "zlab", state, dflash_config={"mask_token_id": 95, "target_layer_ids": [1, 2]})
    with pytest.raises(ValueError, match=r"aux layers: got \[2, 3\], wanted \[1, 2\]"):
        load_start(folder, make_spec())


def test_what_training_can_change_is_only_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = zlab(tmp_path / "zlab", make_drafter(make_spec()).state_dict())
    with caplog.at_level(logging.WARNING):
        load_start(folder, replace(make_spec(), block_size=8))
    assert "block size was 5 there and is 8 here" in caplog.text


def test_other_folders_are_refused(tmp_path: Path, verifier: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted a folder with a config\.json"):
        load_start(tmp_path / "nowhere", make_spec())
    with pytest.raises(ValueError, match="wanted the speculators or the z-lab format"):
        load_start(verifier, make_spec())
