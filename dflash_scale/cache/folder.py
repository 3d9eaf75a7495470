"""The cache: a folder of hidden states, one file a sample, and what writes to it.

    manifest.json            what the files hold and of which verifier and data set
    hs_{sample}.safetensors  file.py; `sample` counts the training samples, then the validation ones

A file is written aside and renamed, so that a name always stands for a whole file, however the writer ends. Nothing is
flushed to the disk: what a power cut tears is found by its checksum and made again. Several processes may write to one
folder; the last file of a name stays. What a killed process left aside is removed by the next start on its machine.

A folder without a manifest was written by another program. It is taken as it is: then a file's sizes, dtype and token
ids are all that can be checked, and the run's layer ids are believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dflash_scale.cache.file import BadFile, file_head, read_states, read_token_ids, write_all
from dflash_scale.files import write_file
from dflash_scale.transport import messages
from dflash_scale.transport.layout import Buffer, Layout, WireError
from dflash_scale.transport.ring import process_start

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
# HOST,PID,START, and the file's name: no host's name has a comma. Not the names of files.py: other processes may be
# writing to the folder when a start removes what was left, so a name tells whether its process lives.
ASIDE: Final = ".aside,"


@dataclass(frozen=True, slots=True)
class CacheOrigin:
    """What the files of a cache were made from.

    `layout`: all layers that a file may hold; `verifier`: its name, for people; its digest as `identity.origin_of`
    computes it, empty where it cannot.
    """

    layout: Layout
    verifier: str
    verifier_digest: str
    data_fingerprint: str


class Cache:
    """The files of one folder. `layer_ids`: of a file that does not name its own."""

    def __init__(self, folder: Path, layer_ids: tuple[int, ...]) -> None:
        self.folder, self._layer_ids = folder, layer_ids
        self._aside = f"{ASIDE}{socket.gethostname()},{os.getpid()},{process_start(os.getpid())},"

    def path(self, sample: int) -> Path:
        return self.folder / f"hs_{sample}.safetensors"

    def has(self, sample: int) -> bool:
        """Whether there is a file of the sample, good or bad."""
        return self.path(sample).exists()

    def token_ids(self, sample: int, most: int) -> bytes:
        """Token ids of a sample's file, at most `most` of them, int32 little-endian; not checked against its checksum.

        Raises:
            BadFile: there is no such file, or it is none of the cache's, or longer.
        """
        file = self._open(sample)
        try:
            return read_token_ids(file, most)
        finally:
            os.close(file)

    def read(self, sample: int, token_ids: bytes, layout: Layout, slot: memoryview) -> None:
        """Reads a sample's states into `slot`, see `cache_file.read_states`.

        Raises:
            BadFile: there is no such file, or it is not what is wanted.
        """
        file = self._open(sample)
        try:
            read_states(file, token_ids, layout, self._layer_ids, slot)
        finally:
            os.close(file)

    def _open(self, sample: int) -> int:
        try:
            return os.open(self.path(sample), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadFile(f"it cannot be opened: {error.strerror}") from error

    def write(self, sample: int, token_ids: bytes, layout: Layout, states: Buffer) -> int:
        """Writes a sample's file; gives its size in bytes.

        Args:
            token_ids: int32, little-endian.
            states: (tokens, layers, hidden size) as `layout` says.

        Raises:
            OSError: it could not be written; nothing is left of it.
        """
        name = self.path(sample)
        aside = self.folder / f"{self._aside}{name.name}"
        head = file_head(layout, token_ids, messages.checksum(token_ids, states))
        try:
            file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                write_all(file, [head, states])
            finally:
                os.close(file)  # some file systems say only now that they are full
            os.replace(aside, name)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        return len(head) + len(states)

    def size(self) -> tuple[int, int]:
        """Files and their bytes."""
        sizes = [entry.stat().st_size for entry in _files(self.folder)]
        return len(sizes), sum(sizes)


def open_cache(folder: Path, layout: Layout) -> Cache:
    """The cache of a run that streams `layout`; removes what killed processes of this machine left aside.

    Raises:
        ValueError: it has a manifest that cannot be read.
        OSError: the folder cannot be read.
    """
    _remove_left_asides(folder)
    origin = read_manifest(folder)
    return Cache(folder, layout.layer_ids if origin is None else origin.layout.layer_ids)


def claim_folder(folder: Path, origin: CacheOrigin, *, writable: bool) -> None:
    """Checks that a folder's files are of this verifier and data set; a new folder is made and gets a manifest.

    Raises:
        ValueError: it is another run's, it cannot be used, or there is none and `writable` is false.
    """
    if not folder.is_dir() and not writable:
        raise ValueError(
            f"stream.cache: got {folder}, wanted a folder of hidden states; write one with `dflash-scale generate`"
        )
    try:
        if writable:
            folder.mkdir(parents=True, exist_ok=True)
        found = read_manifest(folder)
        if found is not None:
            _compare(folder, found, origin)
        elif writable and next(_files(folder), None) is None:
            write_file(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(origin)}, indent=1) + "\n")
    except OSError as error:
        raise ValueError(
            f"stream.cache: {folder} cannot be used: {error.strerror} ({error.filename}); name a folder that this user "
            "can write to"
        ) from None


def read_manifest(folder: Path) -> CacheOrigin | None:
    """What the folder's manifest says; None if it has none. Raises ValueError if it cannot be read."""
    path = folder / MANIFEST
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        names = ("verifier", "verifier_digest", "data_fingerprint")
        return CacheOrigin(Layout.from_params(content["layout"]), *(str(content[name]) for name in names))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, WireError) as error:
        raise ValueError(
            f"stream.cache: {path} is not a manifest of format {FORMAT} ({error}); name another folder, or remove it "
            "if you know that the files beside it are this run's"
        ) from None


def _compare(folder: Path, found: CacheOrigin, wanted: CacheOrigin) -> None:
    layers, wanted_layers = found.layout.layer_ids, wanted.layout.layer_ids
    states = (found.layout.hidden_size, found.layout.dtype), (wanted.layout.hidden_size, wanted.layout.dtype)
    problems = []
    digests = {found.verifier_digest, wanted.verifier_digest} - {""}
    if len(digests) > 1:
        problems.append(f"it was made with the verifier {found.verifier}, verifier.model is {wanted.verifier}")
    if not set(wanted_layers) <= set(layers):
        problems.append(f"it has layers {list(layers)}, this run wants {list(wanted_layers)}")
    if states[0] != states[1]:
        problems.append(
            f"its states are {states[0][0]} wide in {states[0][1]}, wanted {states[1][0]} in {states[1][1]}"
        )
    if found.data_fingerprint != wanted.data_fingerprint:
        problems.append("it was made for another data set than data.path")
    if problems:
        raise ValueError(f"stream.cache: {folder} is another run's: {'; '.join(problems)}; name another folder")


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("hs_") and entry.name.endswith(".safetensors"):
                yield entry


def _remove_left_asides(folder: Path) -> None:
    prefix = f"{ASIDE}{socket.gethostname()},"
    with os.scandir(folder) as entries:
        left = [entry for entry in entries if entry.name.startswith(prefix)]
    for entry in left:
        pid, start, _ = entry.name.removeprefix(prefix).split(",")
        if str(process_start(int(pid))) != start:
            with contextlib.suppress(FileNotFoundError):  # another process of this run was faster
                os.unlink(entry.path)
