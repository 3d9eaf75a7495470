"""How the ranks of a run find each other, and see that they are of one run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from dflash_scale.server.process import free_port
from dflash_scale.training.distributed import interface_towards

ROOT = Path(__file__).parents[2]

# One rank: its folder and its data set's name are its arguments.
RANK = """
import sys
from pathlib import Path
import torch
from dflash_scale.training.distributed import check_alike, check_shared, join_ranks, leave_ranks
control = join_ranks(torch.device("cpu"))
for check in (
    lambda: check_shared(Path(sys.argv[1]), "run", control, within_s=1.0),
    lambda: check_alike({"train": "{}", "data.path": sys.argv[2]}, control),
):
    try:
        check()
        print("alike")
    except ValueError as error:
        print(error)
leave_ranks()
"""


def test_the_interface_is_the_one_with_the_route() -> None:
    assert interface_towards("127.0.0.1") == interface_towards("::1") == "lo"
    assert interface_towards("no-such-host.invalid") is None
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET:
                assert interface_towards(address.address) == name


def ranks(*arguments: tuple[str, str]) -> list[list[str]]:
    """What each rank's two checks say."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(arguments))}
    environment = {**os.environ, **place, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *words],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, words in enumerate(arguments)
    ]
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(arguments)
    return [[line for line in text.splitlines() if line == "alike" or ": " in line] for text in said]


def test_ranks_of_one_run_pass_and_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ranks((str(out), "a"), (str(out), "a")) == [["alike", "alike"]] * 2
    assert not list(out.iterdir())


def test_every_rank_hears_what_is_unlike(tmp_path: Path) -> None:
    said = ranks((str(tmp_path / "out"), "a"), (str(tmp_path / "elsewhere"), "b"))
    for shared, alike in said:
        assert shared.startswith("train.output_dir: 1 of 2 ranks have another ")
        assert alike.startswith("data.path: got several on the ranks of this run")
