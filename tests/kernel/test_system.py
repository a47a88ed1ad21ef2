"""The census of a machine with real dma-bufs, held in every way there is."""

import contextlib
import ctypes
import json
import mmap
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.inspect import SystemBuffer, take_census
from dmabuf.kernel import uapi
from dmabuf.transfer.engine import default_engine
from tests.guards import needs, vgem_node
from tests.kernel.conftest import settled, vgem
from tests.kernel.test_exporters import fdinfo, heap_fd
from tests.support import in_child
from tests.unit.command import dmabuf as command
from tests.unit.command import finish, start

SIZE = 64 * 1024

everything = needs("dma_heap", "udmabuf", "vgem", "root")


@contextlib.contextmanager
def heap(name: str | None = None) -> Iterator[int]:
    """A dma-heap's dma-buf."""
    fd = heap_fd(SIZE, os.O_RDWR)
    try:
        if name is not None:
            uapi.set_name(fd, name.encode())
        yield fd
    finally:
        with contextlib.suppress(OSError):  # the test has closed it
            os.close(fd)


_LOOP = """
import sys
print("ready", flush=True)
for line in sys.stdin:
    more()
    print("done", flush=True)
"""


@contextlib.contextmanager
def child(code: str, *arguments: object, fds: tuple[int, ...] = (), **how: object):
    """A process that has run the code; for each line it is sent, it runs `more` and answers.

    It inherits `fds`.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", f"def more(): pass\n{code}\n{_LOOP}", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=fds,
        text=True,
        **how,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(60)


def of(inode: int) -> SystemBuffer | None:
    """The buffer of that number in a new census."""
    return next((one for one in take_census().buffers if one.inode == inode), None)


def inode_of(fd: int) -> int:
    return os.fstat(fd).st_ino


@everything
def test_buffers_of_each_exporter_and_their_holders():
    with (
        dmabuf.allocate(SIZE, exporter="udmabuf", name="frames") as frames,
        vgem(SIZE) as picture,
        heap() as fd,
        child("", fds=(fd,)) as other,
    ):
        census = take_census()
        assert (census.hidden, census.complete, census.refusals) == (0, True, ())
        found = {one.inode: one for one in census.buffers}
        one = found[inode_of(frames.fileno())]
        assert (one.size, one.exporter, one.name, one.exact) == (SIZE, "udmabuf", "frames", True)
        (holder,) = one.holders
        assert holder.process.pid == os.getpid()
        assert holder.process.command == Path("/proc/self/comm").read_text().rstrip("\n")
        assert holder.fds == (frames.fileno(),)
        assert (one.references, one.unseen, one.devices) == (1, 0, ())
        one = found[inode_of(picture.fileno())]
        assert one.exporter == "drm"
        (holder,) = one.holders
        assert picture.fileno() in holder.fds
        assert [mapping.nbytes for mapping in holder.mappings] == [SIZE]
        assert one.unseen > 0, "its handle in the driver"
        one = found[inode_of(fd)]
        assert (one.size, one.exporter, one.name) == (SIZE, "system", None)
        assert [(held.process.pid, held.fds) for held in one.holders] == [
            (pid, (fd,)) for pid in sorted((os.getpid(), other.pid))
        ]
        assert (one.references, one.unseen) == (2, 0)
        share = census.of(lambda buffer: buffer is one).by_process()
        assert [(total.nbytes, total.share) for total in share.values()] == [(SIZE, SIZE // 2)] * 2
    assert {one.inode for one in take_census().buffers}.isdisjoint(found)


_IMPORT = """
import fcntl, os, struct, sys
card, fd = os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2])
fcntl.ioctl(card, 0xC00C642E, struct.pack("=IIi", 0, 0, fd))  # PRIME_FD_TO_HANDLE
os.close(fd)
"""


@everything
def test_a_device_has_imported_it_and_nobody_else_holds_it():
    with heap("texture") as fd:
        inode = inode_of(fd)
        with child(_IMPORT, vgem_node(), fd, fds=(fd,)):
            os.close(fd)
            one = of(inode)
            assert (one.size, one.exporter, one.name) == (SIZE, "system", "texture")
            assert (one.holders, one.devices) == ((), ("vgem",))
            assert one.unseen == one.references > 0
            assert take_census().by_process()[None].buffers == 1
        assert settled(lambda: of(inode), None) is None


@everything
def test_a_descriptor_under_way_in_a_message():
    ours, theirs = socket.socketpair()
    with ours, theirs, heap() as fd:
        inode = inode_of(fd)
        socket.send_fds(ours, [b"x"], [fd])
        os.close(fd)
        one = of(inode)
        assert (one.holders, one.references, one.unseen) == ((), 1, 1)
        _, (received,), _, _ = socket.recv_fds(theirs, 1, 1)
        one = of(inode)
        assert [held.fds for held in one.holders] == [(received,)]
        assert one.unseen == 0
        os.close(received)


@everything
def test_a_mapping_without_a_descriptor():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with heap("mapped") as fd:
        inode = inode_of(fd)
        address = libc.mmap(None, ctypes.c_size_t(SIZE), 1, mmap.MAP_SHARED, fd, ctypes.c_long(0))
        os.close(fd)
        try:
            one = of(inode)
            (holder,) = one.holders
            assert (holder.process.pid, holder.fds) == (os.getpid(), ())
            assert [(mapped.address, mapped.nbytes) for mapped in holder.mappings] == [
                (address, SIZE)
            ]
            assert (one.size, one.exporter, one.name) == (SIZE, "system", "mapped")
            assert (one.exact, one.references, one.unseen) == (True, 1, 0)
        finally:
            libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(SIZE))
        assert settled(lambda: of(inode), None) is None


@everything
@needs("io_uring")
def test_a_ring_holds_it():
    ring = default_engine()._rings[0]
    with heap() as fd:
        inode = inode_of(fd)
        ring.file_slot(fd)
        os.close(fd)
        try:
            one = of(inode)
            assert (one.holders, one.references, one.unseen) == ((), 1, 1)
        finally:
            ring.forget_file(fd)
        assert settled(lambda: of(inode), None) is None


_FIRST_THREAD_ENDS = """
import ctypes, os, sys, threading
def serve():
    print("ready", flush=True)
    sys.stdin.readline()
    os._exit(0)
threading.Thread(target=serve).start()
exit_this_thread = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
ctypes.CDLL(None).syscall(exit_this_thread, 0)
"""


@everything
def test_a_process_whose_first_thread_has_ended():
    with heap() as fd, child(_FIRST_THREAD_ENDS, fds=(fd,)) as other:

        def state() -> str:
            return Path(f"/proc/{other.pid}/stat").read_text().rpartition(") ")[2][0]

        assert settled(state, "Z") == "Z"
        one = of(inode_of(fd))
        assert [held.process.pid for held in one.holders] == sorted((os.getpid(), other.pid))
        assert one.unseen == 0


@everything
@pytest.mark.parametrize(
    "label",
    ["a\n\tAttached Devices:\n\tgpu", "a\nTotal 1 devices attached", "x\nexp_name:\tdrm\nsize:\t1",
     "\x1b[2J\x1b]0;t\x07[red]", "\n", "\\012 \t", "<none>"],
)  # fmt: skip
def test_labels_are_nothing_but_labels(label: str):
    """In fdinfo, and in debugfs where that is all there is."""
    ours, theirs = socket.socketpair()
    with ours, theirs, heap(label) as fd, heap() as neighbour:
        inode = inode_of(fd)
        for held in (True, False):
            one = of(inode)
            assert len(one.holders) == held
            assert one.name == (None if label == "<none>" and not held else label)
            assert (one.size, one.exporter, one.devices) == (SIZE, "system", ())
            beside = of(inode_of(neighbour))
            assert (beside.size, beside.exporter, beside.name) == (SIZE, "system", None)
            if held:
                socket.send_fds(ours, [b"x"], [fd])
                os.close(fd)


_MAP_A_FILE = """
import mmap, os
with open("/dmabuf:forged", "r+b") as file:
    memory = mmap.mmap(file.fileno(), 4096)
kept = open("/dmabuf:forged")
"""


@everything
@pytest.mark.parametrize("beside", [True, False])
def test_a_file_that_is_called_like_a_dma_buf(beside: bool):
    forged = Path("/dmabuf:forged")
    forged.write_bytes(bytes(4096))
    try:
        with child(_MAP_A_FILE) as other:
            maps = Path(f"/proc/{other.pid}/maps").read_text()
            assert "/dmabuf:forged" in maps
            with heap() if beside else contextlib.nullcontext():
                held = [by.process.pid for one in take_census().buffers for by in one.holders]
            assert held == ([os.getpid()] if beside else [])
    finally:
        forged.unlink()


_AS_A_USER = """
import sys
from dmabuf.cli import main
sys.exit(main(["ls", "--system", *sys.argv[1:]]))
"""


@everything
def test_a_user_without_rights_sees_his_own_and_is_told_so():
    with heap("his") as his, heap("not his") as other:
        for arguments in ("--json",), ():
            ended = subprocess.run(
                [sys.executable, "-c", _AS_A_USER, *arguments],
                pass_fds=(his,),
                user=65534,
                group=65534,
                extra_groups=[],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert ended.returncode == 0, ended.stderr
            if arguments:
                told = json.loads(ended.stdout)
                continue
            notes = ended.stderr.splitlines()
            assert "his" in ended.stdout
            assert "not his" not in ended.stdout
            assert "not seen (1)" in ended.stdout
        (one,) = told["buffers"]
        assert (one["inode"], one["name"], one["size"]) == (inode_of(his), "his", SIZE)
        (holder,) = one["holders"]
        assert holder["fds"] == [his]
        assert holder["process"]["pid"] != os.getpid()
        assert (one["references"], one["unseen_references"], one["devices"]) == (2, 1, None)
        assert inode_of(other) != one["inode"]
        assert told["hidden"] == told["processes"] - 1 > 0
        assert not told["complete"]
        assert notes == [f"note: {refusal}" for refusal in told["refusals"]]
        assert re.match(
            r"note: \d+ of \d+ processes could not be examined: permission denied", notes[0]
        )
        assert notes[1].endswith("bufinfo: Permission denied; run as root")


_LEAK = """
import fcntl, os, struct
heap = os.open("/dev/dma_heap/system", os.O_RDONLY)
def more():
    fcntl.ioctl(heap, 0xC0184800, struct.pack("=QIIQ", 65536, 0, os.O_RDWR, 0))
"""


@everything
def test_top_finds_a_leak():
    with child(_LEAK) as leaky, child(_LEAK) as other:
        looks = start("top", "--json", "--interval", "0.1", "--sort", "first")
        try:
            json.loads(looks.stdout.readline())
            for number in range(1, 4):
                leaky.stdin.write("\n")
                leaky.stdin.flush()
                assert leaky.stdout.readline() == "done\n"
                looks.stdout.readline()  # this one may have begun before
                told = json.loads(looks.stdout.readline())
                row = told["by_process"][0]
                grown = row["since_first"]
                assert row["process"]["pid"] == leaky.pid
                assert (grown["nbytes"], grown["buffers"]) == (number * SIZE, number)
                assert told["since_first"] == grown
            processes = [row["process"] for row in told["by_process"]]
            assert other.pid not in [one["pid"] for one in processes if one]
        finally:
            looks.terminate()
            assert finish(looks).status == 143


_LOOK = """
import sys
events = []
sys.addaudithook(lambda event, arguments: events.append((event, arguments)))
from dmabuf.inspect import take_census
take_census()
del events[:]
found = take_census()
kinds = {"open": [], "fcntl.ioctl": [], "mmap.__new__": [], "fcntl.fcntl": []}
for event, arguments in list(events):
    if event in kinds:
        kinds[event].append(str(arguments[0]))
assert not kinds["fcntl.ioctl"] and not kinds["mmap.__new__"] and not kinds["fcntl.fcntl"]
print(*kinds["open"], sep="\\n")
"""


@everything
def test_looking_touches_no_buffer():
    with heap() as fd, vgem(SIZE) as picture, child("", fds=(fd,)):
        before = [fdinfo(one) for one in (fd, picture.fileno())]
        opened = in_child(_LOOK).splitlines()
        assert [fdinfo(one) for one in (fd, picture.fileno())] == before
        assert f"/proc/{os.getpid()}/fdinfo/{fd}" in opened
        texts = re.compile(
            r"/proc/\d+/(maps|stat|fdinfo/\d+)|/sys/kernel/debug/dma_buf/bufinfo|/proc"
        )
        assert [path for path in opened if not texts.fullmatch(path)] == []


@everything
def test_ls(capsys: pytest.CaptureFixture[str]):
    with vgem(SIZE) as picture, heap("a\nb") as fd:
        ended = command(capsys, "ls", "--system")
        assert (ended.status, ended.err) == (0, "")
        assert "a\\nb" in ended.out
        assert f"[{os.getpid()}] (fd {fd})" in ended.out
        assert "kernel (" in next(line for line in ended.out.splitlines() if " drm " in line)
        assert picture.size == SIZE


def kib(path: str, field: str) -> int:
    """A line of /proc/meminfo or of a process's status."""
    return int(Path(path).read_text().partition(f"{field}:")[2].split()[0])


@everything
def test_where_else_the_memory_is_counted():
    """A udmabuf's is its memfd's: shared memory. A heap's is nowhere, mapped or not."""
    size, slack = 32 << 20, 16 << 10  # the rest of the guest has shared memory, too

    def counted() -> tuple[int, int]:
        return kib("/proc/meminfo", "Shmem"), kib("/proc/self/status", "VmRSS")

    for exporter, shared in ("udmabuf", 32 << 10), ("system", 0):
        before = counted()
        with dmabuf.allocate(size, exporter=exporter) as buf:
            for at in range(0, size, 1 << 20):  # in pieces, which malloc does not keep
                buf.pwrite(b"x" * (1 << 20), at)
            grown = [now - was for was, now in zip(before, counted(), strict=True)]
            assert all(abs(more - shared) < slack for more in grown), (exporter, grown)
