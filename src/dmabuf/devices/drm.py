"""Displays and GPUs by Linux's DRM: their memory as Buffers, and Buffers as pictures they show.

    >>> from dmabuf.devices import drm
    >>> buffer = dmabuf.allocate(drm.size(640, 480), exporter="udmabuf")
    >>> with dmabuf.open("picture.raw") as file:
    ...     transfer = file.read_into(buffer, drm.size(640, 480))
    >>> with drm.Card("/dev/dri/card0") as card:
    ...     with card.framebuffer(drm.image(buffer, 640, 480)) as framebuffer:
    ...         card.show(framebuffer)

Memory goes both ways by PRIME, DRM's name for dma-bufs: docs/displays.md.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import nullcontext, suppress
from typing import Any

from dmabuf import _process, exporters
from dmabuf.buffer import Buffer
from dmabuf.devices import _drm_formats as formats
from dmabuf.devices._drm import Mode, Node, Output
from dmabuf.devices._drm_image import Image, Plane, image, rules_of, size
from dmabuf.devices._drm_parts import Framebuffer, Handle, warn_unclosed
from dmabuf.errors import ClosedError, Uncopyable, os_error
from dmabuf.sizes import as_int, format_size

__all__ = ["Card", "Framebuffer", "Handle", "Image", "Mode", "Output", "Plane", "image", "size"]


class Card(Uncopyable, instead="open it again where it is needed"):
    """An open DRM node: a display, a GPU, or the half of one that a render node is.

    Opening it takes no display from anybody: :meth:`show` does. Thread-safe. After fork the child's
    copy can only be closed. Closing it closes its handles and framebuffers; Buffers stay.
    """

    _closed = True  # until __init__ is through

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a node such as "/dev/dri/card0" or "/dev/dri/renderD128".

        Raises:
            OSError: no such node, no permission, no DRM device (ENODEV).
        """
        self._node = Node(path)
        self._pid = _process.pid
        self._lock = threading.RLock()
        self._handles: dict[int, int] = {}  # how often each is in use
        self._theirs: set[int] = set()  # exported by number: not ours to close
        self._shown: dict[int, tuple[int, int]] = {}  # by connector: the CRTC, the framebuffer
        self.path = self._node.path
        """The device node."""
        self.driver = self._node.driver
        """The kernel driver's name."""
        self._closed = False

    def fileno(self) -> int:
        """The node's descriptor, for ioctls of the driver's own; handles are numbers on it."""
        self._check_open()
        return self._node.fd

    # -- memory

    def dumb(
        self,
        width: int,
        height: int,
        format: str = "XR24",  # noqa: A002 - what everyone calls it
        *,
        name: str | None = None,
    ) -> Image:
        """A new picture in memory of the device's own, as any driver with a display can make it.

        Its Buffer is the only thing that holds the memory. The driver chooses the pitch. ``name``
        labels it as in :func:`dmabuf.from_fd`.

        Raises:
            OSError: a format that is not known or has several planes (EINVAL), a driver or node
                that makes none, too little memory.
            ValueError: a side of less than a pixel.
        """
        self._check_open()
        rules = rules_of(format)
        if len(rules) > 1 or rules[0].across > 1:
            text = f"a dumb buffer holds whole pixels in one plane, and {format} has no such: "
            raise os_error(errno.EINVAL, f"{text}allocate with dmabuf.allocate()", self.path)
        for side, value in (("width", width), ("height", height)):
            if not 0 < as_int(value, side) < 1 << 32:
                raise ValueError(f"{side}={value!r}: 1 or more, in pixels")
        with self._lock:
            self._check_open()
            handle, pitch = self._node.create_dumb(width, height, 8 * rules[0].nbytes)
            try:
                buffer = self._export(handle, name)
            finally:
                self._node.close_handle(handle)
        try:
            return image(buffer, width, height, format, pitch=pitch)
        except BaseException:
            buffer.close()
            raise

    def export(self, handle: int, *, name: str | None = None) -> Buffer:
        """The memory of a GEM handle on this node, made by the driver's own ioctls, as a Buffer.

        The handle stays yours, to close with :meth:`close_handle`, and the Buffer does not need it.

        Raises:
            OSError: there is no such handle (ENOENT), or the driver exports none of its kind.
        """
        number = _handle_number(handle)
        with self._lock:
            self._check_open()
            buffer = self._export(number, name)
            if number not in self._handles:
                self._theirs.add(number)
            return buffer

    def _export(self, handle: int, name: str | None) -> Buffer:
        fd = self._node.export(handle)
        try:
            return exporters.from_fd(fd, name=name)
        finally:
            os.close(fd)

    def close_handle(self, handle: int) -> None:
        """Close a GEM handle that is yours, such as one that was exported. Raises OSError."""
        with self._lock:
            self._check_open()
            number = _handle_number(handle)
            if number in self._handles:
                text = f"GEM handle {number} is in use by a Handle: close that"
                raise os_error(errno.EBUSY, text, self.path)
            self._node.close_handle(number)
            self._theirs.discard(number)

    def handle(self, buffer: Buffer) -> Handle:
        """A Buffer as a GEM handle on this node, until the Handle is closed.

        The kernel gives one and the same number for one dma-buf on one node: it is closed with the
        last Handle of it.

        Raises:
            OSError: the driver refuses to import such memory (ENODEV, EIO, EINVAL ...), or the
                buffer is no dma-buf or several (EOPNOTSUPP).
            ClosedError: the buffer or the card is closed.
        """
        with self._lock:
            return Handle(self, self._import(buffer))

    def _import(self, buffer: Buffer) -> int:
        self._check_open()
        if not isinstance(buffer, Buffer):
            raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
        slabs = buffer.slabs
        if not buffer.is_dmabuf or len(slabs) > 1:
            what = "several dma-bufs" if buffer.is_dmabuf else f"a {buffer.exporter} and no dma-buf"
            fix = 'allocate with exporter="udmabuf"'
            if buffer.is_dmabuf:
                fix = f"a picture needs one ({buffer.reason})"
            raise os_error(errno.EOPNOTSUPP, f"this buffer is {what}: {fix}", self.path)
        kind = f"a buffer of {buffer.exporter}, {format_size(buffer.size)}"
        number = self._node.import_fd(slabs[0].fd, kind)
        self._handles[number] = self._handles.get(number, 0) + 1
        return number

    def _release(self, number: int) -> None:
        if self._pid != _process.pid:  # before the lock, which may have been taken when it forked
            return
        with self._lock:
            if self._closed:
                return
            self._handles[number] -= 1
            if not self._handles[number]:
                del self._handles[number]
                if number not in self._theirs:
                    self._node.close_handle(number)

    # -- displays

    def framebuffer(self, picture: Image) -> Framebuffer:
        """A picture as something that this card's displays can show.

        It keeps the memory alive by itself. Raises what :meth:`handle` raises, and OSError for a
        format, modifier, size or pitch that the display lacks (EINVAL), or no displays at all.
        """
        code = formats.number(picture.format)
        with self._lock:
            used: list[int] = []
            try:
                for plane in picture.planes:
                    used.append(self._import(plane.buffer))
                rows = [
                    (number, plane.pitch, plane.offset)
                    for number, plane in zip(used, picture.planes, strict=True)
                ]
                sides = (picture.width, picture.height)
                try:
                    number = self._node.add_framebuffer(sides, code, rows, picture.modifier)
                except OSError as error:
                    raise self._no_framebuffer(error, picture, code) from None
            finally:
                for handle in used:
                    self._release(handle)  # the framebuffer has the memory itself
            return Framebuffer(self, number, picture)

    def _no_framebuffer(self, error: OSError, picture: Image, code: int) -> OSError:
        none = f"{self.driver} has no displays"
        fixes = {errno.EOPNOTSUPP: none, errno.ENOSYS: none}
        fixes[errno.EACCES] = "render nodes have no displays: open /dev/dri/card0 or so"
        if error.errno == errno.EINVAL:
            known: list[int] = []
            with suppress(OSError):
                known = self._node.formats()
            if known and code not in known:
                text = f"its displays have no {picture.format}: "
                text += ", ".join(map(formats.text, known))
            elif picture.modifier is not None:
                text = f"modifier {picture.modifier:#x}, the size or the pitch is not for "
                text += f"{self.driver}: modifier=None takes what it takes for granted"
            else:
                text = f"{self.driver} refuses the size, or the pitch of {picture.pitch} bytes: "
                text += "try a multiple of 64 or 256"
            fixes[errno.EINVAL] = text
        return self._node.fail(error, f"making a framebuffer of {picture}", fixes)

    def outputs(self) -> tuple[Output, ...]:
        """The connectors: what is connected, and what it can show as far as the kernel knows.

        Raises:
            OSError: the device has no displays, or this is a render node.
        """
        with self._lock:
            self._check_open()
            return self._node.outputs()

    def show(self, framebuffer: Framebuffer, output: str | None = None) -> None:
        """Take the display and show a framebuffer on it, in a mode of exactly its size.

        ``output`` is a connector's name, such as "HDMI-A-1"; by default the first that is
        connected. It is shown until the framebuffer is closed, or another is shown there.

        Raises:
            OSError: another program has the display (EBUSY or EACCES), nothing is connected
                (ENODEV), no mode of that size, or a refusal of the driver's.
            ClosedError: the framebuffer or the card is closed.
        """
        with self._lock:
            self._check_open()
            framebuffer._check_open()
            if framebuffer.card is not self:
                raise ValueError("this framebuffer is another card's: make one of the image here")
            self._node.take_master()
            try:
                self._show(framebuffer, output)
            finally:
                self._give_back()

    def _show(self, framebuffer: Framebuffer, name: str | None) -> None:
        found = self._node.outputs()
        wanted = [one for one in found if (one.connected if name is None else one.name == name)]
        if not wanted or not wanted[0].connected:
            which = "no display is connected" if name is None else f"no display at {name}"
            have = ", ".join(one.name for one in found) or "none"
            raise os_error(errno.ENODEV, f"{which}: its connectors are {have}", self.path)
        one, picture = wanted[0], framebuffer.image
        modes = [m for m in one.modes if (m.width, m.height) == (picture.width, picture.height)]
        if not modes:
            have = ", ".join(dict.fromkeys(map(str, one.modes))) or "none"
            text = f"{one.name} has no mode of {picture.width}x{picture.height}: it has {have}"
            raise os_error(errno.EINVAL, text, self.path)
        taken = [crtc for where, (crtc, _) in self._shown.items() if where != one.connector]
        crtc = next((crtc for crtc in one.crtcs if crtc not in taken), None)
        if crtc is None:
            text = f"{self.driver} has nothing left to drive {one.name}: close a framebuffer"
            raise os_error(errno.EBUSY, text, self.path)
        try:
            self._node.set_crtc(crtc, one.connector, framebuffer.number, modes[0])
        except OSError as error:
            fixes = {
                errno.EINVAL: f"{self.driver} refuses {picture} at a pitch of {picture.pitch}: "
                "try another pitch or format",
                errno.ENOSPC: "the framebuffer is smaller than the mode",
                errno.EACCES: "another program has the display",
            }
            raise self._node.fail(error, f"showing it on {one.name}", fixes) from None
        self._shown[one.connector] = crtc, framebuffer.number

    def _give_back(self) -> None:
        """The display, once nothing is shown."""
        if not self._shown:
            self._node.drop_master()

    def _forget(self, number: int) -> None:
        if self._pid != _process.pid:
            return
        with self._lock:
            if self._closed:
                return
            with suppress(OSError):  # the device is gone
                self._node.remove_framebuffer(number)
            self._shown = {at: one for at, one in self._shown.items() if one[1] != number}
            self._give_back()

    # -- the end

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this card is closed")
        if self._pid != _process.pid:
            raise ClosedError("this card is that of the process which forked this one")

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Close the node, and with it its handles and framebuffers; can be again."""
        forked = self._pid != _process.pid  # the lock may have been taken then
        with nullcontext() if forked else self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._node.fd)

    def __enter__(self) -> Card:
        self._check_open()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __del__(self) -> None:
        warn_unclosed(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.driver
        return f"<dmabuf.Card {self.path} {state}>"


def _handle_number(handle: int) -> int:
    number = as_int(handle, "handle")
    if not 0 <= number < 1 << 32:
        raise ValueError(f"handle={number}: GEM handles are numbers of 32 bits")
    return number
