"""Tiny random verifiers of every family that the tests know, made and saved by Transformers' own classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dflash_scale.verifier.layers import decoder_layers

VOCABULARY, HIDDEN, LAYERS = 97, 32, 4
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
HALVES = ["sliding_attention", "full_attention"] * 2
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _text(name: str, **extra: Any) -> Callable[[bool], Any]:
    return lambda tied: getattr(transformers, name)(**{**TINY, **extra}, tie_word_embeddings=tied)


def _wrapped(name: str, text: str, vision: dict[str, Any], **extra: Any) -> Callable[[bool], Any]:
    def make(tied: bool) -> Any:
        inner = getattr(transformers, text)(**{**TINY, **extra}, tie_word_embeddings=tied)
        return getattr(transformers, name)(
            text_config=inner.to_dict(), vision_config=vision, tie_word_embeddings=tied, image_token_id=5
        )

    return make


FAMILIES: dict[str, Callable[[bool], Any]] = {
    "llama": _text("LlamaConfig"),
    "llama4_text": _text("Llama4TextConfig", num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48),
    "mistral": _text("MistralConfig"),
    "ministral3": _text("Ministral3Config"),
    "qwen2": _text("Qwen2Config"),
    "qwen3": _text("Qwen3Config"),
    "qwen3_moe": _text("Qwen3MoeConfig", **MOE),
    "qwen3_next": _text("Qwen3NextConfig", **MOE, **LINEAR, shared_expert_intermediate_size=16),
    "qwen3_5_text": _text("Qwen3_5TextConfig", **LINEAR),
    "gemma2": _text("Gemma2Config", final_logit_softcapping=0.7),
    "gemma3_text": _text("Gemma3TextConfig", layer_types=HALVES, sliding_window=8),
    "gemma4_text": _text("Gemma4TextConfig", layer_types=HALVES, global_head_dim=8, hidden_size_per_layer_input=4,
                         vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=0, final_logit_softcapping=0.7),
    "gpt_oss": _text("GptOssConfig", num_local_experts=2, num_experts_per_tok=1, layer_types=HALVES,
                     sliding_window=8),
    "phi": _text("PhiConfig"),
    "phi3": _text("Phi3Config"),
    "phimoe": _text("PhimoeConfig", num_local_experts=2, lm_head_bias=True),
    "glm": _text("GlmConfig"),
    "glm4": _text("Glm4Config"),
    "glm4_moe": _text("Glm4MoeConfig", **ROUTED, first_k_dense_replace=1),
    "deepseek_v3": _text("DeepseekV3Config", **ROUTED, **LATENT, first_k_dense_replace=1, num_key_value_heads=4,
                         head_dim=4),
    "granite": _text("GraniteConfig", logits_scaling=3.0, embedding_multiplier=12.0),
    "cohere": _text("CohereConfig", logit_scale=0.25),
    "gemma3": _wrapped("Gemma3Config", "Gemma3TextConfig", {**VISION, "image_size": 28, "patch_size": 14},
                       layer_types=HALVES, sliding_window=8),
    "gemma4": _wrapped("Gemma4Config", "Gemma4TextConfig", {**VISION, "num_key_value_heads": 2, "head_dim": 8},
                       layer_types=HALVES, global_head_dim=8, hidden_size_per_layer_input=0, num_kv_shared_layers=0),
    "mistral3": _wrapped("Mistral3Config", "MistralConfig", {**VISION, "model_type": "pixtral", "head_dim": 8}),
    "qwen3_5": _wrapped("Qwen3_5Config", "Qwen3_5TextConfig",
                        {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                         "out_hidden_size": HIDDEN}, **LINEAR),
    "qwen3_vl": _wrapped("Qwen3VLConfig", "Qwen3VLTextConfig",
                         {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                          "out_hidden_size": HIDDEN, "deepstack_visual_indexes": []}),
}  # fmt: skip


def make_verifier(family: str, folder: Path, *, tied: bool = False, shard: str = "8KB", dtype: str = "float32") -> Any:
    """A random model of a family, saved in shards; every number in it matters: no norm is the identity."""
    torch.manual_seed(0)
    config = FAMILIES[family](tied)
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    model = auto.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.5, 0.3)
        for ends in (model.get_input_embeddings(), model.get_output_embeddings()):
            ends.weight.normal_()
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return model


@torch.no_grad()
def residuals_and_logits(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """By hooks on every decoder layer: (LAYERS + 1, T, H) residuals, id k at index k; and the logits (T, V)."""
    layers = decoder_layers(model)[1]
    seen: list[torch.Tensor] = []

    def first(_module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(_module: Any, _args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    handles = [layers[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return torch.stack([state[0] for state in seen]), logits
