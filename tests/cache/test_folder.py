"""The cache: files are whole or refused, safetensors reads ours and we its; full disks, killed writers."""

import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dflash_scale.cache import folder as cache_module
from dflash_scale.cache.file import MAX_HEADER_BYTES, BadFile
from dflash_scale.cache.folder import ASIDE, Cache, CacheOrigin, claim_folder, open_cache, read_manifest
from dflash_scale.cache.writer import CacheWriter, Sample
from dflash_scale.transport.layout import Layout

WHOLE = Layout((1, 2, 4), 8, "bfloat16")
AUX_LAYERS = Layout((1, 2), 8, "bfloat16")
ORIGIN = CacheOrigin(WHOLE, "fake", "00aa", "11bb")
TOKENS = 7


def ids_of(tokens: int = TOKENS) -> bytes:
    return np.arange(5, 5 + tokens, dtype="<i4").tobytes()


def states_of(layout: Layout, tokens: int = TOKENS, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(tokens * layout.bytes_per_token)


def read(cache: Cache, sample: int, token_ids: bytes, layout: Layout) -> bytes:
    slot = bytearray(len(token_ids) // 4 * layout.bytes_per_token)
    cache.read(sample, token_ids, layout, memoryview(slot))
    return bytes(slot)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return open_cache(tmp_path, WHOLE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_read(cache: Cache, dtype: str) -> None:
    layout = Layout((1, 2, 4), 8, dtype)
    states = states_of(layout)
    size = cache.write(3, ids_of(), layout, states)
    assert cache.has(3) and not cache.has(4)
    assert read(cache, 3, ids_of(), layout) == states
    assert cache.size() == (1, size) == (1, cache.path(3).stat().st_size)
    assert [path.name for path in cache.folder.iterdir()] == ["hs_3.safetensors"]


def test_some_of_the_stored_layers_are_selected(cache: Cache) -> None:
    states = np.frombuffer(states_of(WHOLE), np.uint16).reshape(TOKENS, 3, 8)
    cache.write(0, ids_of(), WHOLE, states.tobytes())
    assert read(cache, 0, ids_of(), AUX_LAYERS) == states[:, :2].tobytes()
    assert read(cache, 0, ids_of(), Layout((2, 4), 8, "bfloat16")) == states[:, 1:].tobytes()


def test_safetensors_reads_our_files(cache: Cache) -> None:
    states = states_of(WHOLE)
    cache.write(0, ids_of(), WHOLE, states)
    tensors = load_file(cache.path(0))
    assert set(tensors) == {"hidden_states", "token_ids"}
    assert tensors["token_ids"].dtype == torch.int64 and tensors["token_ids"].tolist() == list(range(5, 5 + TOKENS))
    assert tensors["hidden_states"].dtype == torch.bfloat16 and tensors["hidden_states"].shape == (TOKENS, 3, 8)
    assert tensors["hidden_states"].view(torch.uint8).numpy().tobytes() == states


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "note": "from elsewhere"}])
def test_files_of_other_programs_are_read(cache: Cache, metadata: dict[str, str] | None) -> None:
    states = torch.randn(TOKENS, 3, 8).to(torch.bfloat16)
    ids = torch.arange(5, 5 + TOKENS)
    save_file({"hidden_states": states, "token_ids": ids}, cache.path(0), metadata=metadata)
    assert read(cache, 0, ids_of(), WHOLE) == states.view(torch.uint8).numpy().tobytes()
    assert read(cache, 0, ids_of(), AUX_LAYERS) == states[:, :2].contiguous().view(torch.uint8).numpy().tobytes()


def foreign(states: torch.Tensor, ids: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"hidden_states": states, "token_ids": ids, **more}


GOOD_STATES, GOOD_IDS = torch.zeros(TOKENS, 3, 8, dtype=torch.bfloat16), torch.arange(5, 5 + TOKENS)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (foreign(GOOD_STATES, GOOD_IDS + 1), "token ids are not those of the sample"),
        (foreign(GOOD_STATES, GOOD_IDS | 1 << 40), "token ids are not those of the sample"),
        (foreign(GOOD_STATES, GOOD_IDS.int()), "token_ids are 'I32'"),
        (foreign(GOOD_STATES[:-1], GOOD_IDS), "7 and 6 tokens"),
        (foreign(GOOD_STATES[:-1], GOOD_IDS[:-1]), "it has 6 tokens, the sample 7"),
        (foreign(GOOD_STATES[:, :2], GOOD_IDS), r"it has 2 layers, wanted 3: \[1, 2, 4\]"),
        (foreign(GOOD_STATES[:, :, :4], GOOD_IDS), "4 wide and BF16, wanted 8 and BF16"),
        (foreign(GOOD_STATES.half(), GOOD_IDS), "8 wide and F16, wanted 8 and BF16"),
        (foreign(GOOD_STATES.to(torch.float8_e4m3fn), GOOD_IDS, hidden_states_scales=torch.ones(1)), "_scales"),
        ({"hidden_states": GOOD_STATES}, r"got \['hidden_states'\]"),
        (foreign(GOOD_STATES.flatten(1), GOOD_IDS), "a tensor of 3 dimensions"),
    ],
)
def test_files_of_something_else_are_refused(cache: Cache, tensors: dict[str, torch.Tensor], text: str) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, cache.path(0))
    with pytest.raises(BadFile, match=text):
        read(cache, 0, ids_of(), WHOLE)


def test_token_ids_are_read_alone(cache: Cache) -> None:
    cache.write(0, ids_of(), WHOLE, states_of(WHOLE))
    assert cache.token_ids(0, 7) == ids_of()
    with pytest.raises(BadFile, match="it has 7 tokens, wanted at most 6"):
        cache.token_ids(0, 6)
    with pytest.raises(BadFile, match="cannot be opened: No such file"):
        cache.token_ids(1, 7)
    cache.path(2).write_bytes(b"")
    with pytest.raises(BadFile, match="would take 0 bytes"):
        cache.token_ids(2, 7)


def test_missing_layers_and_missing_files_are_named(cache: Cache) -> None:
    cache.write(0, ids_of(), AUX_LAYERS, states_of(AUX_LAYERS))
    with pytest.raises(BadFile, match=r"it has layers \[1, 2\] and lacks \[4\]"):
        read(cache, 0, ids_of(), WHOLE)
    with pytest.raises(BadFile, match="cannot be opened: No such file"):
        read(cache, 1, ids_of(), WHOLE)
    cache.path(2).mkdir()
    with pytest.raises(BadFile, match="cannot be read: Is a directory"):
        read(cache, 2, ids_of(), WHOLE)


def header(content: object) -> bytes:
    text = json.dumps(content).encode() if not isinstance(content, bytes) else content
    return len(text).to_bytes(8, "little") + text


ENTRY = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
NARROW = {"dtype": "BF16", "shape": [1, 3, 8], "data_offsets": [8, 56]}
HUGE = {"dtype": "BF16", "shape": [1, 1 << 40, 1 << 40], "data_offsets": [8, 8 + (1 << 81)]}


def described(states: object, tokens: object = ENTRY, **more: object) -> bytes:
    """A file of 8 + 48 bytes of data, whatever its header says."""
    return header({"hidden_states": states, "token_ids": tokens, **more}) + ids_of(1) + b"\0" * 4 + b"\0" * 48


def test_a_described_file_is_good_as_such(cache: Cache) -> None:
    cache.path(0).write_bytes(described(NARROW))
    assert read(cache, 0, ids_of(1), WHOLE) == b"\0" * 48


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "would take 0 bytes"),
        (b"\x00" * 8, "would take 0 bytes"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 100), "at most 1048576 are read"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "would take 9223372036854775808 bytes of 10"),
        (header(b"[" * 100_000), "not JSON"),
        (header(b'{"a": ' + b"9" * 9000 + b"}"), "not JSON"),
        (header(b"\xff\xfe{}"), "not JSON"),
        (header([]), "wanted the tensors"),
        (described(1), "describes a tensor as 1"),
        (described({**NARROW, "shape": [True, 3, 8]}), "a tensor of 3 dimensions"),
        (described({**NARROW, "shape": [1, 3, -8]}), "a tensor of 3 dimensions"),
        (described({**NARROW, "data_offsets": [8]}), "a tensor of 3 dimensions"),
        (described({**NARROW, "dtype": ["BF16"]}), "wanted I64"),
        (described(HUGE), "do not fill its 56 bytes"),
        (described({**NARROW, "shape": [1, 2, 8]}), "do not fill its 56 bytes"),
        (described({**NARROW, "data_offsets": [0, 48]}), "do not fill its 56 bytes"),
        (described(NARROW) + b"more", "do not fill its 60 bytes"),
        (described(NARROW)[:-1], "do not fill its 55 bytes"),
        (described({"dtype": "BF16", "shape": [1, 0, 8], "data_offsets": [8, 8]})[:-48], r"the shape \[1, 0, 8\]"),
        (described({"dtype": "BF16", "shape": [0, 3, 8], "data_offsets": [0, 0]}), r"the shape \[0, 3, 8\]"),
        (described(NARROW, __metadata__={"layer_ids": "[2, 1, 4]"}), r"layer ids: got \[2, 1, 4\]"),
        (described(NARROW, __metadata__={"layer_ids": "["}), "metadata cannot be read"),
        (described(NARROW, __metadata__={"xxh3": 7}), "metadata cannot be read"),
        (described(NARROW, __metadata__={"xxh3": "0"}), "its checksum is another"),
    ],
)
def test_hostile_headers_are_refused_within_bounds(cache: Cache, raw: bytes, text: str) -> None:
    cache.path(0).write_bytes(raw)
    with pytest.raises(BadFile, match=text):
        read(cache, 0, ids_of(1), WHOLE)


@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), kind=st.sampled_from(["flip", "cut", "grow"]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_found(cache: Cache, at: float, flip: int, kind: str) -> None:
    states = states_of(WHOLE)
    cache.write(0, ids_of(), WHOLE, states)
    raw = bytearray(cache.path(0).read_bytes())
    place = int(at * len(raw))
    if kind == "flip":
        raw[place] ^= flip
    elif kind == "cut":
        del raw[place:]
    else:
        raw[place:place] = bytes([flip]) * flip
    cache.path(0).write_bytes(raw)
    try:
        got = read(cache, 0, ids_of(), WHOLE)
    except BadFile:
        return
    assert got == states, "only what the reader does not use may be other, such as a name in the metadata"


def test_a_file_that_shrinks_while_it_is_read_is_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    size = cache.write(0, ids_of(), WHOLE, states_of(WHOLE))
    whole_preadv = os.preadv

    def shrinking(file: int, buffers: list[memoryview], at: int) -> int:
        os.truncate(cache.path(0), size - 3)
        return whole_preadv(file, buffers, at)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(BadFile, match="it ends early"):
        read(cache, 0, ids_of(), WHOLE)


# The folder.


def test_a_new_folder_gets_a_manifest_and_is_known_again(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    claim_folder(folder, ORIGIN, writable=True)
    assert read_manifest(folder) == ORIGIN
    claim_folder(folder, ORIGIN, writable=False)
    claim_folder(folder, CacheOrigin(WHOLE, "not at hand", "", "11bb"), writable=False)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (CacheOrigin(WHOLE, "big", "00ab", "11bb"), "made with the verifier fake, verifier.model is big"),
        (CacheOrigin(WHOLE, "fake", "00aa", "11bc"), "another data set"),
        (
            CacheOrigin(Layout((1, 3, 4), 8, "bfloat16"), "fake", "00aa", "11bb"),
            r"layers \[1, 2, 4\], this run wants \[1, 3",
        ),
        (
            CacheOrigin(Layout((1, 2, 4), 16, "bfloat16"), "fake", "00aa", "11bb"),
            "8 wide in bfloat16, wanted 16 in bfloat16",
        ),
        (CacheOrigin(Layout((1, 2, 4), 8, "float16"), "fake", "00aa", "11bb"), "wanted 8 in float16"),
    ],
)
def test_the_cache_of_another_run_is_refused(tmp_path: Path, other: CacheOrigin, text: str) -> None:
    claim_folder(tmp_path, ORIGIN, writable=True)
    with pytest.raises(ValueError, match=text):
        claim_folder(tmp_path, other, writable=True)


def test_a_run_that_wants_fewer_layers_may_use_it(tmp_path: Path) -> None:
    claim_folder(tmp_path, ORIGIN, writable=True)
    claim_folder(tmp_path, CacheOrigin(AUX_LAYERS, "fake", "00aa", "11bb"), writable=False)
    states = torch.randn(TOKENS, 3, 8).to(torch.bfloat16)
    path = open_cache(tmp_path, AUX_LAYERS).path(0)
    save_file({"hidden_states": states, "token_ids": GOOD_IDS}, path)  # it names no layers: the manifest does
    assert len(read(open_cache(tmp_path, AUX_LAYERS), 0, ids_of(), AUX_LAYERS)) == TOKENS * AUX_LAYERS.bytes_per_token


def test_a_folder_of_another_program_is_taken_as_it_is(tmp_path: Path) -> None:
    save_file({"hidden_states": GOOD_STATES, "token_ids": GOOD_IDS}, tmp_path / "hs_0.safetensors")
    claim_folder(tmp_path, ORIGIN, writable=True)
    assert not (tmp_path / "manifest.json").exists()
    assert open_cache(tmp_path, WHOLE).has(0)


def test_a_missing_folder_and_a_strange_manifest_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write one with `dflash-scale generate`"):
        claim_folder(tmp_path / "nowhere", ORIGIN, writable=False)
    for text in ("no json", "[]", "{}", '{"format": 2}', '{"format": 1, "layout": {}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="is not a manifest of format 1"):
            claim_folder(tmp_path, ORIGIN, writable=True)


def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/cache cannot be used: Not a directory .*name a folder"):
        claim_folder(tmp_path / "file" / "cache", ORIGIN, writable=True)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ValueError, match=r"cannot be used: Is a directory .*manifest\.json"):
        claim_folder(tmp_path, ORIGIN, writable=False)


KILLED = """
import os, sys, time
from pathlib import Path
from dflash_scale.cache import folder
from dflash_scale.cache.folder import Cache
from dflash_scale.transport.messages import Layout

def stuck(file, parts):
    os.write(file, b"half")
    print("writing", flush=True)
    time.sleep(60)

folder.write_all = stuck
Cache(Path(sys.argv[1]), (1,)).write(5, b"\\0" * 4, Layout((1,), 1, "float32"), b"\\0" * 4)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_start(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(ASIDE)
    open_cache(tmp_path, WHOLE)
    assert left.exists(), "its writer lives"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    elsewhere = tmp_path / f"{ASIDE}{socket.gethostname()}-2,1,1,hs_5.safetensors"  # a machine of a longer name
    elsewhere.touch()
    open_cache(tmp_path, WHOLE)
    assert list(tmp_path.iterdir()) == [elsewhere]


# The writing thread.


def sample(number: int, tokens: int = TOKENS) -> Sample:
    return Sample(number, ids_of(tokens), WHOLE, states_of(WHOLE, tokens, number))


def test_kept_samples_are_written_and_counted(cache: Cache) -> None:
    reports: list[tuple[int, str]] = []
    writer = CacheWriter(cache, 1 << 20, report=lambda *report: reports.append(report))
    for number in range(20):
        assert writer.fits(len(sample(number).states))
        writer.put(sample(number))
    writer.close()
    assert reports == [(number, "") for number in range(20)]
    assert writer.status() == {"written": 20, "written_bytes": cache.size()[1], "not_kept": 0, "stopped": ""}
    assert writer.fits(1 << 20), "something still waits"
    for number in range(20):
        assert read(cache, number, ids_of(), WHOLE) == sample(number).states


def test_an_error_that_is_not_the_disks_ends_the_writing_and_is_reported_too(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*given: object) -> int:
        raise MemoryError("no room for the header")

    monkeypatch.setattr(cache, "write", no_memory)
    reports: list[tuple[int, str]] = []
    writer = CacheWriter(cache, 1 << 20, report=lambda *report: reports.append(report))
    for number in range(2):
        writer.put(sample(number))
    writer.close()
    assert [(number, problem.partition(" (")[0]) for number, problem in reports] == [
        (number, "MemoryError: no room for the header") for number in range(2)
    ]
    assert writer.status()["not_kept"] == 2


def test_a_full_queue_and_a_full_folder_say_no(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(sample(0).states)
    slow = CacheWriter(cache, 2 * size)
    monkeypatch.setattr(cache_module, "write_all", lambda file, parts: slow_gate.read(1))
    reading, writing = os.pipe()
    slow_gate = os.fdopen(reading, "rb", buffering=0)
    assert slow.fits(5 * size), "one sample may always wait"
    slow.put(sample(1))
    slow.put(sample(2))
    assert not slow.fits(size)
    os.close(writing)
    slow.close()
    slow_gate.close()
    assert slow.fits(size)
    assert slow.status()["not_kept"] == 1
    monkeypatch.undo()
    bounded = CacheWriter(cache, 1 << 20, most_bytes=cache.size()[1] + size + size // 2)
    assert bounded.fits(size)
    bounded.put(sample(3))
    assert not bounded.fits(size)
    bounded.close()
    assert not bounded.fits(size)
    assert bounded.status()["not_kept"] == 2


def full_disk(cache: Cache, caplog: pytest.LogCaptureFixture) -> CacheWriter:
    """Writes until the file system says no; what came before is whole, nothing is left of the rest."""
    reports: dict[int, str] = {}
    writer = CacheWriter(cache, 1 << 30, report=reports.__setitem__)
    with caplog.at_level(logging.WARNING):
        for number in range(30):
            writer.put(sample(number, 1000 if number > 3 else 10))
        writer.close()
    written = sorted(number for number, problem in reports.items() if not problem)
    assert written and written == list(range(len(written))) and len(reports) == 30
    assert sorted(path.name for path in cache.folder.iterdir()) == sorted(f"hs_{n}.safetensors" for n in written)
    for number in written:
        assert (
            read(cache, number, ids_of(1000 if number > 3 else 10), WHOLE)
            == sample(number, 1000 if number > 3 else 10).states
        )
    assert not writer.fits(1)
    assert writer.status()["written"] == len(written) and writer.status()["not_kept"] == 30 - len(written) + 1
    (line,) = caplog.messages
    assert f"{len(written)} samples of {writer.status()['written_bytes']} bytes were written" in line
    return writer


def test_a_folder_that_vanishes_ends_the_writing_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").mkdir()
    reports: dict[int, str] = {}
    writer = CacheWriter(open_cache(tmp_path / "cache", WHOLE), 1 << 20, report=reports.__setitem__)
    shutil.rmtree(tmp_path / "cache")
    writer.put(sample(0))
    writer.put(sample(1))
    writer.close()
    assert list(reports) == [0, 1] and reports[0] == reports[1]
    assert "No such file or directory" in reports[0] and "which is gone" in reports[0]
    assert len(caplog.messages) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_writing_once(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = full_disk(open_cache(small_disk, WHOLE), caplog)
    assert writer.stopped.startswith("No space left on device") and "bytes free" in writer.stopped


def test_a_file_that_may_not_grow_ends_the_writing_once(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """The same without a mount: the fifth sample exceeds the process's limit of a file's size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        writer = full_disk(cache, caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert writer.stopped.startswith("File too large") and writer.status()["written"] == 4
