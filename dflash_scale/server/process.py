"""Server processes from outside: starting them, waiting for them, asking them, ending them. Standard library alone."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

log = logging.getLogger(__name__)

START_S = 600.0  # a GPU server that compiles takes minutes
STOP_S = 60.0


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(url: str, body: dict[str, object] | None = None, timeout_s: float = 600.0) -> bytes:
    """GET, or POST of JSON if there is a body. Loopback must not go through a proxy."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as reply:
        return bytes(reply.read())


def end_with_parent() -> None:
    """For `preexec_fn`: the kernel ends the child when the thread that started it ends, by whatever signal. It outlives
    exec, so it holds for a server that a launcher becomes."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG, prctl(2)


def wait_until_ready(server: subprocess.Popen[bytes], address: str, log_file: Path) -> None:
    """Returns when the server at `address` answers.

    Raises:
        ValueError: it ended, or was not ready in time; the end of its log is quoted.
    """
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            call(f"{address}/health", timeout_s=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    why = f"ended with status {server.returncode}" if server.poll() is not None else f"was not ready in {START_S:.0f} s"
    tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-15:])
    raise ValueError(f"the vLLM server {why}; the end of {log_file}:\n{tail}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Asks the server to end, and its whole session to if it does not."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_S)
            return
        except subprocess.TimeoutExpired:
            log.warning("vLLM (process %d) did not end in %.0f s: killed", server.pid, STOP_S)
    try:
        os.killpg(server.pid, signal.SIGKILL)  # the session was made for it: nothing else is in it
    except ProcessLookupError:
        return
    server.wait()
