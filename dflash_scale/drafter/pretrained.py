"""Folders that hold a drafter, in the two formats that vLLM serves: written by export, read by evaluation and training.

    speculators   layers in `transformer_layer_config`, aux layers as ids k in `aux_hidden_state_layer_ids`
    z-lab         layers at the top of config.json, aux layers as k-1 in `dflash_config.target_layer_ids`

config.json of the first is what vLLM 0.32's `transformers_utils/configs/speculators` reads. Both keep the weights under
the names that they have in training. The verifier's embedding and head are left out: vLLM then shares the verifier's
own (`v1/spec_decode/llm_base_proposer.py`, `_maybe_share_embeddings` and `_maybe_share_lm_head`). A drafter with a
pruned vocabulary brings the head's rows that it keeps as `lm_head.weight`, and `d2t` and `t2d` beside them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, Qwen3Config

from dflash_scale.drafter.heads import OutputHead
from dflash_scale.drafter.model import Drafter, DrafterSpec
from dflash_scale.drafter.vocabulary import DraftVocabulary
from dflash_scale.files import new_folder
from dflash_scale.verifier.head import load_verifier_head
from dflash_scale.verifier.rope import drafter_rope, verifier_rope

log = logging.getLogger(__name__)

ALGORITHM = "dflash"  # speculators' name of it
ARCHITECTURE = "DFlashDraftModel"  # that of vLLM's model
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# The verifier's matrices and the maps to its ids, which folders may hold beside the drafter's own weights.
NOT_TRAINED = ("embed_tokens.", "lm_head.", "d2t", "t2d", "verifier_")
# Written by Transformers into every dictionary, and none of the drafter's layers.
NOT_THE_LAYERS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
}


@dataclass(frozen=True, slots=True)
class Definition:
    """What a folder says of its drafter, in the terms of `DrafterSpec`. None: it does not say."""

    layers: Qwen3Config
    layer_ids: tuple[int, ...]
    context_size: int
    block_size: int | None
    mask_token_id: int | None
    causal_block: bool | None

    def spec(self) -> DrafterSpec:
        """The whole definition; raises ValueError where the folder does not say all of it."""
        if self.block_size is None or self.mask_token_id is None:
            raise ValueError("got a config.json without block_size or mask_token_id, wanted both; add them")
        causal = self.causal_block
        if causal is None:  # vLLM then takes sliding layers as causal, and full ones as not
            kinds = set(self.layers.layer_types or ())
            if len(kinds) > 1:
                raise ValueError("got full and sliding layers without dflash_config.causal, wanted one mask for all")
            causal = "sliding_attention" in kinds
        return DrafterSpec(
            layers=self.layers,
            layer_ids=self.layer_ids,
            context_size=self.context_size,
            block_size=self.block_size,
            mask_token_id=self.mask_token_id,
            causal_block=causal,
        )


def read_definition(folder: Path) -> Definition:
    """The definition of the drafter in a folder.

    Raises:
        ValueError: `folder` holds no drafter of either format.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"got {folder}, wanted a folder with a {CONFIG}; make one with `dflash-scale export`")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("speculators_model_type") == ALGORITHM:
        return of_content(content, causal_block=not content.get("sliding_window_non_causal", True))
    dflash = content.get("dflash_config") or {}
    if "target_layer_ids" in dflash:
        named = {
            "transformer_layer_config": content,
            "aux_hidden_state_layer_ids": [k + 1 for k in dflash["target_layer_ids"]],
            "block_size": content.get("block_size", dflash.get("block_size")),
            "mask_token_id": dflash.get("mask_token_id", content.get("mask_token_id")),
        }
        return of_content({**content, **named}, causal_block=dflash.get("causal"))
    raise ValueError(
        f"got {path} without speculators_model_type {ALGORITHM} and without dflash_config.target_layer_ids, wanted the "
        "speculators or the z-lab format of a DFlash drafter"
    )


def definition_content(spec: DrafterSpec, draft_vocab_size: int | None) -> dict[str, Any]:
    """What the speculators format and a checkpoint's run.json say in the same words: all but `causal_block`."""
    return {
        "transformer_layer_config": _own_layers(spec),
        "aux_hidden_state_layer_ids": list(spec.layer_ids),  # id k = after k layers; vLLM makes its own k-1 of it
        "target_hidden_size": spec.context_size,
        "block_size": spec.block_size,
        "mask_token_id": spec.mask_token_id,
        "draft_vocab_size": draft_vocab_size or spec.layers.vocab_size,
    }


def of_content(content: Mapping[str, Any], *, causal_block: bool | None) -> Definition:
    """The inverse of `definition_content`."""
    layers = _layers(content["transformer_layer_config"])
    return Definition(
        layers=layers,
        layer_ids=tuple(content["aux_hidden_state_layer_ids"]),
        context_size=content.get("target_hidden_size") or layers.hidden_size,
        block_size=content.get("block_size"),
        mask_token_id=content.get("mask_token_id"),
        causal_block=causal_block,
    )


def _layers(content: Mapping[str, Any]) -> Qwen3Config:
    layers = {name: value for name, value in content.items() if name not in ("model_type", "dflash_config")}
    # vLLM goes by the layers' types alone; with the flag false, Transformers would drop the window.
    layers["use_sliding_window"] = "sliding_attention" in (content.get("layer_types") or ())
    return Qwen3Config(**layers)


def _tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors of all of a folder's files, by their names in training."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 safe_open is no mapping
                own = name.removeprefix("model.")
                if wanted(own):
                    found[own] = file.get_tensor(name)
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    """The drafter's own weights."""
    if (folder / "mask_embedding.pt").is_file():
        log.warning("%s: mask_embedding.pt is left out: masks are rows of the verifier's embedding here", folder)
    return _tensors(folder, lambda name: not name.startswith(NOT_TRAINED))


def _misfits(state: Mapping[str, Tensor], spec: DrafterSpec) -> list[str]:
    """Where `state` is not exactly the parameters of a drafter of this definition."""
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in Drafter(spec).named_parameters()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return [
        f"{name}: got {got.get(name, 'no such weight')}, wanted {wanted.get(name, 'no such weight')}"
        for name in sorted(wanted.keys() | got.keys())
        if got.get(name) != wanted.get(name)
    ]


def check_state(state: Mapping[str, Tensor], spec: DrafterSpec) -> None:
    """Raises ValueError unless `state` holds exactly the parameters of a drafter of this definition."""
    if problems := _misfits(state, spec):
        raise ValueError(
            "drafter weights: the weights and the configuration are not of one run:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def load_spec(folder: Path) -> DrafterSpec:
    """The definition of an exported drafter.

    Raises:
        ValueError: `folder` holds none, or one that it does not define in full.
    """
    try:
        return read_definition(folder).spec()
    except ValueError as error:
        raise ValueError(f"drafter {folder}: {error}") from None


def load_drafter(folder: Path, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Drafter:
    """An exported drafter, in evaluation mode, on the CPU.

    Raises:
        ValueError: `folder` holds no export, or its weights do not fit its config.json.
    """
    spec, state = load_spec(folder), _weights(folder)
    check_state(state, spec)
    drafter = Drafter(spec, backend)
    drafter.load_state_dict(state)
    return drafter.to(dtype).eval()


def load_output(folder: Path) -> OutputHead | None:
    """The head of an exported drafter with a pruned vocabulary; None: it has the verifier's.

    Raises:
        ValueError: the two do not belong together.
    """
    state = _tensors(folder, lambda name: name in ("lm_head.weight", "d2t"))
    try:
        return OutputHead.of_state(state, load_spec(folder).layers.vocab_size)
    except ValueError as error:
        raise ValueError(f"drafter {folder}: {error}") from None


def load_start(folder: Path, spec: DrafterSpec) -> dict[str, Tensor]:
    """All weights of a drafter of the definition `spec`, from a folder: what `drafter.init_from` begins with.

    Raises:
        ValueError: the folder's drafter is another one; all differences in one message, before training begins.
    """
    try:
        there = read_definition(folder)
    except ValueError as error:
        raise ValueError(f"drafter.init_from: {error}") from None
    state = _weights(folder)
    if problems := [*_meaning(there, spec), *_misfits(state, spec)]:
        raise ValueError(
            f"drafter.init_from: {folder} holds another drafter than this run's:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    for what, got, wanted in (
        ("block size", there.block_size, spec.block_size),
        ("causal block", there.causal_block, spec.causal_block),
        ("layer types", there.layers.layer_types, spec.layers.layer_types),
        ("sliding window", there.layers.sliding_window, spec.layers.sliding_window),
    ):
        if got is not None and got != wanted:
            log.warning("drafter.init_from: %s was %s there and is %s here", what, got, wanted)
    return state


def _meaning(there: Definition, spec: DrafterSpec) -> list[str]:
    """What the shapes would not show, and training could not repair."""
    rope = drafter_rope(verifier_rope(there.layers), spec.layers.head_dim)
    own = drafter_rope(verifier_rope(spec.layers), spec.layers.head_dim)
    compared = [
        ("aux layers", list(there.layer_ids), list(spec.layer_ids), "verifier.layer_ids"),
        ("mask token", there.mask_token_id, spec.mask_token_id, "drafter.mask_token_id"),
        ("rotary embedding", rope, own, "drafter.rope_parameters"),
    ]
    return [
        f"{what}: got {got}, wanted {wanted}; set {key} or give another folder"
        for what, got, wanted, key in compared
        if got is not None and got != wanted
    ]


def exported_config(
    spec: DrafterSpec, verifier: str, dtype: torch.dtype, draft_vocab_size: int | None = None
) -> dict[str, Any]:
    """The config.json of the speculators format, which makes vLLM serve what was trained.

    Args:
        spec: the drafter's definition.
        verifier: folder or hub id; its config.json is read for the architecture's name.
        dtype: of the exported weights.
        draft_vocab_size: N of a pruned vocabulary.
    """
    name = str(Path(verifier).resolve()) if Path(verifier).is_dir() else verifier
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": spec.block_size - 1,  # slot 0 is the anchor and predicts nothing
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    return {
        "architectures": [ARCHITECTURE],
        "speculators_model_type": ALGORITHM,
        # vLLM takes `causal` for every layer from the negation of this flag, sliding or not. With false, a
        # bidirectional drafter would be served causally: acceptance falls and nothing fails.
        "sliding_window_non_causal": not spec.causal_block,
        "sample_from_anchor": False,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "speculators_config": {
            "algorithm": ALGORITHM,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": name,
                "architectures": list(AutoConfig.from_pretrained(verifier).architectures or []),
            },
        },
        **definition_content(spec, draft_vocab_size),
    }


def zlab_config(
    spec: DrafterSpec, verifier: str, dtype: torch.dtype, draft_vocab_size: int | None = None
) -> dict[str, Any]:
    """The same of z-lab's format, with the rotary embedding under the names that Transformers 4 reads."""
    layers = _own_layers(spec)
    rope = layers.pop("rope_parameters")
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return layers | {
        "architectures": [ARCHITECTURE],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "block_size": spec.block_size,
        "draft_vocab_size": draft_vocab_size or spec.layers.vocab_size,
        "num_target_layers": AutoConfig.from_pretrained(verifier).get_text_config(decoder=True).num_hidden_layers,
        "target_hidden_size": spec.context_size,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "dflash_config": {
            "mask_token_id": spec.mask_token_id,
            "target_layer_ids": [k - 1 for k in spec.layer_ids],
            "causal": spec.causal_block,
        },
    }


FORMATS = {"speculators": exported_config, "zlab": zlab_config}


def _own_layers(spec: DrafterSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.layers.to_dict().items() if name not in NOT_THE_LAYERS}


def vocabulary_tensors(vocabulary: DraftVocabulary, verifier: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a folder holds of a pruned vocabulary: the head's rows (N, H), d2t (N,) and t2d (V,)."""
    head = load_verifier_head(verifier, dtype, "cpu").weight
    if len(head) != vocabulary.rows:
        raise ValueError(
            f"got a verifier of {len(head)} tokens, wanted {vocabulary.rows}, those of the run; give --verifier"
        )
    return OutputHead.pruned(head, vocabulary).state()


def export_drafter(
    state: Mapping[str, Tensor],
    spec: DrafterSpec,
    verifier: str,
    out_dir: Path,
    dtype: torch.dtype = torch.float32,
    vocabulary: DraftVocabulary | None = None,
    form: str = "speculators",
) -> Path:
    """Writes the drafter to `out_dir`; an older export there is replaced.

    Args:
        state: all parameters of a `Drafter`, by their training names.
        spec: its definition.
        verifier: folder or hub id of the verifier that it drafts for.
        out_dir: the folder to make.
        dtype: of the weights; vLLM casts them to the verifier's when it loads them.
        vocabulary: the drafter's, if it is pruned.
        form: one of FORMATS.

    Raises:
        ValueError: the weights do not fit the definition, or `out_dir` holds something else than an export.
    """
    check_state(state, spec)
    if out_dir.exists() and not _is_export(out_dir):
        raise ValueError(f"got {out_dir}, which holds something else, wanted a new folder; name another one")
    if len(set(spec.layers.layer_types or ())) > 1:
        log.warning("full and sliding layers together: serve with VLLM_USE_V2_MODEL_RUNNER=1")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    if vocabulary is not None:
        tensors |= vocabulary_tensors(vocabulary, verifier, dtype)
    content = FORMATS[form](spec, verifier, dtype, len(vocabulary.ids) if vocabulary is not None else None)
    with new_folder(out_dir, replace=True) as aside:
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(aside / CONFIG, aside / WEIGHTS)  # safetensors' files are for their owner alone: 0600
    return out_dir


def _is_export(folder: Path) -> bool:
    path = folder / CONFIG
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return "speculators_model_type" in content or "dflash_config" in content
