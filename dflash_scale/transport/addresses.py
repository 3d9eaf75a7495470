"""Addresses of servers: their form, and whether they can only mean this machine.

    http://HOST:PORT     tcp://HOST:PORT     ipc://PATH (ZeroMQ only)     an IPv6 host stands in brackets: [::1]

What is let through here, ZeroMQ and the sockets take too, so that no address ends a run later. Standard library only:
used by the configuration, by the servers' launchers and inside the vLLM server.
"""

from __future__ import annotations

import ipaddress
import os
import re

EXAMPLES = {"http": "http://127.0.0.1:8001", "tcp": "tcp://127.0.0.1:5601"}
LONGEST_IPC_PATH = 107  # bytes, of a Unix socket

_FORM = re.compile(
    r"(?P<scheme>[a-z]+)://(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>\*|[\w-]{1,63}(?:\.[\w-]{1,63})*))"
    r":(?P<port>[0-9]{1,5}|\*)(?P<slash>/?)",
    re.ASCII,
)


def split_address(name: str, address: str, scheme: str) -> tuple[str, int]:
    """Host (IPv6 without brackets) and port of SCHEME://HOST:PORT; port 0 for `*`, which lets the system choose one.

    Raises ValueError, starting with `name`, for any other form.
    """
    found = _FORM.fullmatch(address)
    port = 0 if found is None or found["port"] == "*" else int(found["port"])
    slash = found is not None and found["slash"] and scheme != "http"  # ZeroMQ takes none
    if found is None or found["scheme"] != scheme or port > 65535 or slash or not _is_ipv6(found["six"] or "::"):
        raise ValueError(f"{name}: got {address!r}, wanted {scheme}://HOST:PORT; write it as in {EXAMPLES[scheme]}")
    return found["six"] or found["host"], port


def check_server(name: str, address: str, scheme: str, *, open_to_others: bool) -> None:
    """Raises ValueError, starting with `name`, unless a receiver may connect to `address`.

    open_to_others: whether it may be on another machine.
    """
    if scheme == "tcp" and _is_ipc(name, address):
        return
    host, port = split_address(name, address, scheme)
    if not port:
        raise ValueError(f"{name}: got {address!r}, wanted the port of a server; write it as in {EXAMPLES[scheme]}")
    if not open_to_others and not is_loopback(host):
        why, keys = "HTTP has neither encryption nor keys", ""
        if scheme == "tcp":
            why, keys = "without keys the stream is open", "name a folder of keys in stream.keys, "
        raise ValueError(
            f"{name}: got {address!r}, wanted a loopback address because {why}; {keys}"
            "tunnel it to 127.0.0.1, or set stream.insecure to true on a network that you trust"
        )
    if host == "*":
        raise ValueError(f"{name}: got {address!r}, wanted the host of a server; write it as in {EXAMPLES[scheme]}")


def check_bind(name: str, address: str, *, open_to_others: bool) -> None:
    """Raises ValueError, starting with `name`, unless a server may offer hidden states at the ZeroMQ `address`.

    open_to_others: whether other machines may reach it, because it asks for keys or the network is trusted.
    """
    if _is_ipc(name, address):
        return
    host, _ = split_address(name, address, "tcp")
    if not open_to_others and not is_loopback(host):
        raise ValueError(
            f"{name}: got {address!r}, wanted a loopback address because without keys anybody who reaches it is "
            "served; give --keys DIR (`dflash-scale keys DIR` makes them), or --insecure in a trusted network"
        )


def engine_address(name: str, address: str, rank: int) -> str:
    """Where the engine of data-parallel rank `rank` offers what its server offers at the ZeroMQ `address`.

    Raises ValueError, starting with `name`, for a port that the system chooses, and where there is no such port.
    """
    if _is_ipc(name, address):
        return f"{address}.{rank}"
    host, port = split_address(name, address, "tcp")
    if not 0 < port <= 65535 - rank:
        raise ValueError(
            f"{name}: got {address!r}, wanted a port from 1 to {65535 - rank} because each engine of a data-parallel "
            "server binds a port of its own, this one plus its rank"
        )
    return f"tcp://[{host}]:{port + rank}" if ":" in host else f"tcp://{host}:{port + rank}"


def check_bind_http(name: str, host: str, *, insecure: bool) -> None:
    """Raises ValueError, starting with `name`, unless a server may answer HTTP at `host`, which keys do not cover."""
    if not insecure and not is_loopback(host.strip("[]")):
        raise ValueError(
            f"{name}: got {host!r}, wanted a loopback address because HTTP has neither encryption nor keys; bind to "
            "127.0.0.1 and tunnel to it, or pass --insecure in a trusted network"
        )


def cannot_bind(name: str, address: str, why: str | None) -> str:
    """What to say when the system does not let a server have its address."""
    return (
        f"{name}: got {address!r}, which cannot be bound ({why}); name an IP address and port, or a path, that this "
        "machine has and no other process uses"
    )


def _is_ipc(name: str, address: str) -> bool:
    """Whether it is a Unix socket, which only processes of this machine reach.

    Raises ValueError, starting with `name`, for a path that is too long for one.
    """
    path = address.removeprefix("ipc://")
    if path == address or not path:
        return False
    if (length := len(os.fsencode(path))) > LONGEST_IPC_PATH:
        raise ValueError(
            f"{name}: got {address!r}, a path of {length} bytes, wanted at most {LONGEST_IPC_PATH}; name a shorter one"
        )
    return True


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether `host` can only mean this machine; a name other than localhost is not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
