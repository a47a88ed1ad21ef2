"""A file object for writing whose file appears when it is closed, whole or not at all."""

from __future__ import annotations

import io
import sys
from pickle import PickleBuffer
from types import TracebackType
from typing import TYPE_CHECKING

from dmabuf.kernel import process

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class WholeFile(io.RawIOBase):
    """The base of the files that fsspec writes.

    With ``autocommit`` the file appears when it is closed. Without, as in a transaction of fsspec,
    it appears by :meth:`commit`. It never appears if the ``with`` statement ends by an exception,
    after :meth:`discard`, and if it is dropped without close().

    A subclass defines :meth:`append`, :meth:`finish`, :meth:`publish` and :meth:`drop`.
    """

    def __init__(self, path: str, autocommit: bool) -> None:
        self.path = path
        self.mode = "wb"
        self.autocommit = autocommit
        self._written = 0
        self._discarded = False
        self.failed: BaseException | None = None
        """The error that discarded it, if a write did."""

    def append(self, data: memoryview) -> None:
        """Take the next bytes."""
        raise NotImplementedError

    def finish(self) -> None:
        """Bring all bytes to where :meth:`publish` needs them."""

    def publish(self) -> None:
        """Make the file appear."""
        raise NotImplementedError

    def drop(self) -> None:
        """Release everything; does nothing the second time, and after :meth:`publish`."""

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self._written

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of ``data``. An error discards the file, and each later write raises it."""
        if self.failed is not None:
            raise self.failed
        if self.closed:
            raise ValueError(f"write {self.path}: the file is closed")
        with PickleBuffer(data).raw() as raw:
            try:
                self.append(raw)
            except BaseException as error:
                self.failed = error
                self.discard()
                raise
            self._written += len(raw)
            return len(raw)

    def close(self) -> None:
        """Finish the file, and make it appear unless a transaction does that later."""
        if self.closed:
            return
        try:
            self.finish()
            if self.autocommit:
                self.publish()
        except BaseException:
            self.discard()
            raise
        super().close()

    def commit(self) -> None:
        """Make a file without autocommit appear. Raises ValueError if it was discarded."""
        self.close()
        if self._discarded:
            raise ValueError(f"commit {self.path}: it was discarded after an error")
        try:
            self.publish()
        finally:
            self.drop()

    def discard(self) -> None:
        """Forget what was written."""
        self._discarded = True
        self.drop()
        super().close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close() if kind is None else self.discard()

    @process.finalizer
    def __del__(self) -> None:
        if not sys.is_finalizing() and not self.closed:
            self.discard()
