"""A frame of a camera: where its bytes are, and what the driver tells of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dmabuf.buffer import Buffer
from dmabuf.errors import Uncopyable

if TYPE_CHECKING:
    from dmabuf.devices._v4l2 import Filled
    from dmabuf.devices.v4l2 import Camera


class Plane(NamedTuple):
    """One plane of a frame: `nbytes` bytes of `buffer`, from `offset` on."""

    buffer: Buffer
    offset: int
    nbytes: int


class Frame(Uncopyable, instead="copy its bytes (bytes(frame.buffer.pread(...)))"):
    """A frame. It is yours until :meth:`release`, which the `with` statement calls.

    Then its buffer goes back to the driver, which writes another frame into it. A frame that
    nothing refers to any more is released by itself.
    """

    released = True  # until __init__ is through

    def __init__(self, camera: Camera, filled: Filled, lost: int) -> None:
        self._camera = camera
        self._number = filled.number
        self.planes: tuple[Plane, ...] = tuple(
            Plane(buffer, offset, max(0, used - offset))
            for buffer, (used, offset) in zip(
                camera.buffers[filled.number], filled.planes, strict=True
            )
        )
        """Where its bytes are: one plane, but for the multi-planar formats."""
        self.sequence = filled.sequence
        """The driver's number of it, modulo 2**32; a number that is left out is a frame lost."""
        self.timestamp_ns = filled.timestamp_ns
        """When it was taken, in nanoseconds of `clock`."""
        self.clock = filled.clock
        """"monotonic" (that of time.monotonic_ns), "copied" or "unknown"."""
        self.error = filled.error
        """Whether the driver says that some of its bytes may be wrong."""
        self.lost = lost
        """Frames that were lost just before it."""
        self.released = False
        """Whether its buffer went back to the driver."""

    @property
    def buffer(self) -> Buffer:
        """The first plane's buffer; the picture is at its start with nearly every driver."""
        return self.planes[0].buffer

    @property
    def nbytes(self) -> int:
        """Bytes of the picture, all planes together."""
        return sum(plane.nbytes for plane in self.planes)

    def release(self) -> None:
        """Give the buffer back to the driver; again and again does nothing.

        Waits for the fences of devices that still use it, for as long as the camera's `timeout`.

        Raises:
            BusyError: it is mapped, or a transfer of it runs; the frame stays yours.
            TimeoutError: a device still uses it; the frame stays yours.
            OSError: the driver does not take it.
        """
        if not self.released:
            self._camera._give_back(self._number)
            self.released = True

    def __enter__(self) -> Frame:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __del__(self) -> None:
        if not self.released:
            self._camera._dropped(self._number)

    def __repr__(self) -> str:
        return f"<dmabuf.Frame {self.sequence} of {self._camera.path}, {self.nbytes} bytes>"
