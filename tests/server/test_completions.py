"""The embedded server's HTTP face against requests that announce no body that it would read."""

import socket
from concurrent.futures import Future

import pytest

from dflash_scale.server.completions import MAX_BODY_BYTES, CompletionServer, Reply, Request, RequestLimits
from dflash_scale.transport.layout import Layout

LIMITS = RequestLimits(128, 64, Layout((1,), 8, "float32"))


def never(request: Request) -> "Future[Reply]":
    raise AssertionError(f"{request} was taken")


@pytest.mark.parametrize("length", [None, "", "-1", "1e3", "٣", str(MAX_BODY_BYTES + 1), "9" * 5000])
def test_a_length_that_is_none_or_too_much_is_refused(length: str | None) -> None:
    server = CompletionServer("127.0.0.1:0", "m", LIMITS, never)
    try:
        port = int(server.url.rpartition(":")[2])
        header = "" if length is None else f"Content-Length: {length}\r\n"
        with socket.create_connection(("127.0.0.1", port), 30) as client:
            client.sendall(f"POST /v1/completions HTTP/1.1\r\n{header}\r\n".encode())
            reply = b"".join(iter(lambda: client.recv(65536), b""))  # to the end: the connection is closed
        assert reply.startswith(b"HTTP/1.1 413 ")
        assert b"Content-Length must be" in reply
    finally:
        server.close()
