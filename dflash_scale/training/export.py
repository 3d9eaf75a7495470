"""From a training checkpoint to a folder that stock vLLM serves.

dflash-scale export runs/demo/train runs/demo/drafter
vllm serve VERIFIER --speculative-config '{"method": "dflash", "model": "runs/demo/drafter", ...}'
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dflash_scale.drafter.pretrained import export_drafter
from dflash_scale.training.run import ResolvedRun


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


def export_checkpoint(checkpoint: Path, out_dir: Path, verifier: str | None = None, form: str = "speculators") -> Path:
    """Exports one checkpoint of a run, as the run.json beside the weights says.

    Args:
        checkpoint: a step folder.
        out_dir: the folder to make.
        verifier: replaces the run's `verifier.model`, where it has moved since.
        form: of the folder, one of `pretrained.FORMATS`.
    """
    run = ResolvedRun.load(checkpoint)
    state, model = checkpoint_state(checkpoint), verifier or run.verifier.model
    return export_drafter(state, run.spec, model, out_dir, run.dtype, run.vocabulary, form)


def named_checkpoint(path: Path) -> Path:
    """A step folder as it is; a run's folder or its checkpoints folder stands for the best one, else the latest."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for pointer in ("best", "latest"):
        if (folder / pointer).is_file():
            return folder / (folder / pointer).read_text(encoding="utf-8").strip()
    return path
