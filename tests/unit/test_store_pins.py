"""Who keeps pages of a dma-buf that nobody has open: asked in turns, nobody waits for others."""

import os
from collections.abc import Callable, Iterator

import pytest

from dmabuf.store import memory, pins
from dmabuf.store.keeper import Keeper
from dmabuf.store.memory import Memory
from dmabuf.store.names import Names, Peer
from dmabuf.store.pins import Pins
from tests import resources
from tests.serving import Loop

MIB = 1 << 20
HOSTILE, OTHER = frozenset({4001}), frozenset({4005})


class Timed(Loop):
    """And the time that it goes by."""

    now = 100.0


@pytest.fixture
def loop(monkeypatch) -> Timed:
    loop = Timed()
    monkeypatch.setattr(pins.time, "monotonic", lambda: loop.now)
    return loop


@pytest.fixture
def asking(loop: Timed) -> Iterator[Pins]:
    asking = Pins(loop.later)
    yield asking
    asking.end()


class Kept:
    """Memory that somebody keeps, or not; how long it takes to be told."""

    def __init__(
        self, users: frozenset[int], asked: list["Kept"], kept: bool, took: Callable[[], None]
    ) -> None:
        self.holders, self.kept, self._asked, self._took = users, kept, asked, took
        self.answers: list[bool] = []

    def unpinned(self) -> bool:
        self._asked.append(self)
        self._took()
        return not self.kept


@pytest.fixture
def kept(loop: Timed, asking: Pins) -> Callable[..., Kept]:
    """Makes one that takes so long, and asks about it."""
    asked: list[Kept] = []

    def make(users: frozenset[int], kept: bool, took: float | None = None) -> Kept:
        seconds = took if took is not None else 0.15 if kept else 0.0001

        def wait() -> None:
            loop.now += seconds

        one = Kept(users, asked, kept, wait)
        asking.ask(one, one.answers.append)
        return one

    make.asked = asked
    return make


def made() -> Memory:
    """As a udmabuf, but that its dma-buf is none and keeps no page."""
    fd, mapping, _ = memory.memfd.make_memory(
        MIB, name=None, huge_pages=False, numa_node=None, open_to_seals=True
    )
    mapping.close()
    return Memory("udmabuf", "", MIB, [os.open(os.devnull, os.O_RDONLY)], memory._own(fd))


def test_pages_that_something_holds() -> None:
    """In a pipe, as an O_PATH descriptor of the dma-buf holds them: which takes /dev/udmabuf."""
    before = resources.held()
    one = made()
    reading, writing = os.pipe()
    assert os.splice(one.memfd, writing, 4096, offset_src=8192) == 4096
    assert [one.unpinned(), one.unpinned(), len(one.slabs)] == [False, False, 0]
    os.read(reading, 4096)
    assert one.unpinned()
    one.close()
    for fd in (reading, writing):
        os.close(fd)
    assert resources.held() == before


def test_memory_that_takes_no_seals_is_whose_who_sealed_it() -> None:
    one = made()
    memory.fcntl.fcntl(one.memfd, memory._uapi.F_ADD_SEALS, memory._uapi.F_SEAL_SEAL)
    assert one.unpinned()
    one.close()


def test_who_keeps_memory_comes_after_others(loop: Timed, asking: Pins, kept) -> None:
    """A hundred that are kept, and one of others: it comes before all but the first."""
    hostile = [kept(HOSTILE, True) for _ in range(100)]
    free = kept(OTHER, False)
    loop.until(lambda: free.answers)
    assert free.answers == [True]
    assert kept.asked.index(free) <= 2
    late = kept(HOSTILE | OTHER, False)
    loop.until(lambda: late.answers)
    assert late.answers == [True], "who shared memory with him is not one of those"
    assert len(kept.asked) < 10
    loop.until(lambda: all(one.answers for one in hostile))
    assert all(one.answers == [False] for one in hostile)
    assert len(kept.asked) < 20, "the rest is told without being asked"


def test_who_is_slow_to_let_go_comes_after_others(loop: Timed, kept) -> None:
    slow = [kept(HOSTILE, False, took=0.1) for _ in range(50)]
    free = kept(OTHER, False)
    loop.until(lambda: free.answers)
    assert kept.asked.index(free) <= 2
    loop.until(lambda: all(one.answers[-1:] == [True] for one in slow))
    assert {len(one.answers) for one in slow} == {1, 2}, "some waited for more than a second"


def test_many_sets_of_users_hold_up_nobody_for_more_than_a_second(loop: Timed, kept) -> None:
    for user in range(1000):
        kept(frozenset({user}), True)
    began = loop.now
    free = kept(OTHER, False)
    loop.until(lambda: free.answers)
    assert free.answers == [False]
    assert loop.now - began < 1.5


def test_all_that_is_free_is_asked_together(loop: Timed, asking: Pins, kept) -> None:
    free = [kept(HOSTILE, False, took=0.0) for _ in range(1000)]
    turns = 0
    while not all(one.answers for one in free):
        loop.next()
        turns += 1
    assert turns < 20
    assert all(one.answers == [True] for one in free)
    assert kept.asked == free, "the oldest first"


def test_kept_memory_is_asked_about_in_turn_and_takes_a_share(
    loop: Timed, asking: Pins, kept
) -> None:
    some = [kept(HOSTILE, True) for _ in range(3)]
    loop.until(lambda: all(one.answers for one in some) and not asking._asking)
    kept.asked.clear()
    began = loop.now
    while len(kept.asked) < 30:
        loop.now += 0.1
        asking.go_on()
        loop.until(lambda: not asking._asking)
    assert [kept.asked.count(one) for one in some] == [10, 10, 10]
    assert loop.now - began > 30 * 1.5
    for one in some:
        one.kept = False
    kept.asked.clear()
    loop.now += 2
    asking.go_on()
    loop.until(lambda: all(one.answers == [False, True] for one in some))
    assert not (asking._kept or asking._untold or asking._asking)


def test_a_mistake_counts_as_kept(loop: Timed, asking: Pins, caplog) -> None:
    one = Kept(HOSTILE, [], True, lambda: 1 // 0)
    asking.ask(one, one.answers.append)
    loop.until(lambda: one.answers)
    assert one.answers == [False]
    assert "ZeroDivisionError" in caplog.text


def test_memory_counts_while_it_is_kept(loop: Timed) -> None:
    """And so do its descriptors. Who waits for memory is not held up by it."""
    names: Names[Memory] = Names(2 * MIB, 10)
    kept = Keeper(names, 5, loop.later)
    kept._room -= 4
    reading, writing = os.pipe()
    waited: list[int] = []
    for name, uid in ("hostile", 4001), ("other", 4005):
        one = made()
        one.holders.add(uid)
        one.had_by_strangers = True
        one._dma_bufs_have_others = lambda: False
        names.finish(names.begin(name, Peer(uid, uid), 0o600, MIB, MIB), one)
        if name == "hostile":
            os.splice(one.memfd, writing, 4096, offset_src=0)
        names.remove(name, Peer(uid, uid))
    kept.settle(lambda: waited.append(names.left))
    loop.until(lambda: waited)
    assert (waited, kept._room) == ([MIB], 3)
    for _ in range(3):
        loop.now += 1
        kept.settle(lambda: waited.append(names.left))
    assert waited[-3:] == [MIB] * 3, "at once: it is known to be kept"
    loop.until(lambda: not kept._pins._asking)
    os.close(reading)
    os.close(writing)
    loop.now += 1
    kept.sweep()
    loop.until(lambda: names.left == 2 * MIB)
    assert (kept._room, kept._jobs) == (5, {})
    kept.end()
    kept.release_all()
