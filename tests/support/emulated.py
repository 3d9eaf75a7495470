"""The emulated GPU: its build, and memory with guards around it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator"
FLAGS = ("-std=c++20", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DDFLASH_EMULATE")
GUARD = 256  # bytes before and after each buffer that nobody may touch


def build(name: str, *flags: str, source: str = "attention.cpp") -> Path:
    """Compiles the emulated kernels unless that is newer than all it was made from."""
    target = BUILD / name
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests" / "emulator").iterdir(), Path(__file__)]
    if not target.is_file() or target.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        compiler = shutil.which("g++")
        assert compiler is not None, "the emulated kernels need g++"
        BUILD.mkdir(parents=True, exist_ok=True)
        include = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}")
        aside = target.with_suffix(".tmp")
        unit = ROOT / "tests" / "emulator" / source
        subprocess.run([compiler, *FLAGS, *flags, *include, unit, "-o", aside], check=True)
        aside.rename(target)
    return target


class Guarded:
    """A buffer between two guard zones, aligned to 16 bytes; it starts as the tensor's bytes, or as NaN."""

    def __init__(self, tensor: Tensor) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        padded = (nbytes + 15) // 16 * 16
        self.memory = torch.full((GUARD + padded + GUARD + 16,), 0xA5, dtype=torch.uint8)
        self.begin = GUARD + -self.memory.data_ptr() % 16
        self.end = self.begin + nbytes
        self.tensor = self.memory[self.begin : self.end].view(tensor.dtype).view(tensor.shape)
        self.tensor.copy_(tensor)

    @classmethod
    def poisoned(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Guarded:
        return cls(torch.full(shape, float("nan"), dtype=dtype))

    def intact(self) -> bool:
        return bool((self.memory[: self.begin] == 0xA5).all() and (self.memory[self.end :] == 0xA5).all())
