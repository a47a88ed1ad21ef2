"""VA-API: Buffers as surfaces of a video driver, and its surfaces as Buffers.

    >>> from dmabuf.devices import drm, vaapi
    >>> buffer = dmabuf.allocate(drm.size(640, 480, "NV12"), exporter="udmabuf")
    >>> with vaapi.open("/dev/dri/renderD128") as display:
    ...     with display.surface(drm.image(buffer, 640, 480, "NV12", modifier=0)) as surface:
    ...         number = surface.number  # for vaBeginPicture and others

Memory is imported and exported as DRM_PRIME_2 descriptors. A program encodes, decodes and converts
with libva as usual, by ``display.handle`` and ``surface.number``. This module calls libva.so.2 and
libva-drm.so.2 (apt install libva-drm2) by ctypes. Facts are from <va/va.h> and <va/va_drmcommon.h>.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmabuf.devices import lifetime
from dmabuf.devices.drm import Image, Plane
from dmabuf.devices.lifetime import DeviceHandle
from dmabuf.devices.node import open_node
from dmabuf.errors import os_error
from dmabuf.kernel import fence
from dmabuf.memory import Buffer, from_fd
from dmabuf.sizes import as_int

__all__ = ["Display", "Image", "Surface", "open"]

_MAJOR = 226  # of every DRM node (Documentation/admin-guide/devices.txt)
_NODES = "/dev/dri/renderD128 or similar"
_NO_MODIFIER = (1 << 56) - 1  # DRM_FORMAT_MOD_INVALID: the default of the driver
_PRIME_2 = 0x40000000  # VA_SURFACE_ATTRIB_MEM_TYPE_DRM_PRIME_2
_READ_WRITE, _SEPARATE, _COMPOSED = 0x3, 0x4, 0x8  # VA_EXPORT_SURFACE_
_SLICE = 0.1  # seconds of one wait: a signal is delayed by no more
_PAUSE = 0.001  # seconds between two questions where libva cannot wait for a time
_READY = 4  # VASurfaceReady


class _Kind(NamedTuple):
    fourcc: str  # of VA
    rt_format: int  # VA_RT_FORMAT_


_FORMATS = {
    "NV12": _Kind("NV12", 0x1),
    "P010": _Kind("P010", 0x100),
    "YUYV": _Kind("YUY2", 0x2),
    "XR24": _Kind("BGRX", 0x20000),
    "AR24": _Kind("BGRA", 0x20000),
}
"""The formats of surfaces by DRM's name."""
_DRM_NAMES = {kind.fourcc: name for name, kind in _FORMATS.items()}

_UNIMPLEMENTED, _TIMED_OUT, _UNSUPPORTED_MEMORY = 0x14, 0x26, 0x24
_CAUSES = {  # VA_STATUS_ERROR_
    0x02: (errno.ENOMEM, "the driver has no memory for it"),
    0x03: (errno.ENODEV, "the display is closed"),
    0x06: (errno.EINVAL, "the surface is closed"),
    0x0A: (errno.EOPNOTSUPP, "the driver lacks an attribute"),
    0x0E: (errno.EINVAL, "the driver has no such format; use NV12"),
    0x12: (errno.EINVAL, "the driver refuses the layout; use modifier=0 and a pitch of 256 bytes"),
    0x13: (errno.EINVAL, "the driver has no surfaces of this size"),
    0x14: (errno.EOPNOTSUPP, "the driver cannot do it"),
    0x16: (errno.EINVAL, "the driver has no such format; use NV12"),
    0x17: (errno.EIO, "an error in decoding"),
    0x18: (errno.EIO, "an error in encoding"),
    0x22: (errno.EBUSY, "the hardware is busy"),
    0x24: (errno.EOPNOTSUPP, "the driver shares no memory by DRM_PRIME_2"),
}


class _Value(ctypes.Union):
    _fields_ = [("i", ctypes.c_int32), ("f", ctypes.c_float), ("p", ctypes.c_void_p)]


class _GenericValue(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("value", _Value)]


class _Attribute(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("flags", ctypes.c_uint32), ("value", _GenericValue)]


class _Object(ctypes.Structure):
    _fields_ = [
        ("fd", ctypes.c_int),
        ("size", ctypes.c_uint32),
        ("modifier", ctypes.c_uint64),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("drm_format", ctypes.c_uint32),
        ("num_planes", ctypes.c_uint32),
        ("object_index", ctypes.c_uint32 * 4),
        ("offset", ctypes.c_uint32 * 4),
        ("pitch", ctypes.c_uint32 * 4),
    ]


class _Descriptor(ctypes.Structure):  # VADRMPRIMESurfaceDescriptor
    _fields_ = [
        ("fourcc", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("height", ctypes.c_uint32),
        ("num_objects", ctypes.c_uint32),
        ("objects", _Object * 4),
        ("num_layers", ctypes.c_uint32),
        ("layers", _Layer * 4),
    ]


assert ctypes.sizeof(_Attribute) == 24
assert (ctypes.sizeof(_Descriptor), _Descriptor.layers.offset) == (312, 84)

_Message = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)


class _Libva:
    """The functions of libva, with the types of their arguments."""

    def __init__(self) -> None:
        number, pointer = ctypes.c_uint32, ctypes.c_void_p
        try:
            va, drm = ctypes.CDLL("libva.so.2"), ctypes.CDLL("libva-drm.so.2")
        except OSError as error:
            text = f"dmabuf.devices.vaapi needs libva ({error}): apt install libva-drm2"
            raise os_error(errno.ENOENT, text) from None

        def function(library: ctypes.CDLL, name: str, result: Any, *types: Any) -> Any:
            found = getattr(library, name)
            found.restype, found.argtypes = result, types
            return found

        status, ints = ctypes.c_int, ctypes.POINTER(ctypes.c_int)
        self.get_display = function(drm, "vaGetDisplayDRM", pointer, ctypes.c_int)
        self.on_error = function(va, "vaSetErrorCallback", pointer, pointer, _Message, pointer)
        self.on_info = function(va, "vaSetInfoCallback", pointer, pointer, pointer, pointer)
        self.initialize = function(va, "vaInitialize", status, pointer, ints, ints)
        self.terminate = function(va, "vaTerminate", status, pointer)
        self.vendor = function(va, "vaQueryVendorString", ctypes.c_char_p, pointer)
        self.error_text = function(va, "vaErrorStr", ctypes.c_char_p, status)
        self.create = function(
            va, "vaCreateSurfaces", status, pointer, *3 * [ctypes.c_uint],
            ctypes.POINTER(number), ctypes.c_uint, ctypes.POINTER(_Attribute), ctypes.c_uint,
        )  # fmt: skip
        self.destroy = function(
            va, "vaDestroySurfaces", status, pointer, ctypes.POINTER(number), ctypes.c_int
        )
        self.export = function(
            va, "vaExportSurfaceHandle", status, pointer, *3 * [number], ctypes.POINTER(_Descriptor)
        )
        self.state = function(va, "vaQuerySurfaceStatus", status, pointer, number, ints)
        self.sync = function(va, "vaSyncSurface2", status, pointer, number, ctypes.c_uint64)
        self.sync_forever = function(va, "vaSyncSurface", status, pointer, number)


def open(path: str | os.PathLike[str] = "/dev/dri/renderD128") -> Display:  # noqa: A001
    """Open the video driver of a GPU, as libva chooses it for a DRM node.

    LIBVA_DRIVER_NAME names another driver.

    Raises:
        OSError: there is no libva (ENOENT), no such node or no permission; the node is not a DRM
            device, or there is no driver for it (ENODEV).
    """
    return Display(os.fspath(path))


class Display(DeviceHandle):
    """An open driver; made by :func:`open`. Thread-safe. After a fork the child can only close it.

    Closing a Display closes its Surfaces. Buffers stay open.
    """

    def __init__(self, path: str) -> None:
        self._va = va = _Libva()
        self._lock = threading.RLock()
        self._surfaces: weakref.WeakValueDictionary[int, Surface] = weakref.WeakValueDictionary()
        self._messages: list[str] = []
        self.path = path
        """The DRM node."""
        self._fd = open_node(path, 0, _MAJOR, "DRM", _NODES, "render or video")
        try:
            self.handle: int = va.get_display(self._fd) or 0
            """The VADisplay, for programs that call libva themselves."""
            if not self.handle:
                text = "open the video driver: libva does not take this node; use a render node"
                raise os_error(errno.ENODEV, text, path)
            self._on_error = _Message(self._remember)
            va.on_error(self.handle, self._on_error, None)
            va.on_info(self.handle, None, None)
            numbers = ctypes.c_int(), ctypes.c_int()
            status = va.initialize(self.handle, *map(ctypes.byref, numbers))
            if status:
                va.terminate(self.handle)
                why = "; ".join(self._messages) or self._name(status)
                fix = "install the driver of this GPU, or set LIBVA_DRIVER_NAME"
                raise os_error(errno.ENODEV, f"open the video driver: {why}; {fix}", path)
        except BaseException:
            os.close(self._fd)
            raise
        self.version = numbers[0].value, numbers[1].value
        """The version of VA-API, as (1, 22)."""
        self.vendor: str = (va.vendor(self.handle) or b"").decode(errors="replace")
        """What the driver calls itself."""
        self._opened()

    def _remember(self, _context: int, message: bytes) -> None:
        self._messages.append(message.decode(errors="replace").strip())

    def _name(self, status: int) -> str:
        return bytes(self._va.error_text(status)).decode(errors="replace")

    def failure(self, status: int, what: str) -> OSError:
        """Return the error of a VAStatus that is not VA_STATUS_SUCCESS."""
        number, cause = _CAUSES.get(status, (errno.EIO, self._name(status)))
        return os_error(number, f"{what}: {cause}", self.path)

    def surface(self, image: Image) -> Surface:
        """Import a picture as a surface: the driver reads and writes the memory of its Buffers.

        The Buffers stay open until the surface is closed. A modifier of None is the driver's
        default; udmabufs have rows, which is 0.

        Args:
            image: from ``drm.image``, in the format NV12, P010, YUYV, XR24 or AR24.

        Raises:
            OSError: EINVAL where the driver lacks the format, the size or the layout; EOPNOTSUPP
                where a Buffer is not one dma-buf, or the driver imports no memory.
        """
        kind = self._kind(image.format)
        buffers = {id(plane.buffer): plane.buffer for plane in image.planes}
        found = _Descriptor(
            fourcc=_number(kind.fourcc), width=image.width, height=image.height,
            num_objects=len(buffers), num_layers=1,
        )  # fmt: skip
        modifier = _NO_MODIFIER if image.modifier is None else image.modifier
        for place, buffer in zip(found.objects, buffers.values(), strict=False):
            self._check(buffer)
            place.fd, place.size, place.modifier = buffer.slabs[0].fd, buffer.size, modifier
        layer = found.layers[0]
        layer.drm_format, layer.num_planes = _number(image.format), len(image.planes)
        order = list(buffers)
        for index, plane in enumerate(image.planes):
            layer.object_index[index] = order.index(id(plane.buffer))
            layer.offset[index], layer.pitch[index] = plane.offset, plane.pitch
        pointer = ctypes.cast(ctypes.pointer(found), ctypes.c_void_p)
        attributes = [_attribute(6, i=_PRIME_2), _attribute(7, p=pointer)]
        return self._create(image, kind, attributes, list(buffers.values()), f"import {image}")

    def make(self, width: int, height: int, format: str = "NV12") -> Surface:  # noqa: A002
        """Make a surface in memory of the driver, in a layout that it can export.

        Raises:
            OSError: EINVAL where the driver lacks the format or the size; ENOMEM.
        """
        kind = self._kind(format)
        for side, value in (("width", width), ("height", height)):
            if not 0 < as_int(value, side) < 1 << 31:
                raise ValueError(f"invalid {side} {value!r}: use 1 or more pixels")
        attributes = [_attribute(1, i=_number(kind.fourcc))]
        what = f"make a surface of {width}x{height} {format}"
        return self._create(_Shape(width, height, format), kind, attributes, [], what)

    def _kind(self, name: str) -> _Kind:
        if name not in _FORMATS:
            text = f"use {name!r} as a surface: known formats are {', '.join(_FORMATS)}"
            raise os_error(errno.EINVAL, text, self.path)
        return _FORMATS[name]

    def _check(self, buffer: Buffer) -> None:
        text = ""
        if not buffer.is_dmabuf:
            text = f'a {buffer.exporter} is not a dma-buf; allocate with exporter="udmabuf"'
        elif len(buffer.slabs) > 1:
            text = f"it has {len(buffer.slabs)} slabs, a surface needs one; {buffer.reason}"
        elif buffer.size >= 1 << 32:
            text = "it has 4 GiB or more; VA-API takes less"
        if text:
            raise os_error(errno.EOPNOTSUPP, f"import a buffer: {text}", self.path)

    def _create(
        self,
        shape: Image | _Shape,
        kind: _Kind,
        attributes: list[_Attribute],
        buffers: list[Buffer],
        what: str,
    ) -> Surface:
        number = ctypes.c_uint32()
        array = (_Attribute * len(attributes))(*attributes)
        held: list[Buffer] = []
        with self._lock:
            self.check_open()
            try:
                for buffer in buffers:
                    lifetime.hold(buffer)
                    held.append(buffer)
                status = self._va.create(
                    self.handle, kind.rt_format, shape.width, shape.height,
                    ctypes.byref(number), 1, array, len(attributes),
                )  # fmt: skip
                if status:
                    raise self.failure(status, what)
                found = Surface(self, self._va, number.value, shape, held)
            except BaseException:
                for buffer in held:
                    lifetime.release(buffer)
                raise
            self._surfaces[number.value] = found
            return found

    def forget(self, number: int) -> None:
        """Forget a surface that closes; for Surface."""
        with self._lock:
            self._surfaces.pop(number, None)

    def close(self) -> None:
        """Close the surfaces and the driver, after its work. Closing again does nothing.

        Raises:
            OSError: the driver failed; all is closed.
        """
        if self._closed:
            return
        if not self.forked:
            with self._lock:
                for surface in list(self._surfaces.values()):
                    surface.close()
                self._closed = True
                self._va.terminate(self.handle)
        self._closed = True
        os.close(self._fd)

    def __repr__(self) -> str:
        state = "closed" if self._closed else repr(self.vendor)
        return f"<dmabuf.Display {self.path} {state}>"


@dataclass(frozen=True, slots=True)
class _Shape:
    width: int
    height: int
    format: str


def _number(name: str) -> int:
    return int.from_bytes(name.encode("ascii"), "little")


def _attribute(kind: int, **value: Any) -> _Attribute:
    """Return a VASurfaceAttrib of a VASurfaceAttribType with an integer or a pointer."""
    is_pointer = "p" in value
    return _Attribute(
        type=kind,
        flags=2,  # VA_SURFACE_ATTRIB_SETTABLE
        value=_GenericValue(type=3 if is_pointer else 1, value=_Value(**value)),
    )


class Surface(DeviceHandle):
    """A surface of a driver; made by ``Display.surface`` and ``Display.make``."""

    def __init__(
        self, display: Display, va: _Libva, number: int, shape: Image | _Shape, held: list[Buffer]
    ) -> None:
        """Take over the surface, and one hold of each Buffer; for Display."""
        self._display, self._va, self._held = display, va, held
        self.number = number
        """The VASurfaceID."""
        self.width, self.height, self.format = shape.width, shape.height, shape.format
        self._opened()

    def export(self) -> Image:
        """Return the memory of the surface as a picture in Buffers, which the caller closes.

        The Buffers keep the memory when the surface is closed. :meth:`sync` before the bytes are
        read. The picture has the modifier of the memory, None where the driver reports none.

        Raises:
            OSError: EOPNOTSUPP, the driver does not export its memory; EINVAL, in a form that has
                no description as an Image.
        """
        self.check_open()
        what = f"export {self!r}"
        found = _Descriptor()
        for layers in (_SEPARATE, _COMPOSED):
            status = self._va.export(
                self._display.handle, self.number, _PRIME_2, _READ_WRITE | layers, found
            )
            if not status:
                break
        else:
            raise self._display.failure(status, what)
        buffers: list[Buffer] = []
        objects = found.objects[: found.num_objects]
        try:
            try:
                for one in objects:
                    buffers.append(from_fd(one.fd))
            finally:
                for one in objects:
                    os.close(one.fd)
            planes = [
                Plane(buffers[layer.object_index[n]], layer.offset[n], layer.pitch[n])
                for layer in found.layers[: found.num_layers]
                for n in range(layer.num_planes)
            ]
            modifiers = {one.modifier for one in objects}
            name = found.fourcc.to_bytes(4, "little").decode("latin-1")
            if name not in _DRM_NAMES or len(modifiers) != 1:
                text = (
                    f"{what}: the driver describes it as {name!r} with {len(modifiers)} modifiers"
                )
                raise os_error(errno.EINVAL, text, self._display.path)
            modifier = modifiers.pop()
            return Image(
                self.width, self.height, _DRM_NAMES[name], tuple(planes),
                None if modifier == _NO_MODIFIER else modifier,
            )  # fmt: skip
        except BaseException:
            for buffer in buffers:
                buffer.close()
            raise

    def sync(self, timeout: float | None = None) -> None:
        """Wait until the driver has finished all work on the surface.

        Args:
            timeout: seconds; None waits without limit.

        Raises:
            TimeoutError: the driver still works on it.
            OSError: EIO, a part of the work failed, such as the decoding of a damaged picture.
        """
        fence.check_timeout(timeout)
        self.check_open()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._wait(_SLICE if deadline is None else deadline - time.monotonic()):
            if deadline is not None and time.monotonic() >= deadline:
                text = f"wait for {self!r}: the driver still works on it after {timeout:g} s"
                raise os_error(errno.ETIMEDOUT, text, self._display.path)

    def _wait(self, seconds: float) -> bool:
        """Wait for the driver for a short time, and return whether it has finished."""
        handle = self._display.handle
        limit = max(0, int(min(seconds, _SLICE) * 1e9))
        status = self._va.sync(handle, self.number, limit)
        if status == _UNIMPLEMENTED:  # older drivers can wait, but not for a time
            state = ctypes.c_int()
            status = self._va.state(handle, self.number, ctypes.byref(state))
            if not status and state.value != _READY:
                time.sleep(_PAUSE)
                return False
            status = status or self._va.sync_forever(handle, self.number)
        if status == _TIMED_OUT:
            return False
        if status:
            raise self._display.failure(status, f"wait for {self!r}")
        return True

    def close(self) -> None:
        """Destroy the surface, after the driver's work on it. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self.forked:
            return
        try:
            if not self._display.closed:
                with suppress(OSError):  # work that failed is finished, too
                    while not self._wait(_SLICE):
                        pass
                number = ctypes.c_uint32(self.number)
                self._va.destroy(self._display.handle, ctypes.byref(number), 1)
        finally:
            self._display.forget(self.number)
            for buffer in self._held:
                lifetime.release(buffer)
            self._held = []

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.width}x{self.height} {self.format}"
        return f"<dmabuf.Surface {state}>"
