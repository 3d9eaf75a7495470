"""The edge of the programs: how they say what is wrong, and what their exit statuses mean (docs/troubleshooting.md)."""

import sys
from typing import Final

DONE: Final = 0
FAILED: Final = 1  # servers or the disk did
REFUSED: Final = 2  # what was given cannot work
UNACCOUNTED: Final = 3  # a sample was trained twice, or not at all and nobody knows why
STOPPED: Final = 143  # by a signal; the same command again goes on


def fail(command: str, problem: object, status: int = REFUSED) -> int:
    """Says on stderr what is wrong, behind the command's name; gives the exit status."""
    print(f"dflash-scale {command}: {problem}", file=sys.stderr, flush=True)
    return status
