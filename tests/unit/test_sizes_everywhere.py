"""Every size and offset takes integers of any type, also small ones of NumPy, and "1KiB"."""

import asyncio
import itertools

import numpy as np
import pytest

import dmabuf
from dmabuf import aio
from tests.support import pattern

SIZE = 1 << 18
DATA = pattern(SIZE, 21)
AT, COUNT = 64, 100  # the sum does not fit into 8 bits

USES = {
    "map": lambda buf, at, n: _mapped(buf, at, n),
    "open": lambda buf, at, n: buf.open("r", at, n).read(),
    "open to the end": lambda buf, at, n: buf.open("r", at).read()[:COUNT],
    "pread": lambda buf, at, n: buf.pread(n, at),
    "asarray": lambda buf, at, n: buf.asarray("u1", COUNT, at).tobytes(),
    "asarray to the end": lambda buf, at, n: buf.asarray("u1", None, at).tobytes()[:COUNT],
    "read_into": lambda buf, at, n: _read(buf, at, n),
    "aio": lambda buf, at, n: asyncio.run(_read_in_loop(buf, at, n)),
    "write_from": lambda buf, at, n: _written(buf, at, n),
    "copy": lambda buf, at, n: _copied(buf, at, n),
    "plan": lambda buf, at, n: _planned(buf, at, n),
}


def _mapped(buf, at, n):
    with buf.map("r", at, n) as view:
        return bytes(view)


def _read(buf, at, n):
    with dmabuf.open(buf.path) as file:
        assert file.read_into(buf, n, file_offset=at, buffer_offset=at).nbytes == COUNT
    return buf.pread(COUNT, AT)


async def _read_in_loop(buf, at, n):
    async with await aio.open(buf.path) as file:
        done = await file.read_into(buf, n, file_offset=at, buffer_offset=at)
    assert done.nbytes == COUNT
    return buf.pread(COUNT, AT)


def _written(buf, at, n):
    with dmabuf.open(buf.path, "r+") as file:
        file.write_from(buf, n, file_offset=at, buffer_offset=at)
    return buf.path.read_bytes()[AT : AT + COUNT]


def _copied(buf, at, n):
    target = buf.path.with_name("copy")
    assert dmabuf.copy(buf.path, target, size=n, src_offset=at, dst_offset=at).nbytes == COUNT
    return target.read_bytes()[AT:]


def _planned(buf, at, n):
    with dmabuf.open(buf.path) as file:
        file.plan(buf, size=n, file_offset=at, buffer_offset=at)
    return DATA[AT : AT + COUNT]


@pytest.fixture
def buf(tmp_path):
    with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        buffer.pwrite(DATA, 0)
        buffer.path = tmp_path / "file"
        buffer.path.write_bytes(DATA)
        yield buffer


FORMS = {
    "np.int8": np.int8,
    "np.uint8": np.uint8,
    "0-d array": np.array,
    "text": str,
    "text with a unit": "{}B".format,
}


@pytest.mark.parametrize(("use", "form"), list(itertools.product(USES, FORMS)))
def test_sizes_and_offsets(use, form, buf):
    make = FORMS[form]
    assert USES[use](buf, make(AT), make(COUNT)) == DATA[AT : AT + COUNT]


@pytest.mark.parametrize("use", [use for use in USES if use != "plan"])
@pytest.mark.parametrize(
    ("wrong", "error"), [(-1, ValueError), ("no", ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_what_is_not_an_offset(use, wrong, error, buf):
    with pytest.raises(error):
        USES[use](buf, wrong, COUNT)
