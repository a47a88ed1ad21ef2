"""`dmabuf exec`, on a memfd: what it hands over, and what else it leaves alone."""

import json
import os
import signal
import subprocess
import sys

import pytest

import dmabuf
from tests.support import assert_same, pattern
from tests.unit.command import PROGRAM
from tests.unit.command import dmabuf as run_here

SIZE = 300_000 // 4096 * 4096


@pytest.fixture
def buf():
    with dmabuf.allocate(SIZE, exporter="memfd") as buf:
        buf.pwrite(pattern(SIZE, 1), 0)
        yield buf


def execute(buf, *arguments, **how):
    """The command with the buffer as descriptor `{fd}`."""
    fd = buf.fileno()
    words = [str(word).replace("{fd}", str(fd)) for word in arguments]
    how = {"pass_fds": [fd], "capture_output": True, "timeout": 60} | how
    return subprocess.run([*PROGRAM, "exec", "--fd", str(fd), *words], **how)


def test_a_program_reads_it(buf):
    done = execute(buf, "cat", "/dev/fd/{fd}")
    assert (done.returncode, done.stderr) == (0, b"")
    assert_same(done.stdout, pattern(SIZE, 1), "what cat saw")


def test_a_program_writes_it(buf):
    done = execute(buf, "bash", "-c", "cat >&{fd}", input=pattern(SIZE, 2))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 2), "the buffer")


def test_as_standard_input(buf):
    done = subprocess.run(
        [*PROGRAM, "exec", "--fd", "0", "--", "cat"],
        stdin=buf.fileno(),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert_same(done.stdout, pattern(SIZE, 1), "what cat saw")


def test_the_position_is_its_own(buf):
    os.lseek(buf.fileno(), 1000, os.SEEK_SET)
    done = execute(buf, "bash", "-c", "head -c 100 <&{fd}")
    assert done.stdout == pattern(SIZE, 1)[:100]
    assert os.lseek(buf.fileno(), 0, os.SEEK_CUR) == 1000


@pytest.mark.parametrize("option", ["--read-only", "-r"])
def test_read_only(buf, option):
    done = execute(buf, option, "bash", "-c", "head -c 3 <&{fd}; echo x >&{fd}")
    assert done.stdout == pattern(SIZE, 1)[:3]
    assert b"Bad file descriptor" in done.stderr
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


def test_no_more_than_the_descriptor_has(buf):
    fd = os.open(f"/proc/self/fd/{buf.fileno()}", os.O_RDONLY)
    try:
        done = subprocess.run(
            [*PROGRAM, "exec", "--fd", str(fd), "bash", "-c", f"echo x >&{fd}"],
            pass_fds=[fd],
            capture_output=True,
            timeout=60,
        )
    finally:
        os.close(fd)
    assert b"Bad file descriptor" in done.stderr
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


def test_it_becomes_the_program(buf):
    """The same process, with its descriptors."""
    code = "; ".join(
        [
            "import os",
            "fds = [fd for fd in sorted(map(int, os.listdir('/proc/self/fd'))) if fd != 3]",
            "print(os.getpid(), os.environ['DMABUF_FD'], fds)",
        ]
    )
    reader, writer = os.pipe()
    try:
        fd = buf.fileno()
        with subprocess.Popen(
            [*PROGRAM, "exec", "--fd", str(fd), "--", sys.executable, "-S", "-c", code],
            pass_fds=[fd, reader],
            stdout=subprocess.PIPE,
        ) as process:
            out, _ = process.communicate(timeout=60)
        expected = [one for one in sorted({0, 1, 2, fd, reader}) if one != 3]
        assert out.decode() == f"{process.pid} {fd} {expected}\n"
    finally:
        os.close(reader)
        os.close(writer)


def test_signals_are_as_they_were(buf):
    """Also those that Python ignores: SIGPIPE, and SIGXFSZ."""
    look = ["grep", "Sig[BI]", "/proc/self/status"]
    without = subprocess.run(look, capture_output=True, timeout=60)
    assert execute(buf, *look).stdout == without.stdout


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM)],
)
def test_the_status_is_the_programs(buf, script, status):
    assert execute(buf, "sh", "-c", script).returncode == status


def test_options_after_the_program_are_the_programs(buf):
    done = execute(buf, "echo", "--fd", "9", "-v", "--help", "--")
    assert done.stdout == b"--fd 9 -v --help --\n"


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("no-such-program", 127, "no-such-program: No such file or directory"),
        ("/etc", 126, "/etc: Permission denied"),
        ("/etc/hostname/x", 126, "/etc/hostname/x: Not a directory"),
    ],
)
def test_programs_that_cannot_run(buf, program, status, said):
    done = execute(buf, "--", program)
    assert (done.returncode, done.stdout) == (status, b"")
    assert done.stderr.decode() == f"error: {said}\n"


def test_a_file_that_is_no_program(buf, tmp_path):
    for mode, said in ((0o644, "Permission denied"), (0o755, "Exec format error")):
        path = tmp_path / "text"
        path.write_bytes(b"no program")
        path.chmod(mode)
        done = execute(buf, path)
        assert done.returncode == 126
        assert said in done.stderr.decode()


def test_what_is_told(buf):
    size = f"descriptor {buf.fileno()}: {SIZE} bytes, "
    done = execute(buf, "-v", "true")
    assert done.stderr.decode() == (
        f"{size}rb+, by memfd: the memory is a memfd, which is a file\n"
    )
    assert execute(buf, "-rv", "true").stderr.decode().startswith(f"{size}rb, by memfd: ")
    done = execute(buf, "--json", "echo", "out")
    assert done.stdout == b"out\n"
    assert json.loads(done.stderr) == {
        "format": "dmabuf-exec/1",
        "fd": buf.fileno(),
        "size": SIZE,
        "mode": "rb+",
        "way": "memfd",
        "reason": "the memory is a memfd, which is a file",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fd", "3"], "required: PROGRAM"),
        (["--fd", "3", "--"], "required: PROGRAM"),
        (["true"], "required: --fd"),
        (["--fd", "-1", "true"], "--fd"),
        (["--fd", "three", "true"], "--fd"),
    ],
)
def test_command_lines_that_are_not_understood(arguments, said, capsys):
    ended = run_here(capsys, "exec", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert said in ended.err


def test_descriptors_that_will_not_do(capsys, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    ended = run_here(capsys, "exec", "--fd", "1000000", "true")
    assert (ended.status, ended.err) == (1, "error: descriptor 1000000: Bad file descriptor\n")
    ended = run_here(capsys, "exec", "--fd", str(1 << 40), "true")
    assert (ended.status, ended.err) == (1, f"error: descriptor {1 << 40}: Bad file descriptor\n")
    with path.open("rb") as file:
        ended = run_here(capsys, "exec", "--fd", file.fileno(), "true")
    assert ended.status == 1
    assert "is not a dma-buf but a regular file" in ended.err


def test_a_memfd_for_writing_only(buf, capsys):
    fd = os.open(f"/proc/self/fd/{buf.fileno()}", os.O_WRONLY)
    try:
        ended = run_here(capsys, "exec", "--fd", fd, "--read-only", "true")
    finally:
        os.close(fd)
    assert (ended.status, ended.err) == (1, f"error: descriptor {fd} is open for writing only\n")
