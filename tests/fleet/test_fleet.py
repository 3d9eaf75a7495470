"""The fleet's state machine, without network: bounds, retries, deaths, and exactly one end for every sample."""

import itertools
from dataclasses import replace

import pytest

from dflash_scale.fleet.failures import BUSY_S, FAILURES_IN_A_ROW
from dflash_scale.fleet.fleet import Fleet, NoServerError
from dflash_scale.fleet.state import BACKOFF_MAX_S, Action, Cut, Fault, Key, Limits, Lost, Probe, Quarantined, Send

LIMITS = Limits(
    credit_bytes=1000,
    server_credit_bytes=600,
    requests_per_server=4,
    request_timeout_s=10,
    attempts=3,
    probe_s=5,
    no_server_timeout_s=60,
)


class Bench:
    """A fleet with a clock that only moves when told to."""

    def __init__(self, servers: int, limits: Limits = LIMITS, healthy: bool = True) -> None:
        self.now = 100.0
        self.cuts: list[int] = []
        self.fleet = Fleet(limits, self.now)
        for i in range(servers):
            self.fleet.add_server(f"http://s{i}", self.now)
        if healthy:
            for action in self.poll():
                assert isinstance(action, Probe)
                self.fleet.probe_done(action, None, self.now)

    def poll(self, later: float = 0.0) -> list[Action]:
        """What is due; the connections that are given up are kept aside in `cuts`."""
        self.now += later
        actions = self.fleet.poll(self.now)
        self.cuts += [action.server for action in actions if isinstance(action, Cut)]
        return [action for action in actions if not isinstance(action, Cut)]

    def sends(self, later: float = 0.0) -> list[Send]:
        actions = self.poll(later)
        assert all(isinstance(action, Send) for action in actions), actions
        return [action for action in actions if isinstance(action, Send)]

    def probe(self, later: float = 0.0) -> Probe:
        probes = [action for action in self.poll(later) if isinstance(action, Probe)]
        assert len(probes) == 1
        return probes[0]

    def add(self, *samples: int, nbytes: int = 100) -> None:
        for sample in samples:
            self.fleet.add(Key(0, sample), 10, nbytes)

    def deliver(self, send: Send) -> bool:
        job = self.fleet.claim(send.server, send.key, send.attempt)
        if job is not None:
            self.fleet.delivered(job, send.attempt, job.tokens, self.now)
        return job is not None

    def failures(self, send: Send) -> list[str] | None:
        """What counts against the sample; None if it has ended."""
        job = self.fleet.claim(send.server, send.key, send.attempt)
        return None if job is None else job.failures

    def lose(self, server: int) -> None:
        """The server is gone: its connection breaks, and it does not answer the probe."""
        self.fleet.disconnected(server, self.now)
        self.fleet.probe_done(self.probe(), "gone", self.now)

    def answer(self, send: Send, fault: Fault | None = None, reason: str = "") -> None:
        self.fleet.http_done(send, fault, reason, self.now)

    def reject(self, send: Send, reason: str = "refused", fault: Fault = Fault.SAMPLE) -> None:
        self.answer(send)
        self.fleet.rejected(send.server, send.key, send.attempt, fault, reason, self.now)


def test_nothing_is_sent_before_every_server_was_greeted_or_given_up() -> None:
    bench = Bench(2, healthy=False)
    bench.add(1)
    first, second = bench.poll()
    assert isinstance(first, Probe)
    assert isinstance(second, Probe)
    bench.fleet.probe_done(first, None, bench.now)
    assert bench.poll() == []
    bench.fleet.probe_done(second, "connection refused", bench.now)
    (send,) = bench.sends()
    assert send.server == 0


def test_credit_is_bounded_per_server_and_in_all() -> None:
    bench = Bench(2)
    bench.add(*range(30), nbytes=250)
    sends = bench.sends()
    assert [send.key.sample for send in sends] == [0, 1, 2, 3]
    assert [send.server for send in sends] == [0, 1, 0, 1]
    assert bench.fleet.outstanding_bytes == 1000
    assert bench.fleet.blocked == "credit"
    for send in sends:
        bench.answer(send)
    assert bench.sends() == [], "an HTTP answer frees a slot, not the credit"
    bench.deliver(sends[2])
    (after,) = bench.sends()
    assert (after.server, after.key.sample) == (0, 4)


def test_request_slots_are_bounded() -> None:
    bench = Bench(1, replace(LIMITS, credit_bytes=10**9, server_credit_bytes=10**9))
    bench.add(*range(10))
    sends = bench.sends()
    assert len(sends) == 4
    assert bench.fleet.blocked == "requests"
    bench.deliver(sends[0])
    assert bench.sends() == [], "data frees the credit, not the slot"
    bench.answer(sends[0])
    assert len(bench.sends()) == 1


def test_a_sample_larger_than_the_credit_is_refused_at_once() -> None:
    bench = Bench(1)
    with pytest.raises(ValueError, match=r"sample 3 needs 601 bytes.*server_credit_bytes is 600"):
        bench.add(3, nbytes=601)


def test_a_refused_sample_goes_to_the_other_server() -> None:
    bench = Bench(3)
    bench.add(7)
    tried = []
    for _ in range(2):
        (send,) = bench.sends()
        tried.append(send.server)
        bench.reject(send)
    (last,) = bench.sends()
    assert sorted([*tried, last.server]) == [0, 1, 2]
    assert bench.deliver(last)
    assert len(bench.fleet) == 0
    assert bench.fleet.outstanding_bytes == 0


def test_quarantine_names_every_attempt() -> None:
    bench = Bench(2)
    bench.add(7)
    for reason in ("too long", "checksum", "too long"):
        (send,) = bench.sends()
        bench.reject(send, reason)
    (action,) = bench.poll()
    assert isinstance(action, Quarantined)
    assert action.key == (0, 7)
    assert "attempt 1 at http://s0: too long; attempt 2 at http://s1: checksum; attempt 3" in action.reason
    assert len(bench.fleet) == 0
    assert bench.fleet.outstanding_bytes == 0


def test_one_server_alone_may_quarantine_but_one_of_two_may_not() -> None:
    alone, two = Bench(1), Bench(2)
    two.lose(1)
    assert not two.fleet.servers[1].healthy
    for bench in (alone, two):
        bench.add(7)
        for _ in range(3):
            (send,) = bench.sends()
            bench.reject(send)
    assert isinstance(alone.poll()[0], Quarantined)
    assert two.poll() == [], "it waits for the other server"
    two.add(8)
    (other,) = two.sends()
    assert other.key.sample == 8, "and holds up nobody meanwhile"
    two.deliver(other)
    two.answer(other)
    two.fleet.probe_done(two.probe(later=LIMITS.probe_s), None, two.now)
    (send,) = two.sends()
    assert (send.server, send.key.sample) == (1, 7)
    two.reject(send)
    assert isinstance(two.poll()[0], Quarantined)


def test_a_second_server_that_never_comes_does_not_hold_a_bad_sample_for_ever() -> None:
    bench = Bench(2)
    bench.lose(1)
    bench.add(7)
    for _ in range(3):
        (send,) = bench.sends()
        bench.reject(send)
    actions = bench.poll(later=LIMITS.no_server_timeout_s + 1)
    assert [action.key for action in actions if isinstance(action, Quarantined)] == [(0, 7)]


def test_a_dead_server_costs_no_sample_an_attempt() -> None:
    bench = Bench(2, replace(LIMITS, attempts=1))
    bench.add(*range(4), nbytes=200)
    for death in range(5):
        sends = bench.sends()
        mine = [send for send in sends if send.server == 0]
        assert mine
        bench.answer(mine[0], Fault.SERVER, "connection refused")
        assert not bench.fleet.servers[0].healthy
        for send in mine[1:]:
            bench.answer(send, Fault.SERVER, "connection refused")
        rest = [send for send in sends if send.server == 1]
        while rest:
            for send in rest:
                assert send.server == 1
                assert bench.deliver(send)
                bench.answer(send)
            rest = bench.sends()
        assert len(bench.fleet) == 0
        bench.fleet.probe_done(bench.probe(later=BACKOFF_MAX_S), None, bench.now)
        bench.add(*range(100 * death + 100, 100 * death + 104), nbytes=100)
    assert bench.fleet.servers[0].totals.deaths == 5


def test_late_news_of_an_earlier_life_does_not_end_the_next() -> None:
    bench = Bench(1)
    bench.add(1, 2)
    first, second = bench.sends()
    bench.answer(first, Fault.SERVER, "connection reset")
    bench.fleet.probe_done(bench.probe(later=LIMITS.probe_s), None, bench.now)
    assert bench.fleet.servers[0].healthy
    bench.answer(second, Fault.SERVER, "connection reset")
    assert bench.fleet.servers[0].healthy
    (send,) = bench.sends()
    assert send.key.sample == 1
    assert bench.deliver(send)
    assert [send.key.sample for send in bench.sends()] == [2]


def test_a_timeout_counts_only_if_the_server_answers_and_delivers() -> None:
    for alive, delivers in ((True, True), (True, False), (False, True)):
        bench = Bench(1)
        bench.add(0, 1)
        other, send = bench.sends()
        bench.answer(other)
        bench.answer(send)  # HTTP answered, the data never comes
        if delivers:
            bench.deliver(other)
        assert bench.poll(later=LIMITS.request_timeout_s - 1) == []
        probe = bench.probe(later=1.5)
        bench.add(2)
        assert bench.poll() == [], "a server in doubt gets nothing"
        bench.fleet.probe_done(probe, None if alive else "no answer", bench.now)
        assert bench.fleet.servers[0].healthy == (alive and delivers)
        failures = bench.failures(send)
        assert failures is not None
        assert len(failures) == (alive and delivers)


def test_a_probe_without_an_answer_is_given_up() -> None:
    bench = Bench(1)
    bench.add(1)
    bench.sends()
    bench.fleet.disconnected(0, bench.now)
    probe = bench.probe()
    bench.poll(later=bench.fleet.probe_timeout_s)
    assert not bench.fleet.servers[0].healthy
    bench.fleet.probe_done(probe, None, bench.now)
    assert not bench.fleet.servers[0].healthy, "the answer came too late"


def test_a_probe_that_a_death_overtook_does_not_count() -> None:
    bench = Bench(1)
    bench.add(1)
    (send,) = bench.sends()
    bench.fleet.disconnected(0, bench.now)
    probe = bench.probe()
    bench.answer(send, Fault.SERVER, "connection reset")
    bench.fleet.probe_done(probe, None, bench.now)
    assert not bench.fleet.servers[0].healthy, "it was asked on a connection that is given up"


def test_a_restart_between_two_probes_is_seen_by_the_server_id() -> None:
    bench = Bench(1, replace(LIMITS, attempts=1))
    bench.add(1)
    (send,) = bench.sends()
    bench.answer(send)
    bench.fleet.disconnected(0, bench.now)
    bench.fleet.probe_done(bench.probe(), None, bench.now, Lost.RESTARTED)
    (again,) = bench.sends()
    assert (again.key, again.attempt) == (send.key, 1)
    assert bench.fleet.servers[0].totals.errors == 0


def break_connection(bench: Bench) -> None:
    bench.fleet.disconnected(0, bench.now)
    bench.fleet.probe_done(bench.probe(later=LIMITS.probe_s), None, bench.now, Lost.CONNECTION)


def test_a_broken_connection_costs_no_attempt_but_not_for_ever() -> None:
    bench = Bench(1)
    bench.add(0, 1)
    first, second = bench.sends()
    bench.answer(first)
    bench.answer(second)
    assert bench.deliver(first)
    for _ in range(LIMITS.attempts - 1):
        break_connection(bench)
        (send,) = bench.sends()
        bench.answer(send)
    assert bench.fleet.servers[0].totals.errors == 0
    bench.add(2)
    for send in bench.sends():
        bench.answer(send)
    break_connection(bench)
    for count in range(LIMITS.attempts):
        assert bench.fleet.servers[0].totals.errors == count
        (send,) = [send for send in bench.sends() if send.key.sample == 1]
        assert bench.fleet.servers[0].load.solo == send.key
        bench.answer(send)
        break_connection(bench)
    quarantined, after = bench.poll()
    assert isinstance(quarantined, Quarantined)
    assert isinstance(after, Send)
    assert after.key.sample == 2


def test_a_server_that_never_delivers_uses_up_no_attempts() -> None:
    """It answers every probe and accepts every request; the other server works."""
    bench = Bench(2, replace(LIMITS, attempts=2, credit_bytes=10_000))
    wanted, mute_had, put_aside = 0, 0, []
    for _ in range(400):
        while len(bench.fleet) < 8:
            wanted += 1
            bench.add(wanted)
        for action in bench.poll(later=1):
            assert not isinstance(action, Quarantined)
            if isinstance(action, Probe):
                bench.fleet.probe_done(action, None, bench.now)
                continue
            assert isinstance(action, Send)
            bench.answer(action)
            if action.server == 1:
                assert bench.failures(action) == []
                bench.deliver(action)
                continue
            mute_had += 1
            put_aside.append(bench.now)
    assert bench.fleet.servers[1].totals.samples > 300
    pauses = [later - earlier for earlier, later in itertools.pairwise(sorted(set(put_aside)))]
    assert mute_had <= LIMITS.requests_per_server + len(pauses), "one request at a time once it was put aside"
    assert pauses == sorted(pauses), "and later every time"
    assert pauses[0] < 20 < 60 < pauses[-1] < 80


def test_failures_of_a_server_that_fell_silent_are_taken_back() -> None:
    bench = Bench(2, replace(LIMITS, attempts=1, requests_per_server=99, credit_bytes=10**6, server_credit_bytes=10**6))
    bench.add(0)
    (first,) = bench.sends()
    bench.deliver(first)
    quiet = first.server
    bench.fleet.disconnected(1 - quiet, bench.now)
    bench.probe()  # in doubt until it is answered, so that all of it goes to the one
    bench.add(*range(1, FAILURES_IN_A_ROW + 1))
    sends = bench.sends()
    for send in sends[:-1]:
        bench.fleet.rejected(quiet, send.key, send.attempt, Fault.DOUBT, "checksum", bench.now)
    assert all(len(bench.failures(send) or []) == 1 for send in sends[:-1])
    last = sends[-1]
    bench.fleet.rejected(quiet, last.key, last.attempt, Fault.DOUBT, "checksum", bench.now)
    assert not bench.fleet.servers[quiet].healthy
    assert all(bench.failures(send) == [] for send in sends)
    assert bench.cuts == []
    bench.poll()
    assert bench.cuts == [quiet]


def test_a_sample_that_kills_servers_is_tried_alone_and_quarantined() -> None:
    bench = Bench(2)
    bench.add(*range(4))
    ended: list[Quarantined] = []
    deaths = 0
    for _ in range(200):
        for action in bench.poll(later=0.5):
            if isinstance(action, Probe):
                bench.fleet.probe_done(action, None, bench.now)
            elif isinstance(action, Quarantined):
                ended.append(action)
            elif action.key.sample == 2:
                deaths += 1
                bench.answer(action, Fault.SERVER, "connection reset")
            else:
                bench.answer(action)
                bench.deliver(action)
    assert [action.key.sample for action in ended] == [2]
    assert deaths == LIMITS.attempts + 2
    for server, losses in zip(bench.fleet.servers, (4, 5), strict=True):
        assert f"{server.address} died while it had the sample: connection reset (" in ended[0].reason
        assert f"({losses} times, now with nothing else in flight)" in ended[0].reason
    assert len(bench.fleet) == 0


def test_a_busy_server_rests_and_the_sample_does_not_pay() -> None:
    bench = Bench(1, replace(LIMITS, attempts=1))
    bench.add(1, 2)
    first, second = bench.sends()
    for _ in range(5):
        bench.reject(first, "full", Fault.BUSY)
        assert bench.sends() == []
        assert bench.fleet.blocked == "busy"
        (first,) = bench.sends(later=BUSY_S)
        assert first.key.sample == 1
    bench.reject(first, "full", Fault.BUSY)
    assert bench.deliver(second), "it has room again"
    (last,) = bench.sends()
    assert bench.deliver(last)
    assert (bench.fleet.servers[0].totals.busy, bench.fleet.servers[0].totals.errors) == (6, 0)


def test_data_that_is_late_holds_its_credit_until_it_comes_or_cannot_come() -> None:
    bench = Bench(1, replace(LIMITS, request_timeout_s=5))
    bench.add(*range(6), nbytes=100)
    sends = bench.sends()
    assert len(sends) == LIMITS.requests_per_server
    for send in sends:
        bench.answer(send)
    for send in sends[1:3]:
        bench.deliver(send)
    bench.fleet.probe_done(bench.probe(later=5.1), None, bench.now)  # two are late, and the server works
    load = bench.fleet.servers[0].load
    again = bench.sends()
    assert load.late_bytes == 200
    assert load.outstanding_bytes == 200 + 100 * len(again)
    for send in again:
        bench.answer(send)
        bench.deliver(send)
    assert not bench.deliver(sends[0])
    assert load.late_bytes == 100, "what came at last gives its credit back"
    bench.add(99, nbytes=600)
    assert bench.poll() == []
    assert bench.cuts == [0], "no room, and nothing that is waited for: the debt is given up with its connection"
    assert load.outstanding_bytes == 0
    bench.fleet.probe_done(bench.probe(), None, bench.now)
    (big,) = bench.sends()
    assert bench.deliver(big)
    assert bench.fleet.servers[0].strikes == 0


def test_the_status_tells_late_data_from_data_that_is_awaited() -> None:
    bench = Bench(1, replace(LIMITS, request_timeout_s=5))
    first = bench.fleet.servers[0].snapshot(bench.now)
    assert (first.http, first.healthy, first.reason) == ("http://s0", True, "")
    bench.add(1, 2, 3)
    good, late, refused = bench.sends()
    for send in (good, late):
        bench.answer(send)
    bench.now += 2
    bench.deliver(good)
    bench.reject(refused, "too long")
    bench.fleet.probe_done(bench.probe(later=5), None, bench.now)
    again = bench.sends()
    status = bench.fleet.servers[0].snapshot(bench.now)
    assert (status.outstanding_bytes, status.owed_bytes, status.open_requests) == (300, 100, len(again))
    assert (status.samples, status.tokens, status.bytes, status.errors, status.deaths) == (1, 10, 100, 2, 0)
    assert (status.tokens_per_s, status.http_p50_s, status.data_p99_s) == (2.0, 0.0, 2.0)
    bench.fleet.retire(0, bench.now)
    retired = bench.fleet.servers[0].snapshot(bench.now)
    assert (retired.retired, retired.reason) == (True, "removed from the fleet")


def test_servers_join_and_leave() -> None:
    bench = Bench(1)
    bench.add(1, 2)
    first, second = bench.sends()
    bench.answer(first)
    added = bench.fleet.add_server("http://s1", bench.now)
    bench.add(3)
    probe, third = bench.poll()
    assert isinstance(probe, Probe)
    assert isinstance(third, Send), "nobody waits for a server that joins"
    bench.deliver(third)
    bench.fleet.probe_done(probe, None, bench.now)
    bench.fleet.retire(0, bench.now)
    bench.add(4)
    (fourth,) = bench.sends()
    assert fourth.server == added
    bench.deliver(fourth)
    assert bench.deliver(first), "what it owes may still come"
    assert bench.cuts == []
    bench.answer(second)
    (again,) = bench.sends(later=LIMITS.request_timeout_s + 1)
    assert (again.key, again.server) == (second.key, added)
    bench.poll()
    assert bench.cuts == [0]
    assert bench.fleet.servers[0].closed
    assert bench.fleet.outstanding_bytes == bench.fleet.servers[added].load.outstanding_bytes
    assert bench.fleet.add_server("http://s0", bench.now) == 2, "it may come back, as another"


def test_a_fleet_that_answers_and_never_delivers_ends_the_run() -> None:
    bench = Bench(1)
    bench.add(1)

    def run() -> None:
        for _ in range(300):
            for action in bench.poll(later=0.5):
                if isinstance(action, Probe):
                    bench.fleet.probe_done(action, None, bench.now)
                elif isinstance(action, Send):
                    bench.answer(action)

    with pytest.raises(NoServerError, match=r"for 60 s \(http://s0: no data within 10 s, and it has delivered nothing"):
        run()


def test_different_failures_in_a_row_take_the_server_out() -> None:
    bench = Bench(2)
    for sample in range(FAILURES_IN_A_ROW):
        bench.add(sample)
        (send,) = bench.sends()
        while send.server != 0:
            bench.reject(send)
            (send,) = bench.sends()
        bench.reject(send)
        for other in bench.sends():
            bench.deliver(other)
            bench.answer(other)
    assert not bench.fleet.servers[0].healthy
    assert "in a row" in bench.fleet.servers[0].reason
    assert bench.fleet.servers[1].healthy


def test_old_and_double_data_is_taken_once() -> None:
    bench = Bench(2)
    bench.add(1)
    (first,) = bench.sends()
    bench.fleet.rejected(first.server, first.key, first.attempt, Fault.DOUBT, "checksum", bench.now)
    (second,) = bench.sends()
    assert bench.fleet.claim(1 - first.server, first.key, first.attempt) is None, "another server's attempt"
    assert bench.fleet.claim(first.server, first.key, 5) is None, "an attempt that nobody made"
    assert bench.deliver(first), "an older attempt is as good"
    assert not bench.deliver(first)
    assert bench.fleet.outstanding_bytes == 100, "the second attempt is still on its way"
    assert not bench.deliver(second)
    assert bench.fleet.outstanding_bytes == 0


def test_no_server_for_too_long_ends_the_run_with_every_reason() -> None:
    bench = Bench(2, healthy=False)
    bench.add(1)
    for action in bench.poll():
        assert isinstance(action, Probe)
        bench.fleet.probe_done(action, "connection refused", bench.now)
    with pytest.raises(NoServerError, match=r"for 60 s \(http://s0: connection refused; http://s1"):
        bench.poll(later=LIMITS.no_server_timeout_s + 1)


def test_a_sample_with_losses_does_not_keep_a_new_one_from_a_server_on_probation() -> None:
    bench = Bench(1)
    bench.add(1)
    (first,) = bench.sends()
    bench.answer(first, Fault.SERVER, "connection reset")
    bench.add(2)
    bench.fleet.probe_done(bench.probe(later=LIMITS.probe_s), None, bench.now)
    (new,) = bench.sends()
    assert new.key.sample == 2, "the server is not judged by what may have killed it"
    bench.deliver(new)
    assert [send.key.sample for send in bench.sends()] == [1]


def test_a_poison_sample_that_no_server_on_probation_takes_does_not_keep_the_others_from_it() -> None:
    """Two samples kill both servers, and nothing else is wanted: each is tried alone at both, and quarantined."""
    bench = Bench(2, replace(LIMITS, no_server_timeout_s=1000))
    bench.add(1, 2)
    ended: list[Quarantined] = []
    for _ in range(100):
        for action in bench.poll(10):
            match action:
                case Probe():
                    bench.fleet.probe_done(action, None, bench.now)
                case Send():
                    bench.answer(action, Fault.SERVER, "connection reset")
                case Quarantined():
                    ended.append(action)
    assert sorted(action.key.sample for action in ended) == [1, 2]


def test_a_server_that_a_poison_sample_cuts_off_before_it_has_delivered_is_asked_only_over_a_new_connection() -> None:
    bench = Bench(1)
    bench.add(1)
    for _ in range(LIMITS.attempts + 1):
        (send,) = bench.sends()
        bench.answer(send)
        bench.fleet.disconnected(0, bench.now)
        assert bench.cuts == []
        bench.fleet.probe_done(bench.probe(), None, bench.now, Lost.CONNECTION)
    assert bench.poll() == []
    assert bench.cuts == [0], "it failed alone: the server is put aside, with the connection of the probe"
    bench.fleet.probe_done(bench.probe(LIMITS.probe_s), None, bench.now)
    assert len(bench.sends()) == 1


def test_a_connection_that_breaks_while_a_server_is_removed_and_probed_loses_no_time() -> None:
    bench = Bench(2)
    bench.add(1)
    (send,) = bench.sends()
    bench.fleet.disconnected(send.server, bench.now)
    assert bench.probe().server == send.server
    bench.fleet.retire(send.server, bench.now)
    bench.fleet.disconnected(send.server, bench.now)
    (again,) = bench.sends()
    assert (again.key, again.server) == (send.key, 1 - send.server)


def test_a_removed_server_comes_back_as_a_new_one_at_its_old_index() -> None:
    bench = Bench(1)
    bench.add(1)
    (send,) = bench.sends()
    bench.fleet.disconnected(0, bench.now)
    old = bench.probe()
    bench.fleet.retire(0, bench.now)
    bench.deliver(send)
    bench.poll()
    assert not bench.fleet.servers[0].gone, "its HTTP answer is awaited"
    bench.answer(send)
    assert bench.fleet.servers[0].gone
    bench.fleet.rejoin(0, bench.now)
    bench.add(2)
    new = bench.probe()
    bench.fleet.probe_done(old, None, bench.now)
    assert bench.poll() == [], "what it answered before it left says nothing of now"
    bench.fleet.probe_done(new, None, bench.now)
    assert [(send.key.sample, send.server) for send in bench.sends()] == [(2, 0)]
