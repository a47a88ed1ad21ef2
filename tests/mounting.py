"""A store and its mount, as programs, for a test; and what other programs do with the files."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import dmabuf.store
from dmabuf.store import Store
from tests.serving import as_a_program


class Mounted(NamedTuple):
    """A mount: its directory, a connection to its store, its process and its store's."""

    path: Path
    store: Store
    process: subprocess.Popen
    server: subprocess.Popen


COMMAND = ("-m", "dmabuf.cli")


def start(
    directory: Path, socket: Path, *options: object, program: Sequence[str] = COMMAND
) -> subprocess.Popen:
    """`dmabuf mount`, not waited for; `program` is what Python runs as `dmabuf`."""
    command = [sys.executable, *program, "mount", "--socket", socket, directory, *options]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def mount(
    directory: Path, socket: Path, program: Sequence[str] = COMMAND
) -> Iterator[subprocess.Popen]:
    """`dmabuf mount`, once it is ready; at the end SIGTERM, unless it is gone already."""
    process = start(directory, socket, program=program)
    try:
        first = process.stdout.readline()
        assert first.startswith("mounted at "), first + process.stderr.read()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        process.stdout.close()
        process.stderr.close()
        subprocess.run(["umount", "-l", directory], capture_output=True, check=False)


@contextlib.contextmanager
def mounted(folder: Path, max_memory: str = "256MiB", **how: object) -> Iterator[Mounted]:
    """A store of its own, and its mount."""
    directory, socket = folder / "mnt", folder / "store.sock"
    directory.mkdir()
    with (
        as_a_program(socket, "--max-memory", max_memory, **how) as server,
        dmabuf.store.connect(socket) as store,
        mount(directory, socket) as process,
    ):
        yield Mounted(directory, store, process, server)


def shell(script: str, folder: Path, *arguments: object, timeout: float = 100) -> str:
    """Run a script in a folder; its standard output. Any failure in it is one."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script, "bash", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def attributes(path: Path) -> dict[str, str]:
    """What the extended attributes of a file tell."""
    return {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}


__all__ = ["Mounted", "attributes", "mount", "mounted", "shell", "start"]
