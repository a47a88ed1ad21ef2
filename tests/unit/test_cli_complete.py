"""Completion of the command line, as a shell asks for it through argcomplete."""

import os
from pathlib import Path

import pytest

from dmabuf.store import connect
from tests.serving import as_a_program
from tests.unit.command import finish, start


def completed(line: str, folder: Path) -> list[str]:
    """Return what the shell offers after a line."""
    out = folder / "out"
    out.touch()
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1"}
    asked |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    ended = finish(start(env=os.environ | asked))
    assert (ended.status, ended.out) == (0, "")
    return [word.strip() for word in out.read_text().split("\n")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dmabuf do", ["doctor"]),
        ("dmabuf cp --route ", ["native", "direct", "staged", "buffered"]),
        ("dmabuf cp --pref", ["--prefer"]),
        ("dmabuf verify --routes b", ["buffered"]),
        ("dmabuf put --exporter m", ["memfd"]),
        ("dmabuf get --socket /nowhere/s ", [""]),
    ],
)
def test_commands_options_and_values(line: str, words: list[str], tmp_path: Path) -> None:
    assert completed(line, tmp_path) == words


def test_names_of_the_store(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    with as_a_program(socket), connect(socket) as store:
        for name in ("frames", "model"):
            store.create(name, 4096).close()
        assert completed(f"dmabuf rm --socket {socket} ", tmp_path) == ["frames", "model"]
        assert completed(f"dmabuf mv --socket {socket} model f", tmp_path) == ["frames"]
