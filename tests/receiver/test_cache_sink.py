"""Filling a cache through the receiver's loop, in the test's process, from fake servers that misbehave."""

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dflash_scale.cache.folder import open_cache
from dflash_scale.receiver.cache_sink import CacheSink, CacheUnwritable
from dflash_scale.receiver.connections import Identity
from dflash_scale.receiver.endpoints import Endpoints
from dflash_scale.receiver.loop import ReceiverLoop
from dflash_scale.receiver.process import limits_of
from dflash_scale.receiver.requests import PromptRequests, SampleRequests, Sampling
from dflash_scale.receiver.status import Status
from dflash_scale.transport.messages import Origin
from tests.support.fake_verifier import LAYOUT, answer_to, states
from tests.support.receiver_run import BAD, FakeServer, Run

pytest_plugins = ("tests.support.receiver_run",)


class Filling:
    """One start of `generate`, or of `answer`, without its command."""

    def __init__(
        self, run: Run, folder: Path, most_bytes: int = 1 << 20, prompts: PromptRequests | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.run, self.cache = run, open_cache(folder, LAYOUT)
        requests = prompts or SampleRequests(run.samples)
        self.fill = CacheSink(requests, self.cache, LAYOUT, most_bytes)
        identity = Identity("fill", f"fill:{id(self)}", LAYOUT, Origin(), None)
        stream = run.config.stream
        self.loop = ReceiverLoop(Endpoints(stream), limits_of(stream), identity, self.fill, requests, None)

    def work(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        try:
            while not self.fill.complete and not until():
                self.loop.step()
                assert time.monotonic() < deadline, self.status()
        finally:
            self.loop.close()
            self.fill.close()

    def status(self) -> Status:
        status = Status("running", os.getpid(), [])
        self.loop.report(status)
        return status

    def to_the_end(self) -> dict[str, int]:
        self.work(lambda: False)
        return self.fill.status()

    def check_files(self, without: frozenset[int] = frozenset()) -> None:
        """Every file is there and holds what the fake makes of its tokens."""
        for sample in range(len(self.run.samples.lengths)):
            assert self.cache.has(sample) == (sample not in without)
            if sample not in without:
                token_ids = self.run.samples.tokens(sample).astype("<i4").tobytes()
                slot = memoryview(bytearray(len(token_ids) // 4 * LAYOUT.bytes_per_token))
                self.cache.read(sample, token_ids, LAYOUT, slot)
                assert slot == states(token_ids, LAYOUT)
        names = {path.name for path in self.cache.folder.iterdir()}
        assert not [name for name in names if not name.startswith(("hs_", "quarantined"))], names


def test_a_hostile_wire_leaves_a_whole_cache(make_run: Callable[..., Run], tmp_path: Path) -> None:
    script = {sample: [word] for sample, word in enumerate((*BAD, "http400", "http500"))}
    run = make_run([FakeServer(script).start() for _ in range(2)])
    filling = Filling(run, tmp_path / "cache")
    totals = filling.to_the_end()
    samples = len(run.samples.lengths)
    assert totals == {
        "samples": samples,
        "present": 0,
        "written": samples,
        "written_bytes": int(run.samples.lengths.sum()) * LAYOUT.bytes_per_token,
        "quarantined": 0,
    }
    filling.check_files()
    again = Filling(run, tmp_path / "cache")
    assert again.to_the_end() == {**totals, "present": samples, "written": 0, "written_bytes": 0}
    assert again.loop.fleet.issued == 0, "what is there is not asked for"


def test_what_fails_everywhere_is_named_and_asked_for_again(make_run: Callable[..., Run], tmp_path: Path) -> None:
    script = {3: ["http400", "corrupt", "refuse"] * 4}
    run = make_run([FakeServer(script).start(), FakeServer(script).start()])
    filling = Filling(run, tmp_path / "cache")
    totals = filling.to_the_end()
    samples = len(run.samples.lengths)
    assert (totals["written"], totals["quarantined"], totals["present"]) == (samples - 1, 1, 0)
    filling.check_files(without=frozenset({3}))
    (line,) = (tmp_path / "cache" / "quarantined.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == 3 and "HTTP 400" in json.loads(line)["reason"]
    for server in run.servers:
        server.kill()
        server.script = {}
        server.start()
    totals = Filling(run, tmp_path / "cache").to_the_end()
    assert (totals["written"], totals["quarantined"], totals["present"]) == (1, 0, samples - 1)
    assert (tmp_path / "cache" / "quarantined.jsonl").read_text() == ""
    filling.check_files()


def test_files_are_looked_at_one_a_turn_and_the_last_one_written_is_booked(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run([FakeServer()])
    first = Filling(run, tmp_path / "cache")
    wants = first.fill.take()
    assert len(wants) == len(run.samples.lengths) and not first.fill.backlog
    for want in wants[:3]:
        token_ids = run.samples.tokens(want.key[1]).astype("<i4").tobytes()
        place = first.fill.reserve(want.key)
        place[:] = states(token_ids, LAYOUT)
        first.fill.commit(want.key, token_ids, place)
    first.loop.close()
    first.fill.close()
    assert first.fill.counts["written"] == 3 and not first.fill.complete
    second = Filling(run, tmp_path / "cache")
    for turn in (1, 2):
        assert second.fill.take() == []
        assert second.fill.counts["present"] == turn and second.fill.backlog
    assert second.fill.take() == wants[3:] and second.fill.counts["present"] == 3
    assert second.fill.take() == [] and not second.fill.backlog
    second.loop.close()
    second.fill.close()


def test_a_stop_in_the_middle_and_damage_cost_only_what_they_hit(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run([FakeServer().start()], credit_bytes=1 << 14, server_credit_bytes=1 << 13)
    first = Filling(run, tmp_path / "cache", most_bytes=1 << 14)
    first.work(lambda: first.fill.counts["written"] >= 20)
    written, samples = first.fill.counts["written"], len(run.samples.lengths)
    assert 20 <= written < samples
    os.truncate(first.cache.path(7), 100)
    second = Filling(run, tmp_path / "cache", most_bytes=1 << 14)
    totals = second.to_the_end()
    assert totals["present"] == written - 1 and totals["present"] + totals["written"] == samples
    second.check_files()


def test_what_is_asked_for_is_bounded(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """Servers that are away: nothing comes, so nothing more may be taken in hand."""
    run = make_run([FakeServer()])
    largest = int(run.samples.lengths.max()) * LAYOUT.bytes_per_token
    filling = Filling(run, tmp_path / "cache", most_bytes=2 * largest)
    for _ in range(20):
        filling.loop.step()
    held = filling.fill._bytes_in_hand
    assert largest < held <= 2 * largest
    assert len(filling.loop.fleet) == len(filling.fill._in_hand) >= 2
    filling.loop.close()
    filling.fill.close()


def test_a_disk_that_takes_no_more_ends_it_with_what_is_whole(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """Files of the longer samples exceed the process's limit."""
    run = make_run([FakeServer().start()])
    filling = Filling(run, tmp_path / "cache")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30 * LAYOUT.bytes_per_token, before[1]))
    try:
        with pytest.raises(CacheUnwritable, match=r"hs_\d+.safetensors could not be written: File too large"):
            filling.to_the_end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not filling.fill.complete
    files = [path.name for path in (tmp_path / "cache").iterdir() if path.name != "quarantined.jsonl"]
    assert len(files) == filling.fill.counts["written"] == filling.cache.size()[0]


def test_answers_come_through_a_hostile_wire_with_the_states_of_all_their_tokens(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """Of unknown lengths, from prompts whose samples may differ in their room for an answer."""
    # Some words twice: what a server had under way when it was suspended is lost, a bad answer too.
    words = (*BAD, "endless", "mute", "http400", "http500", "tokens", "endless", "mute")
    run = make_run([FakeServer({n: [word] for n, word in enumerate(words)}).start() for _ in range(2)])
    draw = np.random.default_rng(1)
    prompts = [draw.integers(0, 1000, draw.integers(1, 25)).astype(np.int32) for _ in range(60)]
    requests = PromptRequests(prompts, Sampling(answer_tokens=12, max_tokens=30, temperature=0.5))
    folder = tmp_path / "cache"
    filling = Filling(run, folder, prompts=requests)
    totals = filling.to_the_end()
    wanted = [[*p.tolist(), *answer_to(p.tolist(), min(12, 30 - len(p)))] for p in prompts]
    assert {len(tokens) - len(p) for tokens, p in zip(wanted, prompts, strict=True)} >= {1, 5, 12}
    nbytes = sum(map(len, wanted)) * LAYOUT.bytes_per_token
    assert (totals["written"], totals["written_bytes"], totals["quarantined"]) == (60, nbytes, 0)
    status = filling.status()
    assert sum(server.tokens for server in status.servers) == sum(map(len, wanted))
    assert sum(server.bytes for server in status.servers) == nbytes
    assert status.dropped["wrong tokens"] >= 3, "tokens, endless, mute"
    for number, tokens in enumerate(wanted):
        token_ids = np.asarray(tokens, "<i4").tobytes()
        assert filling.cache.token_ids(number, 30) == token_ids
        slot = memoryview(bytearray(len(tokens) * LAYOUT.bytes_per_token))
        filling.cache.read(number, token_ids, LAYOUT, slot)
        assert slot == states(token_ids, LAYOUT)
    os.truncate(filling.cache.path(3), 400)
    filling.cache.path(5).write_bytes(filling.cache.path(6).read_bytes())  # another prompt's answer
    again = Filling(run, folder, prompts=requests)
    totals = again.to_the_end()
    assert (totals["present"], totals["written"]) == (58, 2)
    assert again.cache.token_ids(5, 30) == np.asarray(wanted[5], "<i4").tobytes()


def test_what_may_be_an_answer() -> None:
    prompt = np.array([5, 6, 7], np.int32)
    requests = PromptRequests([prompt], Sampling(answer_tokens=4, max_tokens=6, temperature=0.0))
    assert requests.lengths.tolist() == [6]
    assert requests.body(0) == {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0.0}
    for answer, problem in (
        ([1], None),
        ([1, 2, 3], None),
        ([], "the token ids are not the prompt's and an answer's"),
        ([1, 2, 3, 4], "7 tokens came, at most 6 were asked for"),
    ):
        assert requests.problem(0, np.asarray([5, 6, 7, *answer], "<i4").tobytes()) == problem
    assert (
        requests.problem(0, np.asarray([5, 6, 8, 1], "<i4").tobytes())
        == "the token ids are not the prompt's and an answer's"
    )
