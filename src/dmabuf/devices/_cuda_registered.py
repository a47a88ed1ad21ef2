"""A Buffer's memory, pinned for kernels of a CUDA device."""

from __future__ import annotations

import errno
import io
import warnings
from typing import TYPE_CHECKING, Self

from dmabuf.buffer import Buffer
from dmabuf.devices._cuda import CudaError, register, unregister
from dmabuf.errors import ClosedError, Uncopyable, os_error

if TYPE_CHECKING:
    from dmabuf.devices.cuda import Device


class Registered(Uncopyable, instead="register the memory again where it is needed"):
    """A Buffer that kernels read and write where it is, by `address`; a context manager."""

    def __init__(self, device: Device, buffer: Buffer) -> None:
        self._closed = True
        if not isinstance(buffer, Buffer):
            raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
        context, host = device._context, buffer._address
        refusal = buffer._map_refusal if host is None else buffer._pin_refusal
        if host is None or refusal is not None:
            raise io.UnsupportedOperation(errno.EOPNOTSUPP, f"kernels cannot use it: {refusal}")
        module = context.driver.module
        flags = module.CU_MEMHOSTREGISTER_DEVICEMAP
        if not buffer.writable():
            if not context.attribute("READ_ONLY_HOST_REGISTER_SUPPORTED"):
                text = f"{device.name} cannot use read-only memory: hand the dma-buf in read-write"
                raise os_error(errno.EOPNOTSUPP, text)
            flags |= module.CU_MEMHOSTREGISTER_READ_ONLY
        self.buffer = buffer
        """The Buffer; it cannot be closed meanwhile."""
        self._device, self._host = device, host
        self._view = buffer._view(0, buffer.size)  # which keeps it open
        self._closed = False
        try:
            device._enter(self)
            register(context, host, buffer.size, flags)
            what = f"{context.name}: finding the memory's device pointer"
            self.address = int(context.call("cuMemHostGetDevicePointer", host, 0, what=what))
            """The device pointer of its first byte."""
        except CudaError as error:
            if error.errno == errno.EBUSY:
                self._let_go()  # it is registered, and somebody else's
            else:
                self.close()
            raise
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"of {self.buffer!r}"
        return f"<dmabuf.devices.cuda.Registered {state}>"

    def _let_go(self) -> None:
        self._view.release()
        self._device._leave(self)
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Unpin it; again and again does nothing. No kernel may use it any more."""
        if self._closed:
            return
        if self._device._context.usable:
            unregister(self._device._context, self._host)
        self._let_go()

    def __enter__(self) -> Self:
        if self._closed:
            raise ClosedError(f"{self!r}")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()
