"""The cache: pieces that are expensive to make, each in a folder named after what it is made of.

A piece is made in a temporary folder and renamed when it is complete, so that an interrupted
preparation never counts as done. Nothing in a piece changes afterwards.
"""

import contextlib
import fcntl
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lab import host

KEEP_DAYS = 30
"""A piece that no run used for so long is deleted."""

KEEP_LOGS = 20
"""How many runs' console logs are kept."""


class Cache:
    """The cache folder: pieces, the folders of runs under way, and the logs of past ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.runs = folder / "runs"
        for path in (self.logs, self.runs):
            path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def default(cls) -> "Cache":
        """Return the cache in DMABUF_LAB_CACHE, or in the user's cache folder."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(os.environ.get("DMABUF_LAB_CACHE") or Path(base) / "dmabuf-lab").absolute())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of preparation; one process at a time looks for and makes pieces."""
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with host.step("waiting for another run's preparation"):
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def piece(self, kind: str, key: str, title: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of a piece, made by make(folder) if it is not there yet.

        Needs the lock.
        """
        path = self.folder / f"{kind}-{key}"
        if not path.exists():
            for left in self.folder.glob("tmp-*"):
                remove(left)
            temporary = Path(tempfile.mkdtemp(prefix="tmp-", dir=self.folder))
            temporary.chmod(0o755)
            try:
                with host.step(title):
                    make(temporary)
                temporary.rename(path)
            finally:
                if temporary.exists():
                    remove(temporary)
        os.utime(path)
        return path

    def forget(self) -> None:
        """Delete the pieces, logs and folders of runs that nobody will use again."""
        old = time.time() - KEEP_DAYS * 86400
        for path in self.folder.glob("*-*"):
            if path.is_dir() and path.stat().st_mtime < old:
                remove(path)
        for path in sorted(self.logs.iterdir())[:-KEEP_LOGS]:
            path.unlink(missing_ok=True)
        for path in self.runs.iterdir():
            with _try_lock(path) as alone:
                if alone:
                    remove(path)

    @contextlib.contextmanager
    def run_folder(self) -> Iterator[Path]:
        """Make a folder for one run, deleted at its end, or later if this process is killed."""
        with self.lock():
            path = Path(tempfile.mkdtemp(prefix="run-", dir=self.runs))
            file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            remove(path)
            os.close(file)


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(file)


def remove(path: Path) -> None:
    """Delete a folder, also one with folders that its owner may not write."""
    subprocess.run(host.as_root("rm", "-rf", "--", path), check=False)


def key_of(*parts: str | bytes) -> str:
    """Return a short key for what a piece is made of."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:12]
