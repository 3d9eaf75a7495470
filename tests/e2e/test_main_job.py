"""The main job with real vLLM: two extraction servers, one killed while training runs; then the exported drafter in a
real vLLM, held against Transformers and against the training forward."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Run, wait_for

from dflash_scale.config import load_config
from dflash_scale.evaluate import EvaluateSpec, Evaluation, evaluate
from dflash_scale.evaluate_vllm import stop
from dflash_scale.export import export_checkpoint, named_checkpoint
from dflash_scale.prompts import prepare
from launch.demo.answers import AnswerSpec, make_answers
from launch.demo.main import VLLM_FLAGS, Demo, servers
from launch.demo.verifier import make_verifier

pytestmark = pytest.mark.e2e

REPO = Path(__file__).resolve().parents[2]
VLLM_PYTHON = os.environ.get("DFLASH_SCALE_VLLM_PYTHON", str(REPO / ".venv-vllm" / "bin" / "python"))
KILL_AT = 12  # the step at which one server dies


@dataclass
class Trained:
    run: Run
    killed: str
    evaluation: Evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One whole run, smaller than the demo; a missing vLLM fails here."""
    folder = tmp_path_factory.mktemp("main-job")
    assert Path(VLLM_PYTHON).is_file(), f"no vLLM at {VLLM_PYTHON}: run `make setup` or set DFLASH_SCALE_VLLM_PYTHON"
    verifier = make_verifier(folder / "verifier", seconds=60)
    held_in, held_out = folder / "held-in.jsonl", folder / "held-out.jsonl"
    make_answers(verifier, held_in, held_out, AnswerSpec(prompts=480, heldout=24))
    prepare([held_in], str(verifier), folder / "data", validation_fraction=0.05)
    demo = Demo(folder, folder, REPO / "configs" / "demo.json", VLLM_PYTHON, 60, 480)
    overrides = [f"verifier.model={verifier}", f"data.path={folder / 'data'}"]
    overrides += [f"train.output_dir={folder / 'run' / 'out'}", "train.epochs=2"]
    overrides += ["train.checkpoint_every=20", "train.validate_every=40"]
    config = load_config(demo.config, overrides)
    with servers(demo, config) as fleet:
        addresses = [{"http": server.http, "zmq": server.zmq} for server in fleet]
        content = {**json.loads(config.dump())}
        content["stream"] |= {"servers": addresses, "probe_s": 1.0}
        run = Run(folder / "run", content)
        try:
            run.launch()
            wait_for(lambda: run.step() >= KILL_AT or run.process.poll() is not None, 180, f"step {KILL_AT}")
            assert run.process.poll() is None, run.log[-4000:]
            os.kill(fleet[0].process.pid, signal.SIGKILL)
            assert run.wait(400) == 0, run.log[-6000:]
        finally:
            for process in run.processes():
                if process.pid not in {server.process.pid for server in fleet}:
                    process.kill()
            stop(fleet[0].process)  # what the killed server left of itself
    drafter = export_checkpoint(named_checkpoint(folder / "run" / "out"), folder / "drafter")
    result = evaluate(
        EvaluateSpec(
            str(verifier), drafter, held_out, 24, 64, VLLM_PYTHON, VLLM_FLAGS, log_file=folder / "vllm-drafter.log"
        )
    )
    return Trained(run, fleet[0].http, result)


def test_the_run_outlives_a_killed_vllm_and_trains_every_sample_once(trained: Trained) -> None:
    trained.run.assert_every_sample_once_an_epoch()
    assert f"server {trained.killed} is unhealthy" in trained.run.log
    totals = json.loads((trained.run.folder / "out" / "totals.json").read_text())
    assert totals["complete"] and totals["quarantined"] == 0
    trained.run.assert_nothing_left()


def test_the_drafter_has_learnt(trained: Trained) -> None:
    assert trained.evaluation.untrained.length < 1.2
    assert trained.evaluation.speculative.length > 1.5


def test_transformers_vllm_and_the_training_forward_agree(trained: Trained) -> None:
    result = trained.evaluation
    assert result.vllm is not None and result.vllm_equal is not None
    assert result.equal == 1.0 and result.vllm_equal == 1.0
    assert result.vllm.length == pytest.approx(result.speculative.length, rel=0.05)
    assert result.replay_gap < 1.0
    assert result.vllm.gap(result.replay) < 1.0


def test_streamed_states_are_the_verifiers(trained: Trained) -> None:
    """The answers are greedy, so the head over the streamed last residual must name nearly all of their tokens."""
    lines = (trained.run.folder / "out" / "metrics.jsonl").read_text().splitlines()
    agreements = [json.loads(line)["verifier_agreement"] for line in lines if '"validation"' in line]
    assert agreements and min(agreements) > 0.999
