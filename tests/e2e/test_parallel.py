"""Real vLLM servers with several workers or several engines send the same hidden states as Transformers.

DFLASH_SCALE_VLLM_PYTHON names the interpreter that has vLLM; the default is .venv-vllm/bin/python in the repository.
"""

import json
import os
import time
import urllib.request
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from benchmarks.vllm_compatibility import worst_error
from benchmarks.vllm_server import Sizes, VllmServer, prompt, vllm_server, write_verifier
from dflash_scale.config.run import Config, parse_config
from dflash_scale.data.dataset import Samples, load_prepared
from dflash_scale.data.dataset_writer import FEATURES, FORMAT
from dflash_scale.data.schedule import RowSchedule, schedule_spec
from dflash_scale.receiver.client import ReceiverSpec, spawn_receiver
from dflash_scale.receiver.layouts import RowLayouts
from dflash_scale.receiver.status import read_status
from dflash_scale.server.transformers_server import TransformersVerifier
from dflash_scale.transport.addresses import engine_address
from dflash_scale.transport.ring import COMMITTED, Ring

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("DFLASH_SCALE_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
SIZES, AUX_LAYERS = Sizes(), (0, 2, 3)
TOLERANCE = 1e-3
SMALL = ("--num-gpu-blocks-override", "40", "--max-model-len", str(SIZES.length), "--max-num-seqs", "4")
SMALL += ("--block-size", "32", "--max-num-batched-tokens", "64")
SAMPLES, VALIDATION, ROWS = 40, 4, 64  # ROWS: more than the samples fill


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert Path(VLLM_PYTHON).exists(), f"no vLLM interpreter at {VLLM_PYTHON}: set DFLASH_SCALE_VLLM_PYTHON"
    return write_verifier(tmp_path_factory.mktemp("vllm") / "model", SIZES)


@pytest.fixture(scope="module")
def verifier(model: Path) -> TransformersVerifier:
    return TransformersVerifier(str(model), AUX_LAYERS, "float32")


def assert_blocks_come_back(server: VllmServer, engines: int) -> None:
    """No cache block stays held once its copy is over: vLLM hears of that from the connector."""
    deadline, usage = time.monotonic() + 60, [1.0]
    while usage != [0.0] * engines:
        assert time.monotonic() < deadline, f"cache blocks are still held: {usage}"
        time.sleep(0.2)
        with urllib.request.urlopen(server.http + "/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        usage = [float(line.split()[-1]) for line in lines if line.startswith("vllm:kv_cache_usage_perc{")]


def test_tensor_parallel_workers(model: Path, verifier: TransformersVerifier) -> None:
    """Two workers, each with half of every layer: the first one has the whole hidden states, and sends them once."""
    with vllm_server(model, AUX_LAYERS, VLLM_PYTHON, *SMALL, "--tensor-parallel-size", "2") as server:
        for length in (1, 33, 200):
            assert worst_error(server, verifier, length, answer=False) < TOLERANCE
        assert worst_error(server, verifier, 40, answer=True) < TOLERANCE
        assert_blocks_come_back(server, 1)


def write_data(folder: Path) -> Path:
    """A prepared data set of random prompts, all different."""
    for name, count, seed in (("train", SAMPLES, 0), ("validation", VALIDATION, SAMPLES)):
        ids = [prompt(5 + (7 * n) % 90, seed + n, SIZES.vocabulary) for n in range(count)]
        split = datasets.Dataset.from_dict(
            {"input_ids": ids, "loss_mask": [[1] * len(tokens) for tokens in ids]}, features=FEATURES
        )
        split.save_to_disk(str(folder / name))
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "fingerprint": "random"}))
    return folder


def config_of(model: Path, data: Path, servers: list[dict[str, Any]], folder: Path) -> Config:
    return parse_config(
        {
            "verifier": {"model": str(model), "layer_ids": list(AUX_LAYERS)},
            "data": {"path": str(data), "row_tokens": 128},
            "stream": {
                "servers": servers,
                "ring_bytes": 1 << 24,  # all samples of an epoch
                "credit_bytes": 1 << 20,
                "server_credit_bytes": 1 << 19,
                "requests_per_server": 4,
                "lookahead_rows": ROWS,
                "no_server_timeout_s": 60.0,
            },
            "train": {"rows_per_step": 2, "epochs": 1, "validate_every": 1000, "output_dir": str(folder)},
        }
    )


def engines_of(server: VllmServer, count: int) -> list[dict[str, Any]]:
    """The entries of stream.servers."""
    return [
        {"http": server.http, "zmq": engine_address("zmq", server.zmq, rank), "data_parallel_rank": rank}
        for rank in range(count)
    ]


def test_data_parallel_engines_behind_one_port(model: Path, verifier: TransformersVerifier, tmp_path: Path) -> None:
    """A receiver uses both engines as servers of their own, and all samples come once and right."""
    data = write_data(tmp_path / "data")
    with vllm_server(model, AUX_LAYERS, VLLM_PYTHON, *SMALL, "--data-parallel-size", "2") as server:
        config = config_of(model, data, engines_of(server, 2), tmp_path)
        prepared = load_prepared(data)
        samples = Samples(prepared.train, prepared.validation)
        rows = list(RowSchedule(samples, schedule_spec(config, 1)).rows(0, 1))
        homes = {(row.epoch, place.sample): row for row in rows for place in row.places}
        assert len(rows) < ROWS
        layouts = RowLayouts(verifier.layout.only(AUX_LAYERS), verifier.layout)
        status = tmp_path / "status.json"
        spec = ReceiverSpec(f"engines{os.getpid()}", config, 1, (0,), 1, os.getpid(), layouts, status)
        receiver = spawn_receiver(spec)
        try:
            with Ring.open(receiver.ring_names[0], timeout=60) as ring:
                while homes:
                    record = ring.next_record(timeout=120)
                    assert record is not None, f"{len(homes)} samples are missing after 120 s"
                    assert record.status == COMMITTED
                    layout = layouts.of(homes.pop((record.epoch, record.sample)))
                    token_ids = samples.tokens(record.sample).tolist()
                    got = torch.frombuffer(bytearray(record.payload), dtype=torch.float32)
                    want, _ = verifier.run(token_ids, 1, True, layout.layer_ids)
                    error = (got.view(want.shape) - want).norm(dim=-1) / want.norm(dim=-1)
                    assert error.max() < TOLERANCE, f"sample {record.sample}: relative error {error.max()}"
                    ring.release()
                ring.reader_mark = len(rows)
                assert receiver.process.wait(60) == 0
        finally:
            receiver.close()
        assert_blocks_come_back(server, 2)
    told = read_status(status)
    assert [engine.http for engine in told.servers] == [f"{server.http} engine 0", f"{server.http} engine 1"]
    assert all(engine.samples > 4 for engine in told.servers), told.servers
    assert (told.dropped, told.retried) == ({}, 0)
