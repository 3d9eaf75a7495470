"""Writing aside and renaming: a name stands for a whole file or folder, or for the one that was there before.

What is being written lies beside its name, as NAME.partial-HOST-PID. It goes when writing it fails; what a kill leaves
there is known by that name and may be removed. Nothing is flushed to the disk.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PARTIAL: Final = ".partial"  # in a name, here and where several processes write one folder together


def aside_of(path: Path) -> Path:
    """Where this process writes what is to be `path`: several may, on machines that share the folder."""
    return path.with_name(f"{path.name}{PARTIAL}-{socket.gethostname()}-{os.getpid()}")


def is_partial(path: Path) -> bool:
    """Whether a name is that of something unfinished."""
    return PARTIAL in path.name


def write_file(path: Path, content: str) -> None:
    """Replaces a small file of UTF-8 text in one step. Raises OSError; then the old file stays as it was."""
    aside = aside_of(path)
    try:
        aside.write_bytes(content.encode())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which is `path` when the block is left, and is removed when the block fails.

    Raises:
        OSError: among others when `path` is a folder that holds something, unless it is to be replaced.
    """
    aside = aside_of(path)
    shutil.rmtree(aside, ignore_errors=True)  # of a process of this number that was killed
    aside.mkdir(parents=True)
    try:
        yield aside
        put_folder(aside, path, replace=replace)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def put_folder(aside: Path, path: Path, *, replace: bool) -> None:
    """Gives a finished folder its name."""
    if replace and path.exists():
        remove_folder(path)
    os.rename(aside, path)


def remove_folder(path: Path) -> None:
    """Removes a folder of which nobody shall see half."""
    removed = aside_of(path.with_name(f"{path.name}-removed"))
    shutil.rmtree(removed, ignore_errors=True)  # half of one, of a killed process of this number
    shutil.rmtree(path.rename(removed))


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left; nobody may be writing there."""
    for left in filter(is_partial, folder.glob("*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
