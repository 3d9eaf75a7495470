"""One rank of a run whose hidden states come from a formula instead of servers; started by tests/test_trainer.py.

    deepspeed --num_accelerators W tests/trainer_worker.py CONFIG OUT [--resume] [--poison] [--stall ROW]

With --stall, one rank waits for its row with that number in vain, and gets a SIGTERM while it waits. Everything but the
source is the real thing: schedule, anchors, drafter, loss, DeepSpeed engine, checkpoints.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch import distributed as dist

from dflash_scale.assembler import RowBatch
from dflash_scale.checkpoint import Checkpoints, Position
from dflash_scale.config import load_config
from dflash_scale.drafter.model import Drafter, drafter_spec
from dflash_scale.hidden_states import run_layouts
from dflash_scale.packer import AnchorSpec, Row, RowSchedule, Samples, plan_row, schedule_spec
from dflash_scale.ranks import join_ranks, leave_ranks
from dflash_scale.trainer import Parts, Trainer
from dflash_scale.training.optim import make_engine
from dflash_scale.training.run import ResolvedRun, ResolvedVerifier
from dflash_scale.verifier.shape import VerifierShape
from dflash_scale.verifier_head import VerifierHead
from dflash_scale.vocabulary import choose_vocabulary

HIDDEN, TAPS, VOCAB = 32, 2, 64


class Formula:
    """A split whose lengths, tokens and masks follow from the sample's number."""

    def __init__(self, count: int, first: int) -> None:
        rng = np.random.default_rng(first)
        self.lengths, self._first = rng.integers(8, 16, count).astype(np.int32), first

    def tokens(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((7, self._first + index))
        return rng.integers(0, VOCAB - 1, self.lengths[index]).astype(np.int32)

    def loss_mask(self, index: int) -> np.ndarray:
        return np.arange(self.lengths[index]) >= 2


POISONED = 3  # with --poison, the sample whose states are not finite


class Supply:
    """Says whether the next row is there, as an assembler does; from row `stall` on nothing comes."""

    def __init__(self, stall: int | None) -> None:
        self.given, self.stall = 0, stall

    def wait(self, seconds: float) -> bool:
        if self.given != self.stall:
            return True
        os.kill(os.getpid(), signal.SIGTERM)
        return False


def batches(rows: Iterator[Row], samples: Samples, anchors: AnchorSpec, supply: Supply) -> Iterator[RowBatch]:
    for row in rows:
        assert supply.given != supply.stall, "a row was begun that never comes"
        supply.given += 1
        plan = plan_row(row, samples, anchors)
        states = torch.zeros(len(plan.tokens), TAPS + 1, HIDDEN)
        for place in row.places:
            generator = torch.Generator().manual_seed(place.sample)
            shape = (place.length, TAPS + 1, HIDDEN)
            states[place.start : place.start + place.length] = torch.randn(shape, generator=generator)
            if place.sample == POISONED and "--poison" in sys.argv:
                states[place.start] = torch.nan
        yield RowBatch(plan, states, ())


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
    stall = int(sys.argv.pop(sys.argv.index("--stall") + 1)) if "--stall" in sys.argv else None
    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    config, out, resume = load_config(arguments[0]), Path(arguments[1]), "--resume" in sys.argv
    torch.set_num_threads(1)
    control = join_ranks(torch.device("cpu"))
    rank, world = dist.get_rank(), dist.get_world_size()
    samples = Samples(Formula(12, 0), Formula(4, 100))
    train = config.train
    schedule = RowSchedule(samples, schedule_spec(config, world))
    shape = VerifierShape(
        "qwen3", HIDDEN, 4, 4, 2, 8, 48, VOCAB, 64, 1e-6, {"rope_type": "default", "rope_theta": 1e4}, False, "float32"
    )
    verifier = ResolvedVerifier("formula", "", shape, run_layouts(config, shape))
    vocabulary = None
    if config.drafter.vocab_size is not None:
        said = np.concatenate([samples.tokens(i)[samples.loss_mask(i)] for i in range(12)])
        vocabulary = choose_vocabulary(np.bincount(said, minlength=VOCAB), [5], config.drafter.vocab_size)
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    spec = drafter_spec(config.drafter, shape, verifier.layouts.taps, VOCAB - 1)
    run = ResolvedRun(config, verifier, spec, vocabulary, dtype)
    backends = (config.drafter.attention_backend, config.drafter.pointwise)
    drafter = Drafter(spec, *backends, recompute=train.activation_checkpointing)
    drafter.initialise(train.seed)
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(2)]
    head = VerifierHead(matrices[0].to(dtype), torch.nn.RMSNorm(HIDDEN, dtype=dtype), matrices[1].to(dtype))
    engine = make_engine(config, drafter, schedule.total_steps)
    checkpoints = Checkpoints(out / "checkpoints", train.keep_checkpoints, run)
    position = Position(0, 0.0, world, train.rows_per_step, config.data.row_tokens, train.seed, "formula")
    if resume:
        position = checkpoints.load(engine, position)
    inside = vocabulary.t2d if vocabulary is not None else None
    anchors = AnchorSpec(config.drafter.block_size, config.data.anchors_per_document, train.seed, inside)
    supply = Supply(stall if rank == world - 1 else None)
    source = batches(schedule.rows(rank, position.step + 1), samples, anchors, supply)
    rest = (source, supply.wait, checkpoints, control, position, out, vocabulary)
    parts = Parts(config, spec, head, samples, schedule, anchors, engine, *rest)
    state = record_gradients(engine)
    Trainer(parts).run()
    for name, parameter in engine.module.named_parameters():
        state[f"weight.{name}"] = parameter.detach().float().clone()
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / "state.safetensors")
    leave_ranks()


if __name__ == "__main__":
    main()
