"""The rotary embedding that a drafter takes over from its verifier.

vLLM rotates the drafter's keys by `get_rope` of the drafter's own config.json, training by Transformers' Qwen3 module
of the same dictionary. They agree on default, linear, llama3 and yarn over the whole head dimension, and on nothing
else: Transformers' Qwen3 ignores `partial_rotary_factor` and `mrope_section`, which vLLM obeys. So the dictionary is
brought to the common ground before anything is trained with it, and exported as it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_THETA = 10000.0
REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


def check_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """`drafter.rope_parameters` as configured; raises ValueError unless training and serving rotate alike by it."""
    kind = given.get("rope_type", "default")
    if kind not in REQUIRED:
        raise ValueError(
            f"drafter.rope_parameters: got the rope_type {kind!r}, wanted one of {', '.join(REQUIRED)}, which training "
            "and vLLM compute alike; choose one"
        )
    wanted, known = {"rope_theta", *REQUIRED[kind]}, {"rope_type", *OPTIONAL.get(kind, ())}
    if missing := sorted(wanted - given.keys()):
        raise ValueError(f"drafter.rope_parameters: got no {', '.join(missing)}, wanted it for {kind}; add it")
    if surplus := sorted(given.keys() - wanted - known):
        raise ValueError(f"drafter.rope_parameters: got {', '.join(surplus)}, which {kind} does not take; drop it")
    for name in given.keys() - {"rope_type", "truncate"}:
        if isinstance(given[name], bool) or not isinstance(given[name], int | float):
            raise ValueError(f"drafter.rope_parameters.{name}: got {given[name]!r}, wanted a number; correct it")
    return _floats({"rope_type": kind, **given})


def verifier_rope(text_config: Any) -> dict[str, Any]:
    """The verifier's rope_parameters, of its full attention layers where they differ by the layer's type.

    A drafter's layers read the context as full attention does, at any distance; a sliding layer's theta is made for its
    window alone. And vLLM wants one rotation for all layers of a drafter.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        rope = rope["full_attention"] or {}
    elif rope and all(isinstance(value, Mapping) for value in rope.values()):
        rope = next(iter(rope.values()))
    rope = {name: value for name, value in rope.items() if value is not None and name != "type"}
    return {"rope_type": "default", "rope_theta": getattr(text_config, "rope_theta", None) or DEFAULT_THETA, **rope}


def drafter_rope(verifier: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The dictionary that a drafter of heads of `head_dim` takes from its verifier's.

    default, linear, llama3 and yarn stay. `dynamic` is, up to the longest position and so in all that vLLM serves, the
    default with its theta; with `alpha`, with a greater one. Others (longrope, whose factors belong to the verifier's
    own head dimension; proportional) leave their theta. All rotate the whole head.
    """
    kind = verifier["rope_type"]
    theta = float(verifier["rope_theta"])
    if kind == "dynamic" and "alpha" in verifier:
        theta *= float(verifier["alpha"]) ** (head_dim / (head_dim - 2))
    if any(name not in verifier for name in REQUIRED.get(kind, ("absent",))):
        return {"rope_type": "default", "rope_theta": theta}
    kept = ("rope_type", "rope_theta", *REQUIRED[kind], *OPTIONAL.get(kind, ()))
    return _floats({name: verifier[name] for name in kept if name in verifier})


def _floats(rope: dict[str, Any]) -> dict[str, Any]:
    """vLLM's linear scaling takes a factor of 2.0, not of 2."""
    return {name: float(value) if name in ("factor", "rope_theta") else value for name, value in rope.items()}
