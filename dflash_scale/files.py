"""Writing aside and renaming: a name stands for a whole file or folder, or for the one that was there before.

What is being written lies beside its name, as NAME.partial-HOST-PID. It goes when writing it fails; what a kill leaves
there is known by that name and may be removed. Nothing is flushed to the disk.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PARTIAL: Final = ".partial"  # in the name of everything unfinished
MINE: Final = f"{PARTIAL}-{socket.gethostname()}-{os.getpid()}"


def write_file(path: Path, text: str) -> None:
    """Replaces a small file of UTF-8 text in one step. Raises OSError; then the old file stays as it was."""
    aside = path.with_name(path.name + MINE)
    try:
        aside.write_bytes(text.encode())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which is `path` when the block is left, and is removed when the block fails.

    Raises:
        OSError: among others when `path` is a folder that holds something, unless it is to be replaced.
    """
    aside = path.with_name(path.name + MINE)
    shutil.rmtree(aside, ignore_errors=True)  # of a process of this number that was killed
    aside.mkdir(parents=True)
    try:
        yield aside
        if replace:
            remove_folder(path)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder, if there is one; nobody sees half of it under its name."""
    if path.exists():
        shutil.rmtree(path.rename(f"{path}.old{MINE}"))


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left; nobody may be writing there."""
    for left in folder.glob(f"*{PARTIAL}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
