"""One copy of a model for all processes: attached, read-only, never half, given back."""

import errno
import fcntl
import gc
import hashlib
import itertools
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import dmabuf.store
from dmabuf import safetensors as models
from dmabuf.kernel import uapi
from tests.serving import as_a_program, in_a_thread
from tests.sharing import STEPS, Child, act_at, kill_servers, servers, undisturbed
from tests.support import assert_same, cached, drop_cache, in_child, pattern, wait_until

pytestmark = pytest.mark.usefixtures("leaves_nothing")

MIB = 1 << 20
SIZE = 3 * MIB + 12344
"""Of the larger tensor."""


def make(path: Path, seed: int = 1) -> Path:
    """Write a model of two tensors, which is not in the page cache."""
    tensors = {
        "large": np.frombuffer(pattern(SIZE, seed), "u1"),
        "small": np.frombuffer(pattern(4000, seed + 100), "<f4").reshape(10, 100),
    }
    safetensors.numpy.save_file(tensors, path, metadata={"seed": str(seed)})
    with path.open("rb") as file:
        drop_cache(file.fileno())
    return path


def check(model: models.Tensors, seed: int = 1) -> None:
    """Compare every byte."""
    assert_same(bytes(model.raw("large")), pattern(SIZE, seed), "large")
    assert_same(bytes(model.raw("small")), pattern(4000, seed + 100), "small")
    assert model["small"].shape == (10, 100) and model.metadata == {"seed": str(seed)}


def load(path: Path, socket: Path, **how: object) -> models.Tensors:
    return models.load(path, framework="np", shared=socket, **how)


def memory(model: models.Tensors) -> tuple[int, int]:
    """Return what identifies the memory of a model."""
    status = os.fstat(model.buffer.fileno())
    return status.st_dev, status.st_ino


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make(tmp_path / "model.safetensors")


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    """Where a store is started when one is needed."""
    yield tmp_path / "store.sock"
    kill_servers(tmp_path / "store.sock")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """The socket of a store of this process."""
    with in_a_thread(tmp_path / "served.sock", 64 * MIB):
        yield tmp_path / "served.sock"


# -- one copy


def test_the_second_load_attaches_to_the_memory_of_the_first(path: Path, served: Path) -> None:
    first = load(path, served, require="uncached", audit="always")
    assert first.shared and sum(one.nbytes for one in first.transfers) >= SIZE + 4000
    second = load(path, served)
    assert second.shared and second.transfers == ()
    assert memory(first) == memory(second)
    check(first)
    check(second)
    with dmabuf.store.connect(served) as store:
        [status] = store.list()
        assert status.cached and status.mode == 0o600
        assert status.size <= first.buffer.size


def test_other_files_selections_and_alignments_are_other_copies(path: Path, served: Path) -> None:
    def found(**how: object) -> tuple[int, int]:
        model = load(path, served, **how)
        kept.append(model)
        check(model) if "tensors" not in how else None
        return memory(model)

    kept: list[models.Tensors] = []
    whole = found()
    assert len({whole, found(tensors=["small"]), found(alignment="64KiB")}) == 3
    assert found() == whole == found(alignment=1)
    assert kept[1].buffer.size < MIB
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = load(path, served)
    assert memory(changed) != whole
    check(changed)
    os.replace(make(path.with_name("new"), seed=2), path)
    replaced = load(path, served)
    check(replaced, seed=2)
    check(kept[0])
    link = path.with_name("link")
    os.symlink(path, link)
    assert memory(load(link, served)) == memory(replaced)


def test_no_page_of_the_file_is_left_in_the_page_cache(path: Path, served: Path) -> None:
    for _ in range(2):
        model = load(path, served)
        with path.open("rb") as file:
            assert cached(file.fileno()) == 0
        check(model)


def test_the_memory_is_counted_once(path: Path, served: Path) -> None:
    def attach(tell) -> models.Tensors:
        model = load(path, served)
        check(model)
        tell(b"attached")
        return model

    model = load(path, served)
    children = [Child(attach) for _ in range(4)]
    try:
        for child in children:
            assert child.told() == b"attached"
        check(model)
        total = sum(
            share(pid, str(model.buffer.name))
            for pid in [os.getpid(), *(one.pid for one in children)]
        )
        assert 0.95 * SIZE < total < 1.05 * model.buffer.size
    finally:
        for child in children:
            child.kill()


def share(pid: int, name: str) -> int:
    """Return the proportional set size of a process's mappings of memfds without a label."""
    total, counted = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counted = "/memfd:dmabuf " in line
        elif counted and line.startswith("Pss:"):
            total += int(line.split()[1]) << 10
    return total


CGROUPS = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory").is_dir() else None
CGROUPS = CGROUPS or Path("/sys/fs/cgroup")


@pytest.mark.skipif(
    not os.access(CGROUPS / "cgroup.procs", os.W_OK) or not (CGROUPS / "memory.stat").exists(),
    reason="needs a memory cgroup where this user may make others: run it as root",
)
def test_one_cgroup_is_charged(path: Path, socket: Path) -> None:
    def attach(tell) -> models.Tensors:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        model = load(path, socket)
        check(model)
        tell(b"attached")
        return model

    def shared_memory() -> int:
        lines = (group / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("shmem "))

    groups = [CGROUPS / f"dmabuf-{os.getpid()}-{number}" for number in range(2)]
    children = []
    try:
        for group in groups:
            group.mkdir()
            children.append(Child(attach))
            assert children[-1].told() == b"attached"
        group = groups[0]
        assert shared_memory() >= SIZE
        group = groups[1]
        assert shared_memory() < MIB
    finally:
        for child in children:
            child.kill()
        kill_servers(socket)
        for group in filter(Path.exists, groups):
            wait_until(lambda procs=group / "cgroup.procs": not procs.read_text())
            group.rmdir()


# -- read-only


def test_nobody_can_write_a_shared_model(path: Path, served: Path) -> None:
    model = load(path, served)
    with pytest.raises(ValueError, match="read-only"):
        model["large"][0] = 1
    fd = model.buffer.fileno()
    assert fcntl.fcntl(fd, uapi.F_GET_SEALS) & uapi.F_SEAL_WRITE
    with pytest.raises(PermissionError):
        mmap.mmap(fd, mmap.PAGESIZE)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        for act in (
            lambda: os.pwrite(again, b"x", 0),
            lambda: mmap.mmap(again, mmap.PAGESIZE),
            lambda: os.ftruncate(again, 0),
        ):
            with pytest.raises(PermissionError):
                act()
    finally:
        os.close(again)
    with dmabuf.store.connect(served) as store:
        for trusted in (True, False, None):
            with pytest.raises(PermissionError, match="content is final"):
                store.open(str(model.buffer.name), "r+", trusted)
    check(model)


def test_a_worker_that_writes_all_the_same_is_ended_by_the_kernel(path: Path, served: Path) -> None:
    def write(tell) -> None:
        import ctypes
        import faulthandler

        faulthandler.disable()
        model = load(path, served)
        tell(b"loaded")
        ctypes.memset(model.buffer.address, 0, 1)
        tell(b"written")

    child = Child(write)
    assert child.told() == b"loaded"
    assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == -signal.SIGSEGV
    with pytest.raises(AssertionError, match="has ended"):
        child.told()
    child.close()
    check(load(path, served))


# -- races and ends


def test_processes_that_race_load_once(path: Path, tmp_path: Path) -> None:
    def race(tell) -> models.Tensors:
        filled: list[int] = []

        def progress(done: int, total: int | None) -> None:
            filled.append(done)
            os.read(held, 1)

        tell(b"ready")
        os.read(start, 1)
        model = load(path, tmp_path / "s", progress=progress)
        check(model)
        tell(b"%d %d" % (bool(filled), memory(model)[1]))
        return model

    (start, go), (held, release) = os.pipe(), os.pipe()
    children = [Child(race) for _ in range(5)]  # before this process has the server's memory
    try:
        with in_a_thread(tmp_path / "s") as server:
            assert {child.told() for child in children} == {b"ready"}
            os.write(go, b"x" * len(children))
            wait_until(lambda: server.clients == len(children))
            os.write(release, b"x" * 1000)
            told = [child.told().split() for child in children]
            assert sorted(filled for filled, _ in told) == [b"0"] * 4 + [b"1"]
            assert len({number for _, number in told}) == 1
    finally:
        for fd in (start, go, held, release):
            os.close(fd)
        for child in children:
            child.kill()


def test_a_process_that_forks_while_it_loads(path: Path, served: Path) -> None:
    children: list[Child] = []

    def progress(done: int, total: int | None) -> None:
        if not children:
            children.append(Child(lambda tell: tell(b"forked")))
            assert children[0].told() == b"forked"

    try:
        check(load(path, served, progress=progress))
        check(load(path, served))
    finally:
        for child in children:
            child.kill()


@pytest.mark.parametrize("step", STEPS)
def test_a_loader_is_killed_and_another_takes_over(step: str, path: Path, served: Path) -> None:
    def stop(tell) -> None:
        progress = act_at(step, lambda: (tell(b"there"), signal.pause()))
        load(path, served, progress=progress)

    def wait(tell) -> models.Tensors:
        model = load(path, served)
        check(model)
        tell(b"%d" % len(model.transfers))
        return model

    first = Child(stop)
    assert first.told() == b"there"
    waiting = [Child(wait) for _ in range(2)]
    try:
        first.kill()
        told = sorted(child.told() for child in waiting)
        whole = step in ("after link", "before open", "after open")
        assert told == ([b"0", b"0"] if whole else [b"0", b"1"])
        with dmabuf.store.connect(served) as store:
            assert store.usage().names == 1
    finally:
        for child in waiting:
            child.kill()


@pytest.mark.parametrize("step", STEPS)
def test_the_store_is_killed_and_the_load_succeeds(step: str, path: Path, socket: Path) -> None:
    dmabuf.store.connect(socket, start=True).close()
    with undisturbed():
        model = load(path, socket, progress=act_at(step, lambda: kill_servers(socket)))
    check(model)
    again = load(path, socket)
    check(again)
    if step != "after open":
        assert memory(again) == memory(model)


def test_workers_go_on_after_the_store_and_other_workers_were_killed(
    path: Path, socket: Path
) -> None:
    def work(start: int, tell) -> None:
        model = load(path, socket)
        tell(b"attached")
        while True:
            os.read(start, 1)
            check(model)
            tell(b"right")

    def all_are_right() -> bool:
        for _, go in pipes[: len(children)]:
            os.write(go, b"x")
        return [child.told() for child in children] == [b"right"] * len(children)

    pipes = [os.pipe() for _ in range(3)]  # one each, so that none takes the turn of another
    children = [Child(partial(work, start)) for start, _ in pipes]
    try:
        for child in children:
            child.told()
        kill_servers(socket)
        children.pop().kill()
        assert all_are_right()
        check(load(path, socket))
        assert all_are_right()
    finally:
        for child in children:
            child.kill()
        for fd in itertools.chain(*pipes):
            os.close(fd)


def test_a_file_that_changes_while_it_loads_is_refused(path: Path, served: Path) -> None:
    def change(done: int, total: int | None) -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")

    with pytest.raises(ValueError, match="changed after its header was read"):
        load(path, served, progress=change)
    with dmabuf.store.connect(served) as store:
        wait_until(lambda: not store.usage().charged)
        assert store.list() == []


def test_an_interrupted_load_leaves_nothing(path: Path, served: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(path, served, progress=interrupt)
    with dmabuf.store.connect(served) as store:
        wait_until(lambda: not store.usage().charged)
    check(load(path, served))


# -- memory is given back


def test_room_is_made_by_the_least_recently_used_that_nobody_has(tmp_path: Path) -> None:
    paths = [make(tmp_path / f"{seed}.safetensors", seed) for seed in range(5)]
    socket = tmp_path / "s"
    with in_a_thread(socket, int(3.5 * SIZE)), dmabuf.store.connect(socket) as store:

        def there() -> set[str]:
            return {one.paths[0] for one in models.shared_models(store)}

        for number in (0, 1, 2):
            load(paths[number], socket)
        load(paths[0], socket)
        assert there() == set(map(str, paths[:3]))
        kept = [load(paths[3], socket)]
        assert there() == {str(paths[number]) for number in (0, 2, 3)}, "1 was used least recently"
        kept += [load(paths[0], socket), load(paths[2], socket)]
        with pytest.raises(OSError, match="the store is full") as raised:
            load(paths[4], socket)
        assert raised.value.errno == errno.ENOSPC
        assert there() == {str(paths[number]) for number in (0, 2, 3)}
        for model, seed in zip(kept, (3, 0, 2), strict=True):
            check(model, seed)
        del model
        kept.pop(0)
        check(load(paths[4], socket), 4)
        assert there() == {str(paths[number]) for number in (0, 2, 4)}
        store.create("ordinary", MIB // 4).close()
        with pytest.raises(OSError, match="the store is full"):
            store.create("large", 4 * SIZE)
        assert there() == {str(paths[number]) for number in (0, 2, 4)}, "nothing is dropped in vain"


def test_an_unused_model_is_dropped_after_the_idle_time_and_then_the_store_ends(
    path: Path, tmp_path: Path
) -> None:
    socket = tmp_path / "s"
    with as_a_program(socket, "--idle", 0.5) as server:
        model = load(path, socket)
        began = time.monotonic()
        with dmabuf.store.connect(socket) as store:
            wait_until(lambda: time.monotonic() - began > 2)
            assert len(store.list()) == 1, "it is in use"
            check(model)
            del model
            gc.collect()
            wait_until(lambda: not store.list(), "the end of the idle time")
            store.create("ordinary", MIB).close()
            began = time.monotonic()
            wait_until(lambda: time.monotonic() - began > 2)
            store.remove("ordinary")
        assert server.wait(timeout=100) == 0


# -- the store on demand


def test_a_store_is_started_once_for_many(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    stores: list[dmabuf.store.Store] = []
    threads = [
        threading.Thread(target=lambda: stores.append(dmabuf.store.connect(socket, start=True)))
        for _ in range(4)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(stores) == 4 and len(servers(socket)) == 1
        stores[0].create("a", 1).close()
        assert [one.name for one in stores[3].list()] == ["a"]
    finally:
        for one in stores:
            one.close()
        kill_servers(socket)


def test_why_no_store_could_be_started(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"start a store: .*no such directory"):
        dmabuf.store.connect(tmp_path / "none" / "s", start=True)
    with pytest.raises(FileNotFoundError, match="no store is running here"):
        dmabuf.store.connect(tmp_path / "s")


def test_the_store_of_the_user_is_the_default(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    try:
        first, second = (models.load(path, framework="np", shared=True) for _ in range(2))
        assert memory(first) == memory(second) and second.transfers == ()
        check(second)
        assert len(servers(tmp_path / "dmabuf.sock")) == 1
    finally:
        kill_servers(tmp_path / "dmabuf.sock")


_IN_A_CONTAINER = """
import ctypes, hashlib, sys
from tests.sandbox import forbid
# No capabilities, also of what it starts, since forbid() sets no_new_privs: capset(2)
assert not ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
# mount, umount, the keyring, unshare, perf, fanotify, handles, setns, bpf, userfaultfd, io_uring
forbid(165, 166, 248, 249, 250, 272, 298, 300, 304, 308, 321, 323, 425, 426, 427)
from dmabuf import safetensors
model = safetensors.load(sys.argv[1], framework="np", shared=sys.argv[2])
print([str(one.route) for one in model.transfers])
print(hashlib.sha256(model.raw("large")).hexdigest())
"""


def test_a_container_under_the_default_seccomp_profile(path: Path, socket: Path) -> None:
    """Docker's profile refuses these calls, io_uring among them, without capabilities."""
    digest = hashlib.sha256(pattern(SIZE, 1)).hexdigest()
    route = str(models.load(path, framework="np").transfers[0].route)
    assert in_child(_IN_A_CONTAINER, path, socket).splitlines() == [f"['{route}']", digest]
    assert in_child(_IN_A_CONTAINER, path, socket).splitlines() == ["[]", digest]
    assert len(servers(socket)) == 1


# -- arguments


def test_what_does_not_go_with_shared(path: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "s"
    with dmabuf.allocate(4 * MIB) as buffer:
        for how in ({"buffer": buffer}, {"name": "model"}):
            with pytest.raises(ValueError, match="leave out buffer and name"):
                load(path, nowhere, **how)
    with pytest.raises(ValueError, match="invalid exporter 'udmabuf': a shared model is a memfd"):
        load(path, nowhere, exporter="udmabuf")
    with pytest.raises(TypeError, match="shared must be a bool or the path"):
        models.load(path, framework="np", shared=1)
    assert not servers(nowhere)


def test_a_buffer_that_is_not_a_model_is_refused(path: Path, served: Path) -> None:
    name = str(load(path, served).buffer.name)
    with dmabuf.store.connect(served) as store:
        store.remove(name)
        store.create(name, SIZE).close()
        with pytest.raises(OSError, match="not a model that load has made"):
            load(path, served)
        assert models.shared_models(store) == []
