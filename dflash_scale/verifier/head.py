"""The verifier's embedding, final norm and LM head: from its last hidden state (before the norm) to its logits.

Both are the family's own code in Transformers. Its model is built from the config.json without memory (on the meta
device), its final norm and output head get the tensors that the checkpoint holds for them, and all layers are thrown
away; no layer is ever read. The model's own forward then turns normed residuals into logits, with whatever the family
adds: a bias, a scale, a soft cap. Everything is frozen and belongs to no optimizer.

The drafter sees less of this than the verifier does, because vLLM shares two bare matrices with it and nothing around
them (`maybe_share_target_embed`, `compute_logits` in qwen3_dflash.py): its inputs are rows of `embedding` as they are,
without the factor that Gemma's or Granite's model puts on them, and its logits are products with `weight`, without
bias, scale or cap.

V vocabulary rows of the embedding · H hidden size · N positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPast

from dflash_scale.verifier.files import model_file
from dflash_scale.verifier.layers import decoder_layers
from dflash_scale.verifier.shape import verifier_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FULL_PRECISION = (torch.float32, torch.bfloat16, torch.float16)

# Where checkpoints keep the language model: as it is, and inside the wrappers of the multimodal families.
DECODER_PREFIXES = (
    "model.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.text_model.",
    "text_model.model.",
    "transformer.",
    "",
)
HEAD_PREFIXES = ("", "language_model.", "model.language_model.", "model.", "text_model.")
# Parts of a decoder with weights of their own that only feed its layers (Gemma's per-layer embeddings).
INPUT_SIDE = {"per_layer_model_projection", "per_layer_projection_norm"}


class VerifierHead:
    """Embedding, norm and LM head. Not an nn.Module, so that no engine can find, cast or partition its tensors.

    Args:
        embedding: (V, H).
        norm: the family's own final norm.
        weight: (V, H), the head's, the same tensor if tied.
        project: the family's way from normed residuals (N, H) to logits (N, V); None: the product with `weight`.
    """

    def __init__(
        self, embedding: Tensor, norm: nn.Module, weight: Tensor, project: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.embedding = embedding.requires_grad_(False)
        self.norm = norm.requires_grad_(False)
        self.weight = weight.requires_grad_(False)
        self._project = project

    def logits(self, residual: Tensor) -> Tensor:
        """(N, H) residual after the last decoder layer -> (N, V), the verifier's own logits, in the head's dtype."""
        normed = self.norm(residual.to(self.weight.dtype))
        return F.linear(normed, self.weight) if self._project is None else self._project(normed)


def load_verifier_head(
    model: str, dtype: torch.dtype, device: torch.device | str, *, allow_network: bool = True
) -> VerifierHead:
    """Loads embedding, final norm and head of a folder or a hub id, reading only the shards that hold them.

    Raises:
        ValueError: the parts are not found in the family's model, or a tensor is absent, quantised or misshapen.
    """
    config = verifier_config(model, allow_network=allow_network)
    built = _build(model, config)
    text = config.get_text_config(decoder=True)
    decoder, norm_name = _decoder(model, built, text)
    embedding, norm, head = built.get_input_embeddings(), getattr(decoder, norm_name), built.get_output_embeddings()
    if embedding is None or head is None:
        raise ValueError(f"verifier {model}: {type(built).__name__} has no input embedding or no output head to find")
    names = {id(module): name for name, module in built.named_modules(remove_duplicate=False)}
    checkpoint = _Checkpoint(model, allow_network)
    inside = names[id(decoder)]

    def fill(module: nn.Module, prefixes: Sequence[str], skip: Sequence[str] = ()) -> None:
        """Puts the checkpoint's tensors in the place of the module's parameters."""
        own = names[id(module)]
        local = own.removeprefix(inside + ".") if inside else own
        for parameter, meta in list(module.named_parameters()):
            if parameter not in skip:
                candidates = [f"{own}.{parameter}", *(f"{prefix}{local}.{parameter}" for prefix in prefixes)]
                tensor = checkpoint.read(list(dict.fromkeys(candidates)), tuple(meta.shape), device).to(dtype)
                module.register_parameter(parameter, nn.Parameter(tensor, requires_grad=False))

    fill(embedding, DECODER_PREFIXES)
    fill(norm, DECODER_PREFIXES)
    if _tied(config, text, checkpoint, names[id(head)]):
        head.weight = embedding.weight
        fill(head, HEAD_PREFIXES, skip=["weight"])
    else:
        fill(head, HEAD_PREFIXES)
    # Their Python classes may keep buffers, which the meta device left empty.
    for module in (norm, head):
        if empty := [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]:
            raise ValueError(f"verifier {model}: {type(module).__name__} has {', '.join(empty)}, which no file holds")
    return VerifierHead(embedding.weight, norm, head.weight, _projection(built, decoder))


def _build(model: str, config: Any) -> Any:
    """The family's causal language model without memory: of a multimodal model its text part, if that is one."""
    text = config.get_text_config(decoder=True)
    wanted = []
    for auto, given in (
        (AutoModelForCausalLM, text),
        (AutoModelForCausalLM, config),
        (AutoModelForImageTextToText, config),
    ):
        wanted.append(f"{auto.__name__} of {given.model_type}")
        if type(given) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(given).eval().requires_grad_(False)
    raise ValueError(f"verifier {model}: Transformers has none of {', '.join(wanted)}; it cannot be read")


def _decoder(model: str, built: nn.Module, text: Any) -> tuple[nn.Module, str]:
    """The module that holds the decoder layers, and the name of the final norm in it.

    Raises:
        ValueError: there is not one norm of the hidden size, or something else stands between layers and norm.
    """
    decoder, layers = decoder_layers(built)
    norms, others = [], []
    for name, child in decoder.named_children():
        shapes = {tuple(parameter.shape) for parameter in child.parameters()}
        if child is layers or isinstance(child, nn.Embedding) or name in INPUT_SIDE or "rotary" in name:
            continue
        if "norm" in type(child).__name__.lower() and shapes <= {(text.hidden_size,)}:
            norms.append(name)
        elif shapes:
            others.append(name)
    # A norm before the layers (Bloom's) stands before them in the module too.
    children = [name for name, _ in decoder.named_children()]
    if len(norms) > 1:
        place = next(i for i, child in enumerate(decoder.children()) if child is layers)
        norms = [name for name in norms if children.index(name) > place]
    if len(norms) != 1 or others:
        raise ValueError(
            f"verifier {model}: looked in {type(decoder).__name__} for one final norm of {text.hidden_size} weights, "
            f"got {norms or 'none'}, and for nothing else with weights beside its layers, got {others or 'nothing'}; "
            f"its children are {', '.join(children)}. See docs/extending.md on how to add a family"
        )
    return decoder, norms[0]


def _tied(config: Any, text: Any, checkpoint: _Checkpoint, head: str) -> bool:
    """Wrappers say it at the top, in their text part, or both; if only in the text part, the checkpoint decides."""
    if getattr(config, "tie_word_embeddings", False):
        return True
    present = checkpoint.find([f"{prefix}{head}.weight" for prefix in HEAD_PREFIXES]) is not None
    return bool(getattr(text, "tie_word_embeddings", False)) and not present


class _Passed(nn.Module):
    """Stands where the decoder was: hands on what it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


class _Output(BaseModelOutputWithPast):
    """A decoder's output without the extras that some families ask for (router logits, shared keys)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _projection(built: nn.Module, decoder: nn.Module) -> Callable[[Tensor], Tensor]:
    """The family's own forward, its decoder replaced: (N, H) normed residuals -> (N, V) logits."""
    outer = next(name for name, child in built.named_children() if any(part is decoder for part in child.modules()))
    setattr(built, outer, _Passed())

    def project(normed: Tensor) -> Tensor:
        logits: Tensor = built(inputs_embeds=normed[None], use_cache=False).logits[0]
        return logits

    return project


def _qweight(name: str) -> str:
    return name.removesuffix("weight") + "qweight"


class _Checkpoint:
    """The safetensors files of a verifier, read tensor by tensor."""

    def __init__(self, model: str, allow_network: bool) -> None:
        self._model, self._allow_network = model, allow_network
        index = model_file(model, INDEX, allow_network=allow_network)
        if index is not None:
            self._files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return
        with safe_open(self._path(SINGLE), framework="pt") as shard:
            self._files = dict.fromkeys(shard.keys(), SINGLE)

    def _path(self, file: str) -> Path:
        path = model_file(self._model, file, allow_network=self._allow_network)
        if path is None:
            raise ValueError(
                f"verifier {self._model}: got no {file}, wanted it for embedding, final norm and head; give a folder "
                "with the safetensors weights"
            )
        return path

    def find(self, names: Sequence[str]) -> str | None:
        """The first of `names` that the checkpoint has."""
        return next((name for name in names if name in self._files), None)

    def read(self, names: Sequence[str], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """The tensor that goes by one of `names`."""
        name = self.find(names)
        # weight_scale, weight_packed, weight.absmax, qweight, ...: what quantisers put beside a weight, or in its place
        marks = [
            mark for stem in names if stem.endswith(".weight") for mark in (f"{stem}_", f"{stem}.", _qweight(stem))
        ]
        packed = [file for file in self._files if file.startswith(tuple(marks))]
        if name is None and not packed:
            raise ValueError(
                f"verifier {self._model}: got no tensor {names[0]}, looked for {', '.join(names)} among "
                f"{len(self._files)} tensors; the checkpoint is incomplete, keeps it under another name, or its "
                "config.json says tie_word_embeddings wrongly"
            )
        tensor = None
        if name is not None:
            with safe_open(self._path(self._files[name]), framework="pt", device=str(device)) as shard:
                if name not in shard.keys():  # noqa: SIM118 safe_open is no mapping
                    raise ValueError(
                        f"verifier {self._model}: got no tensor {name} in {self._files[name]}, wanted it there as "
                        f"{INDEX} says; the checkpoint is incomplete"
                    )
                tensor = shard.get_tensor(name)
        if tensor is None or packed or tensor.dtype not in FULL_PRECISION:
            what = f"{name} as {tensor.dtype}" if tensor is not None and not packed else packed[0]
            raise ValueError(
                f"verifier {self._model}: got {what}, wanted {names[0]} in full precision: embedding, final norm and "
                "head may not be quantised; quantise a copy that leaves them out, or give one that does"
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"verifier {self._model}: got {name} of shape {tuple(tensor.shape)}, wanted {shape} as its config.json "
                "says; the weights and the config.json do not belong together"
            )
        return tensor
