"""What a run survives: servers that die, hang, fall silent, move, do not fit, and a network that spoils their data.

Every test reads all rows of a run through the ring, where `consume` checks every byte, and that nothing comes twice.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dflash_scale.transport import ring as ring_module
from dflash_scale.transport.ring import COMMITTED, QUARANTINED, PeerStuck, Ring
from tests.support.proxy import Fault, Proxy
from tests.support.receiver_run import FakeServer, Run, drain, expected, read_all

pytest_plugins = ("tests.support.receiver_run",)

Log = pytest.CaptureFixture[str]


def finish(run: Run, capfd: Log, each: Callable[[int], None] = lambda count: None) -> tuple[dict[str, Any], str]:
    """Drains the run, which must lose nothing; gives the last status and the log."""
    totals = drain(run, run.spawn(), each=each)
    assert run.receiver is not None
    assert run.receiver.process.wait(60) == 0
    status = run.status()
    assert status["state"] == "complete"
    assert totals == {COMMITTED: len(expected(run.rows(1, 0)))}
    assert (status["committed"], status["quarantined"]) == (totals[COMMITTED], 0)
    assert all(server["outstanding_bytes"] <= 1 << 19 for server in status["servers"])
    return status, capfd.readouterr().err


class Supervisor:
    """Starts dead servers again, as a service manager would."""

    def __init__(self, servers: list[FakeServer]) -> None:
        self.servers, self.restarts, self._stop = servers, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            for server in self.servers:
                if server.process is not None and server.process.poll() is not None:
                    server.start()
                    self.restarts += 1

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def proxied() -> Iterator[Callable[[FakeServer], Proxy]]:
    proxies: list[Proxy] = []

    def behind_proxy(server: FakeServer) -> Proxy:
        proxies.append(Proxy(server.zmq))
        server.public_zmq = proxies[-1].port
        return proxies[-1]

    yield behind_proxy
    for proxy in proxies:
        proxy.close()


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("corrupt", ("is unhealthy: ", "the data connection broke")),
        ("cut", ("the data connection broke",)),
        ("slow", ("no data within 2 s", "no answer to a probe within 2 s")),
        ("stall", ("no answer to a probe within 2 s", "no data within 2 s")),
    ],
)
def test_a_bad_network_costs_nothing(
    make_run: Callable[..., Run],
    proxied: Callable[[FakeServer], Proxy],
    capfd: Log,
    fault: Fault,
    named: tuple[str, ...],
) -> None:
    far, near = FakeServer(), FakeServer()
    proxy = proxied(far)
    run = make_run([far.start(), near.start()])

    def each(count: int) -> None:
        if count == 10:
            proxy.fault = fault
        if count < 100:
            time.sleep(0.06)  # so that requests go to both for some seconds

    status, log = finish(run, capfd, each)
    assert proxy.spoiled
    assert any(words in log for words in named), log
    assert status["servers"][0]["http"] == far.addresses["http"]
    assert status["servers"][0]["samples"] > 0, "before the fault"
    assert far.addresses["http"] in log


def test_a_silent_server_is_put_aside_and_costs_nothing(make_run: Callable[..., Run], capfd: Log) -> None:
    """attempts=1: a single failure that counts would quarantine."""
    mute, good = FakeServer(arguments=("--mute",)), FakeServer()
    run = make_run([mute.start(), good.start()], attempts=1, request_timeout_s=1.0)
    status, log = finish(run, capfd, lambda count: time.sleep(0.05))
    assert f"server {mute.addresses['http']} is unhealthy: no data within 1 s, and it has delivered nothing" in log
    first, second = status["servers"]
    assert (first["samples"], second["errors"]) == (0, 0)
    assert first["strikes"] > 1
    assert first["errors"] <= 8 + first["strikes"], "its request slots once, then one request at a time"


def test_a_busy_server_costs_nothing(make_run: Callable[..., Run], capfd: Log) -> None:
    """attempts=1: a single failure that counts would quarantine."""
    server = FakeServer({sample: ["busy"] for sample in range(0, 60, 20)})
    run = make_run([server.start()], attempts=1)
    status, log = finish(run, capfd)
    (only,) = status["servers"]
    assert (only["busy"], only["errors"], only["strikes"]) == (3, 0, 0)
    assert log.count(f"server {server.addresses['http']} is busy: refused: scripted: full") == 1


def test_a_stopped_server_goes_on_later(make_run: Callable[..., Run], capfd: Log) -> None:
    stopped, other = FakeServer(), FakeServer()
    run = make_run([stopped.start(), other.start()], attempts=1, request_timeout_s=1.0)
    since = [0.0]

    def each(count: int) -> None:
        assert stopped.process is not None
        if count == 20:
            since[0] = time.monotonic()
            stopped.process.send_signal(signal.SIGSTOP)
        if since[0] and time.monotonic() - since[0] > 5:
            stopped.process.send_signal(signal.SIGCONT)
            since[0] = 0.0
        time.sleep(0.1)

    _, log = finish(run, capfd, each)
    assert f"server {stopped.addresses['http']} is unhealthy: no answer" in log
    assert f"server {stopped.addresses['http']} is healthy again after" in log


def test_a_sample_that_kills_every_server_is_quarantined(make_run: Callable[..., Run], capfd: Log) -> None:
    servers = [FakeServer({5: ["die"] * 99}).start() for _ in range(2)]
    run = make_run(servers, attempts=2, no_server_timeout_s=60.0)
    supervisor = Supervisor(servers)
    try:
        totals = drain(run, run.spawn())
    finally:
        supervisor.close()
    assert totals[QUARANTINED] == 2, "once per epoch, and nothing else"
    status = run.status()
    assert {entry["sample"] for entry in status["quarantined_samples"]} == {5}
    for entry in status["quarantined_samples"]:
        assert entry["reason"].count("died while it had the sample") == 2, "alone, at two servers or twice"
    assert supervisor.restarts >= 6
    assert "sample 5 (epoch 0) is quarantined: http://127.0.0.1:" in capfd.readouterr().err


def write(path: Path, servers: list[FakeServer]) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps([server.addresses for server in servers]))
    os.replace(aside, path)


def test_servers_join_move_and_leave(make_run: Callable[..., Run], capfd: Log, tmp_path: Path) -> None:
    """The configuration names none; the file appears after the start, and a server comes back on other ports."""
    first, second, moved = FakeServer(), FakeServer(), FakeServer()
    path = tmp_path / "servers.json"
    run = make_run([], endpoints_file=str(path))
    run.servers = [first, second, moved]

    def appear() -> None:
        while run.status().get("state") != "running":
            time.sleep(0.05)
        time.sleep(0.5)
        write(path, [first.start()])

    thread = threading.Thread(target=appear)
    thread.start()

    def each(count: int) -> None:
        if count == 20:
            write(path, [first, second.start()])
        if count == 50:
            first.kill()
            write(path, [second, moved.start()])
        if count == 70:
            path.write_text('[{"http": "http://127.0.0.1:1"}]')
        if count == 90:
            write(path, [moved])
        time.sleep(0.06)

    status, log = finish(run, capfd, each)
    thread.join()
    assert f"{path}: cannot be read (No such file or directory); the fleet stays at 0 servers" in log
    assert f"{path}: entry [0]['zmq']: Field required; wanted a list" in log
    assert f"server {first.addresses['http']} is removed" in log
    by_address = {server["http"]: server for server in status["servers"]}
    assert [by_address[server.addresses["http"]]["retired"] for server in run.servers] == [True, True, False]
    assert all(by_address[server.addresses["http"]]["samples"] > 0 for server in run.servers)


def test_a_server_that_comes_and_goes_is_remembered_once(
    make_run: Callable[..., Run], capfd: Log, tmp_path: Path
) -> None:
    steady, guest = FakeServer().start(), FakeServer().start()
    path = tmp_path / "servers.json"
    write(path, [guest])
    run = make_run([steady], endpoints_file=str(path))
    run.servers.append(guest)
    stints = []

    def await_guest(met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while not met(found := run.status()["servers"][-1]):
            time.sleep(0.05)
        return found

    def each(count: int) -> None:
        if count in (20, 50, 80):
            write(path, [])
            stints.append(await_guest(lambda server: server["retired"] and not server["open_requests"]))
        if count in (30, 60, 90):
            write(path, [guest])
            await_guest(lambda server: server["healthy"] and not server["retired"])

    status, _ = finish(run, capfd, each)
    assert [server["http"] for server in status["servers"]] == [server.addresses["http"] for server in run.servers]
    assert all(stint["samples"] > 0 for stint in (*stints, status["servers"][-1])), "it was asked each time"


@pytest.mark.parametrize("arguments", [("--greeting", "wrong-layout"), ("--greeting", "wrong-size")])
def test_a_server_that_does_not_fit_joins_in_vain(
    make_run: Callable[..., Run], capfd: Log, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    other = FakeServer(arguments=arguments)
    path = tmp_path / "servers.json"
    path.write_text("[]")
    run = make_run([FakeServer().start()], endpoints_file=str(path))
    run.servers.append(other)

    def each(count: int) -> None:
        if count == 10:
            write(path, [other.start()])
        time.sleep(0.04)

    status, log = finish(run, capfd, each)
    assert f"server {other.addresses['http']} is not healthy yet: server {other.addresses['http']} sends layers" in log
    assert status["servers"][1]["samples"] == 0
    assert not status["servers"][1]["healthy"]


def test_a_stopped_receiver_ends_the_run(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run([FakeServer().start()])
    receiver = run.spawn()
    with Ring.open(receiver.ring_names[0], timeout=60) as ring:
        assert ring.next_record(timeout=60) is not None
        monkeypatch.setattr(ring_module, "SILENCE_S", 1.0)
        receiver.process.send_signal(signal.SIGSTOP)
        with pytest.raises(
            PeerStuck, match=rf"pid {receiver.process.pid}\).*not moved for 1 s.*continue with --resume"
        ):
            read_all(ring)
        receiver.process.kill()  # what a stopped one is sent waits for a SIGCONT


def test_a_receiver_that_waits_for_the_trainer_is_not_stuck(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run([FakeServer().start()])
    receiver = run.spawn()
    with Ring.open(receiver.ring_names[0], timeout=60) as ring:
        assert ring.next_record(timeout=60) is not None
        monkeypatch.setattr(ring_module, "SILENCE_S", 0.5)
        read_all(ring)  # and then waits ten seconds for rows that its mark does not ask for
