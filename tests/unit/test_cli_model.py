"""`dmabuf model`, and `dmabuf serve` in the background."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import dmabuf.store
from dmabuf import safetensors as models
from tests.nodes import node, url_of
from tests.serving import as_a_program
from tests.sharing import kill_servers, servers
from tests.support import pattern, wait_until
from tests.unit.command import dmabuf as command
from tests.unit.command import finish, start
from tests.unit.schemas import checked

Capture = pytest.CaptureFixture[str]
SIZE = 300_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        tensors = {f"part{number}": np.frombuffer(pattern(SIZE, number), "u1")}
        safetensors.numpy.save_file(tensors, tmp_path / f"{number}.safetensors")
    return tmp_path


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "s"
    kill_servers(tmp_path / "s")


def test_a_model_is_loaded_listed_and_removed(
    folder: Path, socket: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: object, status: int = 0) -> str:
        ended = command(capsys, "model", *words, "--socket", socket)
        assert ended.status == status, ended
        return ended.err if status else ended.out

    assert "no store is running here" in run("ls", status=1)
    one, other = (folder / f"{number}.safetensors" for number in range(2))
    told = run("load", one, other)
    assert told.startswith(f"model-{os.geteuid()}-") and "read " in told
    assert len(servers(socket)) == 1
    assert "in the store already" in run("load", one, other)
    assert run("load", "--quiet", one) == ""
    lines = run("ls").splitlines()
    assert len(lines) == 2 and all("unused" in line for line in lines)
    assert {line.split(" ")[-1] for line in lines} == {"more", str(one)}
    with models.load(one, framework="np", shared=socket).buffer:
        assert "in use" in run("ls")
        told = run("rm", one, status=1)
        assert told == f"error: {one}: a process has it; give --force to leave it to the process\n"
        assert len(run("ls").splitlines()) == 1, "the other one with that file was removed"
        monkeypatch.chdir(folder)
        run("rm", "--force", "0.safetensors")
    assert run("ls") == ""
    assert "the store has no such model" in run("rm", one, status=1)
    run("load", one)
    name = run("ls").split()[0]
    run("rm", name)
    run("load", one)
    run("rm", folder)
    assert run("ls") == ""


def test_a_model_of_another_node(folder: Path, socket: Path, capsys: Capture) -> None:
    with as_a_program(socket), node(folder, f"unix:{folder / 'node.sock'}"):
        url = f"{url_of(folder / 'node.sock')}/0.safetensors"
        for told in ("read staged", "in the store already"):
            ended = command(capsys, "model", "load", url, "--socket", socket)
            assert ended.status == 0 and told in ended.out, ended
        listed = command(capsys, "model", "ls", "--socket", socket).out
        assert listed.split()[-1] == url
        assert command(capsys, "model", "rm", url, "--socket", socket).status == 0
        assert command(capsys, "model", "ls", "--socket", socket).out == ""


def test_a_list_is_not_a_use(folder: Path, socket: Path, capsys: Capture) -> None:
    with as_a_program(socket), dmabuf.store.connect(socket) as store:
        models.load(folder / "0.safetensors", framework="np", shared=socket)
        [before] = store.list()
        [listed] = models.shared_models(store)
        assert (listed.used_ns, listed.in_use) == (before.accessed_ns, False)
        assert store.list()[0].accessed_ns == before.accessed_ns


@pytest.mark.parametrize(
    "words",
    [["load"], ["rm"], ["ls", "a"], ["ls", "--force"], ["load", "--force", "a"], ["put", "a"], []],
    ids=" ".join,
)
def test_what_is_no_command_line(words: list[str], capsys: Capture) -> None:
    assert command(capsys, "model", *words).status == 2


def test_json(folder: Path, socket: Path, capsys: Capture) -> None:
    with as_a_program(socket):
        end = ["--json", "--socket", socket]
        ended = command(capsys, "model", "load", folder / "0.safetensors", *end)
        loaded = checked(ended.out)
        assert loaded["format"] == "dmabuf-model-load/1"
        assert (loaded["tensors"], loaded["read"] >= SIZE) == (1, True)
        again = checked(command(capsys, "model", "load", folder / "0.safetensors", *end).out)
        assert (again["name"], again["read"], again["routes"]) == (loaded["name"], 0, [])
        [model] = checked(command(capsys, "model", "ls", *end).out)["models"]
        assert model["paths"] == [str(folder / "0.safetensors")] and model["in_use"] is False
        ended = command(capsys, "model", "rm", "none", *end)
        assert (ended.status, checked(ended.err)["errno"]) == (1, "ENOENT")


def test_a_server_in_the_background(socket: Path) -> None:
    ended = finish(start("serve", "--background", "--socket", socket))
    assert (ended.status, ended.out) == (0, "") and ended.err.startswith("serving at ")
    [server] = servers(socket)
    assert os.getsid(server) == server
    assert {os.readlink(f"/proc/{server}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    with dmabuf.store.connect(socket) as store:
        assert store.list() == []
    second = finish(start("serve", "--background", "--socket", socket))
    assert second.status == 1 and "another server listens there" in second.err
    bad = finish(start("serve", "--background", "--socket", f"{socket}2", "--metrics", "1.2.3.4:9"))
    assert bad.status == 1 and "error: " in bad.err
    assert not servers(Path(f"{socket}2")) and not Path(f"{socket}2").exists()
    os.kill(server, signal.SIGTERM)
    wait_until(lambda: not servers(socket))
    assert not socket.exists()
