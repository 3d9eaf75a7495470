"""The clocks of the benchmarks that run on a GPU or a CPU, and what the device could reach at most."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch

WARM_UP: Final = {"cuda": 3, "cpu": 1}  # turns that are not counted
# FLOP/s in bfloat16 and bytes/s, as measured with large products and copies. Other devices are measured here.
DEVICES: Final = {"NVIDIA H100 80GB HBM3": (798e12, 3.0e12)}


def mark(cuda: bool) -> Any:
    """A moment: of the GPU's own work, which the host may be far ahead of, or of the clock."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, last: Any) -> float:
    """Seconds from one `mark` to another; on a GPU after a synchronisation."""
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def wall(work: Callable[[], Any], repeats: int, device: str) -> float:
    """Median seconds of `work` alone, launches included."""
    taken = []
    for _ in range(repeats + WARM_UP[device]):
        started = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[WARM_UP[device] :])


@functools.cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large product, here and now."""
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / wall(lambda: a @ a, 5, device)


@functools.cache
def limits(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s and bytes/s of the device: from the table, else of a large product and a large copy."""
    if device == "cuda" and torch.cuda.get_device_name() in DEVICES:
        return DEVICES[torch.cuda.get_device_name()]
    length = 1 << 29 if device == "cuda" else 1 << 26
    source = torch.empty(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return product_rate(device, dtype), 2 * length / wall(lambda: target.copy_(source), 5, device)
