"""Checkpoints: DeepSpeed's own files plus the run's position, written aside and renamed, `latest` last.

    checkpoints/step-000100/     DeepSpeed's files, position.json, and what the run resolves to (training/run.py):
                                 run.json, config.json, d2t.npy if the drafter's vocabulary is pruned
    checkpoints/latest           the name of the newest complete checkpoint, plain text
    checkpoints/best             the name of the one with the best validation acceptance length

A kill at any instruction leaves at most a `*.partial*` beside these; the next start removes it. Weights and optimizer
keep the precision they train in (fp32 masters). Loading goes through DeepSpeed, which unpickles: load only your own
files.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import deepspeed.comm as dist
from deepspeed import DeepSpeedEngine

from dflash_scale.files import PARTIAL, remove_folder, remove_partial, write_file
from dflash_scale.training.run import ResolvedRun


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run is: completed optimizer steps, its best validation, and what the schedule depends on."""

    step: int
    best_acceptance_length: float
    world_size: int
    rows_per_step: int
    row_tokens: int
    seed: int
    data: str


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        keep: how many of the newest are kept; the best is kept in any case.
        run: what each of them holds, and what a resumed run is compared with.
    """

    def __init__(self, folder: Path, keep: int, run: ResolvedRun) -> None:
        self.folder, self._keep, self._run = folder, keep, run

    def clean(self) -> None:
        """Removes what an interrupted save left. Rank 0 calls it at the start."""
        remove_partial(self.folder)

    def save(self, engine: DeepSpeedEngine, position: Position, *, best: bool) -> None:
        """Saves on all ranks; returns when the checkpoint is complete on disk."""
        name = f"step-{position.step:06d}"
        partial = name + PARTIAL  # the same on all ranks: each writes its files there
        engine.save_checkpoint(str(self.folder), tag=partial, save_latest=False)
        dist.barrier()
        if dist.get_rank() == 0:
            self._run.save(self.folder / partial)
            (self.folder / partial / "position.json").write_text(json.dumps(asdict(position)))
            remove_folder(self.folder / name)  # the same step, before a resume
            os.replace(self.folder / partial, self.folder / name)
            if best:
                write_file(self.folder / "best", name)
            write_file(self.folder / "latest", name)
            self._remove_old()
        dist.barrier()

    def _remove_old(self) -> None:
        kept = {self._named("latest"), self._named("best")}
        complete = sorted(p for p in self.folder.glob("step-*") if PARTIAL not in p.name)
        for old in complete[: -self._keep]:
            if old not in kept:
                remove_folder(old)

    def _named(self, pointer: str) -> Path | None:
        file = self.folder / pointer
        return self.folder / file.read_text().strip() if file.exists() else None

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return self._named("latest")

    def load(self, engine: DeepSpeedEngine, expected: Position) -> Position:
        """Loads the newest checkpoint into the engine, on all ranks.

        Raises:
            ValueError: there is none, or it was written by a run whose drafter or schedule differs from this one's.
        """
        path = self.latest()
        if path is None:
            raise ValueError(f"--resume: no checkpoint in {self.folder}; start without --resume")
        self._run.check_same(ResolvedRun.load(path), path)
        position = Position(**json.loads((path / "position.json").read_text()))
        if expected.world_size != position.world_size:
            raise ValueError(
                f"--resume: got {expected.world_size} ranks, but {path} was written by {position.world_size}: "
                "ZeRO splits the optimizer state by rank; resume on as many ranks"
            )
        for name in ("rows_per_step", "row_tokens", "seed", "data"):
            got, wanted = getattr(expected, name), getattr(position, name)
            if got != wanted:
                raise ValueError(
                    f"--resume: {name} is {got}, but {path} was trained with {wanted}: "
                    "it would not be the same run; restore it or start a new train.output_dir"
                )
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=path.name)
        if loaded is None:
            raise ValueError(f"--resume: DeepSpeed could not load {path}; its files are incomplete")
        return position
