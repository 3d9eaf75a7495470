"""The ring's C++ as it stands, run by programs of tests/ring: every order and every death, and millions of records.

deaths.cpp runs two processes in all sequentially consistent orders of their accesses to shared memory and kills either
or both at every one. stress.cpp runs two threads under the thread sanitizer, which covers the memory orders, and which
is shown to notice each of the four that matter when it is made weaker. Both compile csrc/ring with words of their own
in the place of csrc/ring/memory.h.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RING = [ROOT / "csrc" / "ring" / name for name in ("ring.cpp", "segment.cpp", "process.cpp")]
PROGRAMS = ROOT / "tests" / "ring"
FLAGS = ("-std=c++20", "-O2", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{PROGRAMS}")


def build(folder: Path, sources: list[str], memory: str, wrapped: list[str], *flags: str) -> Path:
    """Compiles a program of tests/ring with the ring's sources; it stands in for the `wrapped` system calls."""
    target = folder / Path(sources[0]).stem
    command = [os.environ.get("CXX") or "g++", *FLAGS, *flags, f'-DDFLASH_RING_MEMORY="{memory}"']
    command += [str(path) for path in [*(PROGRAMS / name for name in sources), *RING]]
    command += ["-Wl," + ",".join(f"--wrap={name}" for name in wrapped), "-o", str(target), "-lrt", "-pthread"]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stress")
    return build(folder, ["stress.cpp"], "orders.h", ["mmap", "munmap"], "-fsanitize=thread")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environment
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=600)


def test_every_order_of_two_processes_and_a_death_at_every_step(tmp_path: Path) -> None:
    calls = ["shm_open", "shm_unlink", "posix_fallocate", "fstat", "opendir", "flock"]
    result = run(build(tmp_path, ["deaths.cpp", "explorer.cpp"], "steps.h", calls))
    assert result.returncode == 0, result.stderr
    explored = {name: int(states) for name, states in re.findall(r"(.+): (\d+) states", result.stdout)}
    # Fewer states than this would mean that accesses are no steps any more.
    least = {
        "from nothing": 400,
        "full and wrapping": 1000,
        "reading ahead": 1000,
        "made while another cleans": 50,
        "two readers for one place": 25,
    }
    assert explored.keys() == least.keys()
    assert all(explored[name] >= least[name] for name in least), explored


@pytest.mark.parametrize(("sizes", "records"), [("small", 2_000_000), ("mixed", 60_000)])
def test_millions_of_records_without_a_race(stress: Path, sizes: str, records: int) -> None:
    """small: up to 48 bytes; mixed: up to half of the ring, so that every few records wrap around."""
    result = run(stress, sizes, str(records))
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{records} records\n", "")


@pytest.mark.parametrize("order", ["head-store", "head-load", "tail-store", "tail-load"])
def test_a_weaker_memory_order_is_a_race(stress: Path, order: str) -> None:
    result = run(stress, "small", "100000", order, TSAN_OPTIONS="halt_on_error=1:exitcode=66")
    assert result.returncode == 66
    assert "ThreadSanitizer: data race" in result.stderr
