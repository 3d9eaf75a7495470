"""A drafter to begin from: an exported folder, of this project or another, in the speculators or the z-lab format.

    drafter.init_from = "drafters/qwen3-8b"

Both keep the weights under the names that vLLM loads, which are the names of training. The speculators format writes
tapped layers as ids k (`aux_hidden_state_layer_ids`), z-lab's as k-1 (`dflash_config.target_layer_ids`). What training
could not repair is checked before it begins.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Qwen3Config

from dflash_scale.drafter.model import Drafter, DrafterSpec
from dflash_scale.rope import drafter_rope, verifier_rope

log = logging.getLogger(__name__)

# The verifier's matrices and the maps to its ids, which exports may hold beside the drafter's own weights.
NOT_TRAINED = ("embed_tokens.", "lm_head.", "d2t", "t2d", "verifier_")


@dataclass(frozen=True, slots=True)
class Start:
    """What a folder says of its drafter. None: it does not say."""

    layers: Qwen3Config
    layer_ids: tuple[int, ...]
    mask_token_id: int | None
    block_size: int | None
    causal_block: bool | None


def read_start(folder: Path) -> Start:
    """The definition of the drafter in a folder; raises ValueError if it is in neither format."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"drafter.init_from: got {folder}, wanted a folder with a config.json; give an exported drafter"
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    dflash = content.get("dflash_config") or {}
    if content.get("speculators_model_type") == "dflash":
        causal = content.get("sliding_window_non_causal")
        return Start(
            layers=_layers(content["transformer_layer_config"]),
            layer_ids=tuple(content["aux_hidden_state_layer_ids"]),
            mask_token_id=content.get("mask_token_id"),
            block_size=content.get("block_size"),
            causal_block=None if causal is None else not causal,
        )
    if "target_layer_ids" in dflash:
        return Start(
            layers=_layers(content),
            layer_ids=tuple(k + 1 for k in dflash["target_layer_ids"]),
            mask_token_id=dflash.get("mask_token_id", content.get("mask_token_id")),
            block_size=content.get("block_size", dflash.get("block_size")),
            causal_block=dflash.get("causal"),
        )
    raise ValueError(
        f"drafter.init_from: got {path} without speculators_model_type dflash and without dflash_config."
        "target_layer_ids, wanted the speculators or the z-lab format of a DFlash drafter"
    )


def _layers(content: dict[str, Any]) -> Qwen3Config:
    return Qwen3Config(
        **{name: value for name, value in content.items() if name not in ("model_type", "dflash_config")}
    )


def load_start(folder: Path, spec: DrafterSpec) -> dict[str, Tensor]:
    """All weights of a drafter of the definition `spec`, from a folder.

    Raises:
        ValueError: the folder's drafter is another one; all differences in one message.
    """
    start = read_start(folder)
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 safe_open is no mapping
                own = name.removeprefix("model.")
                if not own.startswith(NOT_TRAINED):
                    state[own] = tensors.get_tensor(name)
    if problems := [*_meaning(start, spec), *_shapes(state, spec)]:
        raise ValueError(
            f"drafter.init_from: {folder} holds another drafter than this run's:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    for what, got, wanted in (
        ("block size", start.block_size, spec.block_size),
        ("causal block", start.causal_block, spec.causal_block),
        ("layer types", start.layers.layer_types, spec.layers.layer_types),
        ("sliding window", start.layers.sliding_window, spec.layers.sliding_window),
    ):
        if got is not None and got != wanted:
            log.warning("drafter.init_from: %s was %s there and is %s here", what, got, wanted)
    if (folder / "mask_embedding.pt").is_file():
        log.warning("drafter.init_from: mask_embedding.pt is left out: masks are rows of the verifier's embedding here")
    return state


def _meaning(start: Start, spec: DrafterSpec) -> list[str]:
    """What the shapes would not show."""
    rope = drafter_rope(verifier_rope(start.layers), spec.layers.head_dim)
    own = drafter_rope(verifier_rope(spec.layers), spec.layers.head_dim)
    compared = [
        ("tapped layers", list(start.layer_ids), list(spec.layer_ids), "verifier.layer_ids"),
        ("mask token", start.mask_token_id, spec.mask_token_id, "drafter.mask_token_id"),
        ("rotary embedding", rope, own, "drafter.rope_parameters"),
    ]
    return [
        f"{what}: got {got}, wanted {wanted}; set {key} or give another folder"
        for what, got, wanted, key in compared
        if got is not None and got != wanted
    ]


def _shapes(state: dict[str, Tensor], spec: DrafterSpec) -> list[str]:
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in Drafter(spec).named_parameters()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return [
        f"{name}: got {got.get(name, 'no such weight')}, wanted {wanted.get(name, 'no such weight')}"
        for name in sorted(wanted.keys() | got.keys())
        if got.get(name) != wanted.get(name)
    ]
