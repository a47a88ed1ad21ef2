"""`dmabuf doctor`: what the machine and every kind of path support, and nothing of it changed."""

import dataclasses
import glob
import json
import os
import platform
import resource
import socket
from importlib import metadata
from pathlib import Path

import pytest

from dmabuf.inspect import Answer, doctor, examine_machine
from dmabuf.kernel import nvme
from dmabuf.memory import allocate, exporters
from dmabuf.transfer.plan import Route
from tests.forking import in_child as forked
from tests.guards import needs
from tests.support import assert_same, in_child, mounted, pattern, zram
from tests.unit.command import dmabuf

Capture = pytest.CaptureFixture[str]
GROUPS = ["kernel", "io_uring", "exporters", "limits", "devices", "extras", "confinement"]


def report(capsys: Capture, path: object) -> dict:
    ended = dmabuf(capsys, "doctor", "--json", path)
    assert (ended.status, ended.err) == (0, "")
    return json.loads(ended.out)["path"]


def test_the_machine(capsys: Capture) -> None:
    ended = dmabuf(capsys, "doctor")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith("dmabuf 0.")
    for group in (*GROUPS[:-2], "optional packages", "confinement"):
        assert group in lines
    for line in lines[1:]:
        assert not line or line[0].isalpha() or line.startswith(("  yes ", "  no  ", "      "))


def test_json(capsys: Capture) -> None:
    ended = dmabuf(capsys, "doctor", "--json")
    told = json.loads(ended.out)
    assert told["path"] is None
    machine = told["machine"]
    assert set(machine) == {"release", "architecture", "page_size", *GROUPS}
    for group in GROUPS:
        assert machine[group]
        for answer in machine[group]:
            assert set(answer) == {"name", "ok", "detail", "fix"}
            assert isinstance(answer["ok"], bool)
            assert answer["detail"]


def test_a_file_is_not_changed(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "f"
    data = pattern(100_000, 1)
    path.write_bytes(data)
    before = path.stat()
    told = report(capsys, path)
    assert_same(path.read_bytes(), data, "the file")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert (told["kind"], told["size"], told["path"]) == ("file", 100_000, str(path))
    assert told["filesystem"]
    for direction in ("read", "write"):
        assert told[direction]["ok"]
        assert told[direction]["route"] in list(Route)
    if told["direct"]["ok"]:
        assert told["offset_alignment"] in (512, 1024, 2048, 4096)
        assert told["read"]["zero_copy"] == (told["read"]["route"] in ("native", "direct"))


def test_a_directory_keeps_nothing(tmp_path: Path, capsys: Capture) -> None:
    told = report(capsys, tmp_path)
    assert told["kind"] == "directory"
    assert told["read"]["ok"]
    assert told["write"]["ok"]
    assert os.listdir(tmp_path) == []


def test_an_empty_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "f").touch()
    told = report(capsys, tmp_path / "f")
    assert told["read"]["reason"] == "it is empty: there is nothing to read"
    assert told["write"]["ok"]


def test_streams_are_not_opened(tmp_path: Path, capsys: Capture) -> None:
    """Opening a FIFO would wait for its other end."""
    os.mkfifo(tmp_path / "fifo")
    assert report(capsys, tmp_path / "fifo")["read"]["route"] == "buffered"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
        assert report(capsys, tmp_path / "socket")["kind"] == "socket"
    told = report(capsys, "/dev/null")
    assert told["kind"] == "character device"
    assert "in order" in told["write"]["rejected"]["direct"] + told["write"]["reason"]


def test_a_path_that_may_only_be_read(tmp_path: Path, capsys: Capture, monkeypatch) -> None:
    (tmp_path / "f").write_bytes(b"x" * 5000)
    opened = os.open

    def read_only(path, flags, *more, **how):
        if str(path).endswith("/f") and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, *more, **how)

    monkeypatch.setattr(os, "open", read_only)
    told = report(capsys, tmp_path / "f")
    assert told["read"]["ok"]
    assert (told["write"]["ok"], told["write"]["reason"]) == (False, "Permission denied")


def test_a_path_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    text = f"{tmp_path}/none: No such file or directory"
    ended = dmabuf(capsys, "doctor", tmp_path / "none")
    assert (ended.status, ended.err) == (1, f"error: {text}\n")
    ended = dmabuf(capsys, "doctor", "--json", tmp_path / "none")
    assert (ended.status, ended.out) == (1, "")
    assert json.loads(ended.err)["message"] == text


def test_a_name_that_is_not_utf8(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    path.write_bytes(b"x")
    assert report(capsys, path)["path"] == str(path)
    capsys.readouterr()


@needs("zram", "ext4")
def test_filesystem_of_the_innermost_mount(tmp_path: Path, capsys: Capture) -> None:
    outer = report(capsys, tmp_path)["filesystem"]
    folder = tmp_path / "a b"
    with zram(32 << 20) as device, mounted(device, "ext4", folder, "-O", "^has_journal"):
        (folder / "f").touch()
        (tmp_path / "a bc").touch()
        assert report(capsys, folder / "f")["filesystem"] == "ext4"
        assert report(capsys, folder)["filesystem"] == "ext4"
        assert report(capsys, tmp_path / "a bc")["filesystem"] == outer
    assert report(capsys, "/proc/self/status")["filesystem"] == "proc"


def test_without_memory_to_be_had(tmp_path: Path, capsys: Capture, monkeypatch) -> None:
    def refuse(*_a: object, **_k: object) -> None:
        raise OSError(12, "not tried: nothing is left")

    monkeypatch.setattr(doctor, "allocate", refuse)
    ended = dmabuf(capsys, "doctor")
    assert (ended.status, ended.err) == (0, "")
    assert "no  memfd: " in ended.out
    ended = dmabuf(capsys, "doctor", tmp_path)
    assert (ended.status, ended.err) == (1, "error: not tried: nothing is left\n")


# -- the machine


def answers(group: tuple[Answer, ...]) -> dict[str, Answer]:
    return {answer.name: answer for answer in group}


def test_the_examination_is_frozen_and_leaves_nothing_behind(capsys: Capture) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    found = examine_machine()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert capsys.readouterr() == ("", "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.release = "x"
    assert found.release == os.uname().release
    for group in (getattr(found, name) for name in GROUPS):
        assert len(answers(group)) == len(group), "each name once"
        assert all(answer.detail for answer in group)


def test_it_answers_what_allocate_does() -> None:
    found = answers(examine_machine().exporters)
    for name in ("udmabuf", "memfd"):
        try:
            allocate(4096, exporter=name).close()
        except OSError:
            assert not found[name].ok
        else:
            assert found[name].ok


_REFUSED = """
import json, sys
from dmabuf.inspect import examine_machine
from tests.sandbox import forbid
forbid(*map(int, sys.argv[1:]))
found = examine_machine()
groups = (found.kernel, found.io_uring, found.exporters, found.confinement)
print(json.dumps({one.name: [one.ok, one.detail, one.fix] for group in groups for one in group}))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64's system call numbers")
def test_refused_system_calls() -> None:
    """seccomp refuses io_uring_setup, memfd_create and cachestat: each is a no, none a crash."""
    found = json.loads(in_child(_REFUSED, 425, 319, 451))
    ok, detail, fix = found["io_uring"]
    assert not ok and "EPERM" in detail and "threads take its place" in detail
    assert "seccomp" in fix or "sysctl" in fix
    assert found["memfd"][:2] == [False, "Operation not permitted"]
    assert not found["cachestat"][0]
    assert int(found["seccomp"][1].split()[0]) >= 1


def test_exporters_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporters, "UDMABUF", str(tmp_path / "udmabuf"))
    monkeypatch.setattr(exporters, "HEAPS", str(tmp_path / "heaps"))
    found = answers(examine_machine().exporters)
    assert (found["udmabuf"].ok, found["udmabuf"].detail) == (
        False,
        f"{tmp_path}/udmabuf: no such device",
    )
    assert "CONFIG_UDMABUF" in found["udmabuf"].fix
    assert not found["dma-heap"].ok
    (tmp_path / "heaps").mkdir()
    (tmp_path / "heaps/cma").touch()  # a file, so the allocation is refused: ENOTTY
    found = answers(examine_machine().exporters)
    assert "dma-heap" not in found
    assert not found["dma-heap cma"].ok


@needs("root")
def test_limits_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a user namespace CAP_IPC_LOCK is shown but does not count: the doctor pins to find out."""

    def look() -> None:
        import ctypes

        limit = 8 << 20
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
        assert answers(examine_machine().limits)["pinned memory"].ok
        descriptors = answers(examine_machine().limits)["descriptors"]
        assert (descriptors.ok, descriptors.fix) == (False, "ulimit -n 200")
        if ctypes.CDLL(None).unshare(0x10000000) == 0:  # CLONE_NEWUSER
            pinned = answers(examine_machine().limits)["pinned memory"]
            assert not pinned.ok and "does not count in this user namespace" in pinned.detail

    def unprivileged() -> None:
        limit = 8 << 20
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        os.setuid(65534)
        pinned = answers(examine_machine().limits)["pinned memory"]
        assert not pinned.ok and "without CAP_IPC_LOCK" in pinned.detail
        assert "CAP_IPC_LOCK" in pinned.fix

    examine_machine()  # imports everything before the rights go
    for work in (look, unprivileged):
        forked(work)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert "unlimited" in answers(examine_machine().limits)["pinned memory"].detail


@pytest.mark.parametrize(
    ("number", "fix"),
    [(13, "join its group, often fuse"), (1, "--device /dev/fuse"), (6, "load its driver")],
)
def test_a_node_that_may_not_be_opened(
    monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    opened = os.open

    def refuse(path, *more, **how):
        if path == "/dev/fuse":
            raise OSError(number, os.strerror(number), path)
        return opened(path, *more, **how)

    monkeypatch.setattr(glob, "glob", lambda pattern: [pattern] if "fuse" in pattern else [])
    monkeypatch.setattr(os, "stat", lambda path, **_: os.lstat("/dev/null"))
    monkeypatch.setattr(os, "open", refuse)
    found = answers(examine_machine().devices)
    answer = found["FUSE /dev/fuse"]
    assert (answer.ok, answer.detail) == (False, os.strerror(number)) and fix in answer.fix
    assert found["camera"].detail == "there is no /dev/video*"


CONTROLLERS = {
    # name: transport, address, state, and its namespaces with the states of their paths
    "nvme0": ("pcie", "0000:00:04.0", "live", {"nvme0n1": None}),
    "nvme2": ("tcp", "traddr=10.0.0.5,trsvcid=4420", "live", {"nvme2c2n1": "optimized"}),
    "nvme10": ("rdma", "traddr=10.0.1.5,trsvcid=4420", "connecting", {"nvme2c10n1": ""}),
    "nvme11": ("tcp", "traddr=10.0.0.6,trsvcid=4420", "live", {"nvme11n1": None}),
}


@pytest.mark.parametrize("connected", [True, False])
def test_controllers_of_nvme_over_fabrics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, connected: bool
) -> None:
    monkeypatch.setattr(nvme, "SYSFS", str(tmp_path))
    for name, (*texts, namespaces) in CONTROLLERS.items() if connected else ():
        folder = tmp_path / "class/nvme" / name
        for namespace, state in namespaces.items():
            (folder / namespace).mkdir(parents=True)
            if state is not None:
                (folder / namespace / "ana_state").write_text(f"{state}\n")
        for file, text in zip(("transport", "address", "state"), texts, strict=True):
            (folder / file).write_text(f"{text}\n")
    found = {
        name: (answer.ok, answer.detail, answer.fix)
        for name, answer in answers(examine_machine().devices).items()
        if name.startswith("NVMe over")
    }
    if not connected:
        fix = "nvme connect -t tcp -a HOST -s 4420 -n NQN"
        assert found == {"NVMe over fabrics": (False, "no controller is connected", fix)}
        return
    both = "nvme2n1 by 2 paths: nvme2 optimized, nvme10"
    lost = "restore the network or the target: the kernel reconnects until ctrl_loss_tmo"
    assert found == {
        "NVMe over tcp nvme2": (True, f"live, traddr=10.0.0.5,trsvcid=4420; {both}", None),
        "NVMe over rdma nvme10": (False, f"connecting, traddr=10.0.1.5,trsvcid=4420; {both}", lost),
        "NVMe over tcp nvme11": (
            True,
            "live, traddr=10.0.0.6,trsvcid=4420; nvme11n1 by 1 path: nvme11",
            None,
        ),
    }


def test_extras_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = [
        "cffi>=1",
        'pytest>=8; extra == "one"',
        "no_such>=2; extra == 'two'",
        "x; extra == 'dev'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: needed)
    found = answers(examine_machine().extras)
    assert list(found) == ["one", "two"]
    assert found["one"] == Answer("one", True, f"pytest {pytest.__version__}")
    assert found["two"] == Answer("two", False, "missing: no_such", "pip install 'dmabuf[two]'")
