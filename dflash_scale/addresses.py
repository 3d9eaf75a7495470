"""Addresses of servers: well formed, and on loopback unless the run says that it accepts an open wire."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

EXAMPLES = {"http": "http://127.0.0.1:8001", "tcp": "tcp://127.0.0.1:5601"}


def check_address(name: str, address: str, scheme: str, insecure: bool) -> None:
    """Raises ValueError, starting with `name`, unless `address` is SCHEME://HOST:PORT and may be used."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    else:
        if parts.scheme != scheme or parts.path not in ("", "/") or parts.query or parts.username:
            host = None
    if not host or not port:
        raise ValueError(f"{name}: got {address!r}, wanted {scheme}://HOST:PORT; write it as in {EXAMPLES[scheme]}")
    if not insecure and not is_loopback(host):
        raise ValueError(
            f"{name}: got {address!r}, wanted a loopback address because the stream is not encrypted; "
            "tunnel it to 127.0.0.1, or set stream.insecure to true on a network that you trust"
        )


def is_loopback(host: str) -> bool:
    """Whether `host` can only mean this machine; a name other than localhost is not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
