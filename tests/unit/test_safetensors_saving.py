"""Models saved: whole or not, in the background, and as shards with an index."""

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import dmabuf
from dmabuf import safetensors as models
from dmabuf.safetensors import saving
from dmabuf.transfer.engine import default_engine
from tests import forking
from tests.guards import needs
from tests.resources import held
from tests.support import (
    PATIENCE,
    Filter,
    cached,
    in_child,
    let_go,
    loop_device,
    mounted,
    pattern,
    poison,
    raises_errno,
    run,
)
from tests.unit.interrupting import Interruptions

pytestmark = pytest.mark.usefixtures("leaves_nothing")

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def two_rings():
    """The default engine makes its second ring when two threads write at once, and keeps it."""
    engine = default_engine()
    with engine._rings[0].lock:
        engine._pick_ring()


def some(size, seed):
    return np.frombuffer(pattern(size, seed), "u1").copy()


MODEL = {"a": some(3 * MIB + 5, 1), "b": some(100, 2), "c": some(20 * MIB, 3)}
OLD = {"old": some(5000, 4)}


def assert_holds(path, tensors):
    found = safetensors.numpy.load_file(path)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    models.save(OLD, path)
    return path


class Gate:
    """A `progress` that holds the thread of a save until it is opened."""

    def __init__(self):
        self.reached, self._open = threading.Event(), threading.Event()

    def __call__(self, done, total):
        self.reached.set()
        assert self._open.wait(PATIENCE)

    def open(self):
        self._open.set()


# -- save


@pytest.mark.parametrize("more", [0, 1, 511, 512, 4095, 4096, 4097, 8 * MIB - 1, 8 * MIB + 3])
def test_a_file_of_any_size_goes_past_the_page_cache(tmp_path, more):
    """The last page as well: it is written whole, and cut."""
    tensors = {"a": some(MIB + more, more)}
    path = tmp_path / "x"
    with dmabuf.allocate("64KiB") as buf, dmabuf.open(tmp_path / "probe", "w") as probe:
        direct = probe.plan(buf, "write").route == "direct"
    [done] = models.save(tensors, path)
    assert path.read_bytes() == safetensors.numpy.save(tensors)
    assert done.nbytes == done.copied == path.stat().st_size
    models.save(tensors, path)
    if direct:
        assert done.route == "staged"
        with path.open("rb") as file:
            assert not cached(file.fileno())


def test_what_lies_in_a_buffer_as_in_the_file_is_not_copied(tmp_path):
    """But for the pages that it shares with others."""
    models.save(MODEL, tmp_path / "x")
    model = models.load(tmp_path / "x", framework="np")
    copied, straight = models.save(model, tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert copied.nbytes <= 3 * 4096 and straight.nbytes >= 22 * MIB
    assert copied.nbytes + straight.nbytes == (tmp_path / "y").stat().st_size
    if straight.route == "direct":
        assert not straight.copied
    moved = {"first": some(8, 9)} | {name: model[name] for name in MODEL}
    [copied] = models.save(moved, tmp_path / "z")  # at other places in their pages
    assert_holds(tmp_path / "z", moved)
    del model, moved


def test_zero_copy_is_demanded_of_tensors_in_buffers(path, tmp_path):
    model = models.load(path, framework="np")
    with pytest.raises(dmabuf.RouteUnavailable, match="hold no whole page of the file"):
        models.save({"x": some(1, 5)} | {"old": model["old"]}, tmp_path / "y", require="zero-copy")
    assert not (tmp_path / "y").exists()
    del model


def test_an_own_engine_writes_one_block_at_a_time(tmp_path):
    with dmabuf.Engine() as engine:
        models.save(MODEL, tmp_path / "x", engine=engine)
    assert_holds(tmp_path / "x", MODEL)


@pytest.mark.parametrize("how", ["save", "save_async"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.9])
def test_a_disk_that_fails_under_way(path, part, how, caplog):
    """No byte beyond that part can be written; the old file stays, and nothing beside it."""
    limit = int(part * 23 * MIB)
    refuse = lambda one: -errno.ENOSPC if one.offset >= limit else one.result  # noqa: E731
    with Filter(refuse), raises_errno(errno.ENOSPC, filename=str(path)):
        if how == "save":
            models.save(MODEL, path)
        else:
            models.save_async(MODEL, path).result()
    assert_holds(path, OLD)
    assert os.listdir(path.parent) == [path.name]


@needs("root")
def test_a_full_disk_is_found_before_anything_is_written(tmp_path):
    run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path)
    try:
        models.save(OLD, tmp_path / "x")
        with raises_errno(errno.ENOSPC, filename=str(tmp_path / "x")):
            models.save({"a": some(5 * MIB, 1)}, tmp_path / "x")
        with raises_errno(errno.ENOSPC, filename=str(tmp_path / "x")):
            models.save_async({"a": some(5 * MIB, 1)}, tmp_path / "x").result()
        assert_holds(tmp_path / "x", OLD)
        assert os.listdir(tmp_path) == ["x"]
    finally:
        let_go(lambda: run("umount", tmp_path))


@needs("loop", "ext4")
@pytest.mark.parametrize("how", ["save", "save_async", "save_sharded"])
def test_a_disk_without_room_beforehand_fills_at_90_percent(tmp_path, how):
    """Without extents ext4 cannot allocate the room first, so the write itself meets ENOSPC."""
    with (
        loop_device(tmp_path / "image", 64 * MIB) as device,
        mounted(device, "ext4", tmp_path / "mount", "-O", "^extents,^64bit", "-m0") as folder,
    ):
        path, total = folder / "model.safetensors", sum(one.nbytes for one in MODEL.values())
        models.save(OLD, path)
        with (folder / "filler").open("wb") as filler:
            while (status := os.statvfs(folder)).f_bavail * status.f_frsize > 0.9 * total:
                filler.write(bytes(MIB // 4))
                filler.flush()
        if how == "save_sharded":
            with raises_errno(errno.ENOSPC):
                models.save_sharded(MODEL, folder, max_shard_size=4 * MIB)
        else:
            with raises_errno(errno.ENOSPC, filename=str(path)):
                done = getattr(models, how)(MODEL, path)
                done.result()
        assert_holds(path, OLD)
        assert sorted(os.listdir(folder)) == ["filler", "lost+found", path.name]
        (folder / "filler").unlink()
        models.save(MODEL, path)
        assert_holds(path, MODEL)


@pytest.mark.filterwarnings("ignore:unclosed <dmabuf.Buffer:ResourceWarning")
@pytest.mark.parametrize("inside", [True, False], ids=["in a buffer", "elsewhere"])
def test_an_interrupt_at_any_point(path, inside):
    """Whatever it was in the middle of: the old file or the new, and nothing is left."""
    tensors = {"a": some(18 * MIB, 1), "b": some(10, 2)}
    with dmabuf.allocate("32MiB", exporter="memfd") as buffer:
        if inside:
            buffer.pwrite(safetensors.numpy.save(tensors), 0)
            tensors = dict(models.load(buffer, framework="np"))
        with Interruptions((), saving) as points:
            models.save(tensors, path)
        before = held()
        for number in range(1, points.seen, max(1, points.seen // 25)):
            models.save(OLD, path)
            with Interruptions({number}, saving), suppress(KeyboardInterrupt):
                models.save(tensors, path)
            assert held() == before
            found = set(safetensors.numpy.load_file(path))
            assert found in ({"a", "b"}, {"old"})
            assert os.listdir(path.parent) == [path.name]
        tensors.clear()


# -- in the background


def test_tensors_may_change_as_soon_as_it_returns(path):
    tensors = {name: value.copy() for name, value in MODEL.items()}
    gate = Gate()
    handle = models.save_async(tensors, path, metadata={"step": "7"}, progress=gate)
    for value in tensors.values():
        value[:] = 0
    assert gate.reached.wait(PATIENCE)
    assert not handle.done() and "running" in repr(handle)
    assert_holds(path, OLD)
    with pytest.raises(TimeoutError, match=r"goes on after 0\.01 s"):
        handle.result(0.01)
    gate.open()
    [done] = handle.result()
    assert handle.done() and handle.exception() is None and "done" in repr(handle)
    if done.route == "direct":
        with path.open("rb") as file:
            assert not cached(file.fileno()) and not done.copied
    assert_holds(path, MODEL)
    assert done.nbytes == path.stat().st_size
    assert models.load(path, framework="np").metadata == {"step": "7"}


def test_a_given_buffer_is_used_again_and_again(path):
    with dmabuf.allocate("32MiB", exporter="memfd") as buffer:
        buffer.pwrite(poison(buffer.size), 0)
        before = held()
        for step in range(3):
            gate = Gate()
            handle = models.save_async({"a": some(MIB, step)}, path, buffer=buffer, progress=gate)
            with pytest.raises(dmabuf.BusyError):
                buffer.close()
            gate.open()
            handle.result()
            assert_holds(path, {"a": some(MIB, step)})
            end = path.stat().st_size
            assert buffer.pread(end, 0) == path.read_bytes()
            assert buffer.pread(-end % 4096, end) == bytes(-end % 4096)
        assert held() == before
        with pytest.raises(ValueError, match="the snapshot needs 33558528 bytes, the buffer has"):
            models.save_async({"a": np.zeros(32 * MIB, "u1")}, path, buffer=buffer)
        with pytest.raises(TypeError, match=r"must be a dmabuf\.Buffer, not bytearray"):
            models.save_async(MODEL, path, buffer=bytearray(1 << 20))
        inside = buffer.asarray("u1", 100, 5 * MIB)
        with pytest.raises(ValueError, match="tensors lie in the snapshot's buffer"):
            models.save_async({"a": some(6 * MIB, 1), "b": inside}, path, buffer=buffer)
        del inside


def test_saves_of_one_path_run_in_their_order(path):
    gates = [Gate() for _ in range(3)]
    handles = [
        models.save_async({"a": some(100, step)}, path, progress=gate)
        for step, gate in enumerate(gates)
    ]
    gates[2].open()
    gates[1].open()
    assert gates[0].reached.wait(PATIENCE)
    assert not gates[1].reached.is_set() and not handles[2].done()
    assert_holds(path, OLD)
    gates[0].open()
    handles[2].result()
    assert handles[0].done() and handles[1].done()
    assert_holds(path, {"a": some(100, 2)})
    for one in handles:
        one.result()


@pytest.mark.parametrize("how", ["save", "save_file", "save_sharded"])
def test_a_save_waits_for_those_of_its_path_in_the_background(path, monkeypatch, how):
    """Its content stays, by whatever name the path is given."""
    (path.parent / "link").symlink_to(path.name)
    gate, wait, waited = Gate(), models.Saving.wait, []

    def open_and_wait(saving):
        waited.append(saving)
        gate.open()
        wait(saving)

    monkeypatch.setattr(models.Saving, "wait", open_and_wait)
    pending = models.save_async(MODEL, path, progress=gate)
    assert gate.reached.wait(PATIENCE)
    last = {"a": some(90, 1), "b": some(90, 2)}
    if how == "save_sharded":
        models.save_sharded(last, path.parent, max_shard_size=100)
    else:
        getattr(models, how)(last, path.parent / "link")
    gate.open()  # which has no effect where the save has waited
    pending.result()
    if how == "save_sharded":
        assert not path.exists()
        assert_holds_folder(path.parent, last)
    else:
        assert_holds(path, last)
    assert waited == [pending]
    models.save(OLD, path)
    assert waited == [pending]


def test_a_save_that_fails_says_so_and_lets_the_next_one_go_on(path, caplog):
    def stop(done, total):
        raise ZeroDivisionError("at the disk")

    first = models.save_async(MODEL, path, progress=stop)
    second = models.save_async({"a": some(10, 1)}, path)
    second.result()
    assert isinstance(first.exception(), ZeroDivisionError) and "failed" in repr(first)
    with pytest.raises(ZeroDivisionError):
        first.result()
    assert [one.message for one in caplog.records] == [
        f"save {path} in the background: at the disk"
    ]
    assert_holds(path, {"a": some(10, 1)})


@pytest.mark.parametrize("how", ["save", "save_sharded", "result", "of a later save"])
def test_a_progress_function_does_not_wait_for_its_own_save(path, how):
    """It may begin another save of the path in the background, which comes afterwards."""
    waiting = {
        "save": lambda: models.save(MODEL, path),
        "save_sharded": lambda: models.save_sharded(MODEL, path.parent, max_shard_size="1MiB"),
        "result": lambda: handles[0].result(),
        "of a later save": lambda: handles[-1].result(),
    }
    handles, refused, ready = [], [], threading.Event()

    def progress(done, total):
        assert ready.wait(PATIENCE)
        if not refused:
            handles.append(models.save_async(MODEL, path))
            with raises_errno(errno.EDEADLK, "save afterwards", filename=str(path)):
                waiting[how]()
            refused.append(how)

    handles.append(models.save_async({"a": some(100, 1)}, path, progress=progress))
    ready.set()
    handles[0].result(PATIENCE)
    handles[1].result(PATIENCE)
    assert refused == [how] and os.listdir(path.parent) == [path.name]
    assert_holds(path, MODEL)


def test_what_is_refused_at_once(path, tmp_path):
    before = held()
    with pytest.raises(FileNotFoundError, match="its directory"):
        models.save_async(MODEL, tmp_path / "no" / "x")
    with raises_errno(errno.EINVAL, "not a regular file"):
        models.save_async(MODEL, tmp_path)
    with raises_errno(errno.ENOENT, "the path is empty"):
        models.save_async(MODEL, "")
    with pytest.raises(TypeError, match=r"a builtins\.list"):
        models.save_async({"a": [1]}, path)
    with pytest.raises(ValueError, match="invalid exporter"):
        models.save_async(MODEL, path, exporter="none")
    assert held() == before and threading.active_count() == 1


_EXIT = """
import os, sys, threading
import numpy as np
from dmabuf import safetensors
gate = threading.Event()
class Last:  # what ends at exit: the save is still running then
    def __del__(self): gate.set()
threading.Timer(0, lambda: (threading.main_thread().join(), gate.set())).start()
save = lambda: safetensors.save_async(
    {"a": np.full(3 << 20, 7, "u1")}, sys.argv[1], progress=lambda *_: gate.wait())
if sys.argv[2] == "daemon":
    one = threading.Thread(target=save, daemon=True)
    one.start()
    one.join()
else:
    save()
assert not gate.is_set()
"""


@pytest.mark.parametrize("where", ["main", "daemon"])
def test_a_process_that_ends_waits_for_its_saves(path, where):
    in_child(_EXIT, path, where)
    assert_holds(path, {"a": np.full(3 << 20, 7, "u1")})


def test_a_child_of_a_fork_does_not_wait_for_its_parents_save(path):
    gate = Gate()
    handle = models.save_async(MODEL, path, progress=gate)
    assert gate.reached.wait(PATIENCE)

    def child():
        with pytest.raises(dmabuf.ClosedError, match="runs in the process that forked"):
            handle.result()
        models.save_async({"child": some(9, 1)}, path).result(PATIENCE)

    forking.in_child(child)
    assert_holds(path, {"child": some(9, 1)})
    gate.open()
    handle.result()
    assert_holds(path, MODEL)


_KILLED = """
import sys
import numpy as np
from dmabuf import safetensors
value = {"a": np.full(6 << 20, 1, "u1")}
print("ready", flush=True)
for step in range(1 << 30):
    value["a"][:] = step % 251
    if sys.argv[2] == "async":
        safetensors.save_async(value, sys.argv[1])
        if step % 3 == 0:
            safetensors.save_async(value, sys.argv[1]).result()
    else:
        safetensors.save(value, sys.argv[1])
"""


@pytest.mark.parametrize("how", ["async", "sync"])
def test_a_kill_at_any_moment_leaves_a_whole_file(path, how):
    chance = random.Random(7)
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", _KILLED, path, how], stdout=subprocess.PIPE)
        with child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(chance.random() * 0.3)  # any moment is as good
            child.kill()
        assert child.returncode == -signal.SIGKILL
        found = safetensors.numpy.load_file(path)
        if set(found) == {"a"}:
            assert len(found["a"]) == 6 << 20 and (found["a"] == found["a"][0]).all()
        else:
            assert_holds(path, OLD)
        for one in os.listdir(path.parent):  # between link and rename
            assert one == path.name or one.startswith(".dmabuf-")


# -- shards


def shards_of(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


def test_shards_and_their_index(tmp_path):
    calls = []
    tensors = {f"{number}": some(MIB - number, number) for number in range(7)}
    done = models.save_sharded(
        tensors,
        tmp_path / "new" / "model",
        max_shard_size="2MiB",
        metadata={"format": "np"},
        progress=lambda *done: calls.append(done),
    )
    folder = tmp_path / "new" / "model"
    names = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
    assert shards_of(folder) == names and len(done) == 4
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(one.nbytes for one in tensors.values())}
    for name in tensors:
        shard = folder / index["weight_map"][name]
        with safetensors.safe_open(shard, "np") as file:
            assert file.metadata() == {"format": "np"}
            assert file.get_tensor(name).tobytes() == tensors[name].tobytes()
    size = sum((folder / name).stat().st_size for name in names)
    assert calls[-1] == (size, size) and calls == sorted(calls)
    model = models.load(folder, framework="np")
    assert {name: value.tobytes() for name, value in model.items()} == {
        name: value.tobytes() for name, value in tensors.items()
    }


def test_a_tensor_that_is_larger_than_a_shard_has_one_of_its_own(tmp_path):
    tensors = {"a": some(10, 1), "b": some(5000, 2), "c": some(10, 3)}
    models.save_sharded(tensors, tmp_path, max_shard_size=1000, name="diffusion_pytorch_model")
    assert [len(safetensors.numpy.load_file(tmp_path / one)) for one in shards_of(tmp_path)] == [
        1,
        1,
        1,
    ]
    assert_holds_folder(tmp_path, tensors)


_SHARDS = """
import resource, sys
import numpy as np
from dmabuf import safetensors
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
model = {str(number): np.full(1000 + number % 7, number, "<u4") for number in range(300)}
safetensors.save_sharded(model, sys.argv[1], max_shard_size=1)
"""


def test_more_shards_than_descriptors(tmp_path):
    in_child(_SHARDS, tmp_path)
    tensors = {str(number): np.full(1000 + number % 7, number, "<u4") for number in range(300)}
    assert_holds_folder(tmp_path, tensors)
    assert len(os.listdir(tmp_path)) == 301


def assert_holds_folder(folder, tensors):
    model = models.load(folder, framework="np")
    assert set(model) == set(tensors)
    for name, value in tensors.items():
        assert model[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_new_model_takes_the_place_of_the_old_one(tmp_path, before, after):
    """Whatever number of shards each has, and no file of the old one is left."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.safetensors").write_bytes(safetensors.numpy.save(OLD))
    for seed, count in enumerate((before, after, after)):
        tensors = {f"{number}": some(100, 10 * seed + number) for number in range(count)}
        models.save_sharded(tensors, f"{tmp_path}/", max_shard_size=100)
        assert_holds_folder(tmp_path, tensors)
        left = set(os.listdir(tmp_path)) - {"config.json", "other.safetensors"}
        assert len(left) == (count + 1 if count > 1 else 1), left


_STEPS = ("link", "rename", "unlink", "fsync")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_at_every_step_there_is_the_old_model_or_the_new(tmp_path, monkeypatch, before, after):
    """As a reader finds it, or a crash leaves it, at each system call that changes a name."""
    old = {f"{number}": some(100, number) for number in range(before)}
    new = {f"{number}": some(100, 10 + number) for number in range(after)}
    models.save_sharded(old, tmp_path, max_shard_size=100)
    seen = []

    def look():
        model = models.load(tmp_path, framework="np")
        found = {name: value.tobytes() for name, value in model.items()}
        states = [{name: one.tobytes() for name, one in state.items()} for state in (old, new)]
        seen.append(states.index(found))

    for name in _STEPS:
        real = getattr(os, name)

        def step(*arguments, real=real, **how):
            look()
            answer = real(*arguments, **how)
            look()
            return answer

        monkeypatch.setattr(os, name, step)
    models.save_sharded(new, tmp_path, max_shard_size=100)
    monkeypatch.undo()
    assert seen == sorted(seen) and set(seen) == {0, 1}


@pytest.mark.parametrize("number", range(1, 4))
def test_shards_that_cannot_all_be_put_in_place(tmp_path, monkeypatch, number):
    old = {f"{at}": some(100, at) for at in range(2)}
    models.save_sharded(old, tmp_path, max_shard_size=100)
    before, real, calls = sorted(os.listdir(tmp_path)), os.link, []

    def link(*arguments, **how):
        calls.append(arguments)
        if len(calls) == number:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(*arguments, **how)

    monkeypatch.setattr(os, "link", link)
    with raises_errno(errno.EDQUOT):
        models.save_sharded({"x": some(90, 1), "y": some(90, 2)}, tmp_path, max_shard_size=100)
    assert sorted(os.listdir(tmp_path)) == before
    assert_holds_folder(tmp_path, old)


@pytest.mark.parametrize(("number", "new"), [(1, False), (2, True), (3, True)])
def test_a_folder_that_cannot_be_flushed_has_a_whole_model(tmp_path, monkeypatch, number, new):
    """Once the index names the new shards, an error does not remove them."""
    old = {f"{at}": some(100, at) for at in range(2)}
    models.save_sharded(old, tmp_path, max_shard_size=100)
    now, real, calls = {"x": some(90, 1), "y": some(90, 2)}, os.fsync, []

    def fsync(fd):
        calls.append(fd) if stat.S_ISDIR(os.fstat(fd).st_mode) else None
        if len(calls) == number and fd == calls[-1]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with raises_errno(errno.EIO):
        models.save_sharded(now, tmp_path, max_shard_size=100)
    assert_holds_folder(tmp_path, now if new else old)


def test_two_saves_into_one_folder(tmp_path, monkeypatch):
    """The second to end finds the names of the first, and leaves its model."""
    first = {"a": some(90, 1), "b": some(90, 2)}
    real = saving.write

    def write(*arguments):
        monkeypatch.undo()
        models.save_sharded(first, tmp_path, max_shard_size=100)
        return real(*arguments)

    monkeypatch.setattr("dmabuf.safetensors.checkpoints.write", write)
    with pytest.raises(FileExistsError, match="another save has written it meanwhile"):
        models.save_sharded({"c": some(90, 3), "d": some(90, 4)}, tmp_path, max_shard_size=100)
    assert_holds_folder(tmp_path, first)


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"max_shard_size": 0}, ValueError, "at least one byte"),
        ({"max_shard_size": "5 GB"[:1] + "x"}, ValueError, "invalid max_shard_size"),
        ({"name": "../x"}, ValueError, "invalid name"),
        ({"name": ""}, ValueError, "invalid name"),
        ({"name": ".x"}, ValueError, "invalid name"),
        ({"tensors": {"a": 1}}, TypeError, r"a builtins\.int"),
        ({"require": "magic"}, ValueError, "require"),
    ],
)
def test_what_save_sharded_refuses(tmp_path, how, error, match):
    with pytest.raises(error, match=match):
        models.save_sharded(**({"tensors": MODEL, "folder": tmp_path / "new"} | how))
    assert not (tmp_path / "new").exists()
