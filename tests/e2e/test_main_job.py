"""The main job with real vLLM: two extraction servers, one killed while training runs; then the exported drafter in a
real vLLM, held against Transformers and against the training forward. And the same with a pruned vocabulary."""

import json
import math
import os
import signal
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Run, wait_for
from safetensors.torch import load_file

from dflash_scale.config.run import load_config
from dflash_scale.data.prepare import prepare
from dflash_scale.drafter.pretrained import load_drafter
from dflash_scale.evaluation.acceptance import Acceptance
from dflash_scale.evaluation.evaluate import EvaluateSpec, Evaluation, evaluate, read_prompts, replayed, uniform_anchors
from dflash_scale.evaluation.speculative import GreedyVerifier, speculate
from dflash_scale.evaluation.vllm import ServerSpec, answer_prompts
from dflash_scale.server.process import stop
from dflash_scale.training.export import export_checkpoint, named_checkpoint
from dflash_scale.verifier.layers import causal_model
from launch.demo.answers import AnswerSpec, make_answers
from launch.demo.main import VLLM_FLAGS, Demo, Server, servers
from launch.demo.verifier import make_verifier

pytestmark = pytest.mark.e2e

REPO = Path(__file__).resolve().parents[2]
VLLM_PYTHON = os.environ.get("DFLASH_SCALE_VLLM_PYTHON", str(REPO / ".venv-vllm" / "bin" / "python"))
KILL_AT = 12  # the step at which one server dies
VERIFIER_STEPS, PROMPTS, HELD_OUT, MAX_NEW_TOKENS = 240, 480, 24, 64
VOCABULARY = 512  # of 2048, the pruned drafter's


@dataclass
class Material:
    """What both runs share: a small verifier and its own answers."""

    folder: Path
    verifier: Path
    held_out: Path

    def servers(self, vllm_python: str | None) -> AbstractContextManager[list[Server]]:
        """Two extraction servers: vLLM, or Transformers for None."""
        config = REPO / "configs" / "demo.json"
        demo = Demo(self.folder, self.folder, config, vllm_python, VERIFIER_STEPS, PROMPTS)
        return servers(demo, load_config(config, [f"verifier.model={self.verifier}"]))

    def content(self, name: str, addresses: list[dict[str, str]], **drafter: int) -> dict[str, Any]:
        """The demo's configuration for a run in the folder `name`, made short."""
        overrides = [f"verifier.model={self.verifier}", f"data.path={self.folder / 'data'}"]
        overrides += [f"train.output_dir={self.folder / name / 'out'}", "train.epochs=2"]
        overrides += ["train.checkpoint_every=20", "train.validate_every=40"]
        content: dict[str, Any] = json.loads(load_config(REPO / "configs" / "demo.json", overrides).dump())
        content["stream"] |= {"servers": addresses, "probe_s": 1.0}
        content["drafter"] |= drafter
        return content

    def evaluate(self, run: Run) -> Evaluation:
        """Of the run's export, in Transformers and in a real vLLM."""
        export_checkpoint(named_checkpoint(run.folder / "out"), run.folder / "drafter")
        server = self.server(run)
        spec = EvaluateSpec(
            server.verifier,
            server.drafter,
            self.held_out,
            HELD_OUT,
            MAX_NEW_TOKENS,
            server.python,
            server.flags,
            server.log_file,
        )
        return evaluate(spec)

    def server(self, run: Run) -> ServerSpec:
        """A real vLLM that serves the run's export."""
        log = run.folder / "vllm-drafter.log"
        return ServerSpec(str(self.verifier), run.folder / "drafter", VLLM_PYTHON, log, VLLM_FLAGS)


@dataclass
class Trained:
    run: Run
    killed: str
    evaluation: Evaluation


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A missing vLLM fails here."""
    folder = tmp_path_factory.mktemp("main-job")
    assert Path(VLLM_PYTHON).is_file(), f"no vLLM at {VLLM_PYTHON}: run `make setup` or set DFLASH_SCALE_VLLM_PYTHON"
    verifier = make_verifier(folder / "verifier", VERIFIER_STEPS)
    held_in, held_out = folder / "held-in.jsonl", folder / "held-out.jsonl"
    make_answers(verifier, held_in, held_out, AnswerSpec(PROMPTS, heldout=HELD_OUT))
    prepare([held_in], str(verifier), folder / "data", validation_fraction=0.05)
    return Material(folder, verifier, held_out)


@pytest.fixture(scope="module")
def trained(material: Material) -> Trained:
    """One whole run, smaller than the demo."""
    with material.servers(VLLM_PYTHON) as fleet:
        addresses = [{"http": server.http, "zmq": server.zmq} for server in fleet]
        run = Run(material.folder / "run", material.content("run", addresses))
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
    return Trained(run, fleet[0].http, material.evaluate(run))


def assert_alike(one: Acceptance, other: Acceptance) -> None:
    """As alike as two drafts of the same text that are free to fall differently at each of their steps.

    vLLM's sums are rounded otherwise than Transformers', so a near tie between two drafts may fall the other way, and
    then all later anchors of that prompt may be others. The two are samples of the same acceptance from then on, and
    lie within three standard deviations of their difference, by their own counts.
    """
    steps = (one.drafts, other.drafts)
    assert min(steps) > 300
    for slot, counts in enumerate(zip(one.per_position, other.per_position, strict=True), start=1):
        share = sum(counts) / sum(steps)
        bound = 3 * math.sqrt(share * (1 - share) * sum(1 / n for n in steps))
        gap = abs(counts[0] / steps[0] - counts[1] / steps[1])
        assert gap <= bound, f"slot {slot}: {counts} of {steps} accepted, {gap:.3f} apart, {bound:.3f} by chance"


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
    assert result.replay_gap < 1.0  # at the same anchors: near ties alone
    assert_alike(result.vllm, result.replay)


def test_each_draft_of_vllm_is_the_training_forwards(material: Material, trained: Trained) -> None:
    """Two new tokens leave room for one draft, so vLLM drafts at exactly the anchors that are replayed: a near tie of
    one draft moves no later anchor, and what is left to chance is these near ties alone."""
    server = material.server(trained.run)
    drafter = load_drafter(server.drafter)
    verifier = GreedyVerifier(causal_model(server.verifier, torch.float32), drafter.spec.layer_ids)
    size = drafter.spec.block_size
    traces = [speculate(verifier, drafter, prompt, MAX_NEW_TOKENS) for prompt in read_prompts(material.held_out, 8)]
    anchors = [uniform_anchors(trace, size) for trace in traces]
    prompts = [trace.tokens[:anchor] for trace, some in zip(traces, anchors, strict=True) for anchor in some]
    answers, served = answer_prompts(server, prompts, 2, size - 1)
    assert [answer[0] for answer in answers] == [
        trace.tokens[anchor] for trace, some in zip(traces, anchors, strict=True) for anchor in some
    ]
    replay = replayed(verifier, drafter, traces, anchors)
    assert served.drafts == replay.drafts == len(prompts) > 300
    assert served.gap(replay) < 1.0


def test_streamed_states_are_the_verifiers(trained: Trained) -> None:
    """The answers are greedy, so the head over the streamed last residual must name nearly all of their tokens."""
    lines = (trained.run.folder / "out" / "metrics.jsonl").read_text().splitlines()
    agreements = [json.loads(line)["verifier_agreement"] for line in lines if '"validation"' in line]
    assert agreements and min(agreements) > 0.999


def test_a_pruned_drafter_is_accepted_in_vllm_as_its_evaluation_predicts(material: Material) -> None:
    with material.servers(None) as fleet:
        addresses = [{"http": server.http, "zmq": server.zmq} for server in fleet]
        run = Run(material.folder / "pruned", material.content("pruned", addresses, vocab_size=VOCABULARY))
        run.launch()
        assert run.wait(400) == 0, run.log[-6000:]
    result = material.evaluate(run)
    assert load_file(run.folder / "drafter" / "model.safetensors")["lm_head.weight"].shape[0] == VOCABULARY
    assert result.vllm is not None
    assert result.equal == 1.0 and result.vllm_equal == 1.0
    assert result.speculative.length > 1.5
    assert_alike(result.vllm, result.replay)
