"""Hosts on one machine: each is a network and a mount namespace of its own, on one switch that is a namespace too.

A host has its own addresses, loopback, cable and /dev/shm, and shares everything else with the machine. Its namespaces
have no name: they last as long as a process in them, and the one that holds them ends, and with it all others, when
this process has ended, however that happens. Needs root, and `ip` (Debian: iproute2).
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SHM_BYTES = 256 << 20
# Reads until its other end is closed, which is in the process of the tests; then it ends what still runs on the host.
HOLD = f"""
mount -t tmpfs -o size={SHM_BYTES} tmpfs /dev/shm && ip link set lo up && echo ready || exit
cat
here=$(readlink /proc/self/ns/net) && test -n "$here" || exit
for process in /proc/[0-9]*; do
    test "$(readlink $process/ns/net)" = "$here" && test $process != /proc/$$ && kill -KILL ${{process#/proc/}}
done 2> /dev/null
"""


def must(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


class Namespaces:
    """A network and a mount namespace, until `close`."""

    def __init__(self) -> None:
        command = ["unshare", "--net", "--mount", "--", "sh", "-c", HOLD]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO)
        assert self._holder.stdout is not None
        line = self._holder.stdout.readline()
        assert line == b"ready\n", "no namespaces: the line above says why; they need root and `ip` (iproute2)"
        self.pid = self._holder.pid

    def inside(self, *command: str) -> list[str]:
        """A command line that runs a command there, in the same process and in the repository's folder."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--wd", "--", *command]

    def close(self) -> None:
        self._holder.communicate()  # closes the holder's input


@dataclass
class Host:
    """One host on the network."""

    number: int  # from 1, below 255
    switch: Namespaces
    spaces: Namespaces = field(default_factory=Namespaces)

    def __post_init__(self) -> None:
        switch, port = self.switch.inside, f"port{self.number}"
        must(*switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self.spaces.pid)))
        must(*switch("ip", "link", "set", port, "master", "switch", "up"))
        must(*self.spaces.inside("ip", "link", "set", "eth0", "up"))
        for address in (f"{self.ipv4}/24", f"{self.ipv6}/64"):
            nodad = ["nodad"] if ":" in address else []  # the address is good at once
            must(*self.spaces.inside("ip", "address", "add", address, "dev", "eth0", *nodad))

    @property
    def ipv4(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def ipv6(self) -> str:
        return f"fd77::{self.number}"

    def inside(self, *command: str) -> list[str]:
        return self.spaces.inside(*command)

    def cable(self, state: str) -> None:
        """Plugs the host's cable into the switch ("up"), or pulls it out ("down")."""
        must(*self.switch.inside("ip", "link", "set", f"port{self.number}", state))


@contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """Hosts 1 to `count`, that reach each other and nothing else."""
    switch = Namespaces()
    hosts: list[Host] = []
    try:
        must(*switch.inside("ip", "link", "add", "switch", "type", "bridge"))
        must(*switch.inside("ip", "link", "set", "switch", "up"))
        for number in range(1, count + 1):
            hosts.append(Host(number, switch))
        yield hosts
    finally:
        for host in hosts:
            host.spaces.close()
        switch.close()
