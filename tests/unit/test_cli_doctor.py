"""`dmabuf doctor`: every kind of path, and nothing of it changed."""

import json
import os
import socket
from pathlib import Path

import pytest

from dmabuf import _sysfs, exporters
from dmabuf._sysfs import Mount
from dmabuf.cli import _path
from dmabuf.route import Route
from tests.support import assert_same, pattern
from tests.unit.command import dmabuf

Capture = pytest.CaptureFixture[str]


def report(capsys: Capture, path: object) -> dict:
    ended = dmabuf(capsys, "doctor", "--json", path)
    assert (ended.status, ended.err) == (0, "")
    return json.loads(ended.out)["path"]


def test_the_machine(capsys: Capture) -> None:
    ended = dmabuf(capsys, "doctor")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith("dmabuf 0.")
    for group in ("kernel", "io_uring", "exporters", "limits"):
        assert group in lines
    for line in lines[1:]:
        assert not line or line.isidentifier() or line.startswith(("  yes ", "  no  ", "      "))


def test_json(capsys: Capture) -> None:
    ended = dmabuf(capsys, "doctor", "--json")
    told = json.loads(ended.out)
    assert set(told) == {
        "format", "version", "release", "architecture", "page_size", "kernel", "io_uring",
        "exporters", "limits", "path",
    }  # fmt: skip
    assert told["format"] == 1
    assert told["path"] is None
    for group in ("kernel", "io_uring", "exporters", "limits"):
        assert told[group]
        for answer in told[group].values():
            assert set(answer) == {"ok", "detail", "fix"}
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
        assert told["direct"]["offset_alignment"] in (512, 1024, 2048, 4096)
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
    for arguments in ([], ["--json"]):
        ended = dmabuf(capsys, "doctor", *arguments, tmp_path / "none")
        assert ended.status == 1
        assert ended.err == f"error: {tmp_path}/none: No such file or directory\n"


def test_a_name_that_is_not_utf8(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    path.write_bytes(b"x")
    assert report(capsys, path)["path"] == str(path)
    capsys.readouterr()


def test_filesystem_of_the_innermost_mount(monkeypatch, tmp_path: Path) -> None:
    table = [
        Mount("/", "/", "ext4", "rw"),
        Mount("/mnt", "/", "xfs", "rw"),
        Mount("/mnt/a b", "/", "btrfs", "rw"),
    ]
    monkeypatch.setattr(_sysfs, "mounts", lambda: iter(table))
    monkeypatch.setattr(os.path, "realpath", lambda path: path)
    assert _path.filesystem("/home/x") == "ext4"
    assert _path.filesystem("/mnt/x") == "xfs"
    assert _path.filesystem("/mnt/a b/x") == "btrfs"
    assert _path.filesystem("/mntx") == "ext4"


def test_without_memory_to_be_had(tmp_path: Path, capsys: Capture, monkeypatch) -> None:
    def refuse(*_a: object, **_k: object) -> None:
        raise OSError(12, "not tried: nothing is left")

    monkeypatch.setattr(exporters, "allocate", refuse)
    ended = dmabuf(capsys, "doctor")
    assert (ended.status, ended.err) == (0, "")
    assert "no  memfd: " in ended.out
    ended = dmabuf(capsys, "doctor", tmp_path)
    assert (ended.status, ended.err) == (1, "error: not tried: nothing is left\n")
