"""From a training checkpoint to a folder that stock vLLM serves, in the speculators format, and back.

    dflash-scale export runs/demo/train runs/demo/drafter
    vllm serve VERIFIER --speculative-config '{"method": "dflash", "model": "runs/demo/drafter", ...}'

config.json is what vLLM 0.32's `transformers_utils/configs/speculators` reads; model.safetensors holds the drafter's
parameters under the names they have in training. The verifier's embedding and head are left out: vLLM then shares the
verifier's own (`v1/spec_decode/llm_base_proposer.py`, `_maybe_share_embeddings` and `_maybe_share_lm_head`). A drafter
with a pruned vocabulary brings the head's rows that it keeps as `lm_head.weight`, and `d2t` and `t2d` beside them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen3Config

from dflash_scale.config import Config, parse_config
from dflash_scale.drafter.model import Drafter
from dflash_scale.drafter.model import DrafterSpec
from dflash_scale.drafter.model import drafter_spec
from dflash_scale.verifier.layers import aux_layers
from dflash_scale.verifier.shape import mask_token_id
from dflash_scale.verifier.shape import verifier_shape
from dflash_scale.verifier_head import load_verifier_head
from dflash_scale.vocabulary import DraftVocabulary

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, D2T = "config.json", "model.safetensors", "d2t.npy"
VOCABULARY_TENSORS = ("lm_head.weight", "d2t", "t2d")
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


def exported_config(
    spec: DrafterSpec, verifier: str, dtype: torch.dtype, draft_vocab_size: int | None = None
) -> dict[str, Any]:
    """The config.json that makes vLLM serve what was trained.

    Args:
        spec: the drafter's definition.
        verifier: folder or hub id; its config.json is read for the architecture's name.
        dtype: of the exported weights.
        draft_vocab_size: N of a pruned vocabulary.
    """
    layers = {name: value for name, value in spec.layers.to_dict().items() if name not in NOT_THE_LAYERS}
    name = str(Path(verifier).resolve()) if Path(verifier).is_dir() else verifier
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": spec.block_size - 1,  # slot 0 is the anchor and predicts nothing
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "block_size": spec.block_size,
        "mask_token_id": spec.mask_token_id,
        "draft_vocab_size": draft_vocab_size or spec.layers.vocab_size,
        "target_hidden_size": spec.context_size,
        "aux_hidden_state_layer_ids": list(spec.layer_ids),  # id k = after k layers; vLLM makes its own k-1 of it
        # vLLM takes `causal` for every layer from the negation of this flag, sliding or not. With false, a
        # bidirectional drafter would be served causally: acceptance falls and nothing fails.
        "sliding_window_non_causal": not spec.causal_block,
        "sample_from_anchor": False,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": name,
                "architectures": list(AutoConfig.from_pretrained(verifier).architectures or []),
            },
        },
        "transformer_layer_config": layers,
    }


def check_state(state: Mapping[str, Tensor], spec: DrafterSpec) -> None:
    """Raises ValueError unless `state` holds exactly the parameters of a drafter of this definition."""
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in Drafter(spec).named_parameters()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if got == wanted:
        return
    for name in sorted(wanted.keys() | got.keys()):
        if got.get(name) != wanted.get(name):
            raise ValueError(
                f"drafter weights: got {name} of shape {got.get(name)}, wanted {wanted.get(name)} (None: absent); "
                "the weights and the configuration are not of one run"
            )


def vocabulary_tensors(vocabulary: DraftVocabulary, verifier: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a folder holds of a pruned vocabulary: the head's rows (N, H), d2t (N,) and t2d (V,)."""
    head = load_verifier_head(verifier, dtype, "cpu").weight
    if len(head) != vocabulary.rows:
        raise ValueError(
            f"export: got a verifier of {len(head)} tokens, wanted {vocabulary.rows}, those of the run; give --verifier"
        )
    return {
        "lm_head.weight": head[torch.from_numpy(vocabulary.ids)].clone(),
        "d2t": torch.from_numpy(vocabulary.d2t),
        "t2d": torch.from_numpy(vocabulary.t2d),
    }


def export_drafter(
    state: Mapping[str, Tensor],
    spec: DrafterSpec,
    verifier: str,
    out_dir: Path,
    dtype: torch.dtype = torch.float32,
    vocabulary: DraftVocabulary | None = None,
) -> Path:
    """Writes the drafter to `out_dir`, aside first and then renamed; an older export there is replaced.

    Args:
        state: all parameters of a `Drafter`, by their training names.
        spec: its definition.
        verifier: folder or hub id of the verifier that it drafts for.
        out_dir: the folder to make.
        dtype: of the weights; vLLM casts them to the verifier's when it loads them.
        vocabulary: the drafter's, if it is pruned.

    Raises:
        ValueError: the weights do not fit the definition, or `out_dir` holds something else than an export.
    """
    check_state(state, spec)
    if out_dir.exists() and not _is_export(out_dir):
        raise ValueError(f"export: got {out_dir}, which holds something else, wanted a new folder; name another one")
    if len(set(spec.layers.layer_types or ())) > 1:
        log.warning("full and sliding layers together: serve with VLLM_USE_V2_MODEL_RUNNER=1")
    aside = out_dir.with_name(f"{out_dir.name}.partial-{os.getpid()}")
    aside.mkdir(parents=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    if vocabulary is not None:
        tensors |= vocabulary_tensors(vocabulary, verifier, dtype)
    save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
    content = exported_config(spec, verifier, dtype, len(vocabulary.ids) if vocabulary is not None else None)
    (aside / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if out_dir.exists():
        shutil.rmtree(out_dir)
    os.replace(aside, out_dir)
    return out_dir


def _is_export(folder: Path) -> bool:
    path = folder / CONFIG
    return path.is_file() and "speculators_model_type" in json.loads(path.read_text(encoding="utf-8"))


def load_spec(folder: Path) -> DrafterSpec:
    """The definition of an exported drafter.

    Raises:
        ValueError: `folder` holds no export.
    """
    if not folder.is_dir() or not _is_export(folder):
        raise ValueError(f"drafter {folder}: no exported drafter there; make one with `dflash-scale export`")
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    layers = {name: value for name, value in content["transformer_layer_config"].items() if name != "model_type"}
    return DrafterSpec(
        layers=Qwen3Config(**layers),
        layer_ids=tuple(content["aux_hidden_state_layer_ids"]),
        context_size=content["target_hidden_size"],
        block_size=content["block_size"],
        mask_token_id=content["mask_token_id"],
        causal_block=not content["sliding_window_non_causal"],
    )


def load_drafter(folder: Path, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Drafter:
    """An exported drafter, in evaluation mode, on the CPU.

    Raises:
        ValueError: `folder` holds no export, or its weights do not fit its config.json.
    """
    spec = load_spec(folder)
    state = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if name not in VOCABULARY_TENSORS}
    check_state(state, spec)
    drafter = Drafter(spec, backend)
    drafter.load_state_dict(state)
    return drafter.to(dtype).eval()


def load_output(folder: Path) -> tuple[Tensor, Tensor] | None:
    """Of an exported drafter with a pruned vocabulary: its head (N, H) and its target ids (N,) int64; else None.

    Raises:
        ValueError: the two do not belong together.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        if "d2t" not in file.keys():  # noqa: SIM118 safe_open is no mapping
            return None
        head, d2t = file.get_tensor("lm_head.weight"), file.get_tensor("d2t")
    vocabulary = DraftVocabulary.of_offsets(d2t.numpy(), load_spec(folder).layers.vocab_size)
    if len(head) != len(vocabulary.ids):
        raise ValueError(f"drafter {folder}: got {len(head)} rows of lm_head for {len(d2t)} of d2t, wanted one each")
    return head, torch.from_numpy(vocabulary.ids)


def resolved_spec(config: Config) -> DrafterSpec:
    """The definition of the drafter that a run with `config` trains."""
    model = config.verifier.model
    shape = verifier_shape(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    mask = mask_token_id(tokenizer, shape.vocab_size, config.drafter.mask_token_id)
    return drafter_spec(config.drafter, shape, aux_layers(config.verifier.layer_ids, shape.layers), mask)


def checkpoint_state(checkpoint: Path) -> dict[str, Tensor]:
    """The fp32 weights of one of the run's checkpoints, put together from all ranks' files at any ZeRO stage.

    DeepSpeed's files are pickles: read only those that you wrote.
    """
    if not list(checkpoint.glob("*optim_states.pt")):
        raise ValueError(
            f"checkpoint {checkpoint}: got no *optim_states.pt, wanted DeepSpeed's files; name a step folder of a run "
            "that trains with ZeRO, such as checkpoints/step-000500"
        )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def export_checkpoint(checkpoint: Path, out_dir: Path, verifier: str | None = None) -> Path:
    """Exports one checkpoint of a run, as the resolved configuration beside it says.

    Args:
        checkpoint: a step folder.
        out_dir: the folder to make.
        verifier: replaces the run's `verifier.model`, where it has moved since.
    """
    path = checkpoint / CONFIG
    if not path.is_file():
        raise ValueError(f"checkpoint {checkpoint}: got no {CONFIG}, wanted the step folder of a run; check the path")
    config = parse_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    if verifier is not None:
        config = config.model_copy(update={"verifier": config.verifier.model_copy(update={"model": verifier})})
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    spec, vocabulary = resolved_spec(config), None
    if (checkpoint / D2T).is_file():
        vocabulary = DraftVocabulary.of_offsets(np.load(checkpoint / D2T), spec.layers.vocab_size)
    elif config.drafter.vocab_size is not None:
        raise ValueError(f"checkpoint {checkpoint}: got no {D2T}, wanted it for drafter.vocab_size; it is incomplete")
    return export_drafter(checkpoint_state(checkpoint), spec, config.verifier.model, out_dir, dtype, vocabulary)


def named_checkpoint(path: Path) -> Path:
    """A step folder as it is; a run's folder or its checkpoints folder stands for the best one, else the latest."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for pointer in ("best", "latest"):
        if (folder / pointer).is_file():
            return folder / (folder / pointer).read_text(encoding="utf-8").strip()
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dflash-scale export", description="Exports a checkpoint for vLLM.")
    parser.add_argument("checkpoint", type=Path, help="step folder; a run's folder means its best checkpoint")
    parser.add_argument("out_dir", type=Path, help="folder to make")
    parser.add_argument("--verifier", help="folder or hub id, if it is not where the run had it")
    args = parser.parse_args(argv)
    try:
        print(export_checkpoint(named_checkpoint(args.checkpoint), args.out_dir, args.verifier))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
