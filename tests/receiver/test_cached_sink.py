"""The receiver as a real process with a cache: offline without a server, hybrid between a cache and fake servers."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dflash_scale.cache.folder import Cache, open_cache
from dflash_scale.receiver.cached_sink import FAILURES_IN_A_ROW, make_sink
from dflash_scale.receiver.prefetch import Prefetch
from dflash_scale.transport.layout import Layout
from dflash_scale.transport.ring import COMMITTED, QUARANTINED, PeerDied, Ring, own_ring_name
from tests.support.fake_verifier import LAYOUT, states
from tests.support.receiver_run import LAYOUTS, RUN, SAMPLES, FakeServer, Run, drain, expected, read_all

pytest_plugins = ("tests.support.receiver_run",)

DONE = 60  # seconds for a process to end


def fill(run: Run, folder: Path, keep: Callable[[int], bool] = lambda sample: True) -> Cache:
    """What an earlier run would have left: of every sample that `keep` says, the layers that its rows want."""
    folder.mkdir(exist_ok=True)
    cache = open_cache(folder, LAYOUT)
    for sample in filter(keep, range(len(run.samples.lengths))):
        layout = LAYOUTS.train if sample < run.samples.train_count else LAYOUTS.validation
        token_ids = run.samples.tokens(sample).astype("<i4").tobytes()
        cache.write(sample, token_ids, layout, states(token_ids, layout))
    return cache


def damage(cache: Cache, sample: int) -> None:
    raw = bytearray(cache.path(sample).read_bytes())
    raw[-1] ^= 1
    cache.path(sample).write_bytes(raw)


def uses(run: Run, samples: set[int]) -> int:
    """How often the run's schedule delivers these samples."""
    return sum(sample in samples for _, sample in expected(run.rows(1, 0)))


def test_offline_takes_everything_from_the_cache(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run([FakeServer()], mode="offline", cache=str(tmp_path / "cache"), no_server_timeout_s=0.1)
    fill(run, tmp_path / "cache")
    totals = drain(run, run.spawn())
    assert totals == {COMMITTED: len(expected(run.rows(1, 0)))}
    assert run.receiver is not None and run.receiver.process.wait(DONE) == 0
    status = run.status()
    assert status["state"] == "complete" and status["servers"] == [] and status["issued"] == 0
    assert status["cache"] == {"hits": totals[COMMITTED], "misses": 0, "corrupt": 0}
    assert status["committed"] == totals[COMMITTED]


def test_offline_quarantines_what_is_damaged_or_missing(
    make_run: Callable[..., Run],
    tmp_path: Path,
) -> None:
    run = make_run([], mode="offline", cache=str(tmp_path / "cache"))
    cache = fill(run, tmp_path / "cache", lambda sample: sample != 5)
    damage(cache, 3)
    totals = drain(run, run.spawn())
    assert totals[QUARANTINED] == 4 and totals[COMMITTED] == len(expected(run.rows(1, 0))) - 4
    assert run.receiver is not None and run.receiver.process.wait(DONE) == 0
    status = run.status()
    assert status["cache"] == {"hits": totals[COMMITTED], "misses": 2, "corrupt": 2}
    reasons = {entry["sample"]: entry["reason"] for entry in status["quarantined_samples"]}
    assert reasons == {
        3: f"{cache.path(3)}: its checksum is another",
        5: f"{cache.path(5)}: it cannot be opened: No such file or directory",
    }


def test_an_offline_run_goes_on_where_many_are_missing_but_not_in_a_row(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """However many are looked up at once: the whole schedule fits the look-ahead and the ring."""
    run = make_run([], mode="offline", cache=str(tmp_path / "cache"), lookahead_rows=200, ring_bytes=1 << 20)
    fill(run, tmp_path / "cache", lambda sample: sample % 2 == 0)
    totals = drain(run, run.spawn())
    missing = uses(run, set(range(1, len(run.samples.lengths), 2)))
    assert missing > FAILURES_IN_A_ROW
    assert totals == {QUARANTINED: missing, COMMITTED: len(expected(run.rows(1, 0))) - missing}


def test_an_empty_cache_ends_an_offline_run(
    make_run: Callable[..., Run],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = make_run([], mode="offline", cache=str(tmp_path), lookahead_rows=60, ring_bytes=1 << 20)
    receiver = run.spawn()
    with Ring.open(receiver.ring_names[0], timeout=60) as ring, pytest.raises(PeerDied):
        read_all(ring)
    assert receiver.process.wait(DONE) == 1
    assert "64 samples in a row are missing or damaged, the last" in capfd.readouterr().err


def test_hybrid_makes_what_is_damaged_or_missing_and_keeps_it(
    make_run: Callable[..., Run],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = make_run([FakeServer().start()], mode="hybrid", cache=str(tmp_path / "cache"))
    cache = fill(run, tmp_path / "cache", lambda sample: sample % 2 == 0)
    damage(cache, 4)
    (tmp_path / "cache" / "hs_6.safetensors").write_bytes(b"")
    every = range(len(run.samples.lengths))
    totals = drain(run, run.spawn())
    assert totals == {COMMITTED: len(expected(run.rows(1, 0)))}
    assert run.receiver is not None and run.receiver.process.wait(DONE) == 0
    status = run.status()
    counts = status["cache"]
    lacked = {sample for sample in every if sample % 2} | {4, 6}
    # The second epoch may ask for a sample before the first one's is written.
    assert counts["hits"] + counts["misses"] + counts["corrupt"] == totals[COMMITTED]
    assert 2 <= counts["corrupt"] <= 4 and counts["misses"] >= len(lacked) - 2
    assert status["issued"] == counts["misses"] + counts["corrupt"] == counts["written"]
    assert counts["not_kept"] == 0 and counts["stopped"] == ""
    assert f"cache: {cache.path(4)} is not used: its checksum is another" in capfd.readouterr().err
    second = make_run([], mode="offline", cache=str(tmp_path / "cache"))
    assert drain(second, second.spawn()) == totals, "the cache is whole now"


def test_hybrid_keeps_nothing_where_it_may_not(make_run: Callable[..., Run], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    run = make_run([FakeServer().start()], mode="hybrid", cache=str(folder), keep=False)
    cache = fill(run, folder, lambda sample: sample < 30)
    before = cache.size()
    totals = drain(run, run.spawn())
    assert run.receiver is not None and run.receiver.process.wait(DONE) == 0
    assert cache.size() == before
    status = run.status()
    assert status["cache"] == {
        "hits": uses(run, set(range(30))),
        "misses": totals[COMMITTED] - uses(run, set(range(30))),
        "corrupt": 0,
    }
    bounded = make_run([FakeServer().start()], mode="hybrid", cache=str(folder), cache_bytes=before[1] + 20_000)
    assert drain(bounded, bounded.spawn()) == totals
    assert bounded.receiver is not None and bounded.receiver.process.wait(DONE) == 0
    counts = bounded.status()["cache"]
    assert counts["written"] and counts["not_kept"]
    assert cache.size()[1] - before[1] == counts["written_bytes"]
    assert counts["written_bytes"] <= 20_000 + 16 * 1024, "a header beside the states of what was let through"


def test_hybrid_with_a_whole_cache_waits_for_no_server(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run([FakeServer()], mode="hybrid", cache=str(tmp_path / "cache"), no_server_timeout_s=0.2)
    fill(run, tmp_path / "cache")
    assert drain(run, run.spawn()) == {COMMITTED: len(expected(run.rows(1, 0)))}
    assert run.receiver is not None and run.receiver.process.wait(DONE) == 0
    assert run.status()["issued"] == 0


def test_layers_are_picked_from_whole_files(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """As `generate` writes them; a training row wants only its aux layers."""
    run = make_run([], mode="offline", cache=str(tmp_path / "cache"))
    folder = tmp_path / "cache"
    folder.mkdir()
    cache = open_cache(folder, LAYOUT)
    wide = Layout((1, 2, 4), LAYOUT.hidden_size, LAYOUT.dtype)
    for sample in range(len(run.samples.lengths)):
        token_ids = run.samples.tokens(sample).astype("<i4").tobytes()
        cache.write(sample, token_ids, wide, states(token_ids, wide))
    receiver = run.spawn()
    checked: Counter[str] = Counter()
    with Ring.open(receiver.ring_names[0], timeout=60) as ring:
        for record in iter(lambda: ring.next_record(timeout=DONE), None):
            token_ids = run.samples.tokens(record.sample).astype("<i4").tobytes()
            token = wide.hidden_size * 2  # bytes of one layer
            whole = states(token_ids, wide)
            kind = "train" if record.sample < run.samples.train_count else "validation"
            places = (0, 2) if kind == "train" else (0, 1, 2)
            picked = b"".join(
                whole[(3 * at + place) * token : (3 * at + place + 1) * token]
                for at in range(record.tokens)
                for place in places
            )
            assert bytes(record.payload) == picked
            checked[kind] += 1
            ring.release()
            ring.reader_mark = 1000
            if sum(checked.values()) == len(expected(run.rows(1, 0))):
                break
    assert checked["train"] and checked["validation"]


def test_what_is_kept_is_not_what_the_ring_holds_later(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slower than the ring: samples are written after their slots hold others."""
    run = make_run([FakeServer()], mode="hybrid", cache=str(tmp_path))
    turned = threading.Event()
    write = Cache.write
    monkeypatch.setattr(Cache, "write", lambda *given: write(*given) if turned.wait(DONE) else 0)
    rows = run.rows(1, 0)
    with Ring.create(own_ring_name(RUN, 7), run.config.stream.ring_bytes) as ring, Ring.open(ring.name) as reader:
        prefetch = Prefetch(ring, iter(rows), run.samples.lengths, LAYOUTS, len(rows))
        sink = make_sink(run.config.stream, [prefetch], run.samples, LAYOUT)
        sent: dict[int, tuple[Layout, bytes]] = {}
        while len(sent) < SAMPLES:
            for want in sink.take():
                token_ids = run.samples.tokens(want.key[1]).astype("<i4").tobytes()
                slot = sink.reserve(want.key)
                assert slot is not None
                slot[:] = states(token_ids, want.layout)
                sent[want.key[1]] = want.layout, bytes(slot)
                sink.commit(want.key, token_ids, slot)
                assert reader.read() is not None
                reader.release()
        turned.set()
        sink.close()
        ring.unlink()
    cache = open_cache(tmp_path, LAYOUT)
    for sample, (layout, wanted) in sent.items():
        token_ids = run.samples.tokens(sample).astype("<i4").tobytes()
        got = memoryview(bytearray(len(wanted)))
        cache.read(sample, token_ids, layout, got)
        assert got == wanted
