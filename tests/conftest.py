"""What several test files need."""

import socket

from hypothesis import settings

# For runs under a sanitizer, which are ten times slower.
settings.register_profile("few", max_examples=15, deadline=None)


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
