"""Who keeps pages of a dma-buf that nobody has open: asked in turns, nobody waits for others."""

import os
import queue
from collections.abc import Callable, Iterator

import pytest

from dmabuf.store import memory, pins
from dmabuf.store.keeper import Keeper
from dmabuf.store.memory import Memory
from dmabuf.store.names import Names, Peer
from dmabuf.store.pins import Pins
from tests import resources

MIB = 1 << 20
HOSTILE, OTHER = frozenset({4001}), frozenset({4005})


class Loop:
    """The server's, one call at a time, and the time that it goes by."""

    def __init__(self) -> None:
        self.now = 100.0
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue()

    def later(self, what: Callable[..., None], *arguments: object) -> None:
        self._calls.put(lambda: what(*arguments))

    def until(self, done: Callable[[], object]) -> None:
        while not done():
            self._calls.get(timeout=30)()


@pytest.fixture
def loop(monkeypatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(pins.time, "monotonic", lambda: loop.now)
    return loop


@pytest.fixture
def asking(loop: Loop) -> Iterator[Pins]:
    asking = Pins(loop.later)
    yield asking
    asking.end()


class Kept:
    """Memory that somebody keeps, or not."""

    def __init__(self, strangers: frozenset[int], asked: list["Kept"], kept: bool) -> None:
        self.strangers, self.kept, self.asked = strangers, kept, asked
        self.answers: list[bool] = []

    def unpinned(self) -> bool:
        self.asked.append(self)
        return not self.kept


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


def test_memory_that_takes_no_seals_is_never_known_to_be_free() -> None:
    one = made()
    memory.fcntl.fcntl(one.memfd, memory._uapi.F_ADD_SEALS, memory._uapi.F_SEAL_SEAL)
    assert not one.unpinned()
    one.close()


def test_who_keeps_memory_waits_for_it_himself(loop: Loop, asking: Pins) -> None:
    """A hundred that are kept, and after them one of others: that is the second to be asked."""
    asked: list[Kept] = []
    hostile = [Kept(HOSTILE, asked, True) for _ in range(100)]
    for one in hostile:
        asking.ask(one, one.answers.append)
    free = Kept(OTHER, asked, False)
    asking.ask(free, free.answers.append)
    loop.until(lambda: free.answers)
    assert (free.answers, asked.index(free)) == ([True], 1)
    loop.until(lambda: not asking._asking)
    assert len(asked) == 2
    assert all(one.answers == [False] for one in hostile), "none of them is waited for"
    late = Kept(HOSTILE, asked, False)
    asking.ask(late, late.answers.append)
    assert late.answers == [False], "his next is not asked yet"
    loop.now += 1
    asking.go_on()
    loop.until(lambda: not asking._asking and len(asked) == 4)
    assert late.answers == [False, True]
    assert asked[2] is late, "what came last is asked first"
    for one in hostile:
        one.kept = False
    loop.now += 1
    asking.go_on()
    loop.until(lambda: all(len(one.answers) == 2 for one in hostile))
    assert all(one.answers == [False, True] for one in hostile), "without a pause between them"
    assert asking._turns == {}


def test_kept_memory_is_asked_about_in_turn(loop: Loop, asking: Pins) -> None:
    asked: list[Kept] = []
    some = [Kept(HOSTILE, asked, True) for _ in range(3)]
    for one in some:
        asking.ask(one, one.answers.append)
    for _ in range(6):
        loop.now += 1
        asking.go_on()
        asking.go_on()
        loop.until(lambda: not asking._asking)
    assert sorted(map(asked.count, some)) == [2, 2, 2]


def test_a_mistake_counts_as_kept(loop: Loop, asking: Pins, caplog) -> None:
    one = Kept(HOSTILE, [], True)
    one.unpinned = lambda: 1 // 0
    asking.ask(one, one.answers.append)
    loop.until(lambda: one.answers)
    assert one.answers == [False]
    assert "ZeroDivisionError" in caplog.text


def test_memory_counts_while_it_is_kept(loop: Loop) -> None:
    """And so do its descriptors. Who waits for memory is not held up by it."""
    names: Names[Memory] = Names(2 * MIB, 10)
    kept = Keeper(names, 5, loop.later)
    kept._room -= 4
    reading, writing = os.pipe()
    waited: list[int] = []
    for name, uid in ("hostile", 4001), ("other", 4005):
        one = made()
        one.strangers |= {uid}
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
