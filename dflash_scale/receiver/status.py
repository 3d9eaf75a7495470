"""What a receiver says of itself: a JSON file that its ranks, other programs and people read.

It is replaced as a whole, so a reader never sees half of one. docs/online.md explains the keys, which are the names of
the fields here; a field that is None is left out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dflash_scale.files import write_file
from dflash_scale.fleet.state import ServerStatus

State = Literal["starting", "running", "complete", "stopped"]


@dataclass(frozen=True, slots=True)
class QuarantinedSample:
    epoch: int
    sample: int
    reason: str


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """`hits` were read, `misses` have no file, files of `corrupt` are not used; the rest where the cache is written."""

    hits: int
    misses: int
    corrupt: int
    written: int | None = None
    written_bytes: int | None = None
    not_kept: int | None = None
    stopped: str | None = None  # why nothing is written any more; empty: it is


@dataclass(slots=True)
class Status:
    """The whole file.

    blocked_on, and blocked_s by it in seconds: "readers" (a rank has not opened its ring), "no server" (none is
    healthy), "credit", "requests" (all slots in use), "busy" (all servers say so), "servers" (all is requested),
    "cache" (files are being read), "ring" (full), "trainer" (look-ahead used up).
    """

    state: State
    pid: int
    rings: list[str]
    issued: int = 0  # requests
    retried: int = 0
    committed: int = 0  # samples
    committed_bytes: int = 0
    quarantined: int = 0
    quarantined_samples: list[QuarantinedSample] = field(default_factory=list)  # the first 1000
    dropped: dict[str, int] = field(default_factory=dict)  # messages, by reason
    outstanding_bytes: int = 0
    blocked_on: str = ""
    blocked_s: dict[str, float] = field(default_factory=dict)
    servers: list[ServerStatus] = field(default_factory=list)
    cache: CacheStatus | None = None

    def write(self, path: Path) -> None:
        """Replaces the file. Raises OSError."""
        write_file(path, json.dumps(asdict(self, dict_factory=_without_none)))


def read_status(path: Path) -> Status | None:
    """What a status file says; None if there is none yet."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    fields["quarantined_samples"] = [QuarantinedSample(**entry) for entry in fields["quarantined_samples"]]
    fields["servers"] = [ServerStatus(**entry) for entry in fields["servers"]]
    fields["cache"] = CacheStatus(**fields["cache"]) if "cache" in fields else None
    return Status(**fields)


def _without_none(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if value is not None}
