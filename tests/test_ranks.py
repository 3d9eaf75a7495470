"""How the ranks of a run find each other."""

import socket

import psutil

from dflash_scale.ranks import interface_towards


def test_the_interface_is_the_one_with_the_route() -> None:
    assert interface_towards("127.0.0.1") == interface_towards("::1") == "lo"
    assert interface_towards("no-such-host.invalid") is None
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET:
                assert interface_towards(address.address) == name
