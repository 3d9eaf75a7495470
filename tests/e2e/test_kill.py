"""Processes of a run killed with real signals: nothing is left behind, and nothing is trained twice or missed."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Embedded, Run, embedded_fleet, random_data, run_config, tiny_verifier, wait_for

pytestmark = pytest.mark.e2e

EARLY = 12  # a step after the first checkpoint and well before the end


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    verifier = tiny_verifier(folder / "verifier")
    return verifier, random_data(folder, verifier, 300)


@pytest.fixture
def servers(inputs: tuple[Path, Path]) -> Iterator[list[Embedded]]:
    with embedded_fleet(inputs[0]) as fleet:
        yield fleet


@pytest.fixture
def run(inputs: tuple[Path, Path], servers: list[Embedded], tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, run_config(*inputs, servers, tmp_path))
    try:
        run.launch()
        wait_for(lambda: run.step() >= EARLY or run.process.poll() is not None, 120, f"step {EARLY}")
        assert run.process.poll() is None, run.log[-4000:]
        yield run
    finally:
        for process in run.processes():
            process.kill()


def stands_still(run: Run) -> bool:
    before = run.step()
    time.sleep(2)
    return run.step() == before


def resume_to_the_end(run: Run) -> None:
    run.launch("--resume")
    assert run.wait() == 0, run.log[-6000:]
    run.assert_nothing_left()
    run.assert_every_sample_once_an_epoch()


def test_a_killed_server_costs_nothing_and_is_named(run: Run, servers: list[Embedded]) -> None:
    servers[0].kill()
    address = f"http://127.0.0.1:{servers[0].http}"
    wait_for(lambda: f"server {address} is unhealthy" in run.log, 60, "the log line of the dead server")
    servers[0].start()  # and it is used again when it comes back
    assert run.wait() == 0, run.log[-6000:]
    run.assert_every_sample_once_an_epoch()
    run.assert_nothing_left()


def test_a_killed_receiver_ends_the_run_and_resume_continues(run: Run) -> None:
    os.kill(run.pid_of("dflash_scale.receiver.process"), signal.SIGKILL)
    assert run.wait() != 0
    assert "the receiver" in run.log and "is gone" in run.log
    run.assert_nothing_left()
    resume_to_the_end(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_resume_continues(run: Run, rank: int) -> None:
    os.kill(run.pid_of("launch/train.py", rank), signal.SIGKILL)
    assert run.wait() != 0
    run.assert_nothing_left()
    resume_to_the_end(run)


def test_a_killed_launcher_leaves_no_rank_and_resume_continues(run: Run) -> None:
    run.process.kill()
    run.process.wait()
    run.assert_nothing_left()
    saved = (run.folder / "out" / "checkpoints" / "latest").read_text()
    assert int(saved.removeprefix("step-")) == run.step(), "the ranks did not save when they saw the launcher gone"
    resume_to_the_end(run)


def test_a_signal_while_no_server_answers_saves_a_checkpoint(run: Run, servers: list[Embedded]) -> None:
    for server in servers:
        server.kill()
    wait_for(lambda: run.blocked_on() == "no server", 60, "a stream without servers")
    wait_for(lambda: stands_still(run), 60, "the ranks to have used up their rows")
    for process in run.processes():
        process.send_signal(signal.SIGTERM)
    assert run.wait() != 0
    run.assert_nothing_left()
    saved = (run.folder / "out" / "checkpoints" / "latest").read_text()
    assert int(saved.removeprefix("step-")) == run.step()
    for server in servers:
        server.start()
    resume_to_the_end(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_resume_continues(run: Run, number: signal.Signals) -> None:
    """As a terminal or a scheduler sends it: to every process of the run, the receiver among them."""
    for process in run.processes():
        process.send_signal(number)
    assert run.wait() != 0
    run.assert_nothing_left()
    saved = (run.folder / "out" / "checkpoints" / "latest").read_text()
    assert int(saved.removeprefix("step-")) == run.step()
    resume_to_the_end(run)
