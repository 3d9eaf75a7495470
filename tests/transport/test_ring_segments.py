"""The ring's segments in /dev/shm: what is refused, what a small /dev/shm does, and what is reclaimed."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dflash_scale.transport.ring import Ring, own_ring_name, process_start, reclaim, ring_name

RUN = f"segmenttest{os.getpid()}"


def segments() -> list[str]:
    return [entry.name for entry in Path("/dev/shm").iterdir() if entry.name.startswith(f"dflash-{RUN}")]


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    yield
    assert segments() == []


@pytest.mark.parametrize("name", ["dflash-../etc", "other-name", "dflash-a b", "dflash-" + "x" * 300, ""])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="ring name"):
        Ring.create(name, 4096)


def test_open_refuses_what_is_not_a_ring() -> None:
    path = Path(f"/dev/shm/dflash-{RUN}-odd")
    try:
        with pytest.raises(FileNotFoundError):
            Ring.open(path.name)
        path.write_bytes(b"")
        with pytest.raises(FileNotFoundError, match="being made"):
            Ring.open(path.name)
        path.write_bytes(b"\1" * 12288)
        with pytest.raises(ValueError, match="magic/version"):
            Ring.open(path.name)
    finally:
        path.unlink()


def test_open_refuses_a_truncated_segment() -> None:
    writer = Ring.create(own_ring_name(RUN, 0), 16384)
    os.truncate(f"/dev/shm{writer.name}", 12288)
    with pytest.raises(ValueError, match="capacity 16384"):
        Ring.open(writer.name)
    writer.unlink()


def test_too_little_shared_memory_is_refused_with_numbers() -> None:
    with pytest.raises(OSError, match=r"needs .* MiB of shared memory, /dev/shm has .* free of .* --shm-size"):
        Ring.create(own_ring_name(RUN, 0), 1 << 45)


SMALL_TMPFS = """
import os, sys
from dflash_scale.transport.ring import Ring, own_ring_name
fits = Ring.create(own_ring_name("small", 0), 512 << 10)
try:
    Ring.create(own_ring_name("small", 1), 1 << 20)
except OSError as error:
    print(error)
print(os.listdir("/dev/shm") == [fits.name[1:]])
for lap in range(3):
    for part in range(2):
        slot = fits.reserve((256 << 10) - 64)
        slot[:] = bytes([lap]) * len(slot)
        fits.commit(sample=0, epoch=0, status=0, tokens=0)
    if lap == 0:
        reader = Ring.open(fits.name)
    while reader.read() is not None:
        reader.release()
print("every page was there")
"""


def test_a_small_dev_shm_is_refused_with_its_numbers_and_no_store_fails_later() -> None:
    """On a real tmpfs of 1 MiB, in a mount namespace of its own."""
    private = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*private, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system gives no mount namespace; the refusal itself is tested above")
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$1"'
    command = [*private, "sh", "-c", mount, sys.executable, SMALL_TMPFS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    message, *rest = result.stdout.splitlines()
    assert "needs 1.0 MiB of shared memory, /dev/shm has 0.5 MiB free of 1.0 MiB; lower stream.ring_bytes" in message
    assert rest == ["True", "every page was there"]


def in_a_child(code: str, limit: int, value: int) -> str:
    """What `code` prints in a process with a lower limit."""
    prelude = "from dflash_scale.transport.ring import Ring, own_ring_name, reclaim\nimport resource\n"
    lower = f"resource.setrlimit({limit}, ({value}, resource.getrlimit({limit})[1]))\n"
    command = [sys.executable, "-c", prelude + code.replace("LOWER\n", lower)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_file_that_may_not_be_made_leaves_nothing() -> None:
    code = (
        f"LOWER\ntry:\n    Ring.create(own_ring_name({RUN!r}, 0), 1 << 20)\n"
        "except OSError as error:\n    print(error.errno, error)"
    )
    said = in_a_child(code, resource.RLIMIT_FSIZE, 1 << 16)
    assert "needs a file of 1.0 MiB, this process may make files of 0.1 MiB; raise the limit (ulimit -f)" in said


def test_a_process_that_cannot_look_takes_nobody_for_dead() -> None:
    """Without a free descriptor neither /proc nor /dev/shm can be read."""
    mine = Ring.create(own_ring_name(RUN, 1), 4096)
    code = (
        f"ring = Ring.open({mine.name!r})\n"
        "LOWER\n"
        "try:\n    print(ring.peer_alive())\nexcept OSError as error:\n    print(error)\n"
        f"print(reclaim('dflash-{RUN}-'))"
    )
    try:
        said = in_a_child(code, resource.RLIMIT_NOFILE, 3)
        assert "cannot tell from /proc/" in said and "Too many open files" in said
        assert said.endswith("[]\n")
    finally:
        mine.unlink()


def test_reclaim_takes_the_dead_owners_segments_only() -> None:
    mine = Ring.create(own_ring_name(RUN, 0), 4096)
    code = (
        "import sys; from dflash_scale.transport.ring import Ring, own_ring_name\n"
        "ring = Ring.create(own_ring_name(sys.argv[1], 0), 4096); print(ring.name, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, RUN]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = process.stdout.readline().strip()
    assert theirs == ring_name(RUN, process.pid, 0)
    assert reclaim(f"dflash-{RUN}-") == []
    process.kill()
    process.wait()
    stranger = Path(f"/dev/shm/dflash-{RUN}-not-a-ring")
    stranger.touch()
    reused = Path(f"/dev/shm/dflash-{RUN}-{os.getpid()}-1-0")  # our pid, but of a process that started at boot
    reused.touch()
    assert sorted(reclaim(f"dflash-{RUN}-")) == sorted([theirs, f"/{reused.name}"])
    assert sorted(segments()) == sorted([mine.name[1:], stranger.name])
    stranger.unlink()
    mine.unlink()


def test_reclaim_leaves_what_a_living_process_of_another_pid_namespace_owns() -> None:
    """Containers that share /dev/shm do not see each other's pids: there the owner's name means nothing, or another."""
    ring = Ring.create(f"dflash-{RUN}-{(1 << 22) + 1}-5-0", 4096)
    assert reclaim(f"dflash-{RUN}-") == []
    ring.close()
    assert reclaim(f"dflash-{RUN}-") == [ring.name]  # closed and still named: nobody's


def test_process_start_of_nobody_is_none() -> None:
    assert process_start(os.getpid()) is not None
    assert process_start((1 << 22) + 1) is None
    with pytest.raises(ProcessLookupError):
        ring_name(RUN, (1 << 22) + 1, 0)
