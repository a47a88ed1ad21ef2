"""Who may do what to a name, and the sum of the memory: against a model, and against the kernel."""

import errno
import itertools
import os
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dmabuf.store.names import Entry, Names, Peer, may
from dmabuf.store.protocol import Refusal

OWNER, MEMBER, SECOND = Peer(1001, 1001), Peer(1002, 1003, frozenset({1003})), Peer(1004, 1005)
IN_GROUP = Peer(1006, 1007, frozenset({1007, 1003}))
ROOT = Peer(0, 0)


class Fake:
    """Memory, as far as names look at it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = False

    def in_use(self) -> bool:
        return self.used


def entry(uid: int, gid: int, mode: int) -> Entry[Fake]:
    return Entry("n", 1, uid, gid, mode, 1, 1, 0, 0, 0, 0)


def opens(path: Path, peer: Peer, flags: int) -> bool:
    """Whether the kernel lets such a process open a file."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(list(peer.groups))
            os.setresgid(peer.gid, peer.gid, peer.gid)
            os.setresuid(peer.uid, peer.uid, peer.uid)
            os.close(os.open(path, flags))
        except PermissionError:
            os._exit(1)
        except BaseException:
            os._exit(2)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1)
    return status == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can be any user")
@pytest.mark.parametrize("peer", [OWNER, MEMBER, SECOND, IN_GROUP, ROOT])
def test_who_may_open_is_who_may_open_a_file(peer: Peer) -> None:
    folder = Path("/run") if os.access("/run", os.W_OK) else Path("/tmp")
    path = folder / f"dmabuf-test-{os.getpid()}"  # where every user may look
    path.touch()
    try:
        os.chown(path, 1001, 1003)
        for digits in itertools.product((0, 2, 4, 6), repeat=3):
            mode = digits[0] << 6 | digits[1] << 3 | digits[2]
            os.chmod(path, mode)
            for how, flags in (("r", os.O_RDONLY), ("r+", os.O_RDWR)):
                expected = opens(path, peer, flags)
                assert may(entry(1001, 1003, mode), peer, how) == expected, (oct(mode), how)
    finally:
        path.unlink()


def refused(number: int, function, *arguments) -> None:
    with pytest.raises(Refusal) as caught:
        function(*arguments)
    assert caught.value.errno == number


def one(peer: Peer = OWNER, mode: int = 0o600) -> Names[Fake]:
    names: Names[Fake] = Names(1000, 10)
    names.finish(names.begin("n", peer, mode, 100, 100), Fake(100))
    return names


@pytest.mark.parametrize("peer", [MEMBER, SECOND, IN_GROUP])
def test_a_name_is_its_owners(peer: Peer) -> None:
    names = one(mode=0o666)
    names.finish(names.begin("other", peer, 0o666, 1, 1), Fake(1))
    refused(errno.EPERM, names.remove, "n", peer)
    refused(errno.EPERM, names.rename, "n", "m", True, peer)
    refused(errno.EPERM, names.rename, "other", "n", True, peer)
    refused(errno.EPERM, names.chmod, "n", 0o777, peer)
    refused(errno.EPERM, names.chown, "n", peer.uid, -1, peer)
    assert names.listing("", 9) == ["n", "other"]
    names.truncate("n", 5, peer)  # who may write may
    for name in ("n", "other"):
        names.remove(name, ROOT)
    assert len(names) == 0


def test_giving_a_name_away() -> None:
    names = one(IN_GROUP)
    refused(errno.EPERM, names.chown, "n", 1001, -1, IN_GROUP)
    refused(errno.EPERM, names.chown, "n", -1, 1001, IN_GROUP)
    names.chown("n", -1, 1003, IN_GROUP)
    names.chown("n", 1006, 1007, IN_GROUP)
    names.chown("n", 1001, 4242, ROOT)
    assert (names.find("n").uid, names.find("n").gid) == (1001, 4242)
    refused(errno.EPERM, names.chmod, "n", 0o777, IN_GROUP)


def test_a_name_that_is_just_being_made() -> None:
    names = one()
    begun = names.begin("new", OWNER, 0o600, 1, 1)
    refused(errno.EEXIST, names.begin, "new", ROOT, 0o600, 1, 1)
    refused(errno.ENOENT, names.find, "new")
    refused(errno.ENOENT, names.remove, "new", ROOT)
    refused(errno.EBUSY, names.rename, "n", "new", True, OWNER)
    refused(errno.EEXIST, names.rename, "n", "new", False, OWNER)
    assert names.listing("", 9) == ["n"]
    names.abandon(begun)
    names.rename("n", "new", True, OWNER)
    assert names.listing("", 9) == ["new"]


def test_a_name_is_still_a_numbers_or_refused() -> None:
    names = one()
    number = names.find("n").number
    assert names.find("n", number) is names.find("n")
    names.rename("n", "m", True, OWNER)
    refused(errno.ESTALE, names.find, "n", number)
    names.finish(names.begin("n", OWNER, 0o600, 1, 1), Fake(1))
    newer = names.find("n").number
    refused(errno.ESTALE, names.find, "n", number)
    refused(errno.ENOENT, names.find, "x")
    refused(errno.ESTALE, names.rename, "m", "n", number, OWNER)
    assert names.listing("", 9) == ["m", "n"]
    names.rename("m", "n", newer, OWNER)
    names.rename("n", "x", newer, OWNER)
    assert (names.listing("", 9), names.find("x").number) == (["x"], number)


NAMES = st.sampled_from("abcd")
PEERS = st.sampled_from([OWNER, MEMBER, IN_GROUP, ROOT])


class Model(RuleBasedStateMachine):
    """Names and their sums, beside a plain dict of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Names[Fake] = Names(100, 6, clock=itertools.count().__next__)
        self.expected: dict[str, tuple[int, int]] = {}  # owner and charge
        self.begun: list[Entry[Fake]] = []
        self.unnamed: list[Entry[Fake]] = []
        self.left: dict[Fake, int] = {}

    def attempt(self, allowed: bool, function, *arguments) -> bool:
        try:
            function(*arguments)
        except Refusal:
            assert not allowed
            return False
        assert allowed
        return True

    def owned(self, name: str, peer: Peer) -> bool:
        return name in self.expected and peer.uid in (0, self.expected[name][0])

    def total(self) -> int:
        charges = [charge for _, charge in self.expected.values()] + list(self.left.values())
        return sum(charges) + sum(one.charge for one in self.begun + self.unnamed)

    def count(self) -> int:
        return len(self.expected) + len(self.begun) + len(self.unnamed)

    @rule(name=NAMES | st.none(), peer=PEERS, size=st.integers(1, 60))
    def begin(self, name: str | None, peer: Peer, size: int) -> None:
        taken = name in self.expected or name in [one.name for one in self.begun if one.name]
        fits = self.count() < 6 and self.total() + size <= 100
        made = []
        if self.attempt(
            not taken and fits,
            lambda: made.append(self.names.begin(name, peer, 0o600, size, size)),
        ):
            self.begun += made

    @rule(good=st.booleans(), data=st.data())
    def end(self, good: bool, data: st.DataObject) -> None:
        if not self.begun:
            return
        begun = self.begun.pop(data.draw(st.integers(0, len(self.begun) - 1)))
        if not good:
            self.names.abandon(begun)
            return
        self.names.finish(begun, Fake(begun.charge))
        if begun.name is None:
            self.unnamed.append(begun)
        else:
            self.expected[begun.name] = begun.uid, begun.charge

    @rule(name=NAMES, peer=PEERS)
    def remove(self, name: str, peer: Peer) -> None:
        memory = self.names.find(name).memory if name in self.expected else None
        if self.attempt(self.owned(name, peer), self.names.remove, name, peer):
            self.left[memory] = self.expected.pop(name)[1]

    @rule(name=NAMES, to=NAMES, peer=PEERS, replace=st.booleans())
    def rename(self, name: str, to: str, peer: Peer, replace: bool) -> None:
        being_made = to in [one.name for one in self.begun]
        exists = to in self.expected
        good = self.owned(name, peer) and not being_made
        good = good and (replace or not exists) and (not exists or self.owned(to, peer))
        old = self.names.find(to).memory if exists else None
        if self.attempt(good, self.names.rename, name, to, replace, peer) and name != to:
            if exists:
                self.left[old] = self.expected[to][1]
            self.expected[to] = self.expected.pop(name)

    @rule(name=NAMES, peer=PEERS, replace=st.booleans(), length=st.none() | st.integers(0, 60))
    def link(self, name: str, peer: Peer, replace: bool, length: int | None) -> None:
        if not self.unnamed:
            return
        exists = name in self.expected
        being_made = name in [one.name for one in self.begun]
        good = not being_made and (not exists or (replace and self.owned(name, peer)))
        before = self.unnamed[-1].length
        good = good and (length is None or length <= self.unnamed[-1].charge)
        old = self.names.find(name).memory if exists else None
        if self.attempt(good, self.names.link, self.unnamed[-1], name, replace, length, peer):
            linked = self.unnamed.pop()
            assert linked.length == (before if length is None else length)
            if exists:
                self.left[old] = self.expected[name][1]
            self.expected[name] = linked.uid, linked.charge

    @rule(name=NAMES, used=st.booleans(), length=st.integers(0, 60))
    def swap(self, name: str, used: bool, length: int) -> None:
        if not self.unnamed or name not in self.expected:
            return
        memory = self.names.find(name).memory
        memory.used = used
        good = not used and length <= self.unnamed[-1].charge
        if self.attempt(good, self.names.swap, self.unnamed[-1], name, length, ROOT):
            swapped = self.unnamed.pop()
            self.left[memory] = self.expected[name][1]
            self.expected[name] = self.expected[name][0], swapped.charge
        memory.used = False

    @rule()
    def drop(self) -> None:
        if self.unnamed:
            dropped = self.unnamed.pop()
            self.left[dropped.memory] = dropped.charge
            self.names.drop(dropped)

    @rule()
    def forget(self) -> None:
        if self.left:
            memory = next(iter(self.left))
            del self.left[memory]
            self.names.forget(memory)

    @invariant()
    def the_sums_are_right(self) -> None:
        assert self.names.charged == self.total() <= self.names.max_memory
        assert len(self.names) == self.count() <= self.names.max_names
        assert self.names.listing("", 99) == sorted(self.expected)
        assert set(self.names.removed) == set(self.left)
        for name, (uid, charge) in self.expected.items():
            found = self.names.find(name)
            assert (found.name, found.uid, found.charge) == (name, uid, charge)


TestModel = Model.TestCase
