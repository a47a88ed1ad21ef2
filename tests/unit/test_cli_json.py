"""What `--json` prints: every document and error is as its published schema describes it."""

from pathlib import Path

import pytest

from dmabuf import allocate
from tests.serving import as_a_program
from tests.unit.command import dmabuf, finish, start
from tests.unit.schemas import checked

DATA = bytes(300_000)

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    "arguments",
    [
        ["cp", "--verify", "{source}", "{tmp}/t"],
        ["cp", "/dev/null", "{tmp}/t"],
        ["verify", "--rounds", "1", "{source}"],
        ["doctor", "{source}"],
        ["bench", "--rounds", "1", "--seconds", "1", "--block", "64KiB", "{source}"],
        ["top", "--count", "1"],
    ],
    ids=" ".join,
)
def test_results(arguments: list[str], source: Path, tmp_path: Path, capsys: Capture) -> None:
    words = [word.format(source=source, tmp=tmp_path) for word in arguments]
    ended = dmabuf(capsys, words[0], "--json", *words[1:])
    assert (ended.status, ended.err) == (0, "")
    assert checked(ended.out)["format"] == f"dmabuf-{words[0]}/1"


def test_a_list_of_the_machine(capsys: Capture) -> None:
    ended = dmabuf(capsys, "ls", "--system", "--json")
    assert checked(ended.out)["format"] == "dmabuf-ls-system/1"


def test_results_of_the_store(source: Path, tmp_path: Path, capsys: Capture) -> None:
    socket = tmp_path / "s"
    with as_a_program(socket):
        for name, *words in (
            ["put", source, "a"],
            ["get", "a", tmp_path / "t"],
            ["stat", "a"],
            ["ls"],
            ["df"],
            ["ping"],
        ):
            ended = dmabuf(capsys, name, "--json", "--socket", socket, *words)
            assert (ended.status, ended.err) == (0, "")
            assert checked(ended.out)["format"] == f"dmabuf-{name}/1"
        ended = dmabuf(capsys, "ls", "--json", "--socket", socket, "none", "a")
        assert (ended.status, checked(ended.err)["path"]) == (1, "none")
        assert [one["name"] for one in checked(ended.out)["buffers"]] == ["a"]


def test_the_report_of_exec() -> None:
    with allocate(4096, exporter="memfd") as buffer:
        fd = buffer.fileno()
        ended = finish(start("exec", "--json", "--fd", fd, "true", pass_fds=[fd]))
    assert checked(ended.err)["format"] == "dmabuf-exec/1"


@pytest.mark.parametrize(
    ("arguments", "status", "name", "path"),
    [
        (["cp", "{tmp}/none", "{tmp}/t"], 1, "ENOENT", "{tmp}/none"),
        (["cp", "--route", "native", "/etc/passwd", "{tmp}/t"], 1, "EOPNOTSUPP", "/etc/passwd"),
        (["cp", "{tmp}/a\nb\udcff", "{tmp}/t"], 1, "ENOENT", "{tmp}/a\nb\udcff"),
        (["ls", "--system", "--socket", "x"], 2, None, None),
        (["cp", "--no-such-option"], 2, None, None),
        (["no-such-command"], 2, None, None),
        (["stat", "--socket", "{tmp}/s", "x"], 1, "ENOENT", "{tmp}/s"),
    ],
)
def test_errors(
    arguments: list[str], status: int, name: str, path: str, tmp_path: Path, capsys: Capture
) -> None:
    words = [word.format(tmp=tmp_path) for word in arguments]
    ended = dmabuf(capsys, words[0], "--json", *words[1:])
    assert (ended.status, ended.out) == (status, "")
    assert ended.err.count("\n") == 1 and ended.err.isascii()
    told = checked(ended.err)
    assert (told["format"], told["errno"]) == ("dmabuf-error/1", name)
    assert told["path"] == (path and path.format(tmp=tmp_path))
