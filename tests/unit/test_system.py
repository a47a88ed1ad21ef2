"""A census of made-up machines."""

import errno
import os
from pathlib import Path

import pytest

from dmabuf import _procfs, system
from dmabuf.system import Process, Total
from tests.unit.fake_machine import FakeMachine, Made, statted

KIB = 1024
KTHREAD = 0x00200000


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def look(machine: FakeMachine) -> system.Census:
    return system.census(str(machine.root))


def refuse(monkeypatch: pytest.MonkeyPatch, *folders: Path, call: str = "listdir") -> None:
    """As the kernel refuses to show a process of others."""
    real = getattr(os, call)

    def refused(path, *arguments):
        if any(str(path).startswith(f"{folder}/fd") for folder in folders):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *arguments)

    monkeypatch.setattr(os, call, refused)


def test_descriptors_and_mappings(machine: FakeMachine) -> None:
    frames = Made(7, 64 * KIB, "system", "frames\nexp_name:\tforged", references=6)
    other = Made(8, 16 * KIB, "drm", references=2, devices=("0000:01:00.0",))
    machine.process(20, "cam era) S", fds={5: frames, 3: frames, 6: other})
    maps = [frames.mapped(0x7F1000000000, 64 * KIB), frames.mapped(0x7F2000000000, 4 * KIB)]
    machine.process(21, "reader", fds={4: frames}, maps=maps, started=7)
    machine.list(frames, other)
    census = look(machine)
    assert (census.processes, census.hidden, census.complete) == (3, 0, True)
    assert census.refusals == ()
    first, second = census.buffers
    assert (first.inode, first.size, first.exporter) == (7, 64 * KIB, "system")
    assert first.name == "frames\nexp_name:\tforged"
    assert (first.exact, first.references, first.devices) == (True, 6, ())
    camera, reader = first.holders
    assert camera.process == Process(20, 100, "cam era) S")
    assert camera.process.command == "cam era) S"
    assert (camera.fds, camera.mappings) == ((3, 5), ())
    assert reader.fds == (4,)
    assert [one.nbytes for one in reader.mappings] == [64 * KIB, 4 * KIB]
    assert first.unseen == 6 - 5
    assert (second.devices, second.name, second.unseen) == (("0000:01:00.0",), None, 1)
    # Once for each buffer, however often a process holds it.
    assert census.total == Total(80 * KIB, 2, 32 * KIB + 16 * KIB)
    assert census.by_process() == {
        camera.process: Total(80 * KIB, 2, 48 * KIB),
        reader.process: Total(64 * KIB, 1, 32 * KIB),
    }
    assert census.by_exporter() == {
        "system": Total(64 * KIB, 1, 32 * KIB),
        "drm": Total(16 * KIB, 1, 16 * KIB),
    }
    assert list(census.by_exporter()) == ["system", "drm"]
    only = census.of(lambda buffer: buffer.exporter == "drm")
    assert (only.buffers, only.processes) == ((second,), 3)


def test_a_process_is_the_same_whatever_its_command(machine: FakeMachine) -> None:
    assert Process(5, 100, "sh") == Process(5, 100, "python3")
    assert Process(5, 100, "sh") != Process(5, 101, "sh")
    assert Total(5, 2, 3) - Total(8, 1, 3) == Total(-3, 1, 0)


def test_what_no_process_holds(machine: FakeMachine) -> None:
    machine.list(Made(3, 8 * KIB, references=2, devices=("vgem",)))
    (buffer,) = look(machine).buffers
    assert (buffer.holders, buffer.unseen, buffer.devices) == ((), 2, ("vgem",))
    assert look(machine).by_process() == {None: Total(8 * KIB, 1, 8 * KIB)}


def test_no_dma_buf_at_all(machine: FakeMachine) -> None:
    machine.list()
    census = look(machine)
    assert (census.buffers, census.total, census.refusals) == ((), Total(), ())


def test_what_comes_and_goes_during_the_look(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what no process was seen to hold, only what was there before and after is told."""
    stays, gone, comes, held = (Made(inode, inode * KIB) for inode in (1, 2, 3, 4))
    held_before = Made(5, 5 * KIB)
    machine.process(20, fds={3: held, 4: held_before})
    lists = [[stays, gone, held_before], [stays, comes, held]]
    real = _procfs.listed

    def listed(root: str):
        machine.list(*lists.pop(0))
        return real(root)

    monkeypatch.setattr(_procfs, "listed", listed)
    assert [buffer.inode for buffer in look(machine).buffers] == [5, 4, 1]
    assert lists == []


@pytest.mark.parametrize("missing", ["fd/3", "fdinfo/3", "stat"])
def test_what_vanishes_is_no_error(machine: FakeMachine, missing: str) -> None:
    path = machine.process(20, fds={3: Made(1), 4: Made(2)})
    if missing == "fd/3":
        (path / "fdinfo/3").unlink()
    (path / missing).unlink()
    inodes = {"stat": set()}.get(missing, {2})
    assert {buffer.inode for buffer in look(machine).buffers} == inodes


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ESRCH])
@pytest.mark.parametrize("at", ["fd", "maps", "stat"])
def test_a_process_that_ends(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, at: str, error: int
) -> None:
    machine.process(20, fds={3: Made(1)})
    machine.process(21, fds={3: Made(2)})
    gone = f"{machine.root}/proc/20/{at}"
    listdir, text = os.listdir, _procfs.text

    def fail(real):
        def called(path):
            if path == gone:
                raise OSError(error, os.strerror(error), path)
            return real(path)

        return called

    monkeypatch.setattr(os, "listdir", fail(listdir))
    monkeypatch.setattr(_procfs, "text", fail(text))
    census = look(machine)
    assert [buffer.inode for buffer in census.buffers] == [2]
    assert census.hidden == 0


def test_an_error_of_another_kind_is_told(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.process(20, fds={3: Made(1)})

    def listdir(path):
        raise OSError(errno.EMFILE, "Too many open files", path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr(os, "listdir", listdir)
        look(machine)


@pytest.mark.parametrize("call", ["listdir", "readlink"])
def test_processes_that_may_not_be_looked_into(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Kernel threads and what has ended hold nothing, and are not missed."""
    shared = Made(1, references=2)
    machine.process(20, fds={3: shared})
    hidden = [
        machine.process(30, "other's", fds={3: shared}),
        machine.process(31, "kworker/0:1", flags=KTHREAD),
        machine.process(32, "ended", state="Z"),
        machine.process(33, "threads left", state="Z", threads=2),
    ]
    for path in hidden[1:]:
        (path / "fd/9").symlink_to("/dmabuf:") if call == "readlink" else None
    machine.list(shared)
    refuse(monkeypatch, *hidden, call=call)
    census = look(machine)
    assert (census.processes, census.hidden, census.complete) == (4, 2, False)
    assert [holder.process.pid for holder in census.buffers[0].holders] == [20]
    assert census.buffers[0].unseen == 1
    assert census.refusals == (
        "2 of 4 processes could not be looked into, and what they hold is missing or not told as "
        "theirs: root, or CAP_SYS_PTRACE, sees all",
    )


def test_processes_that_are_not_listed(machine: FakeMachine) -> None:
    machine.list()
    one = machine.root / "proc/1"
    one.rename(machine.root / "proc/2")
    census = look(machine)
    assert not census.complete
    assert "does not list the processes of others (hidepid)" in census.refusals[0]


def test_a_container(machine: FakeMachine) -> None:
    machine.list()
    link = machine.root / "proc/1/ns/pid"
    link.unlink()
    link.symlink_to("pid:[4026532000]")
    census = look(machine)
    assert not census.complete
    assert "has the processes of this container alone" in census.refusals[0]
    link.unlink()  # as for those who may not look into process 1
    (machine.root / "proc/self/ns").mkdir(parents=True)
    (machine.root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
    assert look(machine).complete


def test_kernel_threads_are_no_processes(machine: FakeMachine) -> None:
    machine.process(2, "kthreadd", flags=KTHREAD)
    machine.process(9, "ended", state="Z")
    assert look(machine).processes == 2


def test_a_process_whose_first_thread_has_ended(machine: FakeMachine) -> None:
    """Its descriptors and mappings are those of the threads that are left."""
    machine.process(20, "early", state="Z", threads=2)
    (machine.root / "proc/20/task/20").mkdir(parents=True)
    made = Made(1, references=2)
    thread = machine.process(21, "thread", fds={3: made}, folder="20/task/21")
    (thread / "maps").write_text(made.mapped(4096, 4096))
    with statted(thread / "fd/3", made):
        (buffer,) = look(machine).buffers
    (holder,) = buffer.holders
    assert str(holder.process) == "early[20]"
    assert (holder.fds, len(holder.mappings)) == ((3,), 1)


def test_a_file_that_is_called_like_a_dma_buf(machine: FakeMachine) -> None:
    made = Made(1)
    real = machine.process(20, fds={3: made})
    path = machine.process(21, fds={3: made}, maps=[made.mapped(4096, 4096, "fe:01")])
    (path / "fdinfo/3").write_text("pos:\t0\nflags:\t02\nmnt_id:\t5\nino:\t1\n")
    machine.list(made)
    with statted(real / "fd/3", made):  # the file is not asked
        census = look(machine)
    (buffer,) = census.buffers
    assert [holder.process.pid for holder in buffer.holders] == [20]


def test_nothing_but_a_mapping(machine: FakeMachine) -> None:
    """For those who may not read debugfs: what is mapped is the least it can be."""
    made, held = Made(5, 64 * KIB, "drm", "x\ny"), Made(6)
    maps = [made.mapped(1 << 32, 8 * KIB), made.mapped(1 << 33, 4 * KIB)]
    machine.process(20, maps=[*maps, Made(7, name="evil").mapped(1 << 34, 1 << 40, "00:1f")])
    census = look(machine)  # a file may have such a path, and nothing tells which are files
    assert census.buffers == ()
    assert census.refusals[0] == (
        "mappings (3) that may be of dma-bufs, or of files called like one, are left out: any "
        "dma-buf's descriptor that you may look at tells them apart, as does the kernel's list"
    )
    fd = machine.process(21, fds={3: held}) / "fd/3"
    with statted(fd, held):
        census = look(machine)
    assert [one.inode for one in census.buffers] == [5, 6]
    assert all("left out" not in refusal for refusal in census.refusals)
    buffer = census.buffers[0]
    assert (buffer.size, buffer.exact, buffer.exporter) == (8 * KIB, False, None)
    assert (buffer.name, buffer.references, buffer.unseen) == ("x\ny", None, 0)
    machine.process(21)
    machine.list(made)
    (buffer,) = look(machine).buffers
    assert (buffer.size, buffer.exact, buffer.exporter) == (64 * KIB, True, "drm")
    machine.list()  # a file of that name: the kernel knows no such dma-buf
    assert look(machine).buffers == ()


def test_debugfs_that_is_not_mounted(machine: FakeMachine) -> None:
    (refusal,) = look(machine).refusals
    assert refusal == (
        f"attached devices, and buffers of no process seen, are told in {machine.root}/sys/kernel/"
        "debug/dma_buf/bufinfo alone: debugfs is not mounted: mount -t debugfs debugfs "
        f"{machine.root}/sys/kernel/debug"
    )
    (machine.root / "sys/kernel/debug").rmdir()
    assert "debugfs is not mounted" in look(machine).refusals[0]


def test_debugfs_without_dma_bufs(machine: FakeMachine) -> None:
    (machine.root / "sys/kernel/debug/block").mkdir()
    assert "this kernel has no such file" in look(machine).refusals[0]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (errno.EACCES, "Permission denied: look as root"),
        (errno.EPERM, "Operation not permitted: the kernel is locked down (kernel_lockdown(7))"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_debugfs_that_cannot_be_read(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, error: int, why: str
) -> None:
    made = Made(1, references=3)
    machine.process(20, fds={3: made})
    machine.list(made)
    text = _procfs.text

    def refused(path):
        if path.endswith("bufinfo"):
            raise OSError(error, os.strerror(error), path)
        return text(path)

    monkeypatch.setattr(_procfs, "text", refused)
    census = look(machine)
    assert census.refusals[0].endswith(f"bufinfo alone: {why}")
    assert census.complete  # every process was
    assert (census.buffers[0].devices, census.buffers[0].unseen) == (None, 2)


def test_the_statistics_of_androids_kernels(machine: FakeMachine) -> None:
    folder = machine.root / "sys/kernel/dmabuf/buffers"
    for inode, size in ((1, "4096\n"), (2, "65536\n"), (3, "")):  # the third has just gone
        (folder / str(inode)).mkdir(parents=True)
        (folder / str(inode) / "size").write_text(size)
        (folder / str(inode) / "exporter_name").write_text("system\n")
    machine.process(20, fds={3: Made(1, references=1)})
    census = look(machine)
    assert [(one.inode, one.size, one.exporter) for one in census.buffers] == [
        (2, 65536, "system"),
        (1, 4096, "system"),
    ]
    assert [len(one.holders) for one in census.buffers] == [0, 1]
    assert census.refusals[0].startswith("attached devices are told in ")


def test_no_proc(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        system.census(str(tmp_path))
    (tmp_path / "proc").mkdir()
    with pytest.raises(FileNotFoundError, match="mount -t proc proc /proc"):
        system.census(str(tmp_path))


def test_this_machine() -> None:
    """Whatever it has: this process sees itself."""
    census = system.census()
    assert census.processes >= 1
    assert census.hidden < census.processes
