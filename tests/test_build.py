"""The native build: what it makes, and what it says when it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ninja
import pytest
import torch

from dflash_scale.ops.library import LIBRARY, MISSING

ROOT = Path(__file__).resolve().parent.parent
NINJA = Path(ninja.BIN_DIR) / "ninja"


def has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME")
    return bool(home and (Path(home) / "bin" / "nvcc").is_file()) or shutil.which("nvcc") is not None


def build(tmp_path: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """build_ext into a temporary folder; for builds that end before the first compiler runs."""
    places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_library_loads_and_registers_its_operators() -> None:
    assert MISSING is None, MISSING
    for name in ("build_plan", "anchor_attention", "anchor_attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dflash_scale::{name}", "CPU"), name


def test_cuda_code_is_there_exactly_where_nvcc_is() -> None:
    blob = LIBRARY.read_bytes()
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("dflash_scale::build_plan", "CUDA")
    assert registered == has_nvcc()
    assert (b".nv_fatbin" in blob) == has_nvcc()
    if has_nvcc():
        architectures = fatbin_architectures(blob)
        assert architectures == {80, 90}, f"{LIBRARY} holds code for {sorted(architectures)}"


def fatbin_architectures(blob: bytes) -> set[int]:
    """Architectures of the machine code in a library's fat binaries.

    A fat binary starts with magic 0xBA55ED50, u16 version, u16 header bytes, u64 bytes of entries. An entry starts with
    u16 kind (2 = machine code), u16, u32 header bytes, u64 payload bytes, and holds its architecture as u32 at byte 28.
    """
    found: set[int] = set()
    for match in re.finditer(re.escape((0xBA55ED50).to_bytes(4, "little")), blob):
        at = match.start()
        header, size = int.from_bytes(blob[at + 6 : at + 8], "little"), int.from_bytes(blob[at + 8 : at + 16], "little")
        entry, end = at + header, at + header + size
        while entry < end <= len(blob):
            if int.from_bytes(blob[entry : entry + 2], "little") == 2:
                found.add(int.from_bytes(blob[entry + 28 : entry + 32], "little"))
            step = int.from_bytes(blob[entry + 4 : entry + 8], "little")
            entry += step + int.from_bytes(blob[entry + 8 : entry + 16], "little")
    return found


def test_kernels_are_built_without_pythons_headers() -> None:
    """A machine with a GPU may have none: only the ring needs them."""
    for part, needs in (("kernels", False), ("ring", True)):
        command = [NINJA, "-C", ROOT / "build" / part, "-t", "commands"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"csrc/{'attention' if part == 'kernels' else 'ring'}/bindings.cpp" in printed
        assert bool(re.search(r"/include/python3\.\d+", printed)) == needs


def test_an_unknown_target_is_one_clear_sentence() -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--target", "sanitise"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "dflash_scale: --target: got sanitise, wanted one of kernels, ring, sanitize, watchdog."
    )


# What trains on a device, without the configuration and the launcher.
LIGHT = (
    *("drafter.model", "training.loss", "ops.attention", "data.schedule", "training.loader", "training.copiers"),
    "transport.ring",
)


@pytest.mark.parametrize("module", LIGHT)
def test_what_runs_on_a_device_is_imported_without_configuration_and_deepspeed(module: str) -> None:
    program = f"import sys; sys.modules.update(pydantic=None, deepspeed=None); import dflash_scale.{module}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_compiler_is_one_clear_sentence(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "CUDA_HOME")}
    result = build(tmp_path, environment | {"PATH": str(tmp_path)})
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_compiler_named_in_cxx_is_not_replaced_silently(tmp_path: Path) -> None:
    result = build(tmp_path, os.environ | {"CXX": "no-such-compiler"})
    assert result.returncode != 0
    assert "no-such-compiler" in result.stderr
