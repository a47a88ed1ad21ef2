"""SIGKILL at every step of `dmabuf cp`: the old file or the new one, whole, and no third."""

import os
import select
import signal
import warnings
from pathlib import Path

import pytest

from dmabuf.cli import main
from tests.support import pattern

SIZE = (8 << 20) + 5
OLD, DATA = pattern(300_001, 61), pattern(SIZE, 62)

STEPS = ("chmod", "chown", "fsync", "fdatasync", "link", "rename", "unlink")
"""The calls of os that making a file whole consists of, beside the copy itself."""


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """What a child needs is imported once: it begins to copy within a millisecond."""
    from dmabuf.transfer.engine import default_engine

    default_engine()


def child(work) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the parent's threads
        pid = os.fork()
    if pid == 0:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os._exit(work())
        finally:
            os._exit(99)
    return pid


def copy(source: Path, target: Path) -> int:
    return main(["cp", "--sync", str(source), str(target)])


def look(target: Path, there: bool) -> tuple[str, int]:
    """Which of the two it is, and how many hidden names are left."""
    left = [name for name in os.listdir(target.parent) if name != target.name]
    assert all(name.startswith(".dmabuf-") and name.endswith(".tmp") for name in left)
    for name in left:
        (target.parent / name).unlink()
    if not target.exists():
        assert not there
        return "none", len(left)
    found = target.read_bytes()
    assert found in (OLD, DATA), f"neither the old nor the new: {len(found)} bytes"
    assert there or found == DATA
    return "old" if found == OLD else "new", len(left)


@pytest.mark.parametrize("there", [True, False])
def test_at_every_step(there: bool, source: Path, tmp_path: Path) -> None:
    """Before and after each system call that the file becomes whole by, the rename among them."""
    target = tmp_path / "folder" / "target"
    target.parent.mkdir()
    seen: list[tuple[str, str, int]] = []
    for moment in range(200):
        target.unlink(missing_ok=True)
        if there:
            target.write_bytes(OLD)
        name, ended = stopped_at(moment, source, target)
        state, left = look(target, there)
        if ended:
            assert (state, left) == ("new", 0)
            break
        seen.append((name, state, left))
    names = [name for name, _, _ in seen]
    done = names.index("after rename" if there else "after link")
    assert {state for _, state, _ in seen[:done]} == {"old" if there else "none"}
    assert {state for _, state, _ in seen[done:]} == {"new"}
    assert "before fsync" in names[done:], "the name, too, is brought to the medium"
    # A file without a name is gone with whoever wrote it.
    hidden = [name for name, _, left in seen if left]
    assert hidden == (["after link", "before rename"] if there else [])


def stopped_at(moment: int, source: Path, target: Path) -> tuple[str, bool]:
    """Kill a copy when it has come to its `moment`th step; which one that was, and if it ended."""
    told, teller = os.pipe()

    def work() -> int:
        count = [0]

        def pause(what: str) -> None:
            count[0] += 1
            if count[0] > moment:
                os.write(teller, what.encode())
                signal.pause()

        def stepwise(name: str, call):
            def step(*arguments, **how):
                pause(f"before {name}")
                answer = call(*arguments, **how)
                pause(f"after {name}")
                return answer

            return step

        for name in STEPS:
            setattr(os, name, stepwise(name, getattr(os, name)))
        return copy(source, target)

    pid = child(work)
    os.close(teller)
    ready, _, _ = select.select([told], [], [], 100)
    name = os.read(told, 100).decode() if ready else "nothing"
    os.close(told)
    if name:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert name or status == 0, "it ended by itself, and well"
    return name, not name
