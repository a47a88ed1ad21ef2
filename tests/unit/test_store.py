"""The store of named buffers, as its clients use it."""

import copy
import errno
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import dmabuf
import dmabuf.store
from dmabuf.store import Store
from tests.resources import held
from tests.serving import as_a_program, in_a_thread
from tests.support import assert_same, in_child, pattern

SIZE = 1 << 20
MIB = 1 << 20

_SIGNALLED = """
import signal, sys, threading
from dmabuf.store import Server, listening

def signal_this_thread():
    sys.stdin.read()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

with listening(sys.argv[1]) as listener:
    server = Server(listener, 1 << 20)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    threading.Thread(target=signal_this_thread).start()
    print("ready", flush=True)
    server.run()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with in_a_thread(path, 16 * MIB), dmabuf.store.connect(path) as store:
        store.list()  # the server has accepted it
        yield store


def names(store: Store) -> list[str]:
    return [one.name for one in store.list()]


def charged(store: Store) -> tuple[int, int]:
    usage = store.usage()
    return usage.charged, usage.names


def test_a_signal_that_does_not_interrupt_the_wait_stops_the_server(path: Path) -> None:
    """Another thread takes it; so it is with one that comes just before the server waits."""
    command = [sys.executable, "-c", _SIGNALLED, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as server:
        assert server.stdout.readline() == b"ready\n"
        with dmabuf.store.connect(path) as store:
            store.list()  # the server waits for requests
        server.stdin.close()
        try:
            assert server.wait(60) == 0
        finally:
            server.kill()


def test_a_name_is_the_same_memory_for_all_who_open_it(store: Store) -> None:
    with store.create("frames", "1MiB", mode=0o640) as one, store.open("frames") as other:
        assert (one.size, one.mode, other.mode) == (SIZE, "rb+", "rb")
        assert_same(one.pread(SIZE, 0), bytes(SIZE), "a new buffer")
        one.pwrite(pattern(SIZE, 1), 0)
        assert_same(other.pread(SIZE, 0), pattern(SIZE, 1), "the other's view")
        with store.open("frames", "r+") as third:
            third.pwrite(b"third", SIZE - 5)
        assert one.pread(5, SIZE - 5) == other.pread(5, SIZE - 5) == b"third"


def test_status_and_list(store: Store) -> None:
    with store.create("b", 5000, mode=0o644):
        status = store.stat("b")
        assert (status.name, status.size, status.length) == ("b", 8192, 5000)
        assert (status.mode, status.uid, status.gid) == (0o644, os.geteuid(), os.getegid())
        assert status.created_ns == status.changed_ns == status.modified_ns
        assert status.in_use
    assert not store.stat("b").in_use
    store.create("a", 1).close()
    assert names(store) == ["a", "b"]
    assert store.list()[1] == replace(status, in_use=None)
    buffer, opened = store.open_with_status("b", "r+")
    with buffer:
        assert opened == replace(status, in_use=None)
        assert (buffer.size, buffer.mode) == (8192, "rb+")


def test_many_names_are_listed_in_order(store: Store) -> None:
    expected = [f"{number:04d}" * 20 for number in range(500)]
    for name in reversed(expected):
        store.create(name, 1).close()
    assert names(store) == expected


def test_names_are_renamed_changed_and_removed(store: Store) -> None:
    with store.create("one", SIZE) as buf:
        buf.pwrite(b"kept", 0)
        store.rename("one", "two")
        store.chmod("two", 0o604)
        store.truncate("two", 5)
        with pytest.raises(OSError) as caught:
            store.truncate("two", SIZE + 1)
        assert (caught.value.errno, store.stat("two").length) == (errno.EFBIG, 5)
        store.utime("two", modified_ns=5)
        store.utime("two", accessed_ns=7)
        status = store.stat("two")
        assert names(store) == ["two"]
        assert (status.mode, status.accessed_ns, status.modified_ns) == (0o604, 7, 5)
        assert status.changed_ns > status.created_ns
        store.remove("two")
        assert charged(store) == (0, 0)
        with pytest.raises(FileNotFoundError) as caught:
            store.open("two")
        assert caught.value.filename == "two"
        assert buf.pread(4, 0) == b"kept"


@pytest.mark.parametrize("make", ["rename", "link"])
def test_a_name_is_replaced_only_if_it_may_be(store: Store, make: str) -> None:
    def give(**how: object) -> None:
        if make == "link":
            store.link(unnamed, "two", **how)
        else:
            store.rename("one", "two", **how)

    first = store.create("one", 5)
    other = store.create("two", 1)
    with first, other, store.create(None, SIZE) as unnamed:
        before = store.list()
        with pytest.raises(FileExistsError) as caught:
            give(replace=False)
        assert caught.value.filename == "two"
        with pytest.raises(OSError) as caught:
            give(replace=store.stat("one").number)
        assert caught.value.errno == errno.ESTALE
        assert store.list() == before
        give(replace=store.stat("two").number)
        assert store.stat("two").length == (SIZE if make == "link" else 5)
        other.pwrite(b"mine", 0)
        assert other.pread(4, 0) == b"mine", "the replaced buffer lives in who has it"


def test_a_link_sets_the_length_with_the_name(store: Store) -> None:
    store.create("one", 1).close()
    with store.create(None, SIZE) as buffer:
        with pytest.raises(OSError, match="is larger than the buffer") as caught:
            store.link(buffer, "one", length=SIZE + 1)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, "one")
        assert store.stat("one").length == 1
        linked = store.link(buffer, "one", length=0)
        assert linked == replace(store.stat("one"), in_use=None)
        assert (linked.length, linked.size) == (0, SIZE)
        assert linked.modified_ns == linked.changed_ns > linked.created_ns
        for call in (lambda: store.link(buffer, "two"), lambda: store.discard(buffer)):
            with pytest.raises(ValueError, match="was not created without a name"):
                call()


REQUESTS: dict[str, Callable[[Store, int], object]] = {
    "open": lambda store, number: store.open("x", "r+", number=number).close(),
    "truncate": lambda store, number: store.truncate("x", 5, number=number),
    "chmod": lambda store, number: store.chmod("x", 0o604, number=number),
    "chown": lambda store, number: store.chown("x", gid=os.getegid(), number=number),
    "utime": lambda store, number: store.utime("x", modified_ns=5, number=number),
    "rename": lambda store, number: store.rename("x", "y", number=number),
    "replace": lambda store, number: store.rename("z", "x", replace=number),
    "remove": lambda store, number: store.remove("x", number=number),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_request_with_a_number_is_for_that_buffer(store: Store, request_) -> None:
    store.create("z", 1).close()
    store.create("x", SIZE).close()
    looked_at = store.stat("x").number
    with store.create(None, SIZE) as newer:
        status = store.link(newer, "x")
    before = store.list()
    assert status in before
    with pytest.raises(OSError, match=f"no longer belongs to buffer {looked_at}") as caught:
        request_(store, looked_at)
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, "x")
    assert store.list() == before
    request_(store, status.number)


def test_memory_counts_while_the_store_holds_it(store: Store) -> None:
    one = store.create("one", 10 * MIB)
    with pytest.raises(OSError, match="10 MiB wanted, 6 MiB of 16 MiB left") as caught:
        store.create("two", 10 * MIB)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "two")
    store.remove("one")
    assert charged(store) == (0, 0)
    with one, store.create("two", 10 * MIB):
        one.pwrite(pattern(MIB, 1), 9 * MIB)
        assert_same(one.pread(MIB, 9 * MIB), pattern(MIB, 1), "memory without a name")
    with store.create(None, 5 * MIB) as unnamed:
        assert charged(store) == (15 * MIB, 2)
        store.link(unnamed, "two")
        assert charged(store) == (5 * MIB, 1)
    unnamed = store.create(None, MIB)
    store.discard(unnamed)
    assert unnamed.closed
    assert charged(store) == (5 * MIB, 1)


def test_new_memory_is_zeroed(store: Store) -> None:
    for seed in range(5):
        with store.create("n", 8 * MIB) as buffer:
            assert buffer.pread(buffer.size, 0) == bytes(buffer.size)
            buffer.pwrite(pattern(8 * MIB, seed), 0)
        store.remove("n")


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda store: store.create("n", 17 * MIB), errno.ENOSPC),
        (lambda store: store.create("n", 2**62), errno.ENOSPC),
        (lambda store: store.create("n", 1, exporter="nothing"), errno.EINVAL),
        (lambda store: store.create("n", 1, huge_pages=3), errno.EINVAL),
        (lambda store: store.create("there", 1), errno.EEXIST),
        (lambda store: store.open("there", "w"), errno.EINVAL),
        (lambda store: store.open("none"), errno.ENOENT),
        (lambda store: store.stat("\udcff"), errno.EINVAL),
        (lambda store: store.create("\ud800", 1), errno.EINVAL),
        (lambda store: store.rename("there", "a\udcff"), errno.EINVAL),
        (lambda store: store.remove("a/b"), errno.EINVAL),
        (lambda store: store.remove("a" * 256), errno.ENAMETOOLONG),
        (lambda store: dmabuf.store.check_name("\x1b[2J"), errno.EINVAL),
    ],
)
def test_errors(store: Store, call, number: int) -> None:
    store.create("there", 1).close()
    before = store.list()
    with pytest.raises(OSError) as caught:
        call(store)
    assert caught.value.errno == number
    assert len(str(caught.value)) < 500
    assert store.list() == before


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda store: store.open("there", "w"), "open: invalid mode 'w': use 'r' or 'r+'"),
        (
            lambda store: store.chmod("there", 0o1000),
            "chmod: invalid mode 512: use an integer from 0o0 to 0o777",
        ),
        (lambda store: store.create("n", 1, mode=[6]), "create: invalid mode list: use an"),
        (lambda store: store.create("n", 1, exporter="x" * 99), "xx': use text of at most 64"),
        (
            lambda store: store.rename("there", "n", replace="no"),
            "invalid replace 'no': use True or False or an integer from 1 to",
        ),
        (lambda store: store.link("there", "n"), "a dmabuf.Buffer is needed, not str"),
    ],
)
def test_a_wrong_argument_is_named(store: Store, call, text: str) -> None:
    store.create("there", 1).close()
    with pytest.raises((OSError, TypeError)) as caught:
        call(store)
    assert text in str(caught.value)


@pytest.mark.parametrize("size", [0, "much", -1])
def test_a_size_that_no_buffer_has(store: Store, size: object) -> None:
    with pytest.raises(ValueError):
        store.create("n", size)
    assert store.list() == []


def test_a_store_is_not_copied(store: Store) -> None:
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"dmabuf\.store\.connect"):
            make(store)


_FILL = """
import sys, dmabuf.store
with dmabuf.store.connect(sys.argv[1]) as store, store.create("left", 4096) as buf:
    buf.pwrite(b"by a child", 0)
"""


def test_buffers_outlive_programs_and_the_server(path: Path) -> None:
    with as_a_program(path) as server:
        in_child(_FILL, path)
        with dmabuf.store.connect(path) as store, store.open("left") as buf:
            assert buf.pread(10, 0) == b"by a child"
            server.terminate()
            assert server.wait(timeout=100) == 0
            assert not path.exists()
            assert buf.pread(10, 0) == b"by a child"
            with pytest.raises(ConnectionError):
                store.list()


_FORK = """
import os, sys, dmabuf.store
from dmabuf import ClosedError
with dmabuf.store.connect(sys.argv[1]) as store:
    if not os.fork():
        try:
            store.list()
        except ClosedError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    store.list()
"""


def test_a_connection_belongs_to_one_process(path: Path, store: Store) -> None:
    in_child(_FORK, path)
    store.close()
    store.close()
    with pytest.raises(dmabuf.ClosedError, match="this Store is closed"):
        store.list()


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_that_cannot_receive_a_buffer_leaves_nothing(path: Path) -> None:
    with as_a_program(path, "--max-memory", "1MiB"), dmabuf.store.connect(path) as store:
        for name in (None, "named", None, "named"):
            with no_descriptor_left(), pytest.raises(OSError, match="ulimit -n") as caught:
                store.create(name, SIZE)
            assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, name)
            assert charged(store) == (0, 0)
        store.create("kept", SIZE).close()
        with no_descriptor_left(), pytest.raises(OSError, match="ulimit -n"):
            store.open("kept")
        store.open("kept").close()


@pytest.mark.parametrize("name", [None, "linked", "named"])
def test_a_server_that_has_ended_holds_nothing(name: str | None, path: Path) -> None:
    before = held()
    with in_a_thread(path):
        store = dmabuf.store.connect(path)
        with store.create(None if name == "linked" else name, SIZE) as buffer:
            if name == "linked":
                store.link(buffer, name)
    with store, pytest.raises(ConnectionError):
        store.list()
    assert held() == before


def test_the_default_limit_is_half_of_the_smallest_cgroup(tmp_path: Path) -> None:
    """Also where the limit is that of a cgroup above."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/v1\n1:name=x:/\n0::/outer/inner\n")
    groups = tmp_path / "sys/fs/cgroup"
    (groups / "outer/inner").mkdir(parents=True)
    (groups / "memory/v1").mkdir(parents=True)
    (groups / "outer/inner/memory.max").write_text("max\n")
    assert dmabuf.store.default_limit(str(tmp_path)) == machine // 2
    (groups / "outer/memory.max").write_text("1048576\n")
    assert dmabuf.store.default_limit(str(tmp_path)) == MIB // 2
    (groups / "memory/v1/memory.limit_in_bytes").write_text("65536\n")
    assert dmabuf.store.default_limit(str(tmp_path)) == 32768


class Model(RuleBasedStateMachine):
    """The names, lengths and the sum of the memory, beside a plain dict of them."""

    NAMES = st.sampled_from("abc")

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name, "store.sock")
        self.serving = in_a_thread(path, 8 * 4096)
        self.serving.__enter__()
        self.store = dmabuf.store.connect(path)
        self.expected: dict[str, tuple[int, int]] = {}  # length and pages
        self.unnamed: list[tuple[dmabuf.Buffer, int, int]] = []

    def teardown(self) -> None:
        for buffer, _, _ in self.unnamed:
            buffer.close()
        self.store.close()
        self.serving.__exit__(None, None, None)
        self.folder.cleanup()

    def pages(self) -> int:
        return sum(one[-1] for one in [*self.expected.values(), *self.unnamed])

    def attempt(self, allowed: bool, call: Callable[[], object]) -> bool:
        try:
            call()
        except OSError:
            assert not allowed
            return False
        assert allowed
        return True

    @rule(name=NAMES | st.none(), length=st.integers(1, 3 * 4096))
    def create(self, name: str | None, length: int) -> None:
        pages = -(-length // 4096)
        made: list[dmabuf.Buffer] = []
        allowed = name not in self.expected and self.pages() + pages <= 8
        if self.attempt(allowed, lambda: made.append(self.store.create(name, length))):
            if name is None:
                self.unnamed.append((made[0], length, pages))
            else:
                made[0].close()
                self.expected[name] = length, pages

    @rule(name=NAMES, replace_=st.booleans(), length=st.none() | st.integers(0, 3 * 4096))
    def link(self, name: str, replace_: bool, length: int | None) -> None:
        if not self.unnamed:
            return
        buffer, before, pages = self.unnamed[-1]
        allowed = (replace_ or name not in self.expected) and (length or 0) <= pages * 4096
        if self.attempt(
            allowed, lambda: self.store.link(buffer, name, replace=replace_, length=length)
        ):
            self.unnamed.pop()[0].close()
            self.expected[name] = before if length is None else length, pages

    @rule(name=NAMES, to=NAMES, replace_=st.booleans())
    def rename(self, name: str, to: str, replace_: bool) -> None:
        allowed = name in self.expected and (replace_ or to not in self.expected or name == to)
        if name == to and not replace_:
            allowed = False
        if self.attempt(allowed, lambda: self.store.rename(name, to, replace=replace_)):
            self.expected[to] = self.expected.pop(name)

    @rule(name=NAMES, length=st.integers(0, 3 * 4096))
    def truncate(self, name: str, length: int) -> None:
        allowed = name in self.expected and length <= self.expected[name][1] * 4096
        if self.attempt(allowed, lambda: self.store.truncate(name, length)):
            self.expected[name] = length, self.expected[name][1]

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if self.attempt(name in self.expected, lambda: self.store.remove(name)):
            del self.expected[name]

    @rule()
    def discard(self) -> None:
        if self.unnamed:
            self.store.discard(self.unnamed.pop()[0])

    @invariant()
    def all_is_as_expected(self) -> None:
        found = {one.name: (one.length, one.size // 4096) for one in self.store.list()}
        assert found == self.expected
        assert charged(self.store) == (self.pages() * 4096, len(found) + len(self.unnamed))


Model.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestModel = Model.TestCase
