"""`dmabuf cp` and safetensors.save() onto files that may be written but not replaced."""

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmabuf import safetensors
from tests.guards import needs
from tests.support import assert_same, has_program, pattern, run
from tests.unit.command import dmabuf

DATA = pattern(300_001, 11)
NOBODY = 65534

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can be any user")


@pytest.fixture
def folder(capsys: Capture) -> Iterator[Path]:
    """A folder on a disk that every user may enter, with a source and an old target."""
    made = Path(tempfile.mkdtemp(prefix="dmabuf-test-", dir="/var/tmp"))
    made.chmod(0o755)
    (made / "source").write_bytes(DATA)
    (made / "target").write_bytes(b"old")
    # A user who may not read our modules finds them loaded.
    assert dmabuf(capsys, "cp", made / "source", "/dev/null").status == 0
    yield made
    shutil.rmtree(made)


@contextmanager
def as_nobody() -> Iterator[None]:
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def bind_mount(target: Path) -> Iterator[Path]:
    """Another file is mounted over the target, as containers mount their files; its path."""
    real = target.with_name("real")
    real.write_bytes(b"real")
    run("mount", "--bind", real, target)
    try:
        yield real
    finally:
        run("umount", target)


def copied_in_place(capsys: Capture, folder: Path, why: str, *options: str) -> None:
    """Copy twice, for people and for programs, and check that no third file is left."""
    names = sorted(os.listdir(folder))
    before = (folder / "target").stat()
    ended = dmabuf(capsys, "cp", *options, folder / "source", folder / "target")
    assert ended.status == 0, ended.err
    assert ended.err == f"note: {folder}/target is written in place: {why}\n"
    ended = dmabuf(capsys, "cp", "--json", folder / "source", folder / "target")
    assert json.loads(ended.out)["in_place"] == why
    after = (folder / "target").stat()
    assert (after.st_ino, after.st_uid, after.st_mode) == (
        before.st_ino, before.st_uid, before.st_mode,
    )  # fmt: skip
    assert sorted(os.listdir(folder)) == names


@needs("ext4")
def test_a_mounted_file(folder: Path, capsys: Capture) -> None:
    with bind_mount(folder / "target") as real:
        copied_in_place(capsys, folder, "it is a mount point", "--verify", "--sync")
        assert_same(real.read_bytes(), DATA, "the file that was mounted")
    assert (folder / "target").read_bytes() == b"old"


@needs("ext4")
def test_saving_over_a_mounted_file(folder: Path) -> None:
    numpy = pytest.importorskip("numpy")
    with bind_mount(folder / "target") as real:
        safetensors.save({"x": numpy.arange(1000)}, folder / "target")
        loaded = safetensors.load(real, framework="np")
        assert bytes(loaded["x"]) == bytes(numpy.arange(1000))


def test_a_directory_without_write_permission(folder: Path, capsys: Capture) -> None:
    (folder / "target").chmod(0o666)
    with as_nobody():
        why = "no file can be made beside it (Permission denied)"
        copied_in_place(capsys, folder, why)
    assert_same((folder / "target").read_bytes(), DATA, "the target")


def test_an_append_only_directory(folder: Path, capsys: Capture) -> None:
    with attribute("+a", folder):
        copied_in_place(capsys, folder, "its directory is append-only")
    assert_same((folder / "target").read_bytes(), DATA, "the target")


@contextmanager
def attribute(which: str, path: Path) -> Iterator[None]:
    if not has_program("chattr"):
        pytest.skip("needs chattr: install e2fsprogs")
    try:
        run("chattr", which, path)
    except AssertionError:
        pytest.skip("the filesystem of /var/tmp has no attributes: mount ext4 there")
    try:
        yield
    finally:
        run("chattr", which.replace("+", "-"), path)


@pytest.mark.parametrize("which", ["+a", "+i"])
def test_a_file_that_only_grows(which: str, folder: Path, capsys: Capture) -> None:
    with attribute(which, folder / "target"):
        for options in ([], ["--force"]):
            ended = dmabuf(capsys, "cp", *options, folder / "source", folder / "target")
            assert ended.status == 1
            assert "append-only or immutable: append with >>" in ended.err
    assert (folder / "target").read_bytes() == b"old"


def test_a_kernel_setting(folder: Path, capsys: Capture) -> None:
    setting = Path("/proc/sys/vm/dirty_expire_centisecs")
    if not os.access(setting, os.W_OK):
        pytest.skip("/proc/sys is read-only here: run outside a container")
    value = setting.read_text()
    (folder / "source").write_text(value)
    ended = dmabuf(capsys, "cp", folder / "source", setting)
    assert ended.status == 0, ended.err
    assert "is written in place: no file can be made beside it" in ended.err
    assert setting.read_text() == value


# -- permissions


def test_a_file_that_may_not_be_written(folder: Path, capsys: Capture) -> None:
    folder.chmod(0o777)
    with as_nobody():
        ended = dmabuf(capsys, "cp", folder / "source", folder / "target")
        assert ended.status == 1
        assert "may not be written (permission denied): give --force to replace it" in ended.err
        assert (folder / "target").read_bytes() == b"old"
        ended = dmabuf(capsys, "cp", "--force", folder / "source", folder / "target")
        assert ended.status == 0
    assert_same((folder / "target").read_bytes(), DATA, "the target")
    assert (folder / "target").stat().st_uid == NOBODY


@pytest.fixture
def protected() -> Iterator[None]:
    """Have the kernel refuse O_CREAT on other users' files in sticky directories."""
    setting = Path("/proc/sys/fs/protected_regular")
    before = setting.read_text()
    if before.strip() == "0":
        if not os.access(setting, os.W_OK):
            pytest.skip("needs protected files: sysctl fs.protected_regular=1")
        setting.write_text("1")
    yield
    setting.write_text(before)


def test_anothers_file_in_a_sticky_directory(
    protected: None, folder: Path, capsys: Capture
) -> None:
    """Nobody receives what root writes by having made the file first."""
    folder.chmod(0o1777)
    target = folder / "target"
    os.chown(target, NOBODY, NOBODY)
    target.chmod(0o666)
    ended = dmabuf(capsys, "cp", folder / "source", target)
    assert ended.status == 1
    assert "another user's, in a sticky directory" in ended.err
    assert target.read_bytes() == b"old"
    assert dmabuf(capsys, "cp", "--force", folder / "source", target).status == 0
    assert_same(target.read_bytes(), DATA, "the target")
    assert target.stat().st_uid == 0
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_an_error_in_place_says_how_much_was_copied(folder: Path, capsys: Capture) -> None:
    (folder / "target").chmod(0o666)
    with as_nobody():
        ended = dmabuf(
            capsys, "cp", "--require", "zero-copy", "--size", "9", "/dev/zero", folder / "target"
        )
    assert ended.status == 1
    assert "the old file is as it was" not in ended.err
    assert (folder / "target").read_bytes() == b"old"


def test_what_vouches_for_the_old_content_is_not_taken_over(folder: Path, capsys: Capture) -> None:
    """A program that may do something keeps its other attributes, and loses that."""
    target, may_bind = folder / "target", b"\x01\0\0\x02\0\4" + bytes(14)
    os.setxattr(target, "security.capability", may_bind)
    os.setxattr(target, "user.note", b"kept")
    assert dmabuf(capsys, "cp", folder / "source", target).status == 0
    assert_same(target.read_bytes(), DATA, "the target")
    assert os.listxattr(target).count("security.capability") == 0
    assert os.getxattr(target, "user.note") == b"kept"


def test_a_program_that_runs_can_be_replaced(folder: Path, capsys: Capture) -> None:
    shutil.copy(shutil.which("sleep") or "", folder / "target")
    with subprocess.Popen([folder / "target", "1000"]) as process:
        try:
            ended = dmabuf(capsys, "cp", folder / "source", folder / "target")
            assert (ended.status, ended.err) == (0, "")
        finally:
            process.kill()
    assert_same((folder / "target").read_bytes(), DATA, "the target")
