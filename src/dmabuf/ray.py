"""Buffers between actors of Ray: the tensor transport "DMABUF", by `dmabuf.remote`.

    >>> import ray, dmabuf, dmabuf.ray
    >>> dmabuf.ray.use(trusted_network=True)  # before the classes of actors
    >>> @ray.remote(enable_tensor_transport=True)
    ... class Storage:
    ...     @ray.method(tensor_transport="DMABUF")
    ...     def load(self, path):
    ...         with dmabuf.open(path) as file:
    ...             buffer = dmabuf.allocate(file.size)
    ...             file.read_into(buffer)
    ...         return buffer

The actor that returns a Buffer serves it, and keeps it until Ray drops the object. Who gets the
object fetches the bytes from there into a Buffer of its own: Ray's object store has none of them.
Ray's interface for transports is alpha; this was tested with 2.60.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

from dmabuf.memory import Buffer
from dmabuf.remote import Certificates
from dmabuf.sizes import Size

__all__ = ["get", "use"]


def use(
    *,
    engine: Literal["auto", "tcp", "nixl"] = "auto",
    certificates: Certificates | None = None,
    trusted_network: bool = False,
    timeout: float = 30.0,
) -> None:
    """Register the transport with Ray, in this process and the actors that it creates.

    Call it before the classes of actors are defined. A second call has no effect, as in the process
    of an actor that imports the same module.

    The arguments are those of `dmabuf.remote.connect`, for every node of the cluster. Each actor
    that returns Buffers listens at its node's address, with TLS; paths of certificates are the same
    on every node, or DMABUF_CERTIFICATE and the others name them there. Without certificates
    `trusted_network` is needed.
    """
    from ray.experimental import register_tensor_transport

    from dmabuf.integrations import ray_transport

    class Transport(
        ray_transport.BufferTransport
    ):  # sent to actors by value, and with it its settings
        settings = ray_transport.Settings(engine, certificates, trusted_network, timeout)

    with suppress(ValueError):  # it is registered already
        register_tensor_transport(ray_transport.NAME, ["cpu"], Transport, Buffer)


def get(ref: Any, into: Buffer, *, buffer_offset: Size = 0, size: Size | None = None) -> Buffer:
    """Fetch the Buffer of a reference into a range of one that exists, and return that.

    Args:
        ref: the ObjectRef of an object that is one Buffer.
        into: the destination.
        buffer_offset: where in it, in bytes.
        size: bytes, which have to be those of the object; by default all the rest of `into`.

    Raises:
        ValueError: the object has another size, or the range is not within `into`.
        OSError, ray.exceptions.RayError: the actor with the Buffer has ended, or the connection
            failed; the content of the range is undefined.
    """
    import ray
    from ray.experimental import set_target_for_ref

    from dmabuf.integrations import ray_transport

    place = ray_transport.Place(into, *into.check_range(buffer_offset, size))
    set_target_for_ref(ref, [place])  # which it does not keep
    ray.get(ref)
    return into
