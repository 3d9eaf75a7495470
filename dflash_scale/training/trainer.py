"""The training loop: DeepSpeed engine, loss normalised over the optimizer step, validation, checkpoints, one line.

All ranks run the same `RowSchedule`, so they agree on every step, validation and checkpoint without talking; what they
do exchange are small CPU all-reduces: the loss denominator Z of each step, and whether to stop.
"""

import json
import logging
import signal
import time
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import FrameType

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch import distributed as dist

from dflash_scale.data.dataset import Samples
from dflash_scale.data.schedule import Row, RowSchedule
from dflash_scale.drafter.blocks import AnchorSpec, RowPlan, plan_row
from dflash_scale.drafter.heads import OutputHead
from dflash_scale.drafter.model import block_inputs
from dflash_scale.files import write_file
from dflash_scale.training.checkpoint import Checkpoints, Position
from dflash_scale.training.ledger import EpochCount, JsonLines, count_epoch, report_epoch
from dflash_scale.training.loss import (
    VerifierStates,
    drafter_loss,
    kept_slots,
    loss_spec,
    normaliser,
    trained_mask,
)
from dflash_scale.training.metrics import SOURCES, Metrics, ProgressLine
from dflash_scale.training.row_source import RowSource, RowStates
from dflash_scale.training.run import ResolvedRun
from dflash_scale.training.sums import BlockSums, block_metrics
from dflash_scale.verifier.head import VerifierHead

log = logging.getLogger(__name__)

STOP_POLL_S = 0.2  # how often a rank that waits for data checks whether it was asked to stop


def agree(local: list[float], group: dist.ProcessGroup) -> list[float]:
    """Sums small numbers over all ranks on the CPU: waits for no GPU."""
    values = torch.tensor(local, dtype=torch.float64)
    dist.all_reduce(values, group=group)
    return values.tolist()


@dataclass(frozen=True)
class Parts:
    """What a trainer works with, made by launch/train.py."""

    run: ResolvedRun
    head: VerifierHead
    samples: Samples
    schedule: RowSchedule
    anchors: AnchorSpec
    engine: DeepSpeedEngine
    rows: RowSource  # this rank's, from the step after `position` on
    checkpoints: Checkpoints
    control: dist.ProcessGroup  # gloo, for what stays on the CPU
    position: Position
    output: Path


@dataclass
class Interval:
    """Sums since the last log line."""

    sums: Tensor | None = None
    normaliser: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    tokens: int = 0
    samples: int = 0
    slots: int = 0  # supervised
    outside: int = 0  # supervised slots not trained, because the drafter's vocabulary lacks their label


class Trainer:
    """Runs the schedule from `parts.position` to its end, or to the step at which a rank was asked to stop."""

    def __init__(self, parts: Parts) -> None:
        config = parts.run.config
        self.parts, self.rank, self.world = parts, dist.get_rank(), dist.get_world_size()
        self.device = parts.engine.device
        self.loss_spec = loss_spec(config)
        self.output_head = OutputHead.pruned(parts.head.weight, parts.run.vocabulary)
        self.step = parts.position.step
        self.best = parts.position.best_acceptance_length
        self.counts = {"trained": 0, "validated": 0, "quarantined": 0}  # samples, on this rank since its start
        self.unbalanced = 0  # samples of all ranks that the ledger and the schedule disagree on
        self.stopping = False
        self.interval = Interval()
        first = self.step + 1
        self.ledger = JsonLines(parts.output / "ledger" / f"rank-{self.rank}.jsonl", first)
        self.metrics = Metrics(parts.output, first, config.train.tensorboard) if self.rank == 0 else None
        source = SOURCES[config.stream.mode]
        self.line = ProgressLine(parts.schedule.total_steps, self.step, source, enabled=self.rank == 0)

    def run(self) -> bool:
        """Trains. Returns True if the schedule was completed, False if the run was asked to stop before."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        saved = self.step
        stop = False
        while self.step < self.parts.schedule.total_steps:
            stop = not self._train_step(self.step + 1)
            if stop:
                break
            if self.step % self.parts.schedule.steps_per_epoch == 0 or self.step == self.parts.schedule.total_steps:
                self._check_epoch()
            best = self._validate() if self.parts.schedule.validates_after(self.step) else False
            every = self.parts.run.config.train.checkpoint_every
            if best or self.step % every == 0 or self.step == self.parts.schedule.total_steps:
                self._save(best)
                saved = self.step
        if stop and saved != self.step:
            self._save(best=False)
        if stop:
            log.warning("stopped by a signal after step %d; continue with --resume", self.step)
        self._close(complete=not stop)
        return not stop

    def _check_epoch(self) -> None:
        """Compares what all ranks trained in the epoch that ends here with what was to be trained."""
        mine = count_epoch(self.parts.schedule, self.rank, self.step, self.ledger.path)
        count = EpochCount(*map(int, agree(list(astuple(mine)), self.parts.control)))
        self.unbalanced += report_epoch(self.step, count)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _train_step(self, step: int) -> bool:
        """One optimizer step; False, as if it never began, if any rank was asked to stop before it or lacks data."""
        plans = [self._plan(row) for row in self.parts.schedule.train_rows(self.rank, step)]
        mine = sum(self._normaliser(plan) for plan in plans)
        total, stops = agree([mine, float(self.stopping)], self.parts.control)
        if stops:
            return False
        engine = self.parts.engine
        engine.train()
        # DeepSpeed averages over ranks and micro-steps; Z is a sum over both.
        scale = torch.tensor(self.world * len(plans) / max(total, 1e-12), device=self.device)
        trained, quarantined = list[int](), list[int]()
        lr = engine.get_lr()[0]
        for whole in plans:
            if (received := self._receive(whole)) is None:
                return False
            plan = whole.without(received.quarantined)
            loss, sums = self._loss(plan, received.states, scale)
            engine.backward(loss)
            engine.step()
            packed = sums.packed()
            self.interval.sums = packed if self.interval.sums is None else self.interval.sums + packed
            trained += received.usable
            quarantined += received.quarantined
            self.interval.tokens += int((plan.doc_ids >= 0).sum())
            self.interval.slots += int(plan.trained.sum()) + plan.outside
            self.interval.outside += plan.outside
        if not engine.was_step_applied():
            raise RuntimeError(
                f"step {step}: the gradient is not finite, so DeepSpeed left the weights as they were; a sample of "
                f"this step has bad hidden states (this rank's: {trained}). Look at the servers' dtype, then --resume"
            )
        self.step = step
        self.counts["trained"] += len(trained)
        self.counts["quarantined"] += len(quarantined)
        self.interval.normaliser += total
        self.interval.samples += len(trained)
        self.ledger.write({"step": step, "epoch": plans[0].row.epoch, "samples": trained, "quarantined": quarantined})
        if step % self.parts.run.config.train.log_every == 0 or step == self.parts.schedule.total_steps:
            self._log(step, lr)
        return True

    def _lacks_data(self) -> bool:
        """Waits for the next row; True if there is none and this rank was asked to stop."""
        started = time.perf_counter()
        while not (there := self.parts.rows.wait(STOP_POLL_S)) and not self.stopping:
            pass
        self.interval.waited += time.perf_counter() - started
        return not there

    def _plan(self, row: Row) -> RowPlan:
        return plan_row(row, self.parts.samples, self.parts.anchors)

    def _receive(self, plan: RowPlan) -> RowStates | None:
        """The states of the next row; None on all ranks if one lacks them: a row that one began, all have to end."""
        if any(agree([float(self._lacks_data())], self.parts.control)):
            return None
        received = self.parts.rows.next()
        if received is None or received.row != plan.row:
            raise RuntimeError(f"got row {received and received.row}, wanted {plan.row}: it is not the source's next")
        return received

    def _normaliser(self, plan: RowPlan) -> float:
        return normaliser(trained_mask(plan.trained, self.parts.run.spec.block_size), self.loss_spec)

    def _loss(self, plan: RowPlan, states: Tensor, scale: Tensor, *, compare: bool = False) -> tuple[Tensor, BlockSums]:
        """The loss of a row with states (T, L, H); `compare` also compares the labels with the verifier's argmax."""
        head, spec = self.parts.head, self.parts.run.spec
        trained = trained_mask(plan.trained, spec.block_size)
        doc_ids, positions, anchors, tokens, kept = (
            torch.from_numpy(array).to(self.device, non_blocking=True)
            for array in (plan.doc_ids, plan.positions, plan.anchors, plan.block_tokens, kept_slots(trained))
        )
        dtype = head.embedding.dtype
        aux_layers = len(spec.layer_ids)
        context = states[:, :aux_layers].reshape(len(positions), aux_layers * spec.context_size).to(dtype)
        slots = block_inputs(head.embedding, tokens[:, 0], spec)
        hidden = self.parts.engine(slots, context, positions, anchors, doc_ids, kept)
        wanted = compare or self.parts.run.config.loss.needs_verifier
        verifier = VerifierStates(states[:, -1], plan.anchors, self._verifier_logits) if wanted else None
        # Labels outside a pruned vocabulary lie in slots that are not trained.
        labels = self.output_head.labels(tokens)
        return drafter_loss(hidden, self.output_head, labels, trained, self.loss_spec, scale, verifier)

    def _verifier_logits(self, residual: Tensor) -> Tensor:
        """(n, H) -> (n, V), over the drafter's vocabulary."""
        return self.output_head.kept(self.parts.head.logits(residual))

    def _log(self, step: int, lr: float) -> None:
        now, seen = time.perf_counter(), self.interval
        assert seen.sums is not None
        dist.all_reduce(seen.sums)
        waited, seconds, *counts = agree(
            [seen.waited, now - seen.started, *map(float, (seen.tokens, seen.samples, seen.slots, seen.outside))],
            self.parts.control,
        )
        tokens, samples, slots, outside = counts
        values = block_metrics(BlockSums.unpacked(seen.sums.cpu()), seen.normaliser)
        values |= {
            "lr": lr,
            "grad_norm": float(self.parts.engine.get_global_grad_norm() or 0.0),
            "wait_data": waited / seconds,
            "tokens_per_s": tokens * self.world / seconds,
            "samples_per_s": samples * self.world / seconds,
        }
        if self.parts.run.vocabulary is not None:
            values["outside_vocabulary"] = outside / max(slots, 1.0)
        if self.metrics is not None:
            self.metrics.write("train", step, values | {"servers": self.parts.rows.status()})
        self.line.train(step, values)
        self.interval = Interval()

    @torch.no_grad()
    def _validate(self) -> bool:
        """Validates on anchors fixed once; True if the acceptance length is the best so far."""
        started, waited = time.perf_counter(), self.interval.waited
        self.parts.engine.eval()
        sums = torch.zeros(BlockSums.size(self.parts.run.spec.block_size), device=self.device)
        normal, outside, one = 0.0, 0.0, torch.ones((), device=self.device)
        for row in self.parts.schedule.validation_rows(self.rank, self.step):
            whole = self._plan(row)
            if (received := self._receive(whole)) is None:
                log.warning("a signal came and no data: the validation after step %d is left out", self.step)
                return False
            plan = whole.without(received.quarantined)
            self.counts["validated"] += len(received.usable)
            self.counts["quarantined"] += len(received.quarantined)
            sums += self._loss(plan, received.states, one, compare=True)[1].packed()
            normal += self._normaliser(plan)
            outside += plan.outside
        dist.all_reduce(sums)
        normal, outside = agree([normal, outside], self.parts.control)
        total = BlockSums.unpacked(sums.cpu())
        values = block_metrics(total, normal)
        if self.parts.run.vocabulary is not None:
            values["outside_vocabulary"] = outside / max(float(total.trained.sum()) + outside, 1.0)
        values["seconds"] = time.perf_counter() - started
        best = values["acceptance_length"] > self.best
        self.best = max(self.best, values["acceptance_length"])
        if self.metrics is not None:
            self.metrics.write("validation", self.step, values)
        self.line.validation(self.step, values)
        self._leave_out(started, waited)
        return best

    def _save(self, best: bool) -> None:
        position = replace(self.parts.position, step=self.step, best_acceptance_length=self.best)
        started = time.perf_counter()
        self.parts.checkpoints.save(self.parts.engine, position, best=best)
        self._leave_out(started, self.interval.waited)

    def _leave_out(self, started: float, waited: float) -> None:
        """Takes the time since `started` out of the training interval."""
        self.interval.started += time.perf_counter() - started
        self.interval.waited = waited

    def _close(self, complete: bool) -> None:
        """Writes totals.json: what became of the samples of all ranks since this process started."""
        totals = agree([float(count) for count in self.counts.values()], self.parts.control)
        counts = {name: int(total) for name, total in zip(self.counts, totals, strict=True)}
        if self.rank == 0:
            counts |= {"complete": complete, "step": self.step, "unbalanced": self.unbalanced}
            text = json.dumps(counts, indent=1)
            write_file(self.parts.output / "totals.json", text)
        self.ledger.close()
        if self.metrics is not None:
            self.metrics.close()
        self.line.close()
