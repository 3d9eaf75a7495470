"""The fleet's state machine, without network: bounds, retries, deaths, and exactly one end for every sample."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_scale.stream.calls import fault_of, judge
from dflash_scale.stream.fleet import FAILURES_IN_A_ROW, Fleet, NoServerError
from dflash_scale.stream.jobs import Action, Fault, Key, Limits, Lost, Probe, Quarantined, Send

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
        self.fleet = Fleet([f"http://s{i}" for i in range(servers)], limits, self.now)
        if healthy:
            for action in self.poll():
                assert isinstance(action, Probe)
                self.fleet.probe_done(action, "", self.now)

    def poll(self, later: float = 0.0) -> list[Action]:
        self.now += later
        return self.fleet.poll(self.now)

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
            self.fleet.add((0, sample), 10, nbytes)

    def deliver(self, send: Send) -> bool:
        job = self.fleet.claim(send.server, send.key, send.attempt)
        if job is not None:
            self.fleet.delivered(job, send.attempt)
        return job is not None

    def answer(self, send: Send, fault: Fault | None = None, reason: str = "") -> None:
        self.fleet.http_done(send, fault, reason, self.now)

    def reject(self, send: Send, reason: str = "refused") -> None:
        self.answer(send)
        self.fleet.rejected(send.server, send.key, send.attempt, reason, self.now)


def test_nothing_is_sent_before_every_server_was_greeted_or_given_up() -> None:
    bench = Bench(2, healthy=False)
    bench.add(1)
    first, second = bench.poll()
    assert isinstance(first, Probe)
    assert isinstance(second, Probe)
    bench.fleet.probe_done(first, "", bench.now)
    assert bench.poll() == []
    bench.fleet.probe_done(second, "connection refused", bench.now)
    (send,) = bench.sends()
    assert send.server == 0


def test_credit_is_bounded_per_server_and_in_all() -> None:
    bench = Bench(2)
    bench.add(*range(30), nbytes=250)
    sends = bench.sends()
    assert [send.key[1] for send in sends] == [0, 1, 2, 3]
    assert [send.server for send in sends] == [0, 1, 0, 1]
    assert bench.fleet.outstanding_bytes == 1000
    assert bench.fleet.blocked == "credit"
    for send in sends:
        bench.answer(send)
    assert bench.sends() == [], "an HTTP answer frees a slot, not the credit"
    bench.deliver(sends[2])
    (after,) = bench.sends()
    assert (after.server, after.key[1]) == (0, 4)


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
    (probe,) = [two.fleet.servers[1]]
    two.fleet._down(1, "gone", two.now)
    assert not probe.healthy
    for bench in (alone, two):
        bench.add(7)
        for _ in range(3):
            (send,) = bench.sends()
            bench.reject(send)
    assert isinstance(alone.poll()[0], Quarantined)
    assert two.poll() == [], "it waits for the other server"
    two.add(8)
    (other,) = two.sends()
    assert other.key[1] == 8, "and holds up nobody meanwhile"
    two.deliver(other)
    two.answer(other)
    two.fleet.probe_done(two.probe(later=LIMITS.probe_s), "", two.now)
    (send,) = two.sends()
    assert (send.server, send.key[1]) == (1, 7)
    two.reject(send)
    assert isinstance(two.poll()[0], Quarantined)


def test_a_second_server_that_never_comes_does_not_hold_a_bad_sample_for_ever() -> None:
    bench = Bench(2)
    bench.fleet._down(1, "gone", bench.now)
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
        bench.fleet.probe_done(bench.probe(later=LIMITS.probe_s), "", bench.now)
        bench.add(*range(100 * death + 100, 100 * death + 104), nbytes=100)
    assert bench.fleet.servers[0].deaths == 5


def test_late_news_of_an_earlier_life_does_not_end_the_next() -> None:
    bench = Bench(1)
    bench.add(1, 2)
    first, second = bench.sends()
    bench.answer(first, Fault.SERVER, "connection reset")
    bench.fleet.probe_done(bench.probe(later=LIMITS.probe_s), "", bench.now)
    assert bench.fleet.servers[0].healthy
    bench.answer(second, Fault.SERVER, "connection reset")
    assert bench.fleet.servers[0].healthy
    assert {send.key[1] for send in bench.sends()} == {1, 2}


def test_a_timeout_counts_only_if_the_server_answers_a_probe() -> None:
    for alive in (True, False):
        bench = Bench(1)
        bench.add(1)
        (send,) = bench.sends()
        bench.answer(send)  # HTTP answered, the data never comes
        assert bench.poll(later=LIMITS.request_timeout_s - 1) == []
        probe = bench.probe(later=1.5)
        bench.add(2)
        assert bench.poll() == [], "a server in doubt gets nothing"
        bench.fleet.probe_done(probe, "" if alive else "no answer", bench.now)
        assert bench.fleet.servers[0].errors == alive
        if not alive:
            assert bench.poll() == []
            bench.fleet.probe_done(bench.probe(later=LIMITS.probe_s), "", bench.now)
        assert [send.key[1] for send in bench.sends()] == [1, 2]


def test_a_probe_without_an_answer_is_given_up() -> None:
    bench = Bench(1)
    bench.add(1)
    bench.sends()
    bench.fleet.disconnected(0, bench.now)
    probe = bench.probe()
    bench.poll(later=bench.fleet.probe_timeout_s)
    assert not bench.fleet.servers[0].healthy
    bench.fleet.probe_done(probe, "", bench.now)
    assert not bench.fleet.servers[0].healthy, "the answer came too late"


def test_a_restart_between_two_probes_is_seen_by_the_server_id() -> None:
    bench = Bench(1, replace(LIMITS, attempts=1))
    bench.add(1)
    (send,) = bench.sends()
    bench.answer(send)
    bench.fleet.disconnected(0, bench.now)
    bench.fleet.probe_done(bench.probe(), "", bench.now, Lost.RESTARTED)
    (again,) = bench.sends()
    assert (again.key, again.attempt) == (send.key, 1)
    assert bench.fleet.servers[0].errors == 0


def test_a_broken_connection_costs_no_attempt_but_not_for_ever() -> None:
    bench = Bench(1)
    bench.add(1)
    for _ in range(LIMITS.attempts):
        (send,) = bench.sends()
        bench.answer(send)
        bench.fleet.disconnected(0, bench.now)
        bench.fleet.probe_done(bench.probe(later=LIMITS.probe_s), "", bench.now, Lost.CONNECTION)
        assert bench.fleet.servers[0].errors == 0
    ended = []
    for _ in range(LIMITS.attempts):
        (send,) = bench.sends()
        bench.answer(send)
        bench.fleet.disconnected(0, bench.now)
        bench.fleet.probe_done(bench.probe(later=LIMITS.probe_s), "", bench.now, Lost.CONNECTION)
        ended = bench.poll() if bench.fleet.servers[0].errors == LIMITS.attempts else []
    assert [type(action) for action in ended] == [Quarantined]


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
    bench.fleet.rejected(first.server, first.key, first.attempt, "checksum", bench.now)
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


def test_whose_fault_an_answer_is() -> None:
    assert judge(200, b"{}") == (None, "")
    assert judge(400, b'{"error": "too long"}') == (Fault.SAMPLE, 'HTTP 400: {"error": "too long"}')
    assert judge(500, b"")[0] is judge(429, b"")[0] is Fault.DOUBT
    assert fault_of(ConnectionRefusedError()) is fault_of(ConnectionResetError()) is Fault.SERVER
    assert fault_of(TimeoutError()) is Fault.DOUBT


def random_event(bench: Bench, draw: random.Random, open_sends: list[Send], sent: list[Send]) -> None:
    """One of the things that a network does to a fleet."""
    what = draw.random()
    if open_sends and what < 0.35:
        send = open_sends.pop(draw.randrange(len(open_sends)))
        faults = [None] * 6 + [Fault.SAMPLE, Fault.DOUBT, Fault.SERVER]
        bench.answer(send, draw.choice(faults), "scripted")
    elif sent and what < 0.65:
        bench.deliver(draw.choice(sent))  # late, double and in any order
    elif sent and what < 0.75:
        send = draw.choice(sent)
        bench.fleet.rejected(send.server, send.key, send.attempt, "checksum", bench.now)
    elif what < 0.8:
        bench.fleet.disconnected(draw.randrange(len(bench.fleet.servers)), bench.now)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), servers=st.integers(1, 4), samples=st.integers(1, 40))
def test_every_sample_ends_exactly_once_whatever_happens(seed: int, servers: int, samples: int) -> None:
    draw = random.Random(seed)
    bench = Bench(servers, replace(LIMITS, no_server_timeout_s=1e9))
    delivered: list[Key] = []
    finished, original = [], bench.fleet._finish
    bench.fleet._finish = lambda job: (finished.append(job.key), original(job))  # type: ignore[method-assign,func-returns-value,assignment]
    for sample in range(samples):
        bench.add(sample, nbytes=draw.randint(1, 600))
    sent: list[Send] = []
    open_sends: list[Send] = []
    probes: list[Probe] = []
    for turn in range(4000):
        calm = turn > 1500  # from here on the network behaves, and everything has to end
        for action in bench.poll(later=draw.random() * 3):
            if isinstance(action, Send):
                sent.append(action)
                open_sends.append(action)
            elif isinstance(action, Probe):
                probes.append(action)
            else:
                delivered.append(action.key)
        if probes and draw.random() < 0.7:
            lost = Lost.NOTHING if calm else draw.choice([Lost.NOTHING, Lost.NOTHING, Lost.CONNECTION, Lost.RESTARTED])
            problem = "" if calm or draw.random() < 0.6 else "scripted"
            bench.fleet.probe_done(probes.pop(), problem, bench.now, lost)
        if calm and open_sends:
            send = open_sends.pop(0)
            bench.answer(send)
            bench.deliver(send)
        elif not calm:
            random_event(bench, draw, open_sends, sent)
        for server in bench.fleet.servers:
            assert 0 <= server.outstanding <= LIMITS.server_credit_bytes
            assert 0 <= server.open_requests <= LIMITS.requests_per_server
        assert bench.fleet.outstanding_bytes <= LIMITS.credit_bytes
        if calm and not len(bench.fleet) and not open_sends:
            break
    assert sorted(finished) == [(0, sample) for sample in range(samples)]
    assert set(delivered) <= set(finished)
    for _ in range(50):  # what still holds credit runs out
        for action in bench.poll(later=LIMITS.request_timeout_s):
            if isinstance(action, Probe):
                bench.fleet.probe_done(action, "", bench.now)
    assert bench.fleet.outstanding_bytes == 0
