"""`dmabuf serve`, and the commands of its clients."""

import grp
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf.store
from tests.guards import needs
from tests.serving import as_a_program, in_a_thread, served_by
from tests.support import assert_same, pattern, wait_until
from tests.unit.command import dmabuf as command
from tests.unit.command import finish, start

DATA = pattern(300_001, 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def store(path: Path) -> Iterator[dmabuf.store.Store]:
    with in_a_thread(path), dmabuf.store.connect(path) as store:
        yield store


def test_a_file_there_and_back(store, source, path, tmp_path, capsys) -> None:
    ended = command(capsys, "put", "--socket", path, "--mode", "640", source, "name")
    assert (ended.status, ended.err) == (0, "")
    assert "300.0 kB in " in ended.out and ": read " in ended.out and "written" not in ended.out
    status = store.stat("name")
    assert (status.length, status.mode, status.in_use) == (len(DATA), 0o640, False)
    with store.open("name") as buffer:
        assert_same(buffer.pread(buffer.size, 0), DATA.ljust(buffer.size, b"\0"), "the buffer")
    ended = command(capsys, "get", "--socket", path, "name", tmp_path / "target")
    assert (ended.status, ended.err) == (0, "")
    assert ": written " in ended.out and "read " not in ended.out.split("(")[0]
    assert_same((tmp_path / "target").read_bytes(), DATA, "the target")
    assert not store.stat("name").in_use


def test_the_record_tells_the_route(store, source, path, tmp_path, capsys) -> None:
    ended = command(capsys, "put", "--socket", path, "--json", source, "name")
    record = json.loads(ended.out)
    assert record["nbytes"] == record["read"]["nbytes"] == len(DATA)
    assert record["read"]["route"] and record["write"] is None
    assert (record["name"], record["buffer"]) == ("name", store.stat("name").exporter)
    ended = command(capsys, "get", "--socket", path, "--json", "name", tmp_path / "t")
    assert json.loads(ended.out)["write"]["nbytes"] == len(DATA)


def test_pipes(store, path, capsys) -> None:
    process = start("put", "--socket", path, "--size", "1MiB", "-", "pipe", stdin=subprocess.PIPE)
    assert finish(process, DATA).status == 0
    assert (store.stat("pipe").length, store.stat("pipe").size) == (len(DATA), 1 << 20)
    process = start("get", "--socket", path, "pipe", "-")
    out, err = process.communicate(timeout=60)
    assert_same(out, DATA, "standard output")
    assert b": written " in err
    process = start("put", "--socket", path, "-", "none", stdin=subprocess.PIPE)
    ended = finish(process, b"")
    assert ended.status == 1
    assert "standard input: the size of a stream is unknown; give the most bytes" in ended.err


def test_an_empty_file(store, path, tmp_path, capsys) -> None:
    (tmp_path / "empty").touch()
    assert command(capsys, "put", "--socket", path, tmp_path / "empty", "none").status == 0
    assert store.stat("none").length == 0
    assert command(capsys, "get", "--socket", path, "none", tmp_path / "back").status == 0
    assert (tmp_path / "back").read_bytes() == b""


def test_a_name_is_whole_or_as_it_was(store, source, path, tmp_path, capsys) -> None:
    command(capsys, "put", "--socket", path, source, "name")
    (tmp_path / "other").write_bytes(b"other")
    with store.open("name") as kept:
        assert command(capsys, "put", "--socket", path, tmp_path / "other", "name").status == 0
        assert kept.pread(5, 0) == DATA[:5]
    with store.open("name") as now:
        assert now.pread(5, 0) == b"other"
    ended = command(capsys, "put", "--socket", path, tmp_path / "missing", "name")
    assert (ended.status, store.stat("name").length) == (1, 5)
    ended = command(capsys, "get", "--socket", path, "missing", source)
    assert (ended.status, ended.err) == (1, "error: missing: there is no such buffer\n")
    assert_same(source.read_bytes(), DATA, "the file that was not replaced")


def test_nobody_sees_a_stream_at_another_length(store, path, tmp_path) -> None:
    seen = []
    with served_by(tmp_path / "between.sock", path) as between:
        between.around_each(lambda: seen.append([one.length for one in store.list()]))
        socket = tmp_path / "between.sock"
        command = ["put", "--socket", socket, "--size", "1MiB", "-", "n"]
        assert finish(start(*command, stdin=subprocess.PIPE), DATA[:5000]).status == 0
    assert [] in seen and [5000] in seen
    assert all(one in ([], [5000]) for one in seen), seen


def test_what_is_got_is_of_one_put(store, path, tmp_path) -> None:
    puts = []

    def another() -> None:
        size = 100 + 5000 * (len(puts) % 3)
        puts.append(pattern(size, len(puts)))
        with store.create(None, size) as buffer:
            buffer.pwrite(puts[-1], 0)
            store.link(buffer, "name")

    another()
    with served_by(tmp_path / "between.sock", path) as between:
        between.around_each(another)
        command = ["get", "--socket", tmp_path / "between.sock", "name", tmp_path / "got"]
        assert finish(start(*command)).status == 0
    assert len(puts) > 2
    assert (tmp_path / "got").read_bytes() in puts


def test_what_there_is(store, path, capsys) -> None:
    assert command(capsys, "ls", "--socket", path).out == ""
    store.create("b", 10, mode=0o604).close()
    store.create("a", 12345).close()
    lines = command(capsys, "ls", "--socket", path).out.splitlines()
    assert [line.split()[0] for line in lines] == ["-rw-------", "-rw----r--"]
    assert [line.split()[3] for line in lines] == ["12345", "10"]
    assert [line.split()[-1] for line in lines] == ["a", "b"]
    listed = json.loads(command(capsys, "ls", "--socket", path, "--json").out)
    assert [(one["name"], one["mode"]) for one in listed["buffers"]] == [("a", "600"), ("b", "604")]
    told = command(capsys, "stat", "--socket", path, "b").out
    assert "content  10 bytes" in told and "in use   no" in told
    with store.open("b"):
        assert "in use   yes" in command(capsys, "stat", "--socket", path, "b").out
        assert json.loads(command(capsys, "stat", "--socket", path, "--json", "b").out)["in_use"]


NO_SUCH = "error: {}: there is no such buffer\n"


@pytest.mark.parametrize(
    ("words", "left", "err"),
    [
        (["a1", "a1", "b"], ["a2", "a[1]"], ""),
        (["missing", "b"], ["a1", "a2", "a[1]"], NO_SUCH.format("missing")),
        (["a/b", "b"], ["a1", "a2", "a[1]"], "error: a/b: invalid name: use printable"),
        (["a*", "x*"], ["b"], NO_SUCH.format("x*")),
        (["a[1]"], ["a1", "a2", "b"], ""),  # a name that exists is not a pattern
        (["a[12]", "?"], ["a[1]"], ""),
    ],
)
def test_names_and_patterns_are_listed_changed_and_removed(
    store, path, capsys, words, left, err
) -> None:
    for name in ("b", "a1", "a2", "a[1]"):
        store.create(name, 10).close()
    gone = sorted({"a1", "a2", "a[1]", "b"} - set(left))
    ended = command(capsys, "ls", "--socket", path, "--", *words)
    assert (ended.status, [line.split()[-1] for line in ended.out.splitlines()]) == (
        bool(err),
        gone,
    )
    assert ended.err.startswith(err) and bool(ended.err) == bool(err)
    ended = command(capsys, "chmod", "--socket", path, "604", *words)
    assert (ended.status, ended.err[: len(err)]) == (bool(err), err)
    assert [one.name for one in store.list() if one.mode == 0o604] == gone
    ended = command(capsys, "rm", "--socket", path, *words)
    assert (ended.status, ended.err[: len(err)]) == (bool(err), err)
    assert [one.name for one in store.list()] == left


def test_a_rename_replaces_unless_told_not_to(store, path, capsys) -> None:
    for name in ("a", "b"):
        store.create(name, 10).close()
    number = store.stat("a").number
    ended = command(capsys, "mv", "--socket", path, "-n", "a", "b")
    assert (ended.status, ended.err) == (1, "error: b: a buffer of that name exists\n")
    assert command(capsys, "mv", "--socket", path, "a", "b").status == 0
    assert [(one.name, one.number) for one in store.list()] == [("b", number)]
    ended = command(capsys, "mv", "--socket", path, "a", "c")
    assert (ended.status, ended.err) == (1, NO_SUCH.format("a"))


def test_how_full_the_store_is(store, path, capsys) -> None:
    store.create("a", "16MiB").close()
    out = command(capsys, "df", "--socket", path).out
    assert "16 MiB of 64 MiB (25%)" in out and "names    1 of " in out
    told = json.loads(command(capsys, "df", "--socket", path, "--json").out)
    assert (told["charged"], told["max_memory"], told["names"]) == (16 << 20, 64 << 20, 1)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["put", "--mode", "888", "f", "n"], "three octal digits"),
        (["put", "--mode", "1777", "f", "n"], "three octal digits"),
        (["put", "--size", "much", "f", "n"], "size"),
        (["get", "--size", "-1", "n", "f"], "size"),
        (["serve", "--max-memory", "all"], "--max-memory"),
        (["serve", "--max-memory", "0"], "the store could hold nothing"),
        (["serve", "--metrics", "host"], "use HOST:PORT or PORT"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, why, capsys) -> None:
    ended = command(capsys, *arguments)
    assert ended.status == 2
    assert why in ended.err


def test_a_name_is_checked_before_anything_is_copied(store, path, source, capsys) -> None:
    ended = command(capsys, "put", "--socket", path, source, "a/b")
    assert ended.status == 1
    assert "error: a/b: invalid name: use printable characters" in ended.err


def test_without_a_server(path, capsys) -> None:
    ended = command(capsys, "ls", "--socket", path)
    assert ended.status == 1
    assert ended.err == f"error: {path}: no store is running here; start one: dmabuf serve\n"


def test_whether_the_store_answers(store, path, tmp_path, capsys) -> None:
    ended = command(capsys, "ping", "--socket", path)
    assert (ended.status, ended.out.startswith(f"{path}: the store answers, in ")) == (0, True)
    silent = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(silent))
        listener.listen()
        ended = command(capsys, "ping", "--socket", silent, "--timeout", "0.01")
    why = f"error: {silent}: the store does not answer within 0.01 s\n"
    assert (ended.status, ended.err) == (1, why)


def test_what_is_done_and_refused_is_logged(path: Path) -> None:
    options = ("--log-level", "info", "--log-format", "json", "--max-memory", "1MiB")
    with as_a_program(path, *options) as server, dmabuf.store.connect(path) as store:
        store.create("a", 5, mode=0o640).close()
        with pytest.raises(OSError, match="is full"):
            store.create("b", "2MiB")
        store.open("a").close()  # is not logged
        store.remove("a")
        server.terminate()
        lines = [json.loads(line) for line in server.stderr.read().splitlines()]
    keys = ("level", "operation", "result", "user", "name")
    user = os.geteuid()
    assert [tuple(line[key] for key in keys) for line in lines] == [
        ("info", "create", "ok", user, "a"),
        ("warning", "create", "ENOSPC", user, "b"),
        ("info", "remove", "ok", user, "a"),
    ]
    assert (lines[0]["mode"], "2 MiB wanted" in lines[1]["reason"]) == ("640", True)


def test_metrics_for_prometheus_go_on_over_a_replacement(path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def figures() -> dict[str, float]:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    options = ("--metrics", address, "--max-memory", "1MiB")
    with as_a_program(path, *options) as first, dmabuf.store.connect(path) as store:
        store.create("a", 4096).close()
        told = figures()
        assert told["dmabuf_store_memory_bytes"] == 4096
        assert told["dmabuf_store_clients"] == told["dmabuf_store_names"] == 1
        created = 'dmabuf_store_requests_total{operation="create",result="ok"}'
        wait_until(lambda: figures().get(created) == 1)  # it is counted after the reply
        with as_a_program(path, *options, "--replace"):
            assert first.wait(timeout=100) == 0
            assert figures()["dmabuf_store_memory_bytes"] == 4096


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_the_ordinary_end(path: Path, number: int) -> None:
    with as_a_program(path) as server:
        with dmabuf.store.connect(path) as store:
            store.create("left", 4096).close()
            server.send_signal(number)
            assert server.wait(timeout=100) == 0
    assert not path.exists()
    assert server.stderr.closed


@needs("root")
def test_a_shared_store_is_for_a_group(path: Path) -> None:
    with as_a_program(path):
        assert (path.stat().st_mode & 0o777, path.stat().st_gid) == (0o600, os.getegid())
    with as_a_program(path, "--group", "daemon"):
        assert path.stat().st_mode & 0o777 == 0o660
        assert path.stat().st_gid == grp.getgrnam("daemon").gr_gid
    ended = finish(start("serve", "--socket", path, "--group", "no-such-group"))
    assert (ended.status, ended.err) == (
        1,
        "error: invalid group 'no-such-group': use a group that getent group lists\n",
    )
    assert not path.exists()


def test_a_second_server_is_refused(path: Path) -> None:
    with as_a_program(path) as first:
        ended = finish(start("serve", "--socket", path))
        assert ended.status == 1
        assert ended.err == f"error: {path}: another server listens there\n"
        with dmabuf.store.connect(path) as store:
            assert store.list() == []
        assert first.poll() is None


def test_a_killed_server_leaves_what_its_clients_have(path: Path) -> None:
    with as_a_program(path) as server, dmabuf.store.connect(path) as store:
        with store.create("left", 4096) as buffer:
            buffer.pwrite(b"before", 0)
            server.kill()
            server.wait(timeout=100)
            assert path.exists(), "nobody took the socket away"
            with pytest.raises(ConnectionError) as caught:
                store.list()
            assert caught.value.filename == str(path)
            assert buffer.pread(6, 0) == b"before"
            buffer.pwrite(b"after.", 0)
            assert buffer.pread(6, 0) == b"after."
    with pytest.raises(ConnectionRefusedError, match="has stopped"):
        dmabuf.store.connect(path)
    with as_a_program(path), dmabuf.store.connect(path) as store:
        assert store.list() == [], "the stale socket was replaced"


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("a file of somebody's")
    ended = finish(start("serve", "--socket", path))
    assert ended.status == 1
    assert "the file is not a socket; nothing was changed" in ended.err
    ended = finish(start("ping", "--socket", path))
    assert (ended.status, ended.err) == (
        1,
        f"error: {path}: the file is not a socket; name that of a store\n",
    )
    assert path.read_text() == "a file of somebody's"


_ACTIVATED = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
listener.listen()
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.executable, [sys.executable, "-m", "dmabuf.cli", "serve"])
"""


def test_a_socket_of_systemd(path: Path, tmp_path: Path) -> None:
    """Socket activation and readiness, as sd_listen_fds(3) and sd_notify(3) have them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        process = subprocess.Popen([sys.executable, "-c", _ACTIVATED, path], env=environment)
        try:
            assert manager.recv(100) == b"READY=1"
            with dmabuf.store.connect(path) as store:
                store.create("name", 1).close()
        finally:
            process.terminate()
            assert process.wait(timeout=100) == 0
    assert path.exists(), "the socket is systemd's"


def test_a_descriptor_that_does_not_listen(path: Path) -> None:
    other = _ACTIVATED.replace("listener.listen()", "")
    done = subprocess.run([sys.executable, "-c", other, path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not a listening socket; use ListenSequentialPacket=" in done.stderr
