"""The requests of a mount as the kernel makes them, and no kernel in between."""

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import trio

import dmabuf.store
from dmabuf.store import Store
from tests.guards import demand
from tests.serving import in_a_thread

CALLER = SimpleNamespace(uid=os.geteuid(), gid=os.getegid(), pid=0, umask=0)
ROOT = 1

Task = Callable[[], Awaitable[object]]


class World:
    """A store, and the requests of a mount of it."""

    def __init__(self, path: Path, store: Store) -> None:
        from dmabuf.mount.files import Files
        from dmabuf.mount.operations import Operations

        self.store = store
        self.said: list[str] = []
        self.files = Files(str(path))
        self.ask = Operations(self.files, shared=False, tell=self.said.append)

    async def create(self, name: str, data: bytes = b"") -> int:
        info, _ = await self.ask.create(ROOT, name.encode(), 0o644, os.O_RDWR, CALLER)
        await self.ask.write(info.fh, 0, data)
        return info.fh

    async def put(self, name: str, data: bytes) -> None:
        await self.close(await self.create(name, data))

    async def open(self, name: str, flags: int = os.O_RDWR) -> int:
        found = await self.ask.lookup(ROOT, name.encode(), CALLER)
        return (await self.ask.open(found.st_ino, flags, CALLER)).fh

    async def close(self, fh: int) -> None:
        try:
            await self.ask.flush(fh)
        finally:
            await self.ask.release(fh)

    async def truncate(self, name: str, length: int) -> None:
        from pyfuse3 import EntryAttributes

        attributes = EntryAttributes()
        attributes.st_size = length
        await self.set(name, attributes, "size")

    async def set(self, name: str, attributes: object, *fields: str) -> None:
        found = await self.ask.lookup(ROOT, name.encode(), CALLER)
        wanted = dict.fromkeys(("size", "mode", "uid", "gid", "atime", "mtime"), False)
        wanted |= dict.fromkeys(fields, True)
        chosen = SimpleNamespace(**{f"update_{name}": value for name, value in wanted.items()})
        await self.ask.setattr(found.st_ino, attributes, chosen, None, CALLER)

    async def read(self, name: str) -> bytes:
        fh = await self.open(name)
        try:
            return bytes(await self.ask.read(fh, 0, 1 << 30))
        finally:
            await self.ask.release(fh)


@contextmanager
def requests(folder: Path) -> Iterator[World]:
    """A store of its own, and the requests."""
    demand("fuse", "pyfuse3")
    path = folder / "store.sock"
    with in_a_thread(path), dmabuf.store.connect(path) as store:
        made = World(path, store)
        yield made
        made.files.close()


def run(body: Task) -> None:
    async def limited() -> None:
        with trio.fail_after(20):
            await body()

    trio.run(limited)
