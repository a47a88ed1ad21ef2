"""What a Card hands out: GEM handles and framebuffers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from dmabuf.devices._drm_image import Image
from dmabuf.errors import ClosedError, Uncopyable

if TYPE_CHECKING:
    from dmabuf.devices.drm import Card


class Part(Uncopyable, instead="acquire it again from its Card"):
    """What a Card hands out: it ends with `close`, with its Card, or with the process."""

    _closed = True  # until __init__ is through

    def __init__(self, card: Card, number: int) -> None:
        self.card = card
        """Whose it is."""
        self.number = number
        """The kernel's number of it, on this node."""
        self._closed = False

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"this {type(self).__name__} is closed")

    @property
    def closed(self) -> bool:
        """Whether it, or its card, was closed."""
        return self._closed or self.card.closed

    def close(self) -> None:
        """Give it back to the kernel; can be again."""
        if not self._closed:
            self._closed = True
            self._end()

    def _end(self) -> None:
        raise NotImplementedError

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __del__(self) -> None:
        warn_unclosed(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.number} of {self.card.path}"
        return f"<dmabuf.{type(self).__name__} {state}>"


class Handle(Part):
    """A GEM handle, `number` on `card.fileno()`, for ioctls of the driver's; by `Card.handle`."""

    def _end(self) -> None:
        self.card._release(self.number)

    def __enter__(self) -> Handle:
        self._check_open()
        return self


class Framebuffer(Part):
    """A picture that a display can show; made by :meth:`Card.framebuffer`.

    Closing it turns the display that shows it off. The console or desktop comes back when the card
    is closed.
    """

    def __init__(self, card: Card, number: int, picture: Image) -> None:
        super().__init__(card, number)
        self.image = picture
        """What it shows."""

    def flush(self) -> None:
        """Tell the display that the pixels have changed; some take a copy, and show that.

        Raises OSError of the driver's, ClosedError after close.
        """
        with self.card._lock:
            self._check_open()
            self.card._check_open()
            self.card._node.flush(self.number)

    def _end(self) -> None:
        self.card._forget(self.number)

    def __enter__(self) -> Framebuffer:
        self._check_open()
        return self


def warn_unclosed(thing: Card | Part) -> None:
    """What a finalizer does: close what nobody has closed, and say so."""
    if not thing._closed:
        warnings.warn(f"unclosed {thing!r}", ResourceWarning, source=thing, stacklevel=3)
        thing.close()
