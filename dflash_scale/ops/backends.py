"""An operator's backends, one row of a table each, and the choice of the one that runs.

From the rows come the names that the configuration takes, the errors, the choice of "auto" and the table in
docs/kernels.md; tests/ops/test_backends.py holds the configuration and the page to them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dflash_scale.ops.library import why_not_compiled

log = logging.getLogger(__name__)

Run = TypeVar("Run")
Capability = tuple[int, int]


@dataclass(frozen=True)
class Proof:
    """That a GPU kernel matched its definition on a device: a file in benchmarks/results, written by gpu_check.sh, and
    the sha256 of the sources that it was compiled from (tests/gpu/check.py, `source_digest`)."""

    results: str
    sources: str


@dataclass(frozen=True)
class Backend(Generic[Run]):
    """One implementation of an operator, and what it takes. A field that is not given limits nothing.

    name: what the configuration calls it · run: the implementation
    device: the device type that it is made for; the limits hold there, and "auto" takes it there alone
    also_on: a device type on which it runs too
    dtypes, head_dims: of the first tensor, the head dim being its last dimension
    capability: the first and the last compute capability, None = no last one
    compiled: whether it is in the compiled library
    proof: without one, "auto" does not take a compiled GPU kernel
    limits: what the fields cannot say. Gets the tensors and what else the operator's module gives `Operator.choose`;
        returns why it cannot run them, as the rest of a sentence that starts with the name, or None. Its docstring
        stands in docs/kernels.md.
    slow: "auto" warns where nothing else is left
    """

    name: str
    run: Run
    device: str | None = None
    also_on: str | None = None
    dtypes: Collection[torch.dtype] = ()
    head_dims: Collection[int] = ()
    capability: tuple[Capability, Capability | None] | None = None
    compiled: bool = False
    proof: Proof | None = None
    limits: Callable[..., str | None] | None = None
    slow: bool = False

    @property
    def needs_proof(self) -> bool:
        return self.compiled and self.device == "cuda"

    def obstacle(self, tensors: tuple[Tensor, ...], *rest: Any) -> str | None:
        """Why it cannot run these tensors, as the rest of a sentence that starts with its name; None if it can."""
        return self._field_obstacle(tensors[0]) or (self.limits(tensors, *rest) if self.limits else None)

    def _field_obstacle(self, x: Tensor) -> str | None:
        device = x.device.type
        if self.device is None or device == self.also_on:
            return None
        if device != self.device:
            devices = " or ".join(name.upper() for name in (self.device, self.also_on) if name)
            return f"needs {devices} tensors, got {x.device}"
        if self.compiled and (reason := why_not_compiled(device)):
            return f"needs the compiled operators, but {reason}"
        if self.capability and not _within(found := gpu_capability(x.device), *self.capability):
            return f"needs a GPU of compute capability {versions(*self.capability)}, got {found[0]}.{found[1]}"
        if self.dtypes and x.dtype not in self.dtypes:
            return f"takes {listed([dtype_name(dtype) for dtype in self.dtypes])}, got {dtype_name(x.dtype)}"
        if self.head_dims and x.shape[-1] not in self.head_dims:
            return f"takes head dims {sizes(self.head_dims)}, got {x.shape[-1]}"
        return None


@dataclass(frozen=True)
class Operator(Generic[Run]):
    """An operator's backends, in the order in which "auto" tries them; the last one takes everything.

    name: for the log · setting: the configuration's key, for errors
    """

    name: str
    setting: str
    backends: tuple[Backend[Run], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the configuration may say."""
        return ("auto", *[backend.name for backend in self.backends])

    def backend(self, name: str) -> Backend[Run]:
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise ValueError(f'{self.setting}: got "{name}", wanted one of {", ".join(self.names)}')

    def choose(self, name: str, tensors: tuple[Tensor, ...], *rest: Any) -> Backend[Run]:
        """The backend that runs; `rest` is what `Backend.limits` asks for.

        Raises ValueError for a named backend that cannot run the tensors: only "auto" ever takes another one.
        """
        if name == "auto":
            return self._fastest(tensors, *rest)
        backend = self.backend(name)
        reason = backend.obstacle(tensors, *rest)
        if reason is not None:
            able = next(other.name for other in self.backends if other.obstacle(tensors, *rest) is None)
            raise ValueError(f'{self.setting}: got "{name}", which {reason}; use "{able}" or "auto"')
        return backend

    def _fastest(self, tensors: tuple[Tensor, ...], *rest: Any) -> Backend[Run]:
        device = tensors[0].device.type
        passed: list[str] = []
        for backend in self.backends:
            if backend.device not in (None, device):
                continue
            reason = backend.obstacle(tensors, *rest)
            if reason is None and backend.needs_proof and backend.proof is None:
                reason = "has not been proven against its definition on a GPU yet"
            if reason is None:
                if not torch.compiler.is_compiling():
                    level = logging.WARNING if backend.slow else logging.INFO
                    _log_choice(level, f'{self.name} on {device} runs backend "{backend.name}"', "; ".join(passed))
                return backend
            passed.append(f'"{backend.name}" {reason}')
        raise AssertionError(f"the last backend of {self.name} takes everything")


@functools.cache
def _log_choice(level: int, choice: str, passed: str) -> None:
    log.log(level, "%s%s", choice, f": {passed}" if passed else "")


def gpu_capability(device: torch.device) -> Capability:
    properties = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    return properties.major, properties.minor


def _within(found: Capability, first: Capability, last: Capability | None) -> bool:
    return first <= found and (last is None or found <= last)


def versions(first: Capability, last: Capability | None) -> str:
    """A range of compute capabilities in words: 9.0, or 8.0 or newer."""
    text = f"{first[0]}.{first[1]}"
    return f"{text} or newer" if last is None else text if last == first else f"{text} to {last[0]}.{last[1]}"


def sizes(wanted: Collection[int]) -> str:
    """Head dims in words: 64, 96, 128, or 16 to 256."""
    return f"{wanted[0]} to {wanted[-1]}" if isinstance(wanted, range) else ", ".join(map(str, wanted))


def listed(names: list[str]) -> str:
    """Names in words: float32, bfloat16 and float16."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
