"""`dmabuf` as a program: standard input and output, signals, and what others see meanwhile."""

import array
import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from dmabuf import allocate
from tests.support import assert_same, in_child, pattern
from tests.unit.command import PATIENCE, PROGRAM, dmabuf, finish, room_for, start

SIZE = 300_001
DATA = pattern(SIZE, 12)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def test_from_and_to_pipes(tmp_path: Path) -> None:
    ended = finish(start("cp", "-", tmp_path / "t", stdin=subprocess.PIPE), DATA)
    assert (ended.status, ended.err) == (0, "")
    assert "read buffered (" in ended.out
    assert_same((tmp_path / "t").read_bytes(), DATA, "the target")
    process = start("cp", tmp_path / "t", "-")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert_same(out, DATA, "standard output")
    assert err.startswith(b"300.0 kB in "), "results go to standard error"


def test_standard_files_are_used_at_their_position(source: Path, tmp_path: Path) -> None:
    """Between other programs on the same descriptors, as in ( head; dmabuf cp - -; tail )."""
    out = tmp_path / "out"
    with source.open("rb") as stdin, out.open("wb") as stdout:
        os.write(stdout.fileno(), os.read(stdin.fileno(), 1001))
        command = [*PROGRAM, "cp", "-q", "--size", "100001", "-", "-"]
        subprocess.run(command, stdin=stdin, stdout=stdout, check=True, timeout=PATIENCE)
        for file in (stdin, stdout):
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 101_002
        os.write(stdout.fileno(), os.read(stdin.fileno(), SIZE))
    assert_same(out.read_bytes(), DATA, "what the three wrote")


def test_appending(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"first")
    with out.open("ab") as stdout:
        subprocess.run(
            [*PROGRAM, "cp", "-q", source, "-"], stdout=stdout, check=True, timeout=PATIENCE
        )
        stdout.write(b"last")
    assert_same(out.read_bytes(), b"first" + DATA + b"last", "what was appended")


def test_a_reader_who_leaves(source: Path) -> None:
    process = start("cp", "--size", "1GiB", "/dev/zero", "-")
    assert process.stdout.read(1) == b"\0"
    process.stdout.close()
    assert process.wait(PATIENCE) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("arguments", [["doctor"], ["ls", "--system"], ["--help"]])
def test_a_reader_who_has_left(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*PROGRAM, *arguments], stdout=write, stderr=subprocess.PIPE, timeout=PATIENCE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("arguments", "full", "status"),
    [
        (["doctor"], "stdout", 1),
        (["--help"], "stdout", 1),
        (["--version"], "stdout", 1),
        (["cp", "{0}/nothing", "{0}/x"], "stderr", 1),
        (["no-such-command"], "stderr", 2),
        (["cp", "/etc/passwd", "{0}/x"], "stdout", 1),
        (["exec", "--fd", "{1}", "no-such-program"], "stderr", 127),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_a_status_is_the_commands_where_nothing_can_be_said(
    tmp_path: Path, arguments: list[str], full: str, status: int
) -> None:
    with allocate(4096, exporter="memfd") as buf, open("/dev/full", "wb") as nowhere:
        command = [*PROGRAM, *(one.format(tmp_path, buf.fileno()) for one in arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: nowhere}
        buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            command, **streams, pass_fds=[buf.fileno()], env=buffered, timeout=PATIENCE, check=False
        )
    assert done.returncode == status
    if full == "stdout":
        assert done.stderr == b"error: standard output: No space left on device\n"


def test_closed_standard_files(source: Path) -> None:
    for arguments, closed, name in (
        (["cp", "-", "x"], 0, "input"),
        (["cp", source, "-"], 1, "output"),
    ):
        ended = finish(start(*arguments, preexec_fn=lambda fd=closed: os.close(fd)))
        assert (ended.status, ended.err) == (1, f"error: standard {name}: is closed\n")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_in_the_middle(number: signal.Signals, there: bool, tmp_path: Path) -> None:
    """A copy from a FIFO that has read something, and waits for more, for ever."""
    target, fifo = tmp_path / "t", tmp_path / "fifo"
    if there:
        target.write_bytes(b"old")
    os.mkfifo(fifo)
    # Open for both, so that opening does not wait for a program that may have failed.
    with fifo.open("r+b", buffering=0) as writer:
        process = start("cp", fifo, target)
        writer.write(b"not all of it")
        unread = array.array("i", [1])
        while unread[0]:
            assert process.poll() is None
            fcntl.ioctl(writer, termios.FIONREAD, unread)
        hidden = [name for name in os.listdir(tmp_path) if name.startswith(".dmabuf-")]
        assert not hidden, "the file that is written has no name"
        process.send_signal(number)
        ended = finish(process)
    if number == signal.SIGKILL:
        assert (ended.status, ended.out, ended.err) == (-number, "", "")
    else:
        assert (ended.status, ended.out) == (128 + number, "")
        assert ended.err == f"error: stopped by {number.name}\n"
    assert sorted(os.listdir(tmp_path)) == (["fifo", "t"] if there else ["fifo"])
    assert not there or target.read_bytes() == b"old"


@pytest.mark.parametrize("ignored", [False, True])
def test_an_interrupt_while_the_command_is_imported(ignored: bool) -> None:
    """No traceback; and where it is ignored, as under nohup, the command goes on."""
    script = """
import importlib.abc, os, signal, sys
class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "dmabuf.cli.output":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv[1:] = ["--version"]
from dmabuf.cli.__main__ import run
sys.exit(run())
"""
    how = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)} if ignored else {}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, **how
    )
    assert (ended.returncode, ended.stderr) == (0 if ignored else -signal.SIGINT, "")


def test_a_filesystem_without_nameless_files(tmp_path: Path, monkeypatch, capsys) -> None:
    """The file has a hidden name from the start, which an error or signal takes away again."""
    opened = os.open

    def refusing(path, flags, *rest, **how):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opened(path, flags, *rest, **how)

    monkeypatch.setattr(os, "open", refusing)
    (tmp_path / "s").write_bytes(DATA)
    for _ in range(2):
        assert dmabuf(capsys, "cp", tmp_path / "s", tmp_path / "t").status == 0
        assert_same((tmp_path / "t").read_bytes(), DATA, "the target")
        assert sorted(os.listdir(tmp_path)) == ["s", "t"]
    ended = dmabuf(
        capsys, "cp", "--require", "zero-copy", "--route", "staged", tmp_path / "s", tmp_path / "t"
    )
    assert ended.status == 1
    assert sorted(os.listdir(tmp_path)) == ["s", "t"]


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731 - as nohup does
    process = start("cp", fifo, tmp_path / "t", preexec_fn=ignore)
    with fifo.open("wb") as writer:
        process.send_signal(signal.SIGHUP)
        writer.write(b"all of it")
    assert finish(process).status == 0
    assert (tmp_path / "t").read_bytes() == b"all of it"


def test_a_full_disk(tmp_path: Path) -> None:
    """The real one is in tests/kernel."""
    (tmp_path / "t").write_bytes(b"old")
    process = start("cp", "-", tmp_path / "t", stdin=subprocess.PIPE, preexec_fn=room_for(10**7))
    ended = finish(process, bytes(2 * 10**7))
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith(f"error: {tmp_path}/t: ")
    assert "File too large (after 8388608 whole bytes; the old file is unchanged)" in ended.err
    assert (tmp_path / "t").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["t"]


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    """A line after a second, on standard error, and gone at the end; nothing of it in the result.

    Its bytes are read to the end: a program that nobody reads waits for ever.
    """
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "cp", fifo, tmp_path / "t"], stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    shown, ended = [b""], threading.Event()

    def look() -> None:
        with contextlib.suppress(OSError):  # EIO: the program has ended
            while more := os.read(ours, 4096):
                shown.append(more)
                if b"copying" in b"".join(shown):
                    ended.set()
        ended.set()

    looking = threading.Thread(target=look)
    looking.start()
    with fifo.open("wb") as writer:
        while not ended.is_set():
            writer.write(bytes(1 << 20))
    out, _ = process.communicate(timeout=PATIENCE)
    looking.join()
    os.close(ours)
    assert process.returncode == 0
    assert b"copying" not in out and b"B in " in out
    assert b"".join(shown).endswith(b"\r\x1b[K"), "the line is gone"


LIGHT = """
import sys
from dmabuf.cli import main
main(sys.argv[1:])
print("loaded:", *sys.modules)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_what_needs_no_command_loads_none(arguments: list[str]) -> None:
    loaded = set(in_child(LIGHT, *arguments).partition("loaded:")[2].split())
    heavy = {"argparse", "importlib.metadata", "dmabuf.transfer", "dmabuf.memory", "dmabuf.cli.cp"}
    assert not loaded & heavy


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert dmabuf(capsys, "--version").out.startswith("dmabuf 0.")
    ended = dmabuf(capsys, "--help")
    assert (ended.status, ended.err) == (0, "")
    commands = [line.split()[0] for line in ended.out.splitlines() if line.startswith("  ")]
    assert max(map(len, ended.out.splitlines())) <= 80
    for name in commands[:-2]:  # but the two options
        of_it = dmabuf(capsys, name, "--help")
        assert (of_it.status, of_it.err) == (0, ""), name
        assert of_it.out.startswith(f"usage: dmabuf {name} ")
        assert max(map(len, of_it.out.splitlines())) <= 100
    assert len(commands) == 14 + 2
    for arguments, what in (([], "a command is missing"), (["cq"], "unknown command 'cq'")):
        ended = dmabuf(capsys, *arguments)
        assert (ended.status, ended.err) == (2, f"error: {what}; try 'dmabuf --help'\n")
