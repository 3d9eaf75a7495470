"""CURVE keys of the wire: a pair for the servers, a pair for the receivers, one short text file for each half.

    dflash-scale keys DIR

    DIR/server.secret      stays on the machines of the servers     DIR/server.public      goes to the receivers
    DIR/receiver.secret    stays on the machines of the receivers   DIR/receiver.public    goes to the servers

A server needs `server.secret` and the public key of each receiver that it shall serve: it takes every
`receiver*.public` of its folder, so that a second run's key can be laid beside the first under a name of its own. A
receiver needs `receiver.secret` and `server.public`. A file holds one key, 40 characters of Z85, and is never written
over. Imported inside the vLLM server: standard library and zmq only.
"""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq

KEY_CHARS: Final = 40
HALVES: Final = ("public", "secret")  # in the order of zmq.curve_keypair
_Z85 = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


class KeysError(ValueError):
    """A folder of keys that cannot be used, or must not be written."""


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """What a server needs: its own pair, and whom it serves. Keys are Z85, 40 bytes each."""

    public: bytes
    secret: bytes = field(repr=False)
    receivers: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class ReceiverKeys:
    """What a receiver needs: its own pair, and the servers' public key. Keys are Z85, 40 bytes each."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


def make_keys(folder: Path) -> None:
    """Writes both pairs into `folder`; files are 0600, a folder that it makes is 0700.

    Raises KeysError, before anything is written, if one of the files exists.
    """
    pairs = {name: zmq.curve_keypair() for name in ("server", "receiver")}
    files = {
        folder / f"{name}.{half}": key for name, pair in pairs.items() for half, key in zip(HALVES, pair, strict=True)
    }
    if there := [path.name for path in files if path.exists()]:
        raise KeysError(f"{folder} holds {', '.join(there)}, and keys are never written over; name another folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path, key in files.items():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key + b"\n")


def server_keys(folder: Path) -> ServerKeys:
    """The server's part of a folder; raises KeysError for what is absent, damaged or readable by others."""
    secret = _read(folder / "server.secret")
    publics = sorted(folder.glob("receiver*.public"))
    if not publics:
        raise KeysError(f"{folder} has no receiver*.public: copy the public key of each receiver that may connect")
    return ServerKeys(zmq.curve_public(secret), secret, frozenset(map(_read, publics)))


def receiver_keys(folder: Path) -> ReceiverKeys:
    """The receiver's part of a folder; raises KeysError for what is absent, damaged or readable by others."""
    secret = _read(folder / "receiver.secret")
    return ReceiverKeys(zmq.curve_public(secret), secret, _read(folder / "server.public"))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(KEY_CHARS + 2).strip()
    except OSError as error:
        raise KeysError(
            f"{path} cannot be read ({error.strerror}): `dflash-scale keys DIR` makes it, and it has to be copied here"
        ) from None
    if path.suffix == ".secret" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeysError(f"{path} has the mode {stat.S_IMODE(mode):04o}, others may use it: chmod 600 {path}")
    try:
        if not _Z85.fullmatch(key):
            raise ValueError
        zmq.curve_public(key)  # not every text of these characters is 32 bytes
    except (ValueError, zmq.ZMQError):
        raise KeysError(
            f"{path} holds no key, wanted {KEY_CHARS} characters of Z85: copy it again, or make new keys"
        ) from None
    return key
