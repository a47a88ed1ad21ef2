"""`dmabuf ls --system` and `dmabuf top`, on made-up machines and as programs."""

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf import inspect
from tests.unit.command import PATIENCE, dmabuf, finish, start
from tests.unit.fake_machine import FakeMachine, Made, statted
from tests.unit.schemas import checked

Capture = pytest.CaptureFixture[str]

MIB = 1 << 20
FRAMES = Made(7, MIB, "system", "frames", references=4)
SCREEN = Made(8, 3 * MIB, "drm", references=2, devices=("0000:01:00.0", "vgem"))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """What the commands see."""
    machine = FakeMachine(tmp_path)
    census = inspect.take_census
    monkeypatch.setattr(inspect, "take_census", lambda: census(str(tmp_path)))
    return machine


@pytest.fixture
def busy(machine: FakeMachine) -> FakeMachine:
    machine.process(20, "camera", fds={3: FRAMES, 5: FRAMES})
    machine.process(21, "reader", fds={4: FRAMES}, maps=[FRAMES.mapped(4096, MIB)])
    machine.list(FRAMES, SCREEN)
    return machine


def under(out: str, title: str) -> list[str]:
    """The rows of the last table of that title, their cells apart by one space."""
    lines = out.splitlines()
    at = len(lines) - lines[::-1].index(title) + 1
    end = lines.index("", at) if "" in lines[at:] else len(lines)
    return [" ".join(line.split()) for line in lines[at:end]]


def test_ls(busy: FakeMachine, capsys: Capture) -> None:
    ended = dmabuf(capsys, "ls", "--system")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[-1] == "2 dma-bufs, 4 MiB"
    row = next(line for line in lines if line.split()[:1] == ["7"])
    assert row.split(None, 5)[3:5] == ["system", "frames"]
    assert "camera[20] (fd 3 5), reader[21] (fd 4, 1 mapping)" in row
    row = next(line for line in lines if line.split()[:1] == ["8"])
    assert "kernel (2)" in row
    assert row.endswith("0000:01:00.0, vgem")
    assert under(ended.out, "by process") == [
        "kernel 1 3 MiB 3 MiB",
        "camera[20] 1 1 MiB 512 KiB",
        "reader[21] 1 1 MiB 512 KiB",
    ]
    assert under(ended.out, "by exporter") == ["drm 1 3 MiB", "system 1 1 MiB"]


def test_ls_as_json(busy: FakeMachine, capsys: Capture) -> None:
    ended = dmabuf(capsys, "ls", "--system", "--json")
    assert (ended.status, ended.err) == (0, "")
    told = checked(ended.out)
    camera = {"pid": 20, "started": 100, "command": "camera"}
    reader = {"pid": 21, "started": 100, "command": "reader"}
    mapping = told["buffers"][1]["holders"][1]["mappings"][0]
    assert (mapping["address"], mapping["nbytes"]) == (4096, MIB)
    assert told["buffers"][1] == {
        "inode": 7,
        "size": MIB,
        "exact": True,
        "exporter": "system",
        "name": "frames",
        "references": 4,
        "unseen_references": 0,
        "holders": [
            {"process": camera, "fds": [3, 5], "mappings": []},
            {"process": reader, "fds": [4], "mappings": [mapping]},
        ],
        "devices": [],
    }
    assert told["buffers"][0]["devices"] == ["0000:01:00.0", "vgem"]
    assert [(one["process"], one["total"]) for one in told["by_process"]] == [
        (None, {"nbytes": 3 * MIB, "buffers": 1, "share": 3 * MIB}),
        (camera, {"nbytes": MIB, "buffers": 1, "share": MIB // 2}),
        (reader, {"nbytes": MIB, "buffers": 1, "share": MIB // 2}),
    ]
    assert [one["exporter"] for one in told["by_exporter"]] == ["drm", "system"]
    assert told["total"]["nbytes"] == 4 * MIB
    assert (told["processes"], told["hidden"]) == (3, 0)
    assert (told["complete"], told["refusals"]) == (True, [])


@pytest.mark.parametrize("wanted", [("--process", "reader"), ("--process", "21")])
def test_ls_of_one_process(busy: FakeMachine, capsys: Capture, wanted: tuple[str, ...]) -> None:
    told = json.loads(dmabuf(capsys, "ls", "--system", "--json", *wanted).out)
    assert [one["inode"] for one in told["buffers"]] == [7]


def test_ls_of_one_exporter(busy: FakeMachine, capsys: Capture) -> None:
    told = json.loads(dmabuf(capsys, "ls", "--system", "--json", "--exporter", "drm").out)
    assert [one["inode"] for one in told["buffers"]] == [8]
    ended = dmabuf(capsys, "ls", "--system", "--exporter", "dr")
    assert (ended.status, ended.out) == (0, "0 dma-bufs, 0 B\n")


def test_what_could_not_be_seen(machine: FakeMachine, capsys: Capture) -> None:
    machine.process(20, "one", maps=[SCREEN.mapped(4096, MIB)])
    held = Made(9, MIB, references=3)
    fd = machine.process(21, "two", fds={3: held}) / "fd/3"
    (machine.root / "proc/1/ns/pid").unlink()
    (machine.root / "proc/1/ns/pid").symlink_to("pid:[1]")
    with statted(fd, held):
        ended = dmabuf(capsys, "ls", "--system")
    assert ended.status == 0
    assert "?" in next(line for line in ended.out.splitlines() if line.split()[:1] == ["8"])
    assert ">=1 MiB" in ended.out
    assert "two[21] (fd 3), not seen (2)" in ended.out
    assert "2 dma-bufs, >=2 MiB" in ended.out
    notes = ended.err.splitlines()
    assert len(notes) == 2
    assert all(note.startswith("note: ") for note in notes)
    assert "only this container's processes" in notes[0]
    assert "debugfs is not mounted; mount -t debugfs debugfs" in notes[1]


def test_names_do_nothing_to_a_terminal(machine: FakeMachine, capsys: Capture) -> None:
    """Nor are they two lines."""
    label = "\x1b[2J[red]a\nb:smile:\\ \u202e\udcff"
    made = Made(7, MIB, "sys[b]tem", label, references=1)
    machine.process(20, "x\x1b]0;t\a\r", fds={3: made})
    machine.list(made)
    for command in (("ls", "--system"), ("top", "-n", "1")):
        ended = dmabuf(capsys, *command)
        assert ended.status == 0
        assert ended.out.replace("\n", "").isprintable()
        assert "x\\x1b]0;t\\x07\\r[20]" in ended.out
        assert "sys[b]tem" in ended.out
        if command[0] == "ls":
            assert r"\x1b[2J[red]a\nb:smile:\\ \u202e\xff" in ended.out
    told = json.loads(dmabuf(capsys, "ls", "--system", "--json").out)
    assert told["buffers"][0]["name"] == label


@pytest.mark.parametrize(
    "arguments", [("--process", "1"), ("--exporter", "system"), ("--system", "--socket", "/run/s")]
)
def test_ls_of_the_store_and_of_the_system_are_apart(capsys: Capture, arguments) -> None:
    ended = dmabuf(capsys, "ls", *arguments)
    assert ended.status == 2
    assert "--system" in ended.err


@pytest.mark.parametrize(
    "arguments",
    [("--sort", "name"), ("--interval", "0"), ("--count", "0"), ("--interval", "often")],
)
def test_top_refuses(capsys: Capture, arguments: tuple[str, ...]) -> None:
    assert dmabuf(capsys, "top", *arguments).status == 2


def leak(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Between looks `leaky` gets one buffer more; the seconds slept."""
    slept: list[float] = []
    held = {3: Made(100, MIB)}

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:  # another process with its number
            machine.process(30, "leaky", fds={3: Made(100, MIB)}, started=999)
            return
        held[3 + len(slept)] = Made(100 + len(slept), MIB, "udmabuf")
        machine.process(30, "leaky", fds=held)

    machine.process(20, "steady", fds={3: Made(7, 8 * MIB)})
    machine.process(30, "leaky", fds=held)
    monkeypatch.setattr(time, "sleep", sleep)
    return slept


def test_top_finds_a_leak(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    slept = leak(machine, monkeypatch)
    ended = dmabuf(capsys, "top", "--count", 3, "--interval", 5, "--sort", "first")
    assert ended.status == 0
    assert slept == [5, 5]
    assert under(ended.out, "by process") == [
        "leaky[30] 3 3 MiB 3 MiB +1 MiB (+1) +2 MiB (+2)",
        "steady[20] 1 8 MiB 8 MiB 0 0",
    ]
    assert under(ended.out, "by exporter") == [
        "udmabuf 2 2 MiB +1 MiB (+1) +2 MiB (+2)",
        "system 2 9 MiB 0 0",
    ]
    heads = [line for line in ended.out.splitlines() if " dma-bufs, " in line]
    assert heads[0] == "2 dma-bufs, 9 MiB"
    assert heads[2].startswith(
        "4 dma-bufs, 11 MiB; since the last look +1 MiB (+1), since the first +2 MiB (+2) in "
    )
    assert ended.err.count("note: ") == 1, "what was not seen is told once"


def test_top_as_json(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    leak(machine, monkeypatch)
    ended = dmabuf(capsys, "top", "-n", 4, "--json", "--process", "leaky")
    assert (ended.status, ended.err) == (0, "")
    rounds = [checked(line) for line in ended.out.splitlines()]
    assert [one["look"] for one in rounds] == [1, 2, 3, 4]
    (row,) = rounds[2]["by_process"]

    def grown(mib: int, buffers: int) -> dict[str, int]:
        return {"nbytes": mib * MIB, "buffers": buffers, "share": mib * MIB}

    assert row == {
        "process": {"pid": 30, "started": 100, "command": "leaky"}, "total": grown(3, 3),
        "since_last": grown(1, 1), "since_first": grown(2, 2),
    }  # fmt: skip
    assert rounds[0]["since_first"] == grown(0, 0)
    assert rounds[2]["since_first"]["buffers"] == 2
    (row,) = rounds[3]["by_process"]
    assert (row["process"]["started"], row["since_first"]) == (999, grown(1, 1))
    assert rounds[3]["since_last"] == grown(-2, -2)
    assert rounds[3]["refusals"]


def test_top_of_one_process(busy: FakeMachine, capsys: Capture) -> None:
    """Without those that hold the same buffers."""
    ended = dmabuf(capsys, "top", "-n", 1, "--json", "--process", "reader")
    told = json.loads(ended.out)
    assert [(row["process"]["pid"], row["total"]["share"]) for row in told["by_process"]] == [
        (21, MIB // 2)
    ]
    assert told["total"]["nbytes"] == MIB


@pytest.mark.parametrize(
    ("order", "first"), [("size", 20), ("share", 20), ("buffers", 30), ("last", 30), ("first", 30)]
)
def test_top_sorts(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: Capture, order: str, first: int
) -> None:
    leak(machine, monkeypatch)
    ended = dmabuf(capsys, "top", "-n", 2, "--json", "--sort", order)
    rows = json.loads(ended.out.splitlines()[1])["by_process"]
    assert rows[0]["process"]["pid"] == first


def test_top_ends_by_ctrl_c() -> None:
    process = start("top", "--json", "--interval", "60")
    assert json.loads(process.stdout.readline())["look"] == 1
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert (ended.status, ended.out) == (130, "")
    assert ended.err == "", "the usual end of top, so without a word"


def test_top_to_a_reader_who_leaves() -> None:
    process = start("top", "--json", "--interval", "0.1")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(PATIENCE) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


ON_A_TERMINAL = """
import sys
from dmabuf import inspect
from dmabuf.cli import main
census = inspect.take_census
inspect.take_census = lambda: census(sys.argv[1])
sys.exit(main(["top", *(sys.argv[2:] or ["--interval", "0.1"])]))
"""


@pytest.mark.parametrize(
    ("columns", "shown", "hidden"),
    [(100, "last look", "?"), (46, "first look", "share"), (30, "size", "first look")],
)
def test_top_on_a_terminal(tmp_path: Path, columns: int, shown: str, hidden: str) -> None:
    """Each look takes the place of the last; what does not fit is left out as whole columns."""
    with on_a_terminal(tmp_path, columns) as (process, ours):
        text = read_until(ours, b"since the last look", 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        text += read_rest(ours)
    looks = text.replace("\r\n", "\n").split("\x1b[J")[1:]
    up = looks[0].rpartition("\x1b[")[2].strip("\r")
    assert up.endswith("A"), "the cursor goes back up"
    for look in looks[:2]:
        lines = look.partition("\x1b[")[0].splitlines()
        assert sum(max(1, -(-len(line) // columns)) for line in lines) <= 24
        table = lines[lines.index("by process") + 1 : lines.index("by exporter")]
        assert all(len(line) <= columns for line in table)
        assert shown in table[0] and hidden not in table[0]
        assert table[1].split()[0] == "w[59]" and "59 MiB" in table[1]
        assert "more" in "".join(table) and "w[20]" not in "".join(table)
    assert "error" not in text


def test_keys_of_top(tmp_path: Path) -> None:
    """A key sorts at once, q quits, and the terminal is as it was before."""
    with on_a_terminal(tmp_path, 100, "--interval", "3600") as (process, ours):
        before = termios.tcgetattr(ours)[3]
        read_until(ours, b"q quits", 1)
        assert not termios.tcgetattr(ours)[3] & termios.ICANON
        os.write(ours, b"b")
        text = read_until(ours, b"q quits", 1)
        assert text.index("w[20]") < text.index("w[59]"), "it has two buffers"
        os.write(ours, b"q")
        assert process.wait(PATIENCE) == 0
        assert termios.tcgetattr(ours)[3] == before
        assert "error" not in read_rest(ours)


@contextlib.contextmanager
def on_a_terminal(
    folder: Path, columns: int, *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run top on a terminal of 24 lines of its own; yield it and the terminal's other end."""
    machine = FakeMachine(folder)
    held = {pid: [Made(pid, pid * MIB)] for pid in range(20, 60)}
    held[20].append(Made(100, 1))
    for pid, buffers in held.items():
        machine.process(pid, "w", fds=dict(enumerate(buffers, 3)))
    machine.list(*(one for buffers in held.values() for one in buffers))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-c", ON_A_TERMINAL, str(folder), *arguments]
    process = subprocess.Popen(  # the terminal is its own, as after a login
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)


def read_until(fd: int, mark: bytes, count: int) -> str:
    """Read from a terminal until it has shown `mark` so often."""
    shown = b""
    while shown.count(mark) < count:
        assert select.select([fd], [], [], PATIENCE)[0], shown
        shown += os.read(fd, 1 << 16)
    return shown.decode()


def read_rest(fd: int) -> str:
    """Read what a terminal still has, after its program has ended."""
    shown = b""
    while select.select([fd], [], [], 0)[0]:
        shown += os.read(fd, 1 << 16)
    return shown.decode()
