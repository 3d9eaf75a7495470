"""The servers that a watched file names, so that they join and leave while a run goes on.

The file holds a JSON list of servers as in `stream.servers`, {"http": "http://HOST:PORT", "zmq": "tcp://HOST:PORT"}.
Write it aside and rename it: a file that is being written may be read half. What cannot be used is logged once per
change, and the last good list stays.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from dflash_scale.config.stream import ServerAddress, StreamSection

log = logging.getLogger(__name__)

POLL_EVERY_S: Final = 1.0
_LIST: Final = TypeAdapter(tuple[ServerAddress, ...])


class Endpoints:
    """All servers of a run: those of the configuration, and those of its `endpoints_file`; none in mode offline."""

    def __init__(self, stream: StreamSection) -> None:
        self._stream = stream
        asks = stream.mode != "offline"
        self._path = Path(stream.endpoints_file) if asks and stream.endpoints_file is not None else None
        self._stamp: tuple[int, int, int] | None = (0, 0, 0)  # of the file at the last poll; None: there was none
        self._next_poll = -math.inf
        self.servers = list(stream.servers) if asks else []

    def poll(self, now: float) -> bool:
        """Whether `servers` is another list than at the last poll. Cheap to call often."""
        if self._path is None or now < self._next_poll:
            return False
        self._next_poll = now + POLL_EVERY_S
        try:
            found = os.stat(self._path)
        except OSError as error:
            if self._stamp is not None:
                log.warning("%s: cannot be read (%s); %s", self._path, error.strerror, self._kept())
            self._stamp = None
            return False
        stamp = found.st_mtime_ns, found.st_size, found.st_ino
        if stamp == self._stamp:
            return False
        self._stamp, before = stamp, self.servers
        try:
            self.servers = self._read(self._path)
        except (OSError, ValueError) as error:
            log.error("%s: %s; %s", self._path, error, self._kept())
        return self.servers != before

    def _read(self, path: Path) -> list[ServerAddress]:
        try:
            named = _LIST.validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = "".join(f"[{part!r}]" for part in first["loc"])
            raise ValueError(
                f'entry {where or "list"}: {first["msg"]}; wanted a list of {{"http": ..., "zmq": ...}}'
            ) from None
        servers = [*self._stream.servers, *named]
        self._stream.check_servers("servers of the configuration and of the file", servers)
        return servers

    def _kept(self) -> str:
        return f"the fleet stays at {len(self.servers)} servers until the file is corrected"
