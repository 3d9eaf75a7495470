"""A training step on one device, whole or with a peer's parts, and what is measured of it."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import dflash_scale.drafter.model
from benchmarks.timing import WARM_UP, between, mark, synchronize
from benchmarks.train_cases import Case, make_drafter, make_ends, make_row, padded
from benchmarks.train_peers import OURS, Variant, make_loss, peers_attention
from dflash_scale.drafter.model import block_inputs
from dflash_scale.training.loss import normaliser

PARTS: Final = ("forward", "loss", "backward", "accumulate", "optimizer")
LEARNING_RATE, CLIP, BETAS = 6e-4, 1.0, (0.9, 0.95)  # the configuration's defaults
TOP_KERNELS = 40


@dataclass(frozen=True)
class Options:
    """`rows` micro-steps make an optimizer step; `attention`, `loss` and `pointwise` name this library's kernels."""

    device: str
    attention: str = "auto"
    loss: str = "auto"
    pointwise: str = "auto"
    optimizer: str = "fused"
    rows: int = 8
    repeats: int = 8


class Masters:
    """AdamW on fp32 masters of the drafter's weights, with the gradients of several rows added up in fp32."""

    def __init__(self, weights: Iterable[nn.Parameter], optimizer: str) -> None:
        self.weights: list[Tensor] = list(weights)
        self.masters: list[Tensor] = [
            nn.Parameter(weight.detach().to(torch.float32, copy=True)) for weight in self.weights
        ]
        self.sums = [torch.zeros_like(master) for master in self.masters]
        for master, total in zip(self.masters, self.sums, strict=True):
            master.grad = total
        self.adamw = torch.optim.AdamW(
            self.masters, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, **{optimizer: True}
        )

    @torch.no_grad()
    def accumulate(self) -> None:
        for weight, total in zip(self.weights, self.sums, strict=True):
            assert weight.grad is not None
            total += weight.grad  # with no fp32 copy of it between
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.masters, CLIP, foreach=True)
        self.adamw.step()
        torch._foreach_copy_(self.weights, self.masters)
        torch._foreach_zero_(self.sums)


@dataclass(frozen=True)
class Evidence:
    """Of the first optimizer step, before it changes a weight: the loss (), and the gradients of all norms' weights, to
    which every slot of every layer adds something."""

    loss: Tensor
    gradient: Tensor


class Step:
    """One row's forward, loss and backward, and the optimizer step; each method is timed as one of PARTS."""

    every = 1  # turns from one optimizer step to the next; its time is shared by `rows` of them whatever this is

    def __init__(self, case: Case, options: Options, variant: Variant = OURS) -> None:
        self.case, self.options, self.variant = case, options, variant
        self.cuda = options.device == "cuda"
        self.row = make_row(case, options.device)
        spec = case.loss(options.loss)
        self.scale = torch.tensor(1 / normaliser(self.row.trained, spec), device=options.device)
        if variant.padded:
            self.row = padded(self.row, case.documents * case.anchors)
        self.embedding, head = make_ends(case, options.device)
        self.loss_of = make_loss(variant, self.row, head, spec)
        self.drafter = make_drafter(case, options.attention, options.pointwise, options.device)
        self.evidence: Evidence | None = None
        self.take_over()

    def take_over(self) -> None:
        """Hands the drafter to what owns gradients and weights from here on."""
        self.masters = Masters(self.drafter.parameters(), self.options.optimizer)

    def swapped(self) -> AbstractContextManager[Any]:
        if not self.variant.attention:
            return contextlib.nullcontext()
        return patch.object(dflash_scale.drafter.model, "anchor_attention", peers_attention)

    def model(self) -> nn.Module:
        return self.drafter

    def forward(self) -> Tensor:
        row = self.row
        slots = block_inputs(self.embedding, row.labels[:, 0], self.drafter.spec)
        kept = None if self.variant.padded else row.kept
        with self.swapped():
            return self.model()(slots, row.states, row.positions, row.anchors, row.doc_ids, kept)

    def loss(self, hidden: Tensor) -> Tensor:
        return self.loss_of(hidden, self.scale)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def accumulate(self) -> None:
        self.masters.accumulate()

    def due(self) -> bool:
        """Whether `update` steps the optimizer."""
        return True

    def update(self) -> None:
        self.masters.step()

    def gradient(self) -> Tensor:
        """Of the norms' weights, side by side, in fp32."""
        return torch.cat([total for total in self.masters.sums if total.dim() == 1])

    def close(self) -> None:
        """Lets go of what outlives the object."""


@dataclass(frozen=True)
class Turn:
    """The moments between PARTS; `due` where the last of them stepped the optimizer."""

    marks: list[Any]
    due: bool

    def seconds(self, part: int) -> float:
        return between(self.marks[part], self.marks[part + 1])


def turn(step: Step) -> Turn:
    marks = [mark(step.cuda)]
    hidden = step.forward()
    marks.append(mark(step.cuda))
    loss = step.loss(hidden)
    marks.append(mark(step.cuda))
    step.backward(loss)
    marks.append(mark(step.cuda))
    step.accumulate()
    marks.append(mark(step.cuda))
    due = step.due()
    if due and step.evidence is None:
        step.evidence = Evidence(loss.detach().float(), step.gradient())
    step.update()
    marks.append(mark(step.cuda))
    return Turn(marks, due)


def measure(step: Step) -> dict[str, Any]:
    """Seconds by part and of a row, the peak of memory on a GPU, and a profile."""
    device, every = step.options.device, step.every
    started = time.perf_counter()
    turn(step)
    synchronize(device)
    first = time.perf_counter() - started
    for _ in range(_whole(WARM_UP[device], every) - 1):
        turn(step)
    if step.cuda:
        torch.cuda.reset_peak_memory_stats()
    turns = [turn(step) for _ in range(_whole(step.options.repeats, every))]
    synchronize(device)
    parts = {
        name: statistics.median(each.seconds(index) for each in turns if each.due or name != "optimizer")
        for index, name in enumerate(PARTS)
    }
    row = sum(parts.values()) - parts["optimizer"] + parts["optimizer"] / step.options.rows
    result = {"first_turn_s": first, "parts_s": parts, "row_s": row, "rows_per_s": 1 / row}
    result["tokens_per_s"] = step.case.tokens / row
    if step.cuda:
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result | {"profile": profile(step, parts)}


def _whole(turns: int, every: int) -> int:
    return -(-turns // every) * every


def profile(step: Step, parts: dict[str, float]) -> dict[str, Any]:
    """One turn's kernels, on a CPU its operators, by falling time; and the share of a turn in which no kernel runs: of
    its time without the profiler, which slows the host alone."""
    activity = ProfilerActivity.CUDA if step.cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        due = turn(step).due
        synchronize(step.options.device)
    # torch marks ranges of its own on the GPU's line, such as the optimizer's step: they are no work.
    events = [event for event in found.events() if not event.is_user_annotation]
    if step.cuda:
        events = [event for event in events if event.device_type == DeviceType.CUDA]
    kinds: dict[str, list[float]] = {}
    for event in events:
        microseconds = event.time_range.elapsed_us() if step.cuda else event.self_cpu_time_total
        kinds.setdefault(event.name, []).append(microseconds)
    order = sorted(kinds, key=lambda name: -sum(kinds[name]))[:TOP_KERNELS]
    result: dict[str, Any] = {"top": [[name[:160], len(kinds[name]), sum(kinds[name]) / 1e3] for name in order]}
    if step.cuda and events:
        result["kernels_s"] = covered((e.time_range.start, e.time_range.end) for e in events) / 1e6
        whole = sum(parts.values()) - (0.0 if due else parts["optimizer"])
        result["idle"] = max(0.0, 1 - result["kernels_s"] / whole)
    return result


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
