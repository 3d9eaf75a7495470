"""What the trainer knows of the verifier: its shape, its embedding, and the way from its last residual to its logits.

The verifier itself runs inside the servers. The trainer reads three tensors of it (embedding, final norm, head) by
name from the safetensors shards; no layer is ever loaded. They are frozen, and belong to no optimizer.

V vocabulary rows of the embedding · H hidden size · N positions.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# config.json files of public verifiers, so that a run can be planned with no network.
SHIPPED = Path(__file__).parents[1] / "configs" / "verifiers"

# model_type -> (module, class) of the family's final norm in Transformers. Families stand here only if
# logits = lm_head(norm(residual)) and nothing else (no scale, no soft-cap), which tests/test_verifier.py proves.
FINAL_NORM = {
    "llama": ("transformers.models.llama.modeling_llama", "LlamaRMSNorm"),
    "mistral": ("transformers.models.mistral.modeling_mistral", "MistralRMSNorm"),
    "qwen2": ("transformers.models.qwen2.modeling_qwen2", "Qwen2RMSNorm"),
    "qwen3": ("transformers.models.qwen3.modeling_qwen3", "Qwen3RMSNorm"),
    "qwen3_moe": ("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeRMSNorm"),
}


@dataclass(frozen=True, slots=True)
class VerifierShape:
    """The numbers of the verifier's config.json that the drafter and the stream depend on.

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
        ValueError: no config.json could be found, or it lacks a number.
    """
    path = _file(model, "config.json") or _shipped(model)
    if path is None and allow_network:
        path = _file(model, "config.json", allow_network=True)
    if path is None:
        raise ValueError(
            f"verifier.model: got {model!r}, wanted a folder with a config.json or a model in the hub's cache; "
            f"download it (`hf download {model}`) or give the folder"
        )
    return _read_shape(json.loads(path.read_text(encoding="utf-8")), path)


def _read_shape(content: dict[str, Any], path: Path) -> VerifierShape:
    rope = dict(content.get("rope_parameters") or content.get("rope_scaling") or {})  # the latter before Transformers 5
    rope.setdefault("rope_theta", content.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    try:
        return VerifierShape(
            model_type=content["model_type"],
            hidden_size=content["hidden_size"],
            layers=content["num_hidden_layers"],
            heads=content["num_attention_heads"],
            kv_heads=content.get("num_key_value_heads") or content["num_attention_heads"],
            head_dim=content.get("head_dim") or content["hidden_size"] // content["num_attention_heads"],
            intermediate_size=content["intermediate_size"],
            vocab_size=content["vocab_size"],
            max_position_embeddings=content["max_position_embeddings"],
            rms_norm_eps=content["rms_norm_eps"],
            rope_parameters=rope,
            tie_word_embeddings=content.get("tie_word_embeddings", False),
            dtype=content.get("dtype") or content.get("torch_dtype") or "float32",
        )
    except KeyError as error:
        raise ValueError(
            f"verifier {path}: no {error.args[0]!r} (model_type {content.get('model_type')!r}); wanted the config.json "
            f"of a text verifier, of one of the families {', '.join(FINAL_NORM)}"
        ) from None


def _file(model: str, name: str, *, allow_network: bool = False) -> Path | None:
    """One file of a verifier on this machine, None if it has none; only `allow_network` downloads."""
    folder = Path(model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if model.count("/") != 1 or model.startswith((".", "/")):  # a path that does not exist, not a hub id
        return None
    try:
        return Path(hf_hub_download(model, name, local_files_only=not allow_network))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"verifier {model}: {name} cannot be fetched from the hub: {error}") from error


def _shipped(model: str) -> Path | None:
    for path in sorted(SHIPPED.glob("*.json")):
        if json.loads(path.read_text(encoding="utf-8"))["_name_or_path"] == model:
            return path
    return None


class VerifierHead:
    """The verifier's ends. Not an nn.Module, so that no engine can find, cast or partition its tensors.

    embedding (V, H) · norm, the family's own module · weight (V, H), the head's, the same tensor if tied.
    """

    def __init__(self, embedding: Tensor, norm: nn.Module, weight: Tensor) -> None:
        self.embedding = embedding.requires_grad_(False)
        self.norm = norm.requires_grad_(False)
        self.weight = weight.requires_grad_(False)

    def logits(self, residual: Tensor) -> Tensor:
        """(N, H) residual after the last decoder layer -> (N, V) logits, in the head's dtype."""
        return F.linear(self.norm(residual.to(self.weight.dtype)), self.weight)

    @torch.no_grad()
    def argmax(self, residual: Tensor, chunk: int = 2048) -> Tensor:
        """(N, H) -> (N,) int32, the verifier's greedy next token; holds the logits of `chunk` positions at once."""
        picked = [self.logits(part).argmax(-1).int() for part in residual.split(chunk)]
        return torch.cat(picked) if picked else residual.new_zeros(0, dtype=torch.int32)


def load_verifier_head(
    model: str, dtype: torch.dtype, device: torch.device | str, *, allow_network: bool = True
) -> VerifierHead:
    """Loads embedding, final norm and head of a folder or a hub id, reading only the shards that hold them.

    Raises:
        ValueError: a family that is not known, or a tensor that is absent or of the wrong shape.
    """
    shape = verifier_shape(model, allow_network=allow_network)
    if shape.model_type not in FINAL_NORM:
        raise ValueError(
            f"verifier {model}: got the family {shape.model_type!r}, wanted one of {', '.join(sorted(FINAL_NORM))}; "
            "another family may scale or cap its logits: see docs/extending.md on how to add one"
        )
    names = [EMBEDDING, NORM] + ([] if shape.tie_word_embeddings else [HEAD])
    tensors = {name: tensor.to(dtype) for name, tensor in _read(model, names, device, allow_network).items()}
    matrix = (shape.vocab_size, shape.hidden_size)
    for name, tensor in tensors.items():
        wanted = matrix if name != NORM else (shape.hidden_size,)
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"verifier {model}: got {name} of shape {tuple(tensor.shape)}, wanted {wanted} as its config.json "
                "says; the weights and the config.json do not belong together"
            )
    module, name = FINAL_NORM[shape.model_type]
    norm = getattr(importlib.import_module(module), name)(shape.hidden_size, eps=shape.rms_norm_eps)
    norm.weight = nn.Parameter(tensors[NORM], requires_grad=False)
    return VerifierHead(tensors[EMBEDDING], norm, tensors.get(HEAD, tensors[EMBEDDING]))


def _read(model: str, names: list[str], device: torch.device | str, allow_network: bool) -> dict[str, Tensor]:
    index = _file(model, INDEX, allow_network=allow_network)
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index is not None else {}
    tensors = {}
    for name in names:
        path = _file(model, shards.get(name, SINGLE), allow_network=allow_network)
        if path is None:
            raise ValueError(
                f"verifier {model}: got no {shards.get(name, SINGLE)}, wanted it for the tensor {name}; "
                "give a folder with the safetensors weights"
            )
        with safe_open(path, framework="pt", device=str(device)) as shard:
            if name not in shard.keys():  # noqa: SIM118 safe_open is no mapping
                raise ValueError(
                    f"verifier {model}: got no tensor {name} in {path.name}, wanted it there; the checkpoint is "
                    "incomplete or its config.json says tie_word_embeddings wrongly"
                )
            tensors[name] = shard.get_tensor(name)
    return tensors


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
