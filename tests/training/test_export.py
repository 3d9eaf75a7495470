"""The exported folder: the drafter that comes back, its logits from the notes' text alone, and what vLLM reads."""

import json
import math
import os
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dflash_scale.commands.cli import main
from dflash_scale.drafter.model import DrafterSpec, block_inputs
from dflash_scale.drafter.pretrained import FORMATS, export_drafter, load_drafter, load_spec
from tests.support.drafters import (
    EPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    THETA,
    VOCABULARY,
    make_drafter,
    make_spec,
    make_verifier,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def turn(x: Tensor, position: int) -> Tensor:
    """RoPE of one position's heads (heads, D), pair (i, i + D/2) turned by position / theta**(2i/D)."""
    half = HEAD_DIM // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * THETA ** (-2 * i / HEAD_DIM)
        c, s = math.cos(angle), math.sin(angle)
        out[:, i] = x[:, i] * c - x[:, i + half] * s
        out[:, i + half] = x[:, i + half] * c + x[:, i] * s
    return out


def plain_logits(
    w: dict[str, Tensor], spec: DrafterSpec, ends: tuple[Tensor, Tensor], states: Tensor, anchor: int, token: int
) -> Tensor:
    """One block of one document, key by key, from notes on the semantics. states (n, L*H) of the document alone."""
    embedding, head = ends
    context = norm(states[:anchor] @ w["fc.weight"].T, w["hidden_norm.weight"])
    x = embedding[[token] + [spec.mask_token_id] * (spec.block_size - 1)]
    for layer in range(2):
        p, window = f"layers.{layer}.", spec.window(layer)

        def project(rows: Tensor, name: str, heads: int, p: str = p) -> Tensor:
            return (rows @ w[f"{p}self_attn.{name}_proj.weight"].T).view(-1, heads, HEAD_DIM)

        inside = norm(x, w[f"{p}input_layernorm.weight"])
        both = torch.cat([context, inside])  # position of row i is i: the block starts where the context ends
        k = norm(project(both, "k", KV_HEADS), w[f"{p}self_attn.k_norm.weight"])
        k, v = torch.stack([turn(row, i) for i, row in enumerate(k)]), project(both, "v", KV_HEADS)
        q = norm(project(inside, "q", HEADS), w[f"{p}self_attn.q_norm.weight"])
        out = torch.zeros(spec.block_size, HEADS, HEAD_DIM)
        for slot in range(spec.block_size):
            here = anchor + slot
            seen = [
                i
                for i in range(anchor + spec.block_size)
                if (window is None or here - i < window) and not (spec.causal_block and i > here)
            ]
            query = turn(q[slot], here)
            for h in range(HEADS):
                g = h // (HEADS // KV_HEADS)
                out[slot, h] = F.softmax(k[seen, g] @ query[h] / math.sqrt(HEAD_DIM), 0) @ v[seen, g]
        x = x + out.flatten(1) @ w[f"{p}self_attn.o_proj.weight"].T
        inside = norm(x, w[f"{p}post_attention_layernorm.weight"])
        gate, up = (inside @ w[f"{p}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{p}mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"]) @ head.T


@pytest.fixture
def verifier(tmp_path: Path) -> Path:
    return make_verifier(tmp_path / "verifier")


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 6), (True, 6)])
def test_exported_logits_are_those_of_the_text(tmp_path: Path, verifier: Path, causal: bool, window: int) -> None:
    spec = make_spec(causal, window)
    folder = export_drafter(make_drafter(spec).state_dict(), spec, str(verifier), tmp_path / "drafter")
    drafter = load_drafter(folder)
    torch.manual_seed(0)
    lengths, own = (7, 19, 11), 1  # the document in the middle is looked at
    start, anchors_inside = lengths[0], (0, 4, 9, 18)
    states = torch.randn(sum(lengths), 2 * HIDDEN)
    embedding, head = torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    tokens = torch.randint(0, 90, (sum(lengths),))
    doc_ids = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    anchors = torch.tensor([2, *(start + a for a in anchors_inside), start + lengths[own] + 3], dtype=torch.int32)
    with torch.no_grad():
        slots = block_inputs(embedding, tokens[anchors], spec)
        got = (drafter(slots, states, positions, anchors, doc_ids) @ head.T).view(len(anchors), 5, VOCABULARY)
        weights, alone = load_file(folder / "model.safetensors"), states[start : start + lengths[own]]
        for row, anchor in enumerate(anchors_inside, start=1):
            token = int(tokens[start + anchor])
            wanted = plain_logits(weights, spec, (embedding, head), alone, anchor, token)
            error = (got[row] - wanted).norm() / wanted.norm()
            assert error < 1e-4, f"anchor {anchor}: relative error {error:.2e} of {tuple(wanted.shape)}"


def test_config_says_what_vllm_reads(tmp_path: Path, verifier: Path) -> None:
    for causal in (False, True):
        spec = make_spec(causal)
        folder = export_drafter(make_drafter(spec).state_dict(), spec, str(verifier), tmp_path / "drafter")
        content = json.loads((folder / "config.json").read_text())
        assert content["speculators_model_type"] == content["speculators_config"]["algorithm"] == "dflash"
        assert content["sliding_window_non_causal"] is (not causal)
        assert content["aux_hidden_state_layer_ids"] == [1, 2]
        assert content["draft_vocab_size"] == content["transformer_layer_config"]["vocab_size"] == VOCABULARY
        method = content["speculators_config"]["proposal_methods"][0]
        assert method["speculative_tokens"] == content["block_size"] - 1 == 4
        named = content["speculators_config"]["verifier"]
        assert named == {"name_or_path": str(verifier), "architectures": ["Qwen3ForCausalLM"]}
        layers = content["transformer_layer_config"]
        assert layers["num_hidden_layers"] == len(layers["layer_types"]) == 2
        assert layers["rope_parameters"] == {"rope_type": "default", "rope_theta": THETA}
    names = set(load_file(folder / "model.safetensors"))
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.1.self_attn.q_norm.weight"} < names
    assert not any("embed" in name or "lm_head" in name for name in names)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path: Path, verifier: Path, umask: int) -> None:
    """A server in a container is often another user."""
    spec, before = make_spec(), os.umask(umask)
    try:
        folder = export_drafter(make_drafter(spec).state_dict(), spec, str(verifier), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors"), oct(0o666 & ~umask))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("causal", "rope"), [(True, {}), (False, YARN)])
def test_definition_comes_back(tmp_path: Path, verifier: Path, form: str, causal: bool, rope: dict[str, Any]) -> None:
    spec = make_spec(causal=causal, window=6)
    spec.layers.rope_parameters.update(rope)
    drafter = make_drafter(spec)
    for _ in range(2):  # an export replaces one of either format
        folder = export_drafter(drafter.state_dict(), spec, str(verifier), tmp_path / "drafter", form=form)
    loaded = load_spec(folder)
    assert replace(loaded, layers=spec.layers) == spec
    for name in ("hidden_size", "head_dim", "rms_norm_eps", "rope_parameters", "layer_types", "sliding_window"):
        assert getattr(loaded.layers, name) == getattr(spec.layers, name), name
    for name, tensor in load_drafter(folder).state_dict().items():
        assert torch.equal(tensor, drafter.state_dict()[name]), name


def test_zlab_config_is_as_published(tmp_path: Path, verifier: Path) -> None:
    """The keys that z-lab's folders have, under which vLLM and SGLang look for them; theta by its old name."""
    spec = make_spec()
    folder = export_drafter(make_drafter(spec).state_dict(), spec, str(verifier), tmp_path / "drafter", form="zlab")
    content = json.loads((folder / "config.json").read_text())
    assert content["dflash_config"] == {"mask_token_id": 95, "target_layer_ids": [0, 1], "causal": False}
    assert (content["architectures"], content["model_type"]) == (["DFlashDraftModel"], "qwen3")
    assert (content["block_size"], content["num_target_layers"], content["num_hidden_layers"]) == (5, 4, 2)
    assert (content["rope_theta"], content["rope_scaling"]) == (THETA, None)
    assert content.keys().isdisjoint({"rope_parameters", "speculators_model_type", "transformer_layer_config"})


def test_the_command_takes_the_format(tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, step = make_spec(), tmp_path / "step-000001"
    run = SimpleNamespace(
        spec=spec, verifier=SimpleNamespace(model=str(verifier)), dtype=torch.float32, vocabulary=None
    )
    monkeypatch.setattr("dflash_scale.training.export.ResolvedRun.load", lambda checkpoint: run)
    monkeypatch.setattr(
        "dflash_scale.training.export.checkpoint_state", lambda checkpoint: make_drafter(spec).state_dict()
    )
    for flags, key in (([], "speculators_model_type"), (["--format", "zlab"], "dflash_config")):
        assert main(["export", str(step), str(tmp_path / "drafter"), *flags]) == 0
        assert key in json.loads((tmp_path / "drafter" / "config.json").read_text())


def test_what_does_not_fit_is_refused(tmp_path: Path, verifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = make_spec()
    state = make_drafter(spec).state_dict()
    with pytest.raises(ValueError, match=r"fc\.weight: got \(48, 96\), wanted \(48, 144\)"):
        export_drafter(state, replace(spec, layer_ids=(1, 2, 3)), str(verifier), tmp_path / "drafter")
    with pytest.raises(ValueError, match="lm_head"):
        export_drafter(state | {"lm_head.weight": torch.zeros(1)}, spec, str(verifier), tmp_path / "drafter")
    with pytest.raises(ValueError, match="holds something else"):
        export_drafter(state, spec, str(verifier), verifier)
    with pytest.raises(ValueError, match="wanted the speculators or the z-lab format"):
        load_drafter(verifier)
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "drafter")]) == 2
    assert "step folder" in capsys.readouterr().err
