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
from dmabuf.cli import COMMANDS, output
from tests.support import assert_same, in_child, pattern
from tests.unit.command import PATIENCE, PROGRAM, dmabuf, finish, start

SIZE = 300_001
DATA = pattern(SIZE, 12)


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


def test_closed_standard_files(source: Path, tmp_path: Path) -> None:
    for arguments, closed, name in (
        (["cp", "-", "x"], 0, "input"),
        (["cp", source, "-"], 1, "output"),
        (["--version"], 1, "output"),
    ):
        ended = finish(start(*arguments, preexec_fn=lambda fd=closed: os.close(fd)))
        assert (ended.status, ended.err) == (1, f"error: standard {name}: is closed\n")
    ended = finish(start("cp", tmp_path / "none", "x", preexec_fn=lambda: os.close(2)))
    assert (ended.status, ended.out) == (1, ""), "errors are not results"


@pytest.mark.parametrize("arguments", [["--help"], ["top"], ["cp", "{0}", "{1}"]])
def test_a_terminal_that_has_gone(arguments: list[str], source: Path, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    os.close(ours)
    words = [word.format(source, tmp_path / "t") for word in arguments]
    how = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    done = subprocess.run([*PROGRAM, *words], timeout=PATIENCE, check=False, **how)
    os.close(theirs)
    assert done.returncode == 1


HOSTILE = "\x1b[2J\x07\n\u202e\x9bgrüß\udcff"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_is_one_line_whatever_the_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / HOSTILE
    for words in ([target], [target, target], ["--fd", HOSTILE], [f"--{HOSTILE}"]):
        ended = dmabuf(capsys, name, *words)
        assert ended.status in (1, 2)
        lines = ended.err.splitlines()
        assert lines[0].startswith("error: ")
        assert lines[1:] in ([], [f"try 'dmabuf {name} --help'"])
        assert all(map(str.isprintable, lines))


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "tr_TR.UTF-8"},
        {"TERM": "dumb", "COLUMNS": "40"},
    ],
    ids=str,
)
def test_locales_and_terminals(environment: dict[str, str], tmp_path: Path) -> None:
    name = tmp_path / HOSTILE
    name.write_bytes(b"x")
    env = os.environ | environment
    ended = finish(start("doctor", name, env=env))
    assert (ended.status, ended.err) == (0, "")
    (line,) = (line for line in ended.out.splitlines() if str(tmp_path) in line)
    assert r"\x1b[2J\x07\n" in line and r"\xff (" in line and line.isprintable()
    ended = finish(start("cp", tmp_path / "İ", tmp_path / "t", env=env))
    assert ended.status == 1
    assert ended.err.endswith(": No such file or directory\n")
    ended = finish(start("cp", "--help", env=env))
    assert max(map(len, ended.out.splitlines())) <= 80


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_no_progress_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb", buffering=0), os.fdopen(theirs, "w") as terminal:
        assert output.is_terminal(terminal)
        monkeypatch.setenv("TERM", "dumb")
        assert not output.is_terminal(terminal)


LIGHT = """
import sys
before = set(sys.modules)
from dmabuf.cli import main
main(sys.argv[1:])
print("loaded:", *set(sys.modules) - before)
"""


@pytest.mark.parametrize(
    ("arguments", "most"),
    [("--help", 50), ("--version", 50), ("cp --help", 140)],
)
def test_help_and_version_load_few_modules(arguments: str, most: int) -> None:
    """Because each costs about a millisecond."""
    loaded = set(in_child(LIGHT, *arguments.split()).partition("loaded:")[2].split())
    assert not loaded & {"importlib.metadata", "logging", "asyncio", "numpy", "ctypes"}
    assert "cp" in arguments or not loaded & {"argparse", "dataclasses", "dmabuf.memory"}
    assert len(loaded) <= most + 10 * (sys.version_info >= (3, 14))  # it imports more itself


def test_version_and_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert dmabuf(capsys, "--version").out.startswith("dmabuf 0.")
    ended = dmabuf(capsys, "--help")
    assert (ended.status, ended.err) == (0, "")
    commands = [line.split()[0] for line in ended.out.splitlines() if line.startswith("  ")]
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "..." not in ended.out.replace("[ARGUMENT ...]", "")
    without = dmabuf(capsys)
    assert (without.status, without.out, without.err) == (2, "", ended.out)
    for name in commands[:-2]:  # but the two options
        of_it = dmabuf(capsys, name, "--help")
        assert (of_it.status, of_it.err) == (0, ""), name
        assert of_it.out.startswith(f"usage: dmabuf {name} ")
        assert not [line for line in of_it.out.splitlines() if len(line) > 80]
    assert commands[:-2] == list(COMMANDS)
    ended = dmabuf(capsys, "cq")
    assert (ended.status, ended.err) == (2, "error: unknown command 'cq'; try 'dmabuf --help'\n")
