"""Fixtures of the unit tests: a made-up kernel, and transfers in and out of an event loop."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from dmabuf.kernel import uapi
from dmabuf.memory import exporters
from tests.unit.fake_kernel import FakeKernel


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeKernel:
    """A machine with udmabuf, without a readable limit, and with the heap "system"."""
    fake = FakeKernel()
    (tmp_path / "heaps").mkdir()
    (tmp_path / "heaps" / "system").touch()
    monkeypatch.setattr(uapi, "ioctl", fake.ioctl)
    monkeypatch.setattr(exporters, "UDMABUF", os.devnull)
    monkeypatch.setattr(exporters, "UDMABUF_SIZE_LIMIT", str(tmp_path / "size_limit_mb"))
    monkeypatch.setattr(exporters, "maps_large_pages", lambda: True)
    monkeypatch.setattr(exporters, "HEAPS", str(tmp_path / "heaps"))
    return fake


@pytest.fixture(params=["on the spot", "in an event loop"])
def move(request: pytest.FixtureRequest) -> Callable[..., dmabuf.Transfer]:
    """A function that opens a file and calls a method of it, of either kind of File."""

    def on_the_spot(path, verb, *args, **how):
        with dmabuf.open(path, "w" if verb.startswith("write") else "r") as file:
            return getattr(file, verb)(*args, **how)

    def in_loop(path, verb, *args, **how):
        from dmabuf import aio  # the tests of a package run without anyio

        async def main():
            async with await aio.open(path, "w" if verb.startswith("write") else "r") as file:
                return await getattr(file, verb)(*args, **how)

        return asyncio.run(main())

    return on_the_spot if request.param == "on the spot" else in_loop
