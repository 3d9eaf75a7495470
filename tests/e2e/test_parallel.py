"""Real vLLM servers with several workers send the same hidden states as Transformers.

DFLASH_SCALE_VLLM_PYTHON names the interpreter that has vLLM; the default is .venv-vllm/bin/python in the repository.
"""

import os
import time
import urllib.request
from pathlib import Path

import pytest

from benchmarks.vllm_compatibility import worst_error
from benchmarks.vllm_server import Sizes, VllmServer, vllm_server, write_verifier
from dflash_scale.stream.embedded import TappedVerifier

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("DFLASH_SCALE_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
SIZES, TAPS = Sizes(), (0, 2, 3)
TOLERANCE = 1e-3
SMALL = ("--num-gpu-blocks-override", "40", "--max-model-len", str(SIZES.length), "--max-num-seqs", "4")
SMALL += ("--block-size", "32", "--max-num-batched-tokens", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert Path(VLLM_PYTHON).exists(), f"no vLLM interpreter at {VLLM_PYTHON}: set DFLASH_SCALE_VLLM_PYTHON"
    return write_verifier(tmp_path_factory.mktemp("vllm") / "model", SIZES)


@pytest.fixture(scope="module")
def verifier(model: Path) -> TappedVerifier:
    return TappedVerifier(str(model), TAPS, "float32")


def assert_blocks_come_back(server: VllmServer, engines: int) -> None:
    """No cache block stays held once its copy is over: vLLM hears of that from the connector."""
    deadline, usage = time.monotonic() + 60, [1.0]
    while usage != [0.0] * engines:
        assert time.monotonic() < deadline, f"cache blocks are still held: {usage}"
        time.sleep(0.2)
        with urllib.request.urlopen(server.http + "/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        usage = [float(line.split()[-1]) for line in lines if line.startswith("vllm:kv_cache_usage_perc{")]


def test_tensor_parallel_workers(model: Path, verifier: TappedVerifier) -> None:
    """Two workers, each with half of every layer: the first one has the whole hidden states, and sends them once."""
    with vllm_server(model, TAPS, VLLM_PYTHON, *SMALL, "--tensor-parallel-size", "2") as server:
        for length in (1, 33, 200):
            assert worst_error(server, verifier, length, answer=False) < TOLERANCE
        assert worst_error(server, verifier, 40, answer=True) < TOLERANCE
        assert_blocks_come_back(server, 1)
