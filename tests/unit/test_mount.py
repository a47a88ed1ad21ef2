"""`dmabuf mount`: a store's buffers as files, as the system calls see them."""

import errno
import os
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.guards import demand, needs
from tests.mounting import Mounted, attributes, mount, mounted, shell, start
from tests.serving import as_a_program
from tests.support import assert_same, pattern, wait_until
from tests.unit.schemas import checked

SIZE = 3 << 20


@pytest.fixture(scope="module", autouse=True)
def fuse() -> None:
    demand("fuse", "pyfuse3")


def failing(number: int, function, *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        function(*arguments)
    assert caught.value.errno == number, caught.value


def test_a_buffer_is_a_file_and_a_file_is_a_buffer(files: Mounted) -> None:
    with files.store.create("made", 5000, mode=0o640) as buffer:
        buffer.pwrite(pattern(5000, 1), 0)
        path = files.path / "made"
        assert_same(path.read_bytes(), pattern(5000, 1), "the file")
        told = path.stat()
        assert (told.st_size, told.st_blocks, told.st_mode) == (5000, 16, stat.S_IFREG | 0o640)
        assert (told.st_uid, told.st_gid, told.st_nlink) == (os.geteuid(), os.getegid(), 1)
        with path.open("r+b") as file:
            file.seek(100)
            file.write(pattern(77, 2))
        expected = bytearray(pattern(5000, 1))
        expected[100:177] = pattern(77, 2)
        assert_same(buffer.pread(5000, 0), bytes(expected), "the buffer")
        buffer.pwrite(b"now", 0)
        assert path.read_bytes()[:3] == b"now"
    path = files.path / "written"
    path.write_bytes(pattern(SIZE + 1, 3))
    with files.store.open("written") as buffer:
        assert buffer.size == SIZE + 4096
        assert_same(buffer.pread(SIZE + 1, 0), pattern(SIZE + 1, 3), "the new buffer")
        assert buffer.pread(4095, SIZE + 1) == bytes(4095)
    assert files.store.stat("written").length == SIZE + 1


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, (1 << 20) + 1, (5 << 20) + 12345])
def test_a_file_of_any_size_comes_back(files: Mounted, size: int) -> None:
    path = files.path / "x"
    path.write_bytes(pattern(size, 1))
    assert_same(path.read_bytes(), pattern(size, 1), "read")
    assert path.stat().st_size == size == files.store.stat("x").length
    assert files.store.stat("x").size == max(-(-size // 4096), 1) * 4096
    assert files.store.usage().charged == files.store.stat("x").size


def test_content_grows_by_appending_and_by_writing_past_its_end(files: Mounted) -> None:
    path = files.path / "x"
    expected = b""
    for number, size in enumerate([10, 4086, 1, 1 << 20, 100, 2 << 20]):
        with path.open("ab") as file:
            file.write(pattern(size, number))
        expected += pattern(size, number)
        assert_same(path.read_bytes(), expected, f"after {number} appends")
        with files.store.open("x") as buffer:
            assert_same(buffer.pread(len(expected), 0), expected, "the buffer")
    with path.open("r+b") as file:
        file.seek(len(expected) + 5000)
        file.write(b"end")
    assert_same(path.read_bytes(), expected + bytes(5000) + b"end", "with a hole")


def test_a_size_that_is_known_first_makes_the_buffer_at_once(files: Mounted) -> None:
    with (files.path / "x").open("xb", buffering=0) as file:
        assert files.store.list() == []
        os.ftruncate(file.fileno(), SIZE)
        assert files.store.stat("x").length == SIZE
        with files.store.open("x") as buffer:
            os.pwrite(file.fileno(), b"seen at once", SIZE - 12)
            assert buffer.pread(12, SIZE - 12) == b"seen at once"
        assert files.store.usage().charged == SIZE


def test_content_that_outgrows_its_memory_becomes_another_buffer(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        path = files.path / "x"
        path.write_bytes(pattern(4096, 1))
        path.chmod(0o640)
        inode = path.stat().st_ino
        with files.store.open("x", "r+") as buffer:
            path.write_bytes(b"short")  # in the same memory
            assert buffer.pread(5, 0) == b"short"
            with path.open("r+b", buffering=0) as file:
                file.write(pattern(5000, 2))
                assert_same(os.pread(file.fileno(), 5000, 0), pattern(5000, 2), "in the spool")
                assert path.stat().st_size == 5000
                assert files.store.stat("x").length == 5, "before close(2)"
            buffer.pwrite(b"old memory", 0)
        assert_same(path.read_bytes(), pattern(5000, 2), "after close(2)")
        status = files.store.stat("x")
        assert (status.size, status.length, status.mode) == (8192, 5000, 0o640)
        assert path.stat().st_ino == inode
        files.process.send_signal(signal.SIGTERM)
        assert "x: outgrows its 4 KiB of memory" in files.process.stderr.read()


def test_a_new_file_of_dd_is_not_reported_as_outgrown(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        shell("dd if=/dev/zero of=frames bs=1M count=4 status=none", files.path)
        assert files.store.stat("frames").length == 4 << 20
        files.process.send_signal(signal.SIGTERM)
        assert "outgrows" not in files.process.stderr.read()


def test_a_full_store_is_a_full_disk(files: Mounted) -> None:
    room = os.statvfs(files.path)
    assert room.f_blocks * room.f_frsize == 256 << 20
    assert room.f_bavail == room.f_blocks
    with (files.path / "x").open("xb", buffering=0) as file:
        failing(errno.ENOSPC, os.ftruncate, file.fileno(), (256 << 20) + 1)
        file.write(b"fits")
    assert (files.path / "x").read_bytes() == b"fits"
    assert os.statvfs(files.path).f_bavail == room.f_blocks - 1


def test_a_file_may_be_renamed_while_it_is_written(files: Mounted) -> None:
    (files.path / "kept").write_bytes(b"old")
    with (files.path / ".kept.tmp").open("xb", buffering=0) as file:
        file.write(pattern(SIZE, 1))
        inode = os.fstat(file.fileno()).st_ino
        os.rename(files.path / ".kept.tmp", files.path / "kept")
        file.write(pattern(SIZE, 2))
        assert (files.path / "kept").stat().st_ino == inode
    assert_same((files.path / "kept").read_bytes(), pattern(SIZE, 1) + pattern(SIZE, 2), "both")
    assert os.listdir(files.path) == ["kept"]


def test_modes_and_times_are_kept(files: Mounted) -> None:
    path = files.path / "x"
    with path.open("xb", buffering=0) as file:
        file.write(b"content")
        os.fchmod(file.fileno(), 0o604)
        os.utime(file.fileno(), ns=(10**18 + 1, 10**18 + 2))
    told = path.stat()
    assert (told.st_atime_ns, told.st_mtime_ns) == (10**18 + 1, 10**18 + 2)
    assert stat.S_IMODE(told.st_mode) == files.store.stat("x").mode == 0o604
    assert files.store.stat("x").modified_ns == 10**18 + 2
    before = time.time_ns()
    with path.open("r+b") as file:
        file.write(b"C")
    assert path.stat().st_mtime_ns >= before
    assert path.stat().st_atime_ns == 10**18 + 1
    path.chmod(0o600)
    os.utime(path, ns=(5, 6))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (5, 6)
    assert files.store.stat("x").mode == 0o600


def test_what_a_name_may_be(files: Mounted) -> None:
    for name in ("ä" * 127, "a" * 255, "-rf", " ", "%s", "..."):
        (files.path / name).write_bytes(name.encode())
        assert (files.path / name).read_bytes() == name.encode()
        assert files.store.stat(name).length == len(name.encode())
    failing(errno.ENAMETOOLONG, (files.path / ("a" * 256)).write_bytes, b"")
    failing(errno.EINVAL, (files.path / "new\nline").write_bytes, b"")
    failing(errno.EILSEQ, open, os.fsencode(files.path) + b"/\xff", "wb")
    assert (files.path / ".." / "mnt" / " ").exists()


def test_there_are_files_in_one_directory_and_nothing_else(files: Mounted) -> None:
    (files.path / "x").write_bytes(b"")
    failing(errno.EPERM, (files.path / "d").mkdir)
    failing(errno.EPERM, (files.path / "l").symlink_to, "x")
    failing(errno.EPERM, os.link, files.path / "x", files.path / "l")
    failing(errno.EPERM, os.mkfifo, files.path / "p")
    assert os.listdir(files.path) == ["x"]


def test_extended_attributes_tell_what_the_memory_is(files: Mounted) -> None:
    path = files.path / "x"
    path.write_bytes(bytes(5000))
    status = files.store.stat("x")
    wait_until(lambda: attributes(path)["user.dmabuf.in_use"] == "no")  # FUSE releases it later
    told = attributes(path)
    assert told.pop("user.dmabuf.reason") == status.reason
    assert told == {
        "user.dmabuf.exporter": status.exporter,
        "user.dmabuf.in_use": "no",
        "user.dmabuf.is_dmabuf": "yes" if status.is_dmabuf else "no",
        "user.dmabuf.size": "8192",
        "user.dmabuf.slabs": "1",
    }
    with files.store.open("x"):
        assert attributes(path)["user.dmabuf.in_use"] == "yes"
    failing(errno.ENODATA, os.getxattr, path, "user.other")
    failing(errno.EOPNOTSUPP, os.setxattr, path, "user.dmabuf.size", b"1")


def test_mappings_are_private_ones(files: Mounted) -> None:
    import mmap

    path = files.path / "x"
    path.write_bytes(pattern(10000, 1))
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as view:
            assert_same(bytes(view), pattern(10000, 1), "the mapping")
        failing(errno.ENODEV, mmap.mmap, file.fileno(), 0)


def test_seeking_for_holes_finds_none(files: Mounted) -> None:
    path = files.path / "x"
    path.write_bytes(bytes(10000))
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), 5, os.SEEK_DATA) == 5
        assert os.lseek(file.fileno(), 5, os.SEEK_HOLE) == 10000
        failing(errno.ENXIO, os.lseek, file.fileno(), 10000, os.SEEK_DATA)


def test_many_names_are_listed(files: Mounted) -> None:
    for number in range(300):
        files.store.create(f"{number:04d}", 1).close()
    assert sorted(os.listdir(files.path)) == [f"{number:04d}" for number in range(300)]
    assert [(files.path / f"{number:04d}").stat().st_size for number in range(50)] == [1] * 50


def test_what_other_clients_do_is_seen_at_once(files: Mounted) -> None:
    path = files.path / "x"
    files.store.create("x", 100).close()
    assert path.stat().st_size == 100
    files.store.truncate("x", 50)
    files.store.chmod("x", 0o644)
    assert (path.stat().st_size, stat.S_IMODE(path.stat().st_mode)) == (50, 0o644)
    files.store.rename("x", "y")
    assert not path.exists()
    files.store.remove("y")
    files.store.create("y", 200).close()
    assert (files.path / "y").stat().st_size == 200


def test_a_mount_ends_when_it_is_told_to(tmp_path: Path) -> None:
    folder, socket = tmp_path / "mnt", tmp_path / "store.sock"
    folder.mkdir()
    with as_a_program(socket):
        for end in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process = start(folder, socket, "--json")
            told = checked("".join(process.stdout.readline() for _ in range(5)))
            assert told == {
                "format": "dmabuf-mount/1",
                "directory": str(folder),
                "store": str(socket),
            }
            assert os.path.ismount(folder)
            with (folder / f"by {end.name}").open("xb", buffering=0) as file:
                file.write(b"kept")
                process.send_signal(end)
                assert process.communicate(timeout=100) == ("", "")
                assert process.returncode == 0
                failing(errno.ENOTCONN, file.write, b"too late")
                with pytest.raises(OSError):
                    file.close()
            assert not os.path.ismount(folder)
        with mount(folder, socket) as process:
            assert sorted(os.listdir(folder)) == ["by SIGHUP", "by SIGINT", "by SIGTERM"]
            assert (folder / "by SIGINT").read_bytes() == b"kept"
            subprocess.run(["fusermount3", "-u", folder], check=True)
            assert process.wait(timeout=100) == 0
        assert not os.path.ismount(folder)


def test_a_dead_mount_is_taken_away(tmp_path: Path) -> None:
    folder, socket = tmp_path / "mnt", tmp_path / "store.sock"
    folder.mkdir()
    with as_a_program(socket):
        process = start(folder, socket)
        assert process.stdout.readline().startswith("mounted")
        process.kill()
        process.communicate()
        failing(errno.ENOTCONN, os.listdir, folder)
        with mount(folder, socket) as process:
            (folder / "x").write_bytes(b"works")
            assert (folder / "x").read_bytes() == b"works"
            process.send_signal(signal.SIGTERM)
            assert "a mount whose process had died" in process.stderr.read()
        assert not os.path.ismount(folder)


def test_where_it_cannot_be_mounted_it_says_why(tmp_path: Path) -> None:
    folder, socket = tmp_path / "mnt", tmp_path / "store.sock"

    def refused(match: str, where: Path = folder) -> None:
        process = start(where, socket)
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (1, "")
        assert err.startswith("error: ") and match in err and err.count("\n") == 1, err

    folder.mkdir()
    refused("no store is running here; start one: dmabuf serve")
    with as_a_program(socket):
        refused("No such file or directory", tmp_path / "none")
        (tmp_path / "file").write_bytes(b"")
        refused("Not a directory", tmp_path / "file")
        (folder / "x").write_bytes(b"")
        refused("would hide its 1 entries")
        (folder / "x").unlink()
        with mount(folder, socket):
            refused("a store is already mounted here")
    assert not os.path.ismount(folder)


NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-c"]
OTHER = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "bash", "-c"]


@needs("root")
def test_roots_mount_is_for_every_user_by_owner_and_mode() -> None:
    def run(user: list[str], script: str, folder: Path) -> tuple[int, str, str]:
        done = subprocess.run([*user, script], cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with mounted(folder) as files:
            assert (
                run(NOBODY, "umask 027; echo mine > x; echo all > y; chmod 644 y", files.path)[0]
                == 0
            )
            told = (files.path / "x").stat()
            assert (told.st_uid, told.st_gid, told.st_mode & 0o777) == (65534, 65534, 0o640)
            status = files.store.stat("x")
            assert (status.uid, status.gid, status.mode) == (65534, 65534, 0o640)
            assert (
                run(NOBODY, "cat x; echo more >> x; cat x", files.path)[1] == "mine\nmine\nmore\n"
            )
            for script in ("cat x", "echo bad > x", "echo bad > y", "chmod 666 x", "mv -f x z"):
                code, _, err = run(OTHER, script, files.path)
                assert code and ("denied" in err or "not permitted" in err), (script, err)
            assert run(OTHER, "rm -f x", files.path)[0]
            assert run(OTHER, "cat y", files.path)[1] == "all\n"
            assert (files.path / "x").read_text() == "mine\nmore\n"
            assert run(NOBODY, "rm x y", files.path)[0] == 0
            assert os.listdir(files.path) == []


def test_space_is_not_reserved_without_a_size(files: Mounted) -> None:
    with (files.path / "x").open("xb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, 10000)  # the C library's own, by writing
    assert (files.path / "x").read_bytes() == bytes(10000)
