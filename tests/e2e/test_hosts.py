"""A run of two nodes, with servers on two more hosts whose cables are pulled out. hosts.py makes the hosts."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Embedded, Run, random_data, run_config, tiny_verifier, wait_for
from hosts import Host, network

from dflash_scale.receiver.status import read_status
from dflash_scale.transport.keys import make_keys

pytestmark = pytest.mark.e2e

EARLY = 8  # a step well before the end


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with network(4) as hosts:
        yield hosts


@pytest.fixture
def servers(hosts: list[Host], tmp_path: Path) -> Iterator[list[Embedded]]:
    """On the last two hosts, one at its IPv4 and one at its IPv6 address, with keys."""
    verifier = tiny_verifier(tmp_path / "verifier")
    make_keys(tmp_path / "keys")
    flags = ("--keys", str(tmp_path / "keys"), "--insecure")  # insecure: HTTP is reached from other hosts
    places = [(hosts[2], hosts[2].ipv4), (hosts[3], f"[{hosts[3].ipv6}]")]
    fleet = [Embedded(verifier, host=address, prefix=host.inside(), flags=flags) for host, address in places]
    try:
        for server in fleet:
            server.start()
        yield fleet
    finally:
        for server in fleet:
            server.kill()


@dataclass
class Node:
    """One launcher of the run, as it is started on a node of its own."""

    host: Host
    log_file: Path
    process: "subprocess.Popen[bytes]"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


def launch(run: Run, hosts: list[Host]) -> list[Node]:
    """One rank and one receiver on each host."""
    hostfile = run.folder / "hosts"
    hostfile.write_text("".join(f"{host.ipv4} slots=1\n" for host in hosts))
    nodes = []
    for rank, host in enumerate(hosts):
        command = host.inside(sys.executable, "-m", "dflash_scale.commands.cli", "train", "--hostfile", str(hostfile))
        command += ["--no_ssh", "--node_rank", str(rank), "--master_addr", hosts[0].ipv4]
        nodes.append(Node(host, run.folder / f"node-{rank}.txt", run.start(command, log=f"node-{rank}.txt")))
    return nodes


@pytest.fixture
def run(hosts: list[Host], servers: list[Embedded], tmp_path: Path) -> Iterator[Run]:
    data = random_data(tmp_path, servers[0].verifier, 300)
    run = Run(tmp_path / "run", run_config(servers[0].verifier, data, servers, tmp_path / "run", epochs=2))
    run.folder.mkdir()
    run.config["stream"] |= {"keys": str(tmp_path / "keys"), "insecure": True, "request_timeout_s": 4.0}
    try:
        yield run
    finally:
        for process in run.processes():
            process.kill()


def test_two_nodes_train_every_sample_once_though_cables_are_pulled(
    run: Run, hosts: list[Host], servers: list[Embedded]
) -> None:
    nodes = launch(run, hosts[:2])

    def logged(server: Embedded, what: str) -> bool:
        assert all(node.process.poll() is None for node in nodes), nodes[0].log[-4000:] + nodes[1].log[-4000:]
        return all(f"server {server.address['http']} {what}" in node.log for node in nodes)

    wait_for(lambda: all(logged(server, "is healthy") for server in servers) and run.step() >= EARLY, 300, "a start")
    for host in hosts[2:]:
        host.cable("down")
    for server in servers:
        wait_for(lambda server=server: logged(server, "is unhealthy"), 60, f"{server.host} named in both nodes' logs")
    hosts[2].cable("up")
    wait_for(lambda: logged(servers[0], "is healthy again"), 60, "the server whose cable is back")
    for node in nodes:  # to its end with that server alone
        assert node.process.wait(300) == 0, node.log[-6000:]
    run.assert_every_sample_once_an_epoch()
    statuses = [read_status(path) for path in sorted((run.folder / "out" / "stream").glob("*-rank?.json"))]
    assert [status.state for status in statuses] == ["complete", "complete"]
    for host in hosts[:2]:
        assert not os.listdir(f"/proc/{host.spaces.pid}/root/dev/shm")
