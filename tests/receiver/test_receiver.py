"""The receiver as a real process, between scripted fake servers (support/fake_verifier.py) and rings read here."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dflash_scale.config.run import parse_config
from dflash_scale.data.quarantine import QuarantineFile
from dflash_scale.receiver.client import STOP_SIGNAL, RankPlace, Stream
from dflash_scale.receiver.delivery import Dropped
from dflash_scale.transport import messages
from dflash_scale.transport.keys import make_keys
from dflash_scale.transport.ring import COMMITTED, QUARANTINED, PeerDied, Ring
from dflash_scale.verifier.identity import origin_of
from tests.support.receiver_run import BAD, LAYOUTS, RUN, FakeServer, Run, consume, drain, expected, read_all
from tests.support.verifier_families import make_verifier

pytest_plugins = ("tests.support.receiver_run",)


def test_everything_is_delivered_once_through_a_hostile_wire(make_run: Callable[..., Run]) -> None:
    words = (*BAD, "http400", "http500")
    # The same at both, once each: whichever is asked for a sample misbehaves, and the third attempt succeeds.
    run = make_run([FakeServer({sample: [word] for sample, word in enumerate(words)}).start() for _ in range(2)])
    receiver = run.spawn()
    totals = drain(run, receiver)
    assert totals == {COMMITTED: len(expected(run.rows(1, 0)))}
    assert receiver.process.wait(60) == 0
    status = run.status()
    assert status["state"] == "complete"
    assert status["committed"] == totals[COMMITTED]
    assert status["quarantined"] == 0
    assert status["outstanding_bytes"] <= 1 << 20
    for reason in ("corrupt", "wrong layout", "wrong tokens", "malformed", "not outstanding"):
        assert status["dropped"].get(reason), f"{reason} in {status['dropped']}"
    assert sum(server["samples"] for server in status["servers"]) == totals[COMMITTED]


def test_a_status_that_cannot_be_written_does_not_end_the_run(
    make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run([FakeServer().start()])
    log = ""

    def each(count: int) -> None:
        nonlocal log
        aside = run.folder / f"status.json.partial-{socket.gethostname()}-{receiver.process.pid}"
        deadline = time.monotonic() + 60
        if count == 10:  # a folder under the name of the file it is written aside to
            aside.mkdir()
        while count == 20 and "status.json cannot be written (Is a directory)" not in log:
            assert receiver.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
            log += capfd.readouterr().err
        if count == 30:
            aside.rmdir()

    receiver = run.spawn()
    drain(run, receiver, each=each)
    assert receiver.process.wait(60) == 0
    assert run.status()["state"] == "complete"


def test_two_ranks_get_their_own_rows(make_run: Callable[..., Run]) -> None:
    run = make_run([FakeServer().start()])
    receiver = run.spawn(world=2)
    totals: dict[int, Counter[int]] = {}
    other = threading.Thread(target=lambda: totals.update({1: drain(run, receiver, 1, 2)}))
    other.start()
    totals[0] = drain(run, receiver, 0, 2)
    other.join(60)
    assert sum(count[COMMITTED] for count in totals.values()) == len(expected(run.rows(1, 0)))
    assert receiver.process.wait(60) == 0


def test_a_sample_that_fails_everywhere_is_quarantined_and_the_run_goes_on(make_run: Callable[..., Run]) -> None:
    script = {3: ["http400", "corrupt", "refuse"] * 4}
    run = make_run([FakeServer(script).start(), FakeServer(script).start()])
    totals = drain(run, run.spawn())
    assert totals[QUARANTINED] == 2, "once per epoch"
    assert run.receiver is not None
    assert run.receiver.process.wait(60) == 0
    status = run.status()
    assert status["quarantined"] == 2
    named = status["quarantined_samples"]
    assert [entry["sample"] for entry in named] == [3, 3]
    assert "HTTP 400" in named[0]["reason"]
    for server in run.servers:
        assert server.addresses["http"] in named[0]["reason"]
    lines = [json.loads(line) for line in (run.folder / "quarantined.jsonl").read_text().splitlines()]
    assert [(line["data"], line["epoch"], line["sample"]) for line in lines] == [("random", 0, 3), ("random", 1, 3)]
    assert lines[0]["reason"] == named[0]["reason"]
    assert lines[0]["servers"] == sorted(server.addresses["http"] for server in run.servers)


def test_what_was_quarantined_is_left_out_of_a_later_run(make_run: Callable[..., Run]) -> None:
    run = make_run([FakeServer({3: ["http400"] * 99}).start()])
    QuarantineFile(run.folder / "earlier.jsonl", "random").write(0, 3, "too long", ["http://127.0.0.1:1"])
    everything = expected(run.rows(1, 0))
    content = run.config.model_dump(mode="json")
    content["data"]["exclude"] = str(run.folder / "earlier.jsonl")
    run.config = parse_config(content)
    assert everything - expected(run.rows(1, 0)) == {(0, 3), (1, 3)}
    assert drain(run, run.spawn()) == {COMMITTED: len(everything) - 2}


def test_killed_and_hung_servers_cost_nothing(make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    """attempts=1: a single counted failure would quarantine."""
    dying, hanging, steady = FakeServer({9: ["die"], 30: ["die"]}), FakeServer({11: ["hang"]}), FakeServer()
    run = make_run([server.start() for server in (dying, hanging, steady)], attempts=1, request_timeout_s=1.5)
    kills = {20: steady, 50: dying, 90: steady}

    def each(count: int) -> None:
        if count in kills:
            kills[count].kill()
            kills[count].start()
        if count % 10 == 0 and dying.process is not None and dying.process.poll() is not None:
            dying.script = {}
            dying.start()

    totals = drain(run, run.spawn(), each=each)
    assert totals == {COMMITTED: len(expected(run.rows(1, 0)))}
    assert run.receiver is not None
    assert run.receiver.process.wait(60) == 0
    status = run.status()
    assert status["quarantined"] == 0
    assert sum(server["deaths"] for server in status["servers"]) >= 2
    stderr = capfd.readouterr().err
    assert "is unhealthy:" in stderr
    assert "is healthy again after" in stderr


def test_no_server_ends_the_run_and_the_rank_sees_it(
    make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run([FakeServer()], no_server_timeout_s=1.0)
    receiver = run.spawn()
    with (
        Ring.open(receiver.ring_names[0], timeout=60) as ring,
        pytest.raises(PeerDied, match=f"pid {receiver.process.pid}.*its own message on stderr"),
    ):
        ring.next_record(timeout=60)
    assert receiver.process.wait(60) == 1
    assert "no server has been healthy for 1 s" in capfd.readouterr().err


def test_another_layout_is_an_error_that_names_both(
    make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run([FakeServer().start(), FakeServer(arguments=("--greeting", "wrong-layout")).start()])
    receiver = run.spawn()
    assert receiver.process.wait(60) == 1
    stderr = capfd.readouterr().err
    assert f"{run.servers[1].addresses['http']} sends layers [1, 3, 4] of 16 bfloat16" in stderr
    assert "this run wants layers [1, 2, 4] of 16 bfloat16" in stderr


def test_another_version_is_an_error_that_names_both(
    make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run([FakeServer(arguments=("--greeting", "other-version")).start()])
    assert run.spawn().process.wait(60) == 1
    http, newer = run.servers[0].addresses["http"], messages.VERSION + 1
    said = f"server {http}: the server speaks version {newer} of the wire, this "
    assert f"{said}receiver {messages.VERSION}; upgrade dflash_scale at the receiver" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("greeting", "rank", "said"),
    [
        ((), 0, "is the only engine of its server, the configuration has the engine with data_parallel_rank 0"),
        (
            ("--greeting", "second-engine"),
            None,
            "is the engine with data_parallel_rank 1, the configuration has the only engine of its server",
        ),
        (
            ("--greeting", "second-engine"),
            0,
            "is the engine with data_parallel_rank 1, the configuration has the engine with data_parallel_rank 0",
        ),
    ],
)
def test_another_engine_is_an_error_that_names_both(
    make_run: Callable[..., Run],
    capfd: pytest.CaptureFixture[str],
    greeting: tuple[str, ...],
    rank: int | None,
    said: str,
) -> None:
    run = make_run([FakeServer(arguments=greeting, data_parallel_rank=rank).start()])
    assert run.spawn().process.wait(60) == 1
    name = run.config.stream.servers[0].name
    assert f"server {name}: at {run.servers[0].addresses['zmq']} {said}" in capfd.readouterr().err


def test_an_engine_is_named_in_log_and_status(make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run([FakeServer(arguments=("--greeting", "second-engine"), data_parallel_rank=1).start()])
    drain(run, run.spawn())
    assert run.receiver is not None
    assert run.receiver.process.wait(60) == 0
    name = f"{run.servers[0].addresses['http']} engine 1"
    assert run.status()["servers"][0]["http"] == name
    assert f"server {name} is healthy" in capfd.readouterr().err


def test_another_verifier_is_an_error_that_names_both(
    make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    make_verifier("qwen3", model, shard="1GB")
    run = make_run([FakeServer(arguments=("--greeting", "other-verifier")).start()])
    run.config = run.config.model_copy(
        update={"verifier": run.config.verifier.model_copy(update={"model": str(model)})}
    )
    assert run.spawn().process.wait(60) == 1
    said = f"serves fake with the verifier {'0' * 16}, verifier.model has {origin_of(str(model)).verifier}; start the"
    assert said in capfd.readouterr().err


def test_what_cannot_be_compared_is_said_once(make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run([FakeServer().start()])
    drain(run, run.spawn())
    assert run.receiver is not None
    assert run.receiver.process.wait(60) == 0
    assert capfd.readouterr().err.count("the verifier of server") == 1


def test_a_run_with_keys(make_run: Callable[..., Run], tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    keyed = ("--keys", str(tmp_path / "keys"))
    dying = FakeServer({9: ["die"]}, arguments=keyed)
    run = make_run([dying.start(), FakeServer(arguments=keyed).start()], keys=str(tmp_path / "keys"), attempts=1)

    def each(count: int) -> None:
        if dying.process is not None and dying.process.poll() is not None:
            dying.script = {}
            dying.start()

    assert drain(run, run.spawn(), each=each) == {COMMITTED: len(expected(run.rows(1, 0)))}
    assert run.receiver is not None
    assert run.receiver.process.wait(60) == 0


def test_a_server_with_other_keys_or_none_gives_nothing_and_the_reason_is_said(
    make_run: Callable[..., Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_keys(tmp_path / "keys")
    make_keys(tmp_path / "other")
    stranger = tmp_path / "stranger"  # knows the servers' public key, and is not known to them
    stranger.mkdir(mode=0o700)
    (stranger / "server.public").write_bytes((tmp_path / "keys" / "server.public").read_bytes())
    (stranger / "receiver.secret").write_bytes((tmp_path / "other" / "receiver.secret").read_bytes())
    (stranger / "receiver.secret").chmod(0o600)
    servers = [FakeServer(arguments=("--keys", str(tmp_path / "keys"))), FakeServer()]
    run = make_run([server.start() for server in servers], keys=str(stranger), no_server_timeout_s=2.0)
    assert run.spawn().process.wait(60) == 1
    unknown, unkeyed = (server.addresses["http"] for server in servers)
    said = capfd.readouterr().err
    assert f"{unknown}: no data connection: the server does not know the receiver's key" in said
    assert f"{unkeyed}: no data connection: the keys do not belong together, or one side has none" in said
    assert said.count("is not healthy yet") < 20, "it asks again and again without a pause"


def test_only_its_own_signal_ends_it_cleanly(make_run: Callable[..., Run]) -> None:
    run = make_run([FakeServer().start()])
    receiver = run.spawn()
    with Ring.open(receiver.ring_names[0], timeout=60) as ring:
        assert ring.next_record(timeout=30) is not None
        for sent_to_every_process in (signal.SIGTERM, signal.SIGINT):
            receiver.process.send_signal(sent_to_every_process)
        time.sleep(0.5)
        assert receiver.process.poll() is None
        receiver.process.send_signal(STOP_SIGNAL)
        assert receiver.process.wait(60) == 0
        assert run.status()["state"] == "stopped"
        with pytest.raises(PeerDied):
            read_all(ring)


def alive(pid: int) -> bool:
    """Whether a process that is not ours to wait for still runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


PARENT = """
import os, sys, time
from dflash_scale.receiver.client import ReceiverSpec, spawn_receiver
spec = ReceiverSpec.parse(open(sys.argv[1]).read())
object.__setattr__(spec, "parent_pid", os.getpid())
receiver = spawn_receiver(spec)
print(receiver.process.pid, flush=True)
time.sleep(60)
"""


def test_the_receiver_dies_with_its_parent_and_leaves_nothing(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run([FakeServer().start()])
    path = tmp_path / "given.json"
    path.write_text(run.spec().dump())
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while run.status().get("state") != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while alive(pid):
        assert time.monotonic() < deadline, "the receiver outlives its parent"
        time.sleep(0.05)


def test_a_killed_receiver_leaves_no_segment_once_its_readers_are_attached(make_run: Callable[..., Run]) -> None:
    run = make_run([FakeServer().start()])
    receiver = run.spawn()
    with Ring.open(receiver.ring_names[0], timeout=60) as ring:
        assert ring.next_record(timeout=30) is not None
        assert not Path(f"/dev/shm{receiver.ring_names[0]}").exists()
        receiver.process.kill()
        with pytest.raises(PeerDied):
            read_all(ring)


def test_a_rank_starts_its_stream_with_one_call(make_run: Callable[..., Run]) -> None:
    run = make_run([FakeServer().start()])
    stream = Stream.start(run.config, LAYOUTS, RankPlace(0, 1, 0, 1), first_step=3, run_id=RUN)
    rows = run.rows(1, 0, first_step=3)
    got = consume(stream.ring, rows, run.samples, run.config.stream.lookahead_rows)
    assert set(got) == expected(rows)
    stream.close()
    status = stream.status()
    assert status is not None
    assert (status.state, status.servers[0].http) == ("complete", run.servers[0].addresses["http"])
    (server,) = stream.servers()
    assert server["healthy"]
    assert stream.receiver is not None
    assert stream.receiver.process.returncode == 0


def test_the_second_rank_finds_its_ring(make_run: Callable[..., Run]) -> None:
    run = make_run([FakeServer().start()])
    run.config = parse_config(run.config.model_dump() | {"train": {"rows_per_step": 4, "output_dir": str(run.folder)}})
    first, second = (
        Stream.start(run.config, LAYOUTS, RankPlace(2 + local, 4, local, 2), first_step=1, run_id=RUN)
        for local in range(2)
    )
    assert second.receiver is None
    wanted = next(row for row in run.rows(4, 3) if row.places)
    record = second.ring.next_record(timeout=60)
    assert record is not None
    assert (record.epoch, record.sample) in {
        (row.epoch, place.sample) for row in run.rows(4, 3)[:3] for place in row.places
    }, f"row {wanted} comes first"
    second.close()
    first.close()


def test_dropped_messages_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    dropped = Dropped()
    for number in range(5):
        dropped("corrupt", f"message {number}", "http://s0")
    assert dropped.counts["corrupt"] == 5
    assert len(caplog.records) == 1
