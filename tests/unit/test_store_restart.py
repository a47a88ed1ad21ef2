"""The server of the store is restarted: names, memory and clients stay."""

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import dmabuf.store
from tests.restarting import KINDS, Replacing, Systemd, at_work, busy
from tests.serving import as_a_program
from tests.support import assert_same, has_program, pattern
from tests.unit.command import finish, start

MIB = 1 << 20
UNITS = Path(__file__).parents[2] / "contrib/systemd"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def systemd(path: Path) -> Iterator[Systemd]:
    with closing(Systemd(path, room=6)) as systemd:
        yield systemd


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_changes_nothing(kind: str, path: Path) -> None:
    with closing(KINDS[kind](path)) as server, dmabuf.store.connect(path) as store:
        for name in ("a", "b", "gone"):
            with store.create(name, MIB, mode=0o640) as buffer:
                buffer.pwrite(pattern(MIB, ord(name[0])), 0)
        store.remove("gone")
        store.rename("b", "c")
        store.truncate("c", 5)
        store.utime("c", modified_ns=7)
        unnamed = store.create(None, MIB)
        before, usage = store.list(), store.usage()
        for _ in range(2):
            server.restart()
        assert store.list() == before
        for name, seed in (("a", ord("a")), ("c", ord("b"))):
            with store.open(name) as buffer:
                assert_same(buffer.pread(MIB, 0), pattern(MIB, seed), name)
        with unnamed:
            if kind == "killed":
                with pytest.raises(FileNotFoundError, match="created no such buffer"):
                    store.link(unnamed, "d")
                assert store.usage().charged == usage.charged - MIB
            else:
                assert store.usage() == usage
                assert store.link(unnamed, "d").number > before[-1].number
        with store.create("e", 1):
            assert store.stat("e").number not in {one.number for one in before}
        for one in store.list():
            store.remove(one.name)
        if isinstance(server, Systemd):
            server.restart()
            assert server.stored == {}, "what was removed is not kept"


@pytest.mark.parametrize("kind", KINDS)
def test_clients_work_during_restarts(kind: str, path: Path) -> None:
    with closing(KINDS[kind](path)) as server, busy(path) as clients:
        for _ in range(3):
            at_work(clients)
            server.restart()
        at_work(clients)
    assert kind == "killed" or not any(client.interrupted for client in clients)


def test_a_request_that_may_have_been_carried_out_is_not_repeated(path: Path) -> None:
    with closing(KINDS["killed"](path)) as server, dmabuf.store.connect(path) as store:
        store.create("a", 1).close()
        server.restart()
        with pytest.raises(ConnectionError):
            store.remove("a")
        store.remove("a")
        with dmabuf.store.connect(path, again=False) as once:
            once.list()
            server.restart()
            with pytest.raises(ConnectionError):
                once.list()
            assert once.closed


def test_a_request_during_a_hand_over_is_the_next_servers(path: Path) -> None:
    taking, asking = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    with as_a_program(path) as server, taking, asking:
        for one in (asking, taking):  # epoll reports the last one first if both are ready
            one.connect(str(path))
            one.send(b'{"op": "usage"}')
            one.recv(4096)
        server.send_signal(signal.SIGSTOP)
        os.waitpid(server.pid, os.WUNTRACED)
        taking.send(b'{"op": "hand_over"}')
        asking.send(b'{"op": "stat", "name": "x"}')
        server.send_signal(signal.SIGCONT)
        kept: list[int] = []
        while descriptors := socket.recv_fds(taking, 4096, 253)[1]:
            kept += descriptors
            taking.send(b"done")
        taking.send(b"done")
        assert taking.recv(4096) == b"done"
        assert server.wait(timeout=100) == 0
        listener, connection = (socket.socket(fileno=fd) for fd in kept)
        with listener, connection:
            assert connection.recv(4096) == b'{"op": "stat", "name": "x"}'


def test_a_server_goes_on_if_the_next_one_cannot_start(path: Path) -> None:
    with closing(Replacing(path)) as server, dmabuf.store.connect(path) as store:
        with store.create(None, 5) as unnamed:
            ended = finish(
                start("serve", "--socket", path, "--replace", "--group", "no-such-group")
            )
            assert (ended.status, ended.err) == (
                1,
                "error: invalid group 'no-such-group': use a group that getent group lists\n",
            )
            store.link(unnamed, "kept")
            server.restart()
            assert [one.name for one in store.list()] == ["kept"]


def test_a_server_of_systemd_is_restarted_by_systemd(path: Path, systemd: Systemd) -> None:
    ended = finish(start("serve", "--socket", path, "--replace"))
    assert (ended.status, "use systemctl restart" in ended.err) == (1, True)
    with dmabuf.store.connect(path) as store:
        assert store.list() == []


def test_a_store_is_full_where_systemd_keeps_no_more(path: Path, systemd: Systemd) -> None:
    with dmabuf.store.connect(path) as store:
        made = []
        with pytest.raises(OSError, match="systemd keeps 6 descriptors") as caught:
            for name in "abcd":
                store.create(name, 1).close()
                made.append(name)
        assert caught.value.errno == errno.ENOSPC and made
        systemd.restart()
        assert [one.name for one in store.list()] == made
        store.remove("a")
        store.create("d", 1).close()


def test_what_a_killed_server_left_by_half_is_dropped(path: Path, systemd: Systemd) -> None:
    systemd.stored |= {"b5.1": os.dup(0), "b6.0": os.memfd_create("torn"), "c0.0": os.dup(1)}
    systemd.restart()
    with dmabuf.store.connect(path) as store:
        assert store.list() == []
    systemd.restart()
    assert systemd.stored == {}


@pytest.mark.skipif(not has_program("systemd-analyze"), reason="needs apt-get install systemd")
@pytest.mark.parametrize("manager", ["system", "user"])
def test_systemd_accepts_the_units(manager: str, tmp_path: Path) -> None:
    units = sorted((UNITS / manager).iterdir())
    assert len(units) == 3
    done = subprocess.run(
        ["systemd-analyze", f"--{manager}", "--man=no", "verify", *units],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, "dmabuf" in done.stderr) == (0, False), done.stderr
