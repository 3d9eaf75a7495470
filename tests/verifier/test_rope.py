"""The drafter's rotary embedding: what it takes from the verifier's, and that it is what vLLM computes."""

import math
from typing import Any

import pytest
import torch
import transformers
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dflash_scale.verifier.rope import check_rope, drafter_rope, verifier_rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
DEEPSEEK = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5, "beta_fast": 32.0, "beta_slow": 1.0}
GPT_OSS = {**YARN, "truncate": False}


def frequencies(rope: dict[str, Any], dim: int) -> tuple[torch.Tensor, float]:
    """(dim/2,) inverse frequencies and the factor on cos and sin, as vLLM 0.32's rotary_embedding classes make them."""
    plain = torch.tensor([rope["rope_theta"] ** (-i / dim) for i in range(0, dim, 2)])
    kind, factor = rope["rope_type"], rope.get("factor", 1.0)
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        original = rope["original_max_position_embeddings"]
        low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
        smooth = (original * plain / 2 / math.pi - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        wave = 2 * math.pi / plain
        between = (1 - smooth) * plain / factor + smooth * plain
        return torch.where(wave < high, plain, torch.where(wave > low, plain / factor, between)), 1.0
    if kind == "yarn":

        def turns(count: float) -> float:
            ratio = rope["original_max_position_embeddings"] / (count * 2 * math.pi)
            return dim * math.log(ratio) / (2 * math.log(rope["rope_theta"]))

        low, high = turns(rope.get("beta_fast", 32)), turns(rope.get("beta_slow", 1))
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1)

        def magnitude(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1

        both = "mscale" in rope
        scale = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"]) if both else magnitude(1)
        return plain / factor * ramp + plain * (1 - ramp), scale
    return plain, 1.0


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "rope_theta": 1e4, "factor": 8}, LLAMA3, YARN, DEEPSEEK, GPT_OSS]
)
def test_the_drafter_rotates_as_vllm_does(rope: dict[str, Any]) -> None:
    taken = drafter_rope(rope, 64)
    assert {name: taken[name] for name in rope} == rope
    config = Qwen3Config(head_dim=64, max_position_embeddings=131072, rope_parameters=dict(taken))
    positions = torch.tensor([0, 1, 30, 4000, 40000])
    cos, sin = Qwen3RotaryEmbedding(config)(torch.zeros(1), positions[None])
    inverse, scale = frequencies(rope, 64)
    angles = positions[:, None] * inverse
    torch.testing.assert_close(cos[0, :, :32], angles.cos() * scale, rtol=0, atol=2e-2)  # fp32 angles of 40000 radians
    torch.testing.assert_close(cos[0, :4, :32], (angles.cos() * scale)[:4], rtol=0, atol=2e-3)
    torch.testing.assert_close(sin[0, :4, 32:], (angles.sin() * scale)[:4], rtol=0, atol=2e-3)


def test_what_the_two_compute_differently_is_not_taken() -> None:
    mrope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}
    assert drafter_rope(mrope, 64) == {"rope_type": "default", "rope_theta": 1e7}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    assert drafter_rope(longrope, 64) == {"rope_type": "default", "rope_theta": 1e4}
    proportional = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert drafter_rope(proportional, 64) == {"rope_type": "default", "rope_theta": 1e6}
    assert drafter_rope({"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}, 64)["rope_type"] == "default"


def test_dynamic_is_the_default_up_to_the_longest_position() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    taken = drafter_rope(dynamic, 64)
    assert taken == {"rope_type": "default", "rope_theta": 1e4}
    rotations = []
    for rope in (dynamic, taken):
        config = Qwen3Config(head_dim=64, max_position_embeddings=4096, rope_parameters=dict(rope))
        rotations.append(Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.arange(4096)[None])[0])
    assert torch.equal(*rotations)
    assert drafter_rope({**dynamic, "alpha": 1000.0}, 64)["rope_theta"] == pytest.approx(1e4 * 1000 ** (64 / 62))


def test_of_several_it_is_the_full_attention_layers() -> None:
    text = transformers.Gemma3TextConfig(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )
    assert verifier_rope(text) == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert verifier_rope(object()) == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "longrope", "rope_theta": 1e4}, "wanted one of default, linear, llama3, yarn"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "got no factor"),
        ({"rope_type": "default"}, "got no rope_theta"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "got partial_rotary_factor, which default does not take"),
        ({"rope_theta": "1e4"}, "rope_theta: got '1e4', wanted a number"),
    ],
)
def test_configured_ones_are_checked(rope: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_rope(rope)


def test_a_configured_one_is_taken_as_it_is() -> None:
    assert check_rope({"rope_theta": 10000}) == {"rope_type": "default", "rope_theta": 10000.0}
    assert check_rope(DEEPSEEK) == DEEPSEEK
