"""One rank of a run on random hidden states, with faults in them; started by tests/training/test_trainer.py.

    deepspeed --num_accelerators W tests/training/trainer_worker.py CONFIG [--resume] [--poison] [--stall ROW]

With --stall, one rank waits for its row with that number in vain, and gets a SIGTERM while it waits. With --poison, the
states of one sample are not finite. All else is launch/train.py's; the weights at the end and the last step's gradients
are left in train.output_dir.
"""

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from dflash_scale.config.run import load_config
from dflash_scale.training.distributed import join_ranks, launched_place, leave_ranks
from dflash_scale.training.row_source import RowSource, RowStates
from launch.train import set_up

POISONED = 3  # with --poison, the sample whose states are not finite


class Faulty:
    """A source of which nothing more comes from row `stall` on, and in which a sample may be poisoned."""

    def __init__(self, rows: RowSource, stall: int | None, poison: bool) -> None:
        self.rows, self.stall, self.poison = rows, stall, poison
        self.given, self.status, self.close = 0, rows.status, rows.close

    def wait(self, seconds: float) -> bool:
        if self.given != self.stall:
            return self.rows.wait(seconds)
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    def next(self) -> RowStates | None:
        assert self.given != self.stall, "a row was begun that never comes"
        self.given += 1
        given = self.rows.next()
        for place in given.row.places if given is not None and self.poison else ():
            if place.sample == POISONED:
                given.states[place.start] = torch.nan
        return given


def record_gradients(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The full reduced gradients of the last optimizer step, taken just before the step; a dict that fills itself."""
    seen: dict[str, torch.Tensor] = {}
    step = engine.step

    def recording_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                seen[f"gradient.{name}"] = safe_get_full_grad(parameter).detach().float().clone()
        step()

    engine.step = recording_step
    return seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--poison", action="store_true")
    parser.add_argument("--stall", type=int)
    parser.add_argument("--local_rank")
    args = parser.parse_args()
    config = load_config(args.config)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    control = join_ranks(device)
    place = launched_place()
    assert place is not None
    trainer = set_up(config, place, device, control, resume=args.resume)
    parts = trainer.parts
    stall = args.stall if dist.get_rank() == dist.get_world_size() - 1 else None
    state = record_gradients(parts.engine)
    trainer.parts = replace(parts, rows=Faulty(parts.rows, stall, args.poison))
    trainer.run()
    for name, parameter in parts.engine.module.named_parameters():
        state[f"weight.{name}"] = parameter.detach().float().clone()
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, parts.output / "state.safetensors")
    leave_ranks()


if __name__ == "__main__":
    main()
