"""The fleet's state machine in simulated fleets: random faults at random times, and what has to hold nevertheless.

The simulation plays servers, connections and the receiver's loop on a clock of its own. Server 0 is only ever killed by
samples; the others are killed, frozen, cut off, made mute or corrupt, added and removed at random.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_scale.fleet.fleet import Fleet
from dflash_scale.fleet.state import Cut, Fault, Key, Limits, Lost, Probe, Send

LIMITS = Limits(
    credit_bytes=1000,
    server_credit_bytes=600,
    requests_per_server=6,
    request_timeout_s=10,
    attempts=3,
    probe_s=1,
    no_server_timeout_s=600,
)
STEP_S = 0.1
FAULTY = ("mute", "corrupt", "slow", "busy", "late")
POISON = ("refused", "silent", "killer", "breaker", "error")


@dataclass
class Machine:
    """One server as it really is."""

    process: int = 0  # grows with every start
    alive: bool = True
    frozen_until: float = 0.0
    mode: str = "good"
    link: int | None = None  # the receiver's connection
    broken: bool = False  # since the last greeting
    greeted: int | None = None  # the process that was greeted last
    coming: dict[tuple[Key, int], int] = field(default_factory=dict)  # attempts whose data can still arrive, bytes
    asked: list[Send] = field(default_factory=list)  # HTTP requests that are open


class World:
    """A fleet, its machines and a clock."""

    def __init__(self, seed: int, servers: int) -> None:
        self.draw = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.machines = [Machine() for _ in range(servers)]
        self.fleet = Fleet(LIMITS, self.now)
        for i in range(servers):
            self.fleet.add_server(f"http://s{i}", self.now)
        self.links = 0
        self.serial = 0
        self.kinds: dict[Key, str] = {}
        self.sizes: dict[Key, int] = {}
        self.ends: Counter[Key] = Counter()
        self.delivered: set[Key] = set()
        self.quarantined: dict[Key, str] = {}

    def at(self, later: float, what: Callable[[], None]) -> None:
        self.serial += 1
        heapq.heappush(self.events, (self.now + later, self.serial, what))

    def add(self, sample: int, kind: str) -> None:
        key = Key(0, sample)
        self.kinds[key], self.sizes[key] = kind, self.draw.randint(1, 300)
        self.fleet.add(key, 10, self.sizes[key])

    # What machines do.

    def send(self, send: Send) -> None:
        machine = self.machines[send.server]
        assert machine.link is not None, "a request without a connection for its data"
        if not machine.alive:
            self.at(0.01, lambda: self.fleet.http_done(send, Fault.SERVER, "connection refused", self.now))
            return
        machine.asked.append(send)
        link, process = machine.link, machine.process
        if machine.mode != "mute" and self.kinds[send.key] not in ("silent", "refused", "error"):
            machine.coming[(send.key, send.attempt)] = self.sizes[send.key]
        self.at(self.draw.uniform(0.05, 2), lambda: self.complete(send, link, process))

    def complete(self, send: Send, link: int, process: int) -> None:
        machine, kind = self.machines[send.server], self.kinds[send.key]
        if not machine.alive or machine.process != process:
            return
        if self.now < machine.frozen_until:
            self.at(machine.frozen_until - self.now, lambda: self.complete(send, link, process))
            return
        if kind == "killer":
            self.kill(send.server, restart_s=self.draw.uniform(1, 8))
            return
        machine.asked.remove(send)
        if kind == "breaker":
            self.fleet.http_done(send, None, "", self.now)
            self.cut_off(send.server)
        elif kind == "refused":
            self.fleet.http_done(send, Fault.SAMPLE, "HTTP 400", self.now)
        elif kind == "error":
            self.fleet.http_done(send, Fault.DOUBT, "HTTP 500", self.now)
        elif machine.mode == "busy" and self.draw.random() < 0.7:
            machine.coming.pop((send.key, send.attempt), None)
            self.fleet.http_done(send, Fault.BUSY, "full", self.now)
        else:
            self.fleet.http_done(send, None, "", self.now)
            later = {"slow": self.draw.uniform(1, 9), "late": self.draw.uniform(8, 40)}.get(machine.mode, 0.2)
            self.at(later, lambda: self.arrive(send, link, process))

    def arrive(self, send: Send, link: int, process: int) -> None:
        """Data comes in, unless its process or its connection is gone."""
        machine = self.machines[send.server]
        if self.now < machine.frozen_until:
            self.at(machine.frozen_until - self.now + 0.01, lambda: self.arrive(send, link, process))
            return
        if machine.coming.pop((send.key, send.attempt), None) is None:
            return
        assert machine.link == link
        assert machine.process == process
        job = self.fleet.claim(send.server, send.key, send.attempt)
        if job is None:
            return
        if machine.mode == "corrupt":
            self.fleet.rejected(send.server, send.key, send.attempt, Fault.DOUBT, "checksum", self.now)
            return
        self.fleet.delivered(job, send.attempt, job.tokens, self.now)
        self.ends[send.key] += 1
        self.delivered.add(send.key)
        if self.draw.random() < 0.05:  # and once more
            assert self.fleet.claim(send.server, send.key, send.attempt) is None

    def kill(self, index: int, restart_s: float) -> None:
        machine = self.machines[index]
        if not machine.alive:
            return
        machine.alive, machine.frozen_until = False, 0.0
        for send in machine.asked:
            self.at(0.02, lambda send=send: self.fleet.http_done(send, Fault.SERVER, "connection reset", self.now))  # type: ignore[misc]
        machine.asked.clear()
        self.cut_off(index)

        def restart() -> None:
            machine.alive, machine.process = True, machine.process + 1

        self.at(restart_s, restart)

    def cut_off(self, index: int) -> None:
        """The connection breaks."""
        machine = self.machines[index]
        machine.coming.clear()
        if machine.link is not None:
            machine.link, machine.broken = None, True
            self.fleet.disconnected(index, self.now)

    def probe(self, probe: Probe) -> None:
        machine = self.machines[probe.server]
        if machine.link is None:
            self.links += 1
            machine.link = self.links
        if not machine.alive:
            self.at(0.01, lambda: self.fleet.probe_done(probe, "connection refused", self.now))
            return
        link = machine.link
        self.at(0.05, lambda: self.answer(probe, link))

    def answer(self, probe: Probe, link: int | None) -> None:
        machine = self.machines[probe.server]
        if self.now < machine.frozen_until:
            self.at(machine.frozen_until - self.now, lambda: self.answer(probe, link))
        elif machine.alive and machine.link == link:
            lost = Lost.CONNECTION if machine.broken else Lost.NOTHING
            if machine.greeted not in (None, machine.process):
                lost = Lost.RESTARTED
            machine.broken, machine.greeted = False, machine.process
            self.fleet.probe_done(probe, None, self.now, lost)

    # The loop of the receiver.

    def step(self) -> None:
        self.now += STEP_S
        while self.events and self.events[0][0] <= self.now:
            heapq.heappop(self.events)[2]()
        for action in self.fleet.poll(self.now):
            match action:
                case Send():
                    self.send(action)
                case Probe():
                    self.probe(action)
                case Cut(server):
                    self.machines[server].link = None
                    self.machines[server].coming.clear()
                case _:
                    self.ends[action.key] += 1
                    self.quarantined[action.key] = action.reason
        self.check()

    def check(self) -> None:
        total = 0
        for machine, server in zip(self.machines, self.fleet.servers, strict=True):
            load = server.load
            coming = sum(machine.coming.values())
            total += coming
            assert coming <= load.outstanding_bytes, "data may arrive that holds no credit"
            assert 0 <= load.late_bytes <= load.outstanding_bytes <= LIMITS.server_credit_bytes
            assert 0 <= load.open_requests <= LIMITS.requests_per_server
            awaited = [attempt for attempt in load.attempts.values() if not attempt.late]
            assert load.awaited == len(awaited)
            if load.solo is not None:
                assert [attempt.job.key for attempt in awaited] == [load.solo], "a solo attempt has company"
            if server.strikes:
                assert load.awaited <= 1, "probation is one request at a time"
        assert total <= self.fleet.outstanding_bytes <= LIMITS.credit_bytes
        assert max(self.ends.values(), default=0) <= 1

    # What an operator and the world do to the fleet.

    def trouble(self) -> None:
        index = self.draw.randrange(len(self.machines))
        server, machine = self.fleet.servers[index], self.machines[index]
        if index == 0 or server.load.solo is not None:
            return
        match self.draw.choice(("kill", "freeze", "cut", "mode", "mode", "good", "retire", "add", "back")):
            case "kill":
                self.kill(index, self.draw.uniform(0.1, 20))
            case "freeze":
                machine.frozen_until = self.now + self.draw.uniform(0.5, 40)
            case "cut":
                self.cut_off(index)
            case "mode":
                faulty = sum(other.mode in ("mute", "corrupt") for other in self.machines)
                machine.mode = self.draw.choice(FAULTY) if faulty < 2 else "good"
            case "good":
                machine.mode = "good"
            case "retire" if not server.retired and self.draw.random() < 0.5:
                self.fleet.retire(index, self.now)
            case "back" if server.gone:
                self.fleet.rejoin(index, self.now)
            case "add" if len(self.machines) < 8:
                self.machines.append(Machine())
                self.fleet.add_server(f"http://s{len(self.machines) - 1}", self.now)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), servers=st.integers(2, 5))
def test_nothing_is_lost_doubled_or_wrongly_quarantined_whatever_happens(seed: int, servers: int) -> None:
    world = World(seed, servers)
    sample = 0
    for _ in range(int(400 / STEP_S)):
        if sample < 400 and len(world.fleet) < 25:
            poisoned = sample % 30 == 17
            world.add(sample, world.draw.choice(POISON) if poisoned else "good")
            sample += 1
        if world.draw.random() < 0.01:
            world.trouble()
        world.step()
    for machine in world.machines:  # from here on the world behaves, and everything has to end
        machine.mode, machine.frozen_until = "good", 0.0
    for _ in range(int(900 / STEP_S)):
        if not len(world.fleet):
            break
        if (
            sum(kind == "good" and not world.ends[key] for key, kind in world.kinds.items()) < 4
        ):  # a stream goes on, so that servers can show that they work
            world.add(sample, "good")
            sample += 1
        world.step()
        if all(world.ends[key] for key, kind in world.kinds.items() if kind != "good"):
            for _ in range(int(200 / STEP_S)):
                world.step()
            break
    assert world.ends.keys() == world.kinds.keys(), "lost"
    assert set(world.ends.values()) == {1}
    wrong = {key: reason for key, reason in world.quarantined.items() if world.kinds[key] == "good"}
    assert not wrong
    assert not [key for key in world.delivered if world.kinds[key] != "good"]
