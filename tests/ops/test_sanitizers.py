"""The CPU operators under the address and undefined-behaviour sanitizers: their own build, and their tests with it.

The tests run in a copy of the package that holds the sanitized library, so the product needs no switch for it. Every
scratch array of the operators has an allocation of its own, so that an overrun of one is seen.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "sanitize" / "_kernels.so"
TESTS = "tests/ops/test_attention_cpu.py::test_operator_equals_the_definition_in_float64"
# Stops before the first test if it is not the sanitized library that runs. Fewer examples: each is ten times slower.
CONFTEST = """
from pathlib import Path
from hypothesis import settings
from dflash_scale.ops import library

settings.register_profile("few", max_examples=8)
assert library.MISSING is None, library.MISSING
assert library.LIBRARY.resolve().is_relative_to(Path(__file__).resolve().parent)
assert b"__asan_init" in library.LIBRARY.read_bytes()
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of the tests' files, with the sanitized library."""
    build = [sys.executable, "setup.py", "-q", "build_ext", "--target", "sanitize"]
    subprocess.run(build, cwd=ROOT, check=True, timeout=600)
    folder = tmp_path_factory.mktemp("sanitized")
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "dflash_scale", folder / "dflash_scale", ignore=unwanted)
    shutil.copy2(LIBRARY, folder / "dflash_scale")
    for name in ("ops", "support"):
        shutil.copytree(ROOT / "tests" / name, folder / "tests" / name, ignore=unwanted)
    (folder / "conftest.py").write_text(CONFTEST)
    return folder


def runtime(name: str) -> str:
    """A sanitizer's runtime library of the compiler that setup.py takes."""
    compiler = os.environ.get("CXX") or "g++"
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    assert Path(path).is_file(), f"{compiler} has no {name}; install its sanitizer runtimes"
    return path


@pytest.mark.parametrize("limit", ["avx512", "avx2", "default"])
def test_cpu_operators_under_the_sanitizers(copy: Path, limit: str) -> None:
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": limit,
        # First of all libraries, as the address sanitizer demands; the C++ runtime with it, so that it finds its throw.
        "LD_PRELOAD": " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(copy),
    }
    # Uncaptured: a sanitizer writes its report and ends the process.
    options = ("-q", "-s", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=few")
    command = [sys.executable, "-m", "pytest", *options, TESTS]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)
    report = re.search(r"[^\n]*(AddressSanitizer|runtime error):.*", result.stderr, re.S)
    assert report is None, report[0][:6000]
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
