"""What the trainer knows of the verifier before any weight is read: its shape and its mask token.

The verifier itself runs inside the servers. What is read of its weights is in head.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import transformers
from transformers import CONFIG_MAPPING

from dflash_scale.verifier.files import CONFIG, model_file, shipped_config
from dflash_scale.verifier.rope import verifier_rope

KV_HEADS_FOR_LATENT_ATTENTION = 8  # at most; DeepSeek's layers have as many key heads as query heads, and cache none
EPS_NAMES = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "layernorm_epsilon")


@dataclass(frozen=True, slots=True)
class VerifierShape:
    """The numbers of the verifier's config.json that the drafter and the stream depend on.

    heads, kv_heads, head_dim and intermediate_size are what a drafter takes over: the verifier's own where it has them.
    `rope_parameters` in the form of Transformers 5 (rope_type, rope_theta, ...); `dtype` as a name, of the weights.
    """

    model_type: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    tie_word_embeddings: bool
    dtype: str

    def stream_dtype(self, configured: str) -> str:
        """The dtype of the streamed hidden states: `configured`, where auto means the verifier's own."""
        return self.dtype if configured == "auto" else configured


def verifier_shape(model: str, *, allow_network: bool = False) -> VerifierShape:
    """Reads a verifier's config.json: a local folder, the hub's cache, a shipped copy, and last, if allowed, the hub.

    Raises:
        ValueError: no config.json could be found, Transformers does not know its family, or it lacks a number.
    """
    content, path = _content(model, allow_network)
    return _read_shape(_parsed(content, path), content, path)


def verifier_config(model: str, *, allow_network: bool = False) -> Any:
    """The verifier's configuration as its family's class in Transformers; raises ValueError as `verifier_shape`."""
    return _parsed(*_content(model, allow_network))


def _content(model: str, allow_network: bool) -> tuple[dict[str, Any], Path]:
    path = model_file(model, CONFIG) or shipped_config(model)
    if path is None and allow_network:
        path = model_file(model, CONFIG, allow_network=True)
    if path is None:
        raise ValueError(
            f"verifier.model: got {model!r}, wanted a folder with a config.json or a model in the hub's cache; "
            f"download it (`hf download {model}`) or give the folder"
        )
    return json.loads(path.read_text(encoding="utf-8")), path


def _parsed(content: dict[str, Any], path: Path) -> Any:
    family = str(content.get("model_type"))
    if family not in CONFIG_MAPPING:
        raise ValueError(
            f"verifier {path}: got the family (model_type) {family!r}, wanted one that Transformers "
            f"{transformers.__version__} knows; a newer Transformers may know it, code from the hub is not run"
        )
    # Only weights of full precision are ever read (head.py); how the others are packed is the servers' matter.
    plain = {name: value for name, value in content.items() if name != "quantization_config"}
    return CONFIG_MAPPING[family].from_dict(plain)


def _read_shape(config: Any, content: dict[str, Any], path: Path) -> VerifierShape:
    text = config.get_text_config(decoder=True)  # of a multimodal wrapper, its language model
    given = content.get("text_config") or {}
    try:
        heads, kv_heads, head_dim = _heads(text)
        inner = getattr(text, "intermediate_size", None) or 3 * text.hidden_size  # experts only: Qwen3's usual ratio
        dtype = given.get("dtype") or given.get("torch_dtype") or content.get("dtype") or content.get("torch_dtype")
        return VerifierShape(
            model_type=content["model_type"],
            hidden_size=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=max(inner) if isinstance(inner, list | tuple) else inner,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.max_position_embeddings,
            rms_norm_eps=next((getattr(text, name) for name in EPS_NAMES if getattr(text, name, None)), 1e-6),
            rope_parameters=verifier_rope(text),
            tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
            dtype=dtype or "float32",
        )
    except AttributeError as error:
        raise ValueError(
            f"verifier {path}: no {error.name!r} (model_type {content['model_type']!r}); wanted the config.json of a "
            "causal language model, or of a multimodal model that holds one"
        ) from None


def _heads(text: Any) -> tuple[int, int, int]:
    """Query heads, key heads and head dimension for a drafter.

    Latent attention (DeepSeek) has no key heads to take over: the drafter gets heads as wide as its values, as many as
    fill the hidden size, and few key heads, because a drafter caches its keys as they are.
    """
    if getattr(text, "kv_lora_rank", None):
        heads = max(1, text.hidden_size // text.v_head_dim)
        kv_heads = max(n for n in range(1, KV_HEADS_FOR_LATENT_ATTENTION + 1) if heads % n == 0)
        return heads, kv_heads, text.v_head_dim
    heads = _own(text, "num_attention_heads")
    if heads is None:
        raise AttributeError(name="num_attention_heads")
    return heads, _own(text, "num_key_value_heads") or heads, _own(text, "head_dim") or text.hidden_size // heads


def _own(text: Any, name: str) -> int | None:
    """A number of the attention. Gemma 4 gives its full attention layers heads of twice the size; what stands in the
    config for all layers is that of the others, which is what attention kernels are made for."""
    try:
        return getattr(text, name, None)
    except RuntimeError:  # Transformers: the attribute differs by layer
        number: int | None = text.to_dict().get(name)
        return number


class Tokenizer(Protocol):
    """What `mask_token_id` asks of a Transformers tokenizer."""

    @property
    def mask_token_id(self) -> int | None: ...
    def get_vocab(self) -> dict[str, int]: ...


def mask_token_id(tokenizer: Tokenizer, vocab_rows: int, configured: int | None) -> int:
    """The token of the mask slots: as configured, else the tokenizer's own, else the first unused embedding row.

    Raises:
        ValueError: the configured id has no embedding row, or every row stands for a token.
    """
    if configured is not None:
        if configured >= vocab_rows:
            raise ValueError(
                f"drafter.mask_token_id: got {configured}, wanted an id below {vocab_rows}, the rows of the "
                "verifier's embedding; lower it"
            )
        return configured
    own = tokenizer.mask_token_id
    if own is not None and own < vocab_rows:
        return own
    unused = max(tokenizer.get_vocab().values(), default=-1) + 1
    if unused >= vocab_rows:
        raise ValueError(
            f"drafter.mask_token_id: the tokenizer has no mask token and uses all {vocab_rows} rows of the "
            "embedding, wanted one to spare; name a token that never occurs in answers, such as a reserved one"
        )
    return unused
