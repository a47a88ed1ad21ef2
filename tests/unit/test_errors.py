import asyncio
import copy
import errno
import importlib
import os
import pickle
import sys
from pathlib import Path

import pytest

import dmabuf
from dmabuf import aio
from dmabuf.devices import cuda, v4l2, vulkan
from dmabuf.errors import (
    BusyError,
    ClosedError,
    IntegrityError,
    RouteUnavailable,
    ShortReadError,
    os_error,
)
from dmabuf.memory import Window

EXAMPLES = [
    RouteUnavailable("no O_DIRECT on tmpfs", "/tmp/x", route="direct", plan={"route": "buffered"}),
    RouteUnavailable("no O_DIRECT on a pipe"),
    IntegrityError("read back differently", "/tmp/x", offset=512),
    BusyError("a transfer is running"),
    ClosedError("this buffer is closed"),
    ShortReadError("the file ended", index=3, nbytes=10),
    ShortReadError("the file ended"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=str)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_a_copy_has_the_same_text_and_values(error, again):
    twin = again(error)
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert twin.args == error.args
    assert vars(twin) == vars(error)
    assert getattr(twin, "filename", None) == getattr(error, "filename", None)


def test_each_is_caught_as_the_nearest_builtin():
    assert issubclass(RouteUnavailable, OSError) and issubclass(IntegrityError, OSError)
    assert issubclass(BusyError, BufferError)
    assert issubclass(ClosedError, ValueError)
    assert issubclass(ShortReadError, EOFError)


def test_text_and_values():
    error = EXAMPLES[0]
    assert str(error) == f"[Errno {errno.EOPNOTSUPP}] no O_DIRECT on tmpfs: '/tmp/x'"
    assert (error.errno, error.reason, error.route) == (errno.EOPNOTSUPP, error.strerror, "direct")
    assert str(EXAMPLES[1]) == f"[Errno {errno.EOPNOTSUPP}] no O_DIRECT on a pipe"
    assert (EXAMPLES[2].errno, EXAMPLES[2].offset) == (errno.EIO, 512)
    assert str(EXAMPLES[5]) == "the file ended"
    assert (EXAMPLES[5].index, EXAMPLES[5].nbytes) == (3, 10)


def test_a_plain_os_error_has_the_class_of_its_errno():
    error = os_error(errno.EACCES, "opening: not ours", Path("/x"))
    assert type(error) is PermissionError
    assert str(error) == "[Errno 13] opening: not ours: '/x'"
    assert str(os_error(errno.EIO, "reading: it broke")) == "[Errno 5] reading: it broke"


def _window():
    return dmabuf.allocate(4096, exporter="memfd").open()


def _in_loop():
    return asyncio.run(aio.open(os.devnull))


HANDLES = {
    "File": lambda: dmabuf.open(os.devnull),
    "aio.File": _in_loop,
    "Engine": dmabuf.Engine,
    "Buffer": lambda: dmabuf.allocate(4096, exporter="memfd"),
    "Window": _window,
}


@pytest.mark.parametrize("make", HANDLES.values(), ids=HANDLES)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(make, again):
    handle = make()
    name = type(handle).__name__
    with pytest.raises(TypeError, match=f"a {name} cannot be copied or pickled: [a-z]"):
        again(handle)
    if isinstance(handle, Window):
        handle = handle.buffer
    if not isinstance(handle, aio.File):
        handle.close()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize(
    "handle",
    [
        *("cuda.Device", "cuda.Memory", "cuda.Registered", "drm.Card", "drm.Image"),
        *("hip.Device", "level_zero.Device", "staging.Staging"),
        *("v4l2.Camera", "v4l2.Frame", "vfio.Device"),
        *("vulkan.Device", "vulkan.Memory", "vulkan.Semaphore"),
    ],
)
def test_handles_of_devices_are_not_copied(handle, again):
    module, name = handle.split(".")
    kind = getattr(importlib.import_module(f"dmabuf.devices.{module}"), name)
    with pytest.raises(TypeError, match=f"a {name} cannot be copied or pickled: [a-z]"):
        again(kind.__new__(kind))


@pytest.mark.parametrize(
    ("module", "call", "needs"),
    [
        (
            "cuda.bindings.driver",
            lambda buf: cuda.Device(),
            r"needs cuda-bindings .*dmabuf\[cuda\]",
        ),
        ("linuxpy.video", lambda buf: v4l2.capture("/dev/x"), r"needs linuxpy .*dmabuf\[v4l2\]"),
        ("vulkan", lambda buf: vulkan.open(), r"needs vulkan .*dmabuf\[vulkan\]"),
        ("numpy", dmabuf.Buffer.asarray, r"^Buffer.asarray needs numpy .*dmabuf\[arrays\]"),
        ("torch", dmabuf.Buffer.astensor, r"^Buffer.astensor needs torch .*torch"),
    ],
)
def test_a_library_that_is_not_installed(monkeypatch, module, call, needs):
    for name in {module, module.partition(".")[0]} - {"cuda"}:
        monkeypatch.setitem(sys.modules, name, None)
    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        with pytest.raises(ImportError, match=needs.replace(" .*", " .*: pip install ")):
            call(buffer)
