"""`dmabuf cp`: what it makes of its arguments, and that a target is whole or not there."""

import dataclasses
import errno
import json
import os
import stat
from pathlib import Path

import pytest

import dmabuf as package
from tests.support import assert_same, pattern
from tests.unit.command import dmabuf

SIZE = 300_001
DATA = pattern(SIZE, 11)

Capture = pytest.CaptureFixture[str]


def only(folder: Path, *names: str) -> None:
    """No temporary file is left."""
    assert sorted(os.listdir(folder)) == sorted(names)


def test_a_file(source: Path, tmp_path: Path, capsys: Capture) -> None:
    ended = dmabuf(capsys, "cp", source, tmp_path / "t")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("300.0 kB in ")
    assert "B/s: read " in ended.out
    assert ", written " in ended.out
    assert ended.out.count("\n") == 1
    assert_same((tmp_path / "t").read_bytes(), DATA, "the target")
    only(tmp_path, "source", "t")


def test_a_name_that_cannot_be_flushed(
    source: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is in place, and the message states it."""

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "t").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    ended = dmabuf(capsys, "cp", "--sync", source, tmp_path / "t")
    text = "flushing its names to the medium failed: Input/output error"
    text = f"it is replaced, but perhaps not after a power cut: {text}"
    assert (ended.status, ended.err) == (1, f"error: {tmp_path / 't'}: {text}\n")
    assert_same((tmp_path / "t").read_bytes(), DATA, "the target")
    only(tmp_path, "source", "t")


def test_quiet(source: Path, tmp_path: Path, capsys: Capture) -> None:
    assert dmabuf(capsys, "cp", "-q", source, tmp_path / "t").out == ""
    assert_same((tmp_path / "t").read_bytes(), DATA, "the target")


def test_an_empty_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "t").write_bytes(b"old")
    ended = dmabuf(capsys, "cp", "--verify", tmp_path / "empty", tmp_path / "t")
    assert (ended.status, ended.err) == (0, "")
    assert (tmp_path / "t").read_bytes() == b""


def test_json(source: Path, tmp_path: Path, capsys: Capture) -> None:
    ended = dmabuf(capsys, "cp", "--json", "--verify", "--sync", source, tmp_path / "t")
    told = json.loads(ended.out)
    assert told["source"] == str(source)
    assert told["target"] == str(tmp_path / "t")
    assert told["nbytes"] == told["read"]["nbytes"] == told["verified"]["nbytes"] == SIZE
    assert set(told) == {
        "format", "source", "target", "nbytes", "seconds", "read", "write", "copied", "exporter",
        "allocated", "verified", "synced", "in_place",
    }  # fmt: skip
    for side in (told["read"], told["write"]):
        assert side["route"] in list(package.Route)
        assert sum(side["routes"].values()) == SIZE
        assert side["reason"]
    assert told["synced"] is True


def test_into_a_directory(source: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "d").mkdir()
    for target in (tmp_path / "d", f"{tmp_path}/d/"):
        assert dmabuf(capsys, "cp", source, target).status == 0
        assert_same((tmp_path / "d" / "source").read_bytes(), DATA, "the target")
        only(tmp_path / "d", "source")


def test_names(source: Path, tmp_path: Path, capsys: Capture, monkeypatch) -> None:
    """Names that begin with a dash, hold a line break, or are not UTF-8."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"-\xff\n")
    ended = dmabuf(capsys, "cp", "--json", "--", source, name)
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out)["target"] == name
    assert_same((tmp_path / name).read_bytes(), DATA, "the target")


def test_names_in_messages_are_escaped(source: Path, tmp_path: Path, capsys: Capture) -> None:
    name = tmp_path / "a\x1b[2J\nb\u202e"
    ended = dmabuf(capsys, "cp", name, tmp_path / "t")
    assert ended.status == 1
    assert ended.err == f"error: {tmp_path}/a\\x1b[2J\\nb\\u202e: No such file or directory\n"


def test_size(source: Path, tmp_path: Path, capsys: Capture) -> None:
    assert dmabuf(capsys, "cp", "--size", "100kB", source, tmp_path / "t").status == 0
    assert_same((tmp_path / "t").read_bytes(), DATA[:100_000], "the target")
    assert dmabuf(capsys, "cp", "--size", "64KiB", "/dev/zero", tmp_path / "t").status == 0
    assert (tmp_path / "t").read_bytes() == bytes(65536)


# -- what becomes of the target


def test_a_target_that_exists_is_replaced(source: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "t"
    target.write_bytes(b"old" * SIZE)
    target.chmod(0o640)
    os.setxattr(target, "user.note", b"mine")
    with target.open("rb") as reader:
        assert dmabuf(capsys, "cp", source, target).status == 0
        assert reader.read() == b"old" * SIZE, "who has the old one open keeps it"
    assert_same(target.read_bytes(), DATA, "the target")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert os.getxattr(target, "user.note") == b"mine"


def test_a_new_file_has_the_umask(source: Path, tmp_path: Path, capsys: Capture) -> None:
    source.chmod(0o777)
    before = os.umask(0o027)
    try:
        assert dmabuf(capsys, "cp", source, tmp_path / "t").status == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o640


@pytest.mark.parametrize("there", [True, False])
def test_preserve(there: bool, source: Path, tmp_path: Path, capsys: Capture) -> None:
    source.chmod(0o604)
    os.utime(source, ns=(1_000_000_001, 2_000_000_002))
    if there:
        (tmp_path / "t").touch()
    assert dmabuf(capsys, "cp", "-p", source, tmp_path / "t").status == 0
    status = (tmp_path / "t").stat()
    assert stat.S_IMODE(status.st_mode) == 0o604
    assert status.st_mtime_ns == 2_000_000_002
    ended = dmabuf(capsys, "cp", "--preserve", source, "/dev/null")
    assert (ended.status, ended.err) == (
        1, "error: /dev/null: --preserve needs a regular file as target\n",
    )  # fmt: skip


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_one(
    there: bool, source: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "d").mkdir()
    if there:
        (tmp_path / "d" / "real").write_bytes(b"old")
    (tmp_path / "t").symlink_to("d/real")
    assert dmabuf(capsys, "cp", source, tmp_path / "t").status == 0
    assert os.readlink(tmp_path / "t") == "d/real"
    assert_same((tmp_path / "d" / "real").read_bytes(), DATA, "what it points to")
    only(tmp_path / "d", "real")


def test_hard_links_are_told(source: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t").write_bytes(b"old")
    os.link(tmp_path / "t", tmp_path / "u")
    ended = dmabuf(capsys, "cp", source, tmp_path / "t")
    assert ended.err.startswith(f"note: {tmp_path}/t has 2 names (hard links)")
    assert (tmp_path / "u").read_bytes() == b"old"
    assert_same((tmp_path / "t").read_bytes(), DATA, "the target")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("where", ["read_into", "write_from"])
def test_an_error_leaves_nothing_half_done(
    where: str, there: bool, source: Path, tmp_path: Path, capsys: Capture, monkeypatch
) -> None:
    def fail(self, *arguments, **how):
        error = OSError(errno.EIO, "a bad sector", self.name)
        error.nbytes = 4096 if where == "write_from" else 0
        raise error

    monkeypatch.setattr(package.File, where, fail)
    if there:
        (tmp_path / "t").write_bytes(b"old")
    ended = dmabuf(capsys, "cp", source, tmp_path / "t")
    name = source if where == "read_into" else tmp_path / "t"
    state = "the old file is unchanged" if there else "no file was made"
    so_far = "after 4096 whole bytes; " if where == "write_from" else ""
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == f"error: {name}: a bad sector ({so_far}{state})\n"
    only(tmp_path, "source", *(["t"] if there else []))
    if there:
        assert (tmp_path / "t").read_bytes() == b"old"


# -- refusals

REFUSED = {
    "missing": (["{0}/none", "{0}/t"], "{0}/none: No such file or directory"),
    "directory": (["{0}", "{0}/t"], "{0}: is a directory: name a file in it"),
    "no directory": (
        ["{0}/source", "{0}/no/t"], "{0}/no/t: its directory: No such file or directory",
    ),
    "not a directory": (["{0}/source", "{0}/source/t"], "{0}/source/t: Not a directory"),
    "slash": (["{0}/source", "{0}/new/"], "{0}/new/: No such file or directory"),
    "empty": (["{0}/source", ""], ": No such file or directory"),
    "same": (["{0}/source", "{0}"], "{0}/source: is the same file as {0}/source"),
    "link": (["{0}/link", "{0}/source"], "{0}/source: is the same file as {0}/link"),
    "name": (["{0}/source", "{0}/" + "n" * 256], ": File name too long"),
    "endless": (["/dev/zero", "{0}/t"], "/dev/zero never ends: limit it with --size"),
    "full": (["{0}/source", "/dev/full"], "/dev/full: writing failed after 0 of 300001 bytes"),
    "verify": (["--verify", "{0}/source", "/dev/null"], "/dev/null: --verify reads both ends"),
    "directory in it": (["{0}/source", "{0}/d"], "{0}/d/source: is a directory"),
    "exporter": (["--exporter", "x", "{0}/source", "{0}/t"], "invalid exporter 'x'"),
    "zero-copy": (
        ["--require", "zero-copy", "--size", "9", "/dev/zero", "{0}/t"],
        "/dev/zero: no route for require='zero-copy'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, source: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "d" / "source").mkdir(parents=True)
    arguments, text = REFUSED[name]
    ended = dmabuf(capsys, "cp", *(one.format(tmp_path) for one in arguments))
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("error: ")
    assert text.format(tmp_path) in ended.err
    assert ended.err.count("\n") == 1
    only(tmp_path, "source", "link", "d")
    assert_same(source.read_bytes(), DATA, "the source")


MISUSED = {
    "nothing": ([], "required: SRC, DST"),
    "one": (["a"], "required: DST"),
    "three": (["a", "b", "c"], "unrecognized arguments: c"),
    "option": (["--fast", "a", "b"], "unrecognized arguments: --fast"),
    "abbreviation": (["--verif", "a", "b"], "unrecognized arguments: --verif"),
    "size": (["--size", "9 bananas", "a", "b"], "--size: "),
    "negative": (["--size", "-1", "a", "b"], "--size: invalid size '-1'"),
    "require": (["--require", "speed", "a", "b"], "--require: invalid choice: 'speed'"),
    "route": (["--route", "scenic", "a", "b"], "--route: invalid choice: 'scenic'"),
}


@pytest.mark.parametrize("name", MISUSED)
def test_misused(name: str, capsys: Capture) -> None:
    arguments, text = MISUSED[name]
    ended = dmabuf(capsys, "cp", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert text in ended.err
    assert "<" not in ended.err, "no representation of a Python object"
    assert ended.err.endswith("try 'dmabuf cp --help'\n")


# -- --verify


class Medium:
    """A medium that returns something else: reads past the page cache pass through here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read = package.File.read_into
        self.wrong_at: int | None = None
        self.size: int | None = None
        medium = self

        def read_into(file, buffer, size=None, *, file_offset=None, require="any", **how):
            record = medium._read(
                file, buffer, size, file_offset=file_offset, require=require, **how
            )
            if require == "uncached":
                return medium.change(record, buffer, file_offset)
            return record

        monkeypatch.setattr(package.File, "read_into", read_into)

    def change(self, record, buffer, offset):
        if self.wrong_at is not None and offset <= self.wrong_at < offset + record.nbytes:
            at = self.wrong_at - offset
            buffer.pwrite(bytes([buffer.pread(1, at)[0] ^ 1]), at)
        if self.size is not None:
            return dataclasses.replace(record, nbytes=self.size)
        return record


BIG = (8 << 20) + 4097
"""More than cp compares at once."""


@pytest.mark.parametrize("at", [0, 77, 8 << 20, BIG - 1])
def test_verify_finds_one_wrong_byte(
    at: int, source: Path, tmp_path: Path, capsys: Capture, monkeypatch
) -> None:
    source.write_bytes(pattern(BIG, 12))
    (tmp_path / "t").write_bytes(b"old")
    Medium(monkeypatch).wrong_at = at
    ended = dmabuf(capsys, "cp", "--verify", source, tmp_path / "t")
    assert (ended.status, ended.out) == (1, "")
    text = f"error: {tmp_path}/t: read back, it differs from the source at offset {at}:"
    assert text in ended.err
    only(tmp_path, "source", "t")
    assert (tmp_path / "t").read_bytes() == b"old"


def test_verify_finds_a_target_that_is_short(
    source: Path, tmp_path: Path, capsys: Capture, monkeypatch
) -> None:
    Medium(monkeypatch).size = 1000
    ended = dmabuf(capsys, "cp", "--verify", source, tmp_path / "t")
    assert ended.status == 1
    assert "read back, it ends at 1000: 299001 bytes short" in ended.err
    only(tmp_path, "source")


def test_verify_says_when_the_cache_was_read(source: Path, capsys: Capture) -> None:
    folder = Path("/dev/shm")
    target = folder / f"dmabuf-test-{os.getpid()}"
    try:
        ended = dmabuf(capsys, "cp", "--verify", source, target)
        if "written buffered" not in ended.out:
            pytest.skip("/dev/shm is no tmpfs here: nothing to test it on")
        assert ended.status == 0
        assert "not past the page cache: flushed, dropped from the cache" in ended.out
        assert_same(target.read_bytes(), DATA, "the target")
    finally:
        target.unlink(missing_ok=True)
