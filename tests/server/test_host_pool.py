"""The pool of host memory: pieces never overlap, what comes back is joined, and the pool never grows."""

import random
import threading

import pytest

from dflash_scale.server.host_pool import ALIGNMENT, HostPool, Piece

UNIT = ALIGNMENT


def test_pieces_are_the_borrowers_alone_and_come_back_whole() -> None:
    """Random loans of random lengths, each filled with its own number for as long as it is lent."""
    pool = HostPool(40 * UNIT + 7, pinned=False)
    rng = random.Random(0)
    lent: list[tuple[int, Piece]] = []
    refused = 0
    for number in range(3000):
        if lent and rng.random() < 0.5:
            fill, piece = lent.pop(rng.randrange(len(lent)))
            assert bool((piece.memory == fill).all()), "somebody else wrote into a piece that was lent"
            pool.give_back(piece)
        else:
            nbytes = rng.randrange(1, 12 * UNIT)
            taken = pool.take(nbytes)
            if taken is None:
                refused += 1
                continue
            assert taken.memory.shape == (nbytes,)
            assert taken.start % ALIGNMENT == 0
            taken.memory.fill_(number % 251)
            lent.append((number % 251, taken))
        assert sum(piece.memory.numel() for _, piece in lent) <= pool.nbytes
    assert refused > 100, "the pool was never full: this test shows little"
    for _, piece in lent:
        pool.give_back(piece)
    assert pool.take(pool.nbytes) is not None, "free memory was not joined"


def test_a_full_pool_lends_again_what_came_back() -> None:
    pool = HostPool(3 * UNIT, pinned=False)
    first, second, third = pool.take(UNIT), pool.take(UNIT - 1), pool.take(1)
    assert first is not None
    assert second is not None
    assert third is not None
    assert pool.take(1) is None
    pool.give_back(second)
    assert pool.take(UNIT + 1) is None, "one free unit cannot hold more"
    pool.give_back(first)
    both = pool.take(2 * UNIT)
    assert both is not None
    assert both.start == 0


@pytest.mark.parametrize("nbytes", [0, -1, 3 * UNIT + 1])
def test_what_can_never_be_lent(nbytes: int) -> None:
    with pytest.raises(ValueError, match="the pool has 768 bytes"):
        HostPool(3 * UNIT, pinned=False).take(nbytes)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        HostPool(0, pinned=False)


def test_a_piece_comes_back_once() -> None:
    pool = HostPool(4 * UNIT, pinned=False)
    piece = pool.take(UNIT)
    assert piece is not None
    rest = pool.take(2 * UNIT)
    pool.give_back(piece)
    for again in (piece, rest):
        assert again is not None
        if again is rest:
            pool.give_back(again)
        with pytest.raises(ValueError, match="given back already"):
            pool.give_back(again)


def test_threads_take_and_give_back() -> None:
    """As in a server: one thread takes, another gives back."""
    pool = HostPool(8 * UNIT, pinned=False)
    handed: list[Piece] = []
    wrong: list[int] = []
    room, ready = threading.Semaphore(0), threading.Semaphore(0)

    def give_back() -> None:
        for number in range(2000):
            ready.acquire()
            piece = handed.pop(0)
            if not bool((piece.memory == number % 251).all()):
                wrong.append(number)
            pool.give_back(piece)
            room.release()

    thread = threading.Thread(target=give_back)
    thread.start()
    for number in range(2000):
        while (piece := pool.take(1 + number % (4 * UNIT))) is None:
            room.acquire()
        piece.memory.fill_(number % 251)
        handed.append(piece)
        ready.release()
    thread.join()
    assert wrong == []
    assert pool.take(pool.nbytes) is not None, "something is still lent"
