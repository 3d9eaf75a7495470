"""A small drafter and its verifier's folder, for tests of the formats on disk."""

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dflash_scale.drafter.model import Drafter, DrafterSpec

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY, EPS, THETA = 4, 2, 16, 48, 96, 1e-5, 5000.0


def make_verifier(folder: Path) -> Path:
    """A small random verifier, saved in `folder`."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_spec(causal: bool = False, window: int | None = None) -> DrafterSpec:
    layers = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        use_sliding_window=window is not None,
        sliding_window=window,
        layer_types=["full_attention", "full_attention" if window is None else "sliding_attention"],
    )
    return DrafterSpec(layers, (1, 2), HIDDEN, 5, 95, causal)


def make_drafter(spec: DrafterSpec) -> Drafter:
    drafter = Drafter(spec)
    drafter.initialise(3)
    with torch.no_grad():  # norms of ones would hide a norm that is left out or exchanged
        for parameter in drafter.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return drafter


KEPT = np.array([0, 3, 4, 7, 11, 19, 40, 95])
