"""Keys of the wire: their files, and who is served by a server that has them, whatever else knocks at its port."""

import contextlib
import json
import os
import socket as tcp
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from dflash_scale.commands import cli
from dflash_scale.server.sender import Offer, Sender
from dflash_scale.transport import messages, sockets
from dflash_scale.transport.keys import KeysError, ReceiverKeys, make_keys, receiver_keys, server_keys
from tests.support.data_messages import decode_data
from tests.support.sender_process import LAYOUT

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def test_files_are_for_their_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = os.umask(0)
    try:
        assert cli.main(["keys", str(tmp_path / "a" / "keys")]) == 0
    finally:
        os.umask(old)
    folder = tmp_path / "a" / "keys"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {"server.public", "server.secret", "receiver.public", "receiver.secret"}
    assert {path.name for path in folder.iterdir()} == names
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    said = capsys.readouterr().out
    for name in names:
        assert name in said
        assert (folder / name).read_text().strip() not in said


def test_keys_are_never_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "server.public").unlink()
    assert cli.main(["keys", str(folder)]) == 2
    assert "holds server.secret, receiver.public, receiver.secret" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == {
        path: content for path, content in before.items() if path.name != "server.public"
    }


def test_each_side_needs_its_secret_and_the_others_public_key(folder: Path, tmp_path: Path) -> None:
    for name, needed in (("server", "receiver"), ("receiver", "server")):
        side = tmp_path / name
        side.mkdir()
        for file in (f"{name}.secret", f"{needed}.public"):
            (side / file).write_bytes((folder / file).read_bytes())
            (side / file).chmod(0o600)
    server, receiver = server_keys(tmp_path / "server"), receiver_keys(tmp_path / "receiver")
    assert server.receivers == {receiver.public}
    assert receiver.server == server.public
    assert server.public.decode() == (folder / "server.public").read_text().strip()
    for keys in (server, receiver):
        assert keys.secret.decode() not in repr(keys)
    with pytest.raises(KeysError, match=r"receiver\.secret cannot be read \(No such file"):
        receiver_keys(tmp_path / "server")
    (tmp_path / "server" / "receiver.public").unlink()
    with pytest.raises(KeysError, match=r"has no receiver\*\.public"):
        server_keys(tmp_path / "server")


def test_a_secret_that_others_may_read_is_refused(folder: Path) -> None:
    (folder / "receiver.secret").chmod(0o640)
    with pytest.raises(KeysError, match=r"mode 0640, others may use it: chmod 600 .*receiver\.secret"):
        receiver_keys(folder)


@pytest.mark.parametrize("content", ["", "a" * 39, "a" * 41, "~" * 40, "#" * 40, "ä" * 20, "a" * 10_000])
def test_files_that_hold_no_key(folder: Path, content: str) -> None:
    for name in ("server.public", "receiver.secret"):
        good = (folder / name).read_bytes()
        (folder / name).write_text(content)
        with pytest.raises(KeysError, match=f"{name} holds no key"):
            receiver_keys(folder)
        (folder / name).write_bytes(good)
    receiver_keys(folder)


# Real sockets.


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def dealer(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, keys: ReceiverKeys | None, largest: int = MIB
) -> "zmq.Socket[bytes]":
    return sockets.connect_dealer(context, address, "rx", max_message_bytes=largest, keys=keys)


def greet(socket: "zmq.Socket[bytes]", wait_ms: int = 10_000) -> bool:
    """Whether a hello is answered."""
    socket.send(messages.encode(messages.Hello("run", "rx")))
    if not socket.poll(wait_ms):
        return False
    return isinstance(messages.decode(socket.recv(), max_tokens=0), messages.HelloReply)


def reaches(sender: Sender, count: int) -> bool:
    deadline = time.monotonic() + 10
    while sender.counters.turned_away < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return sender.counters.turned_away >= count


def test_only_receivers_with_a_known_key_are_served(
    context: "zmq.Context[zmq.Socket[bytes]]", folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_keys(tmp_path / "other")
    ours, theirs = receiver_keys(folder), receiver_keys(tmp_path / "other")
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"), keys=server_keys(folder))
    stranger = ReceiverKeys(theirs.public, theirs.secret, ours.server)  # knows the server's public key
    refused = [None, stranger, theirs]
    for count, keys in enumerate(refused, start=1):
        assert not greet(dealer(context, sender.endpoint, keys), wait_ms=300), f"served with {keys}"
        assert reaches(sender, count), "it is not counted"
    assert "connections turned away so far; the latest: " in caplog.text
    assert greet(dealer(context, sender.endpoint, ours))
    sender.close()


def test_a_second_receivers_key_is_laid_beside_the_first(
    context: "zmq.Context[zmq.Socket[bytes]]", folder: Path, tmp_path: Path
) -> None:
    make_keys(tmp_path / "other")
    (folder / "receiver-other.public").write_bytes((tmp_path / "other" / "receiver.public").read_bytes())
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"), keys=server_keys(folder))
    first, second = receiver_keys(folder), receiver_keys(tmp_path / "other")
    assert greet(dealer(context, sender.endpoint, first))
    assert greet(dealer(context, sender.endpoint, ReceiverKeys(second.public, second.secret, first.server)))
    sender.close()


def test_a_receiver_with_keys_takes_nothing_from_another_server(
    context: "zmq.Context[zmq.Socket[bytes]]", folder: Path, tmp_path: Path
) -> None:
    """Neither from one without keys nor from one that knows the receiver's public key but is not the server."""
    make_keys(tmp_path / "evil")
    (tmp_path / "evil" / "receiver.public").write_bytes((folder / "receiver.public").read_bytes())
    for keys in (None, server_keys(tmp_path / "evil")):
        sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"), keys=keys)
        assert not greet(dealer(context, sender.endpoint, receiver_keys(folder)), wait_ms=300)
        sender.close()


def test_without_an_authenticator_nobody_comes_in(context: "zmq.Context[zmq.Socket[bytes]]", folder: Path) -> None:
    """ZeroMQ by itself would take every key that opens its handshake."""
    router = sockets.bind_router(context, "tcp://127.0.0.1:*", keys=server_keys(folder))
    receiver = dealer(context, router.getsockopt_string(zmq.LAST_ENDPOINT), receiver_keys(folder))
    receiver.send(b"hello")
    assert not router.poll(500)


def test_the_largest_sample_passes_with_keys(context: "zmq.Context[zmq.Socket[bytes]]", folder: Path) -> None:
    """MAXMSGSIZE counts the bytes that encryption adds."""
    tokens = 700
    largest = tokens * LAYOUT.bytes_per_token
    ids, states = os.urandom(4 * tokens), os.urandom(largest)
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"), keys=server_keys(folder))
    socket = dealer(context, sender.endpoint, receiver_keys(folder), largest)
    assert greet(socket)
    sender.send(messages.Ticket("run", "rx", 0, 1, 0, LAYOUT.layer_ids, LAYOUT.dtype), ids, states)
    assert socket.poll(10_000), "nothing came"
    _, got_ids, got_states = decode_data(socket.recv_multipart(), layout=LAYOUT, max_tokens=tokens)
    assert (bytes(got_ids), bytes(got_states)) == (ids, states)
    sender.close()


def test_keys_open_addresses_to_other_machines(folder: Path) -> None:
    with pytest.raises(ValueError, match="wanted a loopback address"):
        Sender("tcp://0.0.0.0:*", Offer(LAYOUT, "m"))
    Sender("tcp://0.0.0.0:*", Offer(LAYOUT, "m"), keys=server_keys(folder)).close()


@pytest.mark.parametrize("keyed", [False, True])
def test_ipv6(context: "zmq.Context[zmq.Socket[bytes]]", folder: Path, keyed: bool) -> None:
    sender = Sender("tcp://[::1]:*", Offer(LAYOUT, "m"), keys=server_keys(folder) if keyed else None)
    assert sender.endpoint.startswith("tcp://[::1]:")
    assert greet(dealer(context, sender.endpoint, receiver_keys(folder) if keyed else None))
    sender.close()


# Hostile clients of a keyed server, which runs in a process of its own so that its memory can be seen.


class Server:
    def __init__(self, keys: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "tests" / "support" / "sender_process.py"), str(keys)]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3, env=environment, text=True)
        self.endpoint = self._line()
        host, _, port = self.endpoint.removeprefix("tcp://").rpartition(":")
        self.address = host, int(port)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._line()

    def turned_away(self) -> int:
        return int(json.loads(self.ask("stats"))["turned_away"])

    def rss(self) -> int:
        """Bytes of memory in use now."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def connections(self) -> int:
        count = 0
        for path in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                count += os.readlink(path).startswith("socket:")
        return count

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    yield server
    server.close()


GREETING = (
    b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"%s" + bytes(31)
)  # ZMTP 3.1: signature, version, mechanism, as-server
NULL, CURVE = (GREETING % name.ljust(20, b"\0") for name in (b"NULL", b"CURVE"))


def flood(server: Server, opening: bytes, endless: bytes, most: int) -> int:
    """Connects, sends `opening` and then `endless` again and again; returns the bytes that the server took."""
    sent = 0
    with tcp.create_connection(server.address, timeout=5) as connection:
        try:
            connection.sendall(opening)
            while sent < most:
                connection.sendall(endless)
                sent += len(endless)
        except OSError:  # the server closed it, or reads no more
            pass
    return sent


@pytest.mark.parametrize(
    ("opening", "endless"),
    [
        (b"", b"\x00garbage\xff" * 4096),
        (NULL, b"\x01\x40" + b"x" * 64),  # endless frames of one message
        (CURVE, b"\x01\x40" + b"x" * 64),
        (CURVE, b"\x06" + struct.pack(">Q", 1 << 40) + b"x" * 65536),  # a command of a terabyte
        (CURVE, b"\x04\xc8\x05HELLO\x01\x00" + bytes(192)),
    ],
    ids=["garbage", "multi-frame, no key", "multi-frame for a handshake", "terabyte", "false hello"],
)
def test_bytes_of_strangers_are_not_gathered(
    server: Server, folder: Path, context: "zmq.Context[zmq.Socket[bytes]]", opening: bytes, endless: bytes
) -> None:
    assert greet(dealer(context, server.endpoint, receiver_keys(folder)))
    before, away = server.rss(), server.turned_away()
    taken = sum(flood(server, opening, endless, 64 * MIB) for _ in range(3))
    assert taken < 3 * 64 * MIB, "the server read all of it"
    assert server.rss() - before < 16 * MIB
    assert greet(dealer(context, server.endpoint, receiver_keys(folder))), "nobody is served any more"
    assert server.turned_away() > away or not opening, "what speaks ZeroMQ and is turned away is counted"


def test_half_open_connections_end_and_others_are_served_meanwhile(
    server: Server, folder: Path, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    count = 300
    receiver = dealer(context, server.endpoint, receiver_keys(folder), 64 * MIB)
    assert greet(receiver)
    before, sockets_before = server.rss(), server.connections()
    held = [tcp.create_connection(server.address, timeout=5) for _ in range(count)]
    for index, connection in enumerate(held):
        connection.sendall((b"", CURVE[:10], CURVE)[index % 3])
    deadline = time.monotonic() + 20
    while server.connections() < sockets_before + count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.connections() >= sockets_before + count, "they were not open at once"
    for _ in range(5):
        sample = server.ask("send 500")
        assert receiver.poll(10_000), "the receiver starves"
        header, _, _ = decode_data(receiver.recv_multipart(), layout=LAYOUT, max_tokens=500)
        assert header.ticket.sample == int(sample)
    assert greet(dealer(context, server.endpoint, receiver_keys(folder))), "no new receiver gets in"
    assert server.rss() - before < 32 * MIB
    deadline = time.monotonic() + 30
    while server.connections() > sockets_before + 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.connections() <= sockets_before + 5, "half-open connections stay for ever"
    assert server.turned_away() >= count
    for connection in held:
        connection.close()
