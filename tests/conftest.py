"""What several test files need, and which tests this machine can run."""

import socket

import pytest
import torch

pytest.register_assert_rewrite("receiver_run")
HAS_CUDA = torch.cuda.is_available()
collect_ignore = [] if HAS_CUDA else ["gpu"]


def pytest_report_header() -> str | None:
    return None if HAS_CUDA else "tests/gpu is left out: torch sees no GPU here"


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
