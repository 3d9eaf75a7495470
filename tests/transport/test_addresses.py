"""Addresses: which forms are taken, and which need more than a loopback interface."""

import pytest
import zmq

from dflash_scale.transport.addresses import (
    check_bind,
    check_bind_http,
    check_server,
    engine_address,
    is_loopback,
    split_address,
)


def test_loopback_is_decided_without_a_lookup() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.9.9.9", "::1"]))
    others = ["0.0.0.0", "localhost.example.org", "127.0.0.1.nip.io", "*", "192.168.0.1", "eth0", "::", ""]
    assert not any(map(is_loopback, others))


@pytest.mark.parametrize(
    ("address", "want"),
    [
        ("tcp://127.0.0.1:5601", ("127.0.0.1", 5601)),
        ("tcp://[::1]:5601", ("::1", 5601)),
        ("tcp://gpu-7.example.org:1", ("gpu-7.example.org", 1)),
        ("tcp://*:*", ("*", 0)),
    ],
)
def test_parts(address: str, want: tuple[str, int]) -> None:
    assert split_address("x", address, "tcp") == want


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1", "tcp://127.0.0.1", "tcp://:1", "tcp://::1:1", "tcp://[::1]", "tcp://a b:1", "tcp://a:99999", "",
        "tcp://user@a:1", "tcp://a:1/v1", "udp://127.0.0.1:1", "inproc://x", "ipc://", "tcp://a:²", "tcp://[a]:1",
        "tcp://127.0.0.1:1/", "tcp://gpu7,:1", "tcp://gpu!:1", "tcp://gpü:1", "tcp://a..b:1", f"tcp://{'a' * 64}:1",
        "tcp://a\x7f:1", f"ipc:///{'x' * 107}",
    ],
)  # fmt: skip
def test_forms_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match=r"^--zmq: got "):
        check_bind("--zmq", address, open_to_others=True)


@pytest.mark.parametrize("address", ["tcp://127.8.9.1:5601", "tcp://localhost:*", "tcp://[::1]:5601", "ipc:///tmp/x"])
def test_servers_may_bind_what_only_this_machine_reaches(address: str) -> None:
    check_bind("--zmq", address, open_to_others=False)


@pytest.mark.parametrize("address", ["tcp://*:5601", "tcp://0.0.0.0:1", "tcp://eth0:1", "tcp://[::]:1"])
def test_what_others_reach_needs_keys_or_a_word(address: str) -> None:
    with pytest.raises(ValueError, match=r"give --keys DIR .*or --insecure"):
        check_bind("--zmq", address, open_to_others=False)
    check_bind("--zmq", address, open_to_others=True)


@pytest.mark.parametrize(
    ("address", "want"),
    [
        ("tcp://127.0.0.1:5601", "tcp://127.0.0.1:5603"),
        ("tcp://[::1]:65533", "tcp://[::1]:65535"),
        ("tcp://*:1", "tcp://*:3"),
        ("ipc:///tmp/states", "ipc:///tmp/states.2"),
    ],
)
def test_each_engine_has_an_address_of_its_own(address: str, want: str) -> None:
    assert engine_address("--zmq", address, 2) == want
    check_bind("--zmq", want, open_to_others=True)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "tcp://127.0.0.1:0", "tcp://127.0.0.1:65534"])
def test_ports_that_leave_none_for_the_engines(address: str) -> None:
    with pytest.raises(ValueError, match=r"^--zmq: got .*, wanted a port from 1 to 65533 because each engine"):
        engine_address("--zmq", address, 2)


def test_http() -> None:
    for host in ("127.0.0.1", "::1", "[::1]", "localhost"):
        check_bind_http("--host", host, insecure=False)
    with pytest.raises(ValueError, match=r"^--host: got '0\.0\.0\.0', wanted a loopback address"):
        check_bind_http("--host", "0.0.0.0", insecure=False)
    check_bind_http("--host", "0.0.0.0", insecure=True)


def test_receivers_connect_to_a_port() -> None:
    check_server("s", "http://[::1]:8001", "http", open_to_others=False)
    for address in ("tcp://127.0.0.1:*", "tcp://127.0.0.1:0"):
        with pytest.raises(ValueError, match="wanted the port of a server"):
            check_server("s", address, "tcp", open_to_others=True)
    with pytest.raises(ValueError, match=r"name a folder of keys in stream\.keys"):
        check_server("s", "tcp://gpu7:1", "tcp", open_to_others=False)
    check_server("s", "tcp://gpu7:1", "tcp", open_to_others=True)
    check_server("s", "ipc:///tmp/hidden-states", "tcp", open_to_others=False)
    with pytest.raises(ValueError, match="wanted the host of a server"):
        check_server("s", "tcp://*:1", "tcp", open_to_others=True)
    with pytest.raises(ValueError, match="wanted http"):
        check_server("s", "ipc:///tmp/hidden-states", "http", open_to_others=True)


@pytest.mark.parametrize("address", [f"ipc:///{'x' * 106}", "tcp://[::1]:1", "tcp://127.0.0.1:65535"])
def test_zeromq_takes_what_is_let_through(address: str) -> None:
    check_server("s", address, "tcp", open_to_others=True)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
