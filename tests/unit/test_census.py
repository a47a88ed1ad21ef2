"""A census of made-up machines, whose labels and commands try to be something else."""

import builtins
import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dmabuf.inspect import Census, Process, Total, take_census
from tests.unit.fake_machine import FakeMachine, Made, statted

KIB = 1024
KTHREAD = 0x00200000


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def look(machine: FakeMachine) -> Census:
    return take_census(str(machine.root))


def inodes(machine: FakeMachine) -> list[int]:
    return [buffer.inode for buffer in look(machine).buffers]


def failing(monkeypatch: pytest.MonkeyPatch, number: int, wanted, *calls: str) -> None:
    """Have `open`, `listdir` or `readlink` fail for each path of which `wanted` is true."""
    for call in calls:
        module = builtins if call == "open" else os
        real = getattr(module, call)

        def failing(path, *arguments, real=real, **how):
            if wanted(str(path)):
                raise OSError(number, os.strerror(number), path)
            return real(path, *arguments, **how)

        monkeypatch.setattr(module, call, failing)


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
    # Each buffer counts once, however often a process holds it.
    assert census.total == Total(80 * KIB, 2, 32 * KIB + 16 * KIB)
    assert census.by_process() == {
        camera.process: Total(80 * KIB, 2, 48 * KIB),
        reader.process: Total(64 * KIB, 1, 32 * KIB),
    }
    exporters = {"system": Total(64 * KIB, 1, 32 * KIB), "drm": Total(16 * KIB, 1, 16 * KIB)}
    assert list(census.by_exporter().items()) == list(exporters.items())
    only = census.of(lambda buffer: buffer.exporter == "drm")
    assert (only.buffers, only.processes) == ((second,), 3)


def test_records_compare_and_subtract() -> None:
    assert Process(5, 100, "sh") == Process(5, 100, "python3")
    assert Process(5, 100, "sh") != Process(5, 101, "sh")
    assert Total(5, 2, 3) - Total(8, 1, 3) == Total(-3, 1, 0)


def test_what_no_process_holds(machine: FakeMachine) -> None:
    machine.list()
    census = look(machine)
    assert (census.buffers, census.total, census.refusals) == ((), Total(), ())
    machine.list(Made(3, 8 * KIB, references=2, devices=("vgem",)))
    (buffer,) = look(machine).buffers
    assert (buffer.holders, buffer.unseen, buffer.devices) == ((), 2, ("vgem",))
    assert look(machine).by_process() == {None: Total(8 * KIB, 1, 8 * KIB)}


def test_what_comes_and_goes_during_the_census(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer without a process counts only if it was there before and after."""
    stays, gone, comes, held = (Made(inode, inode * KIB) for inode in (1, 2, 3, 4))
    held_before = Made(5, 5 * KIB)
    machine.process(20, fds={3: held, 4: held_before})
    lists = [[stays, gone, held_before], [stays, comes, held]]
    machine.list()
    real = builtins.open

    def opened(path, *arguments, **how):
        if str(path).endswith("bufinfo") and arguments[:1] == ("rb",):
            machine.list(*lists.pop(0))
        return real(path, *arguments, **how)

    monkeypatch.setattr(builtins, "open", opened)
    assert inodes(machine) == [5, 4, 1]
    assert lists == []


@pytest.mark.parametrize("missing", ["fd/3", "fdinfo/3", "stat"])
def test_what_vanishes_is_not_an_error(machine: FakeMachine, missing: str) -> None:
    path = machine.process(20, fds={3: Made(1), 4: Made(2)})
    if missing == "fd/3":
        (path / "fdinfo/3").unlink()
    (path / missing).unlink()
    assert inodes(machine) == ([] if missing == "stat" else [2])


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESRCH])
@pytest.mark.parametrize("at", ["fd", "maps", "stat"])
def test_a_process_that_ends(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, at: str, number: int
) -> None:
    machine.process(20, fds={3: Made(1)})
    machine.process(21, fds={3: Made(2)})
    gone = f"{machine.root}/proc/20/{at}"
    failing(monkeypatch, number, lambda path: path == gone, "listdir", "open")
    census = look(machine)
    assert [buffer.inode for buffer in census.buffers] == [2]
    assert census.hidden == 0


def test_any_other_error_is_raised(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        failing(patch, errno.EMFILE, lambda path: path.endswith("/proc"), "listdir")
        look(machine)


@pytest.mark.parametrize("call", ["listdir", "readlink"])
def test_processes_that_may_not_be_examined(
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
    folders = tuple(f"{folder}/fd" for folder in hidden)
    failing(monkeypatch, errno.EACCES, lambda path: path.startswith(folders), call)
    census = look(machine)
    assert (census.processes, census.hidden, census.complete) == (4, 2, False)
    assert [holder.process.pid for holder in census.buffers[0].holders] == [20]
    assert census.buffers[0].unseen == 1
    (refusal,) = census.refusals
    assert refusal.startswith("2 of 4 processes could not be examined: permission denied")


def test_processes_that_are_not_listed(machine: FakeMachine) -> None:
    machine.list()
    link = machine.root / "proc/1/ns/pid"
    link.unlink()
    link.symlink_to("pid:[4026532000]")
    census = look(machine)
    assert not census.complete
    assert "lists only this container's processes" in census.refusals[0]
    link.unlink()  # as for a user who may not examine process 1
    (machine.root / "proc/self/ns").mkdir(parents=True)
    (machine.root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
    assert look(machine).complete
    (machine.root / "proc/1").rename(machine.root / "proc/2")
    census = look(machine)
    assert not census.complete
    assert "hides other users' processes (hidepid)" in census.refusals[0]


def test_a_process_whose_first_thread_has_ended(machine: FakeMachine) -> None:
    """Its descriptors and mappings are those of the remaining threads."""
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


def test_a_file_that_is_named_like_a_dma_buf(machine: FakeMachine) -> None:
    made = Made(1)
    real = machine.process(20, fds={3: made})
    path = machine.process(21, fds={3: made}, maps=[made.mapped(4096, 4096, "fe:01")])
    (path / "fdinfo/3").write_text("pos:\t0\nflags:\t02\nmnt_id:\t5\nino:\t1\n")
    machine.list(made)
    with statted(real / "fd/3", made):  # the file is not touched
        (buffer,) = look(machine).buffers
    assert [holder.process.pid for holder in buffer.holders] == [20]


def test_only_a_mapping(machine: FakeMachine) -> None:
    """For a user who may not read debugfs, the mapping is a lower bound of the size."""
    made, held = Made(5, 64 * KIB, "drm", "x\ny"), Made(6)
    maps = [made.mapped(1 << 32, 8 * KIB), made.mapped(1 << 33, 4 * KIB)]
    machine.process(20, maps=[*maps, Made(7, name="evil").mapped(1 << 34, 1 << 40, "00:1f")])
    census = look(machine)  # an ordinary file may have such a path, and nothing tells which
    assert census.buffers == ()
    assert census.refusals[0].startswith("3 mappings may be of dma-bufs or of files")
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
    machine.list()  # a file of that name: the kernel lists no such dma-buf
    assert inodes(machine) == []


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.EACCES, "Permission denied; run as root"),
        (errno.EPERM, "Operation not permitted: the kernel is locked down (kernel_lockdown(7))"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_debugfs_that_cannot_be_read(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, number: int, why: str
) -> None:
    made = Made(1, references=3)
    machine.process(20, fds={3: made})
    machine.list(made)
    failing(monkeypatch, number, lambda path: path.endswith("bufinfo"), "open")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    census = look(machine)
    assert census.refusals[0].endswith(f"bufinfo: {why}")
    assert census.complete  # every process was examined
    assert (census.buffers[0].devices, census.buffers[0].unseen) == (None, 2)


def test_root_is_not_told_to_become_root(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, errno.EACCES, lambda path: path.endswith("bufinfo"), "open")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (refusal,) = look(machine).refusals
    assert refusal.endswith("Permission denied; refused to root too: run outside this container")


def test_debugfs_that_is_missing(machine: FakeMachine) -> None:
    folder = machine.root / "sys/kernel/debug"
    (refusal,) = look(machine).refusals
    assert refusal.endswith(f"debugfs is not mounted; mount -t debugfs debugfs {folder}")
    (folder / "block").mkdir()
    assert "CONFIG_DEBUG_FS" in look(machine).refusals[0]
    (folder / "block").rmdir()
    folder.rmdir()
    assert "debugfs is not mounted" in look(machine).refusals[0]


def test_no_proc(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        take_census(str(tmp_path))
    (tmp_path / "proc").mkdir()
    with pytest.raises(FileNotFoundError, match="mount -t proc proc /proc"):
        take_census(str(tmp_path))


def test_this_machine() -> None:
    """Whatever it has, this process sees itself."""
    census = take_census()
    assert census.processes >= 1
    assert census.hidden < census.processes


# -- labels and commands: a holder of a buffer may set a label to any bytes but NUL

BUFINFO = """\

Dma-buf Objects:
size    \tflags   \tmode    \tcount   \texp_name\tino     \tname
00065536\t00000002\t02080007\t00000005\tdrm\t00000004\t<none>
\tAttached Devices:
Total 0 devices attached

00065536\t00000002\t02080007\t00000006\tsystem\t00000003\t<none>
\tkernel fence:drm_sched gfx seq 5 unsignalled
\tAttached Devices:
\tvgem
Total 1 devices attached

01048576\t00000002\t02080007\t00000001\tudmabuf\t00000002\ta
Total 0 devices attached
\tAttached Devices:
Total 0 devices attached


Total 3 objects, 1179648 bytes
"""
"""As Linux 7.3 wrote it; the fence is from the source of Linux 6.12 (dma_resv_describe)."""

LINES = ("\n", "\t", "Total 1 devices attached", "\tAttached Devices:", "\tgpu", "name:\t", "x",
         "\nexp_name:\tdrm", "size:\t1", "\tread fence:", "00004096\t", "\x1b[2J", "\r", "\x85",
         "é", "\u2028", "\\", "\\012", "ino:\t9", "\x1c", "\udcff")  # fmt: skip


def short(limit: int):
    """Text of at most `limit` bytes, without NUL, that may be any line the kernel writes."""
    part = st.sampled_from(LINES) | st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4
    )
    joined = st.lists(part, max_size=8).map("".join)
    return joined.map(lambda text: text.encode(errors="surrogateescape")[:limit]).map(os.fsdecode)


dma_bufs = st.builds(
    Made,
    inode=st.integers(0, 2**64 - 1),
    size=st.integers(1, 2**63),
    exporter=st.sampled_from(["system", "udmabuf", "drm", "a b"]),
    name=st.none() | short(31),
    references=st.integers(0, 10**9),
    devices=st.lists(st.sampled_from(["vgem", "0000:01:00.0"]), max_size=3).map(tuple),
    fences=st.lists(st.just("drm_sched gfx seq 5 signalled"), max_size=2).map(tuple),
)


def found(fill) -> Census:
    """The census of a machine that `fill` was called with."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        machine = FakeMachine(Path(folder))
        fill(machine)
        return look(machine)


def test_a_list_that_a_kernel_wrote(machine: FakeMachine) -> None:
    machine.list()
    (machine.root / "sys/kernel/debug/dma_buf/bufinfo").write_text(BUFINFO)
    assert [(b.inode, b.size, b.exporter, b.name, b.unseen, b.devices) for b in
            look(machine).buffers] == [
        (2, 1 << 20, "udmabuf", "a\nTotal 0 devices attached", 1, ()),
        (3, 65536, "system", None, 6, ("vgem",)),
        (4, 65536, "drm", None, 5, ()),
    ]  # fmt: skip


@settings(max_examples=60)
@given(st.lists(dma_bufs, max_size=3, unique_by=lambda made: made.inode))
@example([Made(1, name="x\nexp_name:\tdrm\nname:\ty")])
@example([Made(1, name="a\n\tAttached Devices:\n\tgpu"), Made(2, devices=("vgem",))])
@example([Made(1, name="a\nTotal 1 devices attached"), Made(2)])
@example([Made(1, name="longer\n\tAttached Devices:\nTotal 0 devices attached", devices=("a",))])
@example([Made(1, name="\n1\t1\t1\t1\tx\t00000009\ty"), Made(2)])
@example([Made(1, name="a\n\tread fence:", fences=("one",))])
def test_a_label_forges_nothing(made: list[Made]) -> None:
    """Neither in fdinfo nor in debugfs."""

    def held(machine: FakeMachine) -> None:
        machine.list(*made)
        machine.process(20, fds=dict(enumerate(made, start=3)))

    by_inode = {one.inode: one for one in made}
    for fill, in_hand in ((held, True), (lambda machine: machine.list(*made), False)):
        census = found(fill)
        assert {buffer.inode for buffer in census.buffers} == set(by_inode)
        for buffer in census.buffers:
            one = by_inode[buffer.inode]
            assert (buffer.size, buffer.exporter, buffer.references, buffer.devices) == (
                one.size, one.exporter, one.references, one.devices
            )  # fmt: skip
            if buffer.name == one.name or (not in_hand and one.name == "<none>"):
                continue
            # A label that ends like a fence is cut there in debugfs, and nowhere else.
            assert not in_hand and one.name.startswith(buffer.name + "\n\t")
            assert "fence:" in one.name


@settings(max_examples=60)
@given(short(31), st.integers(0, 2**47), st.integers(1, 2**40), st.integers(0, 2**63))
@example("x\n7f00-7f01 rw-s 0 00:0e 9  /dmabuf:", 0, 1, 1)
def test_a_label_in_maps(label: str, address: int, nbytes: int, inode: int) -> None:
    label = label.replace("\\", "/").lstrip()
    made = Made(inode, name=label)
    around = "7f00-7f01 r--p 00000000 fe:00 4   /srv/dmabuf:x\n7f01-7f02 rw-p 0 00:00 0\n"

    def mapped(machine: FakeMachine) -> None:
        machine.list(made)
        machine.process(20, maps=[around, made.mapped(address, nbytes), around])

    (buffer,) = found(mapped).buffers
    (holder,) = buffer.holders
    (mapping,) = holder.mappings
    expected = (address, nbytes, inode, label or None)
    assert (mapping.address, mapping.nbytes, mapping.inode, mapping.name) == expected


@settings(max_examples=60)
@given(short(15), st.integers(1, 10**5))
@example(") Z 1 1 1", 1)
def test_a_command_forges_nothing(command: str, threads: int) -> None:
    made = Made(1)
    census = found(
        lambda machine: machine.process(20, command, fds={3: made}, threads=threads, started=4711)
    )
    (holder,) = census.buffers[0].holders
    assert (holder.process.command, holder.process.started) == (command, 4711)


@settings(max_examples=60)
@given(text=st.lists(st.sampled_from(LINES) | st.text(max_size=9), max_size=9).map("".join))
@example(text=BUFINFO[: len(BUFINFO) // 2])
@example(text="1-2 rw-s 0 zz:0e 5 /dmabuf:\n-  0 : x /dmabuf:")
@example(text="1 (x) S 1 2 3")
@example(text="exp_name:\tx\nino:\t²\nsize:\tmany")
def test_any_text_is_read(text: str) -> None:
    """Whatever a kernel writes, the census does not fail."""

    def fill(machine: FakeMachine) -> None:
        machine.list()
        path = machine.process(20, fds={3: Made(1)})
        for name in ("fdinfo/3", "maps", "stat", "../../sys/kernel/debug/dma_buf/bufinfo"):
            (path / name).write_bytes(text.encode(errors="surrogateescape"))

    found(fill)
