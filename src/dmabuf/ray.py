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

`ray.data` reads files and models of this machine and of other nodes by Buffers:

    >>> ray.data.read_datasource(dmabuf.ray.files_source(["dmabuf://10.0.0.5:7777/a.bin"]))
    >>> ray.data.read_datasource(dmabuf.ray.model_source("/models/llama"))
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from dmabuf.memory import Buffer
from dmabuf.remote import Certificates
from dmabuf.sizes import Size, parse_size

if TYPE_CHECKING:
    import ray
    from ray.data.datasource import Datasource

__all__ = ["files_source", "get", "model_source", "use"]


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


def get(
    ref: ray.ObjectRef, into: Buffer, *, buffer_offset: Size = 0, size: Size | None = None
) -> Buffer:
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


def files_source(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, row_size: Size = "64MiB"
) -> Datasource:
    """Return the content of files for `ray.data.read_datasource`.

    A row has the columns path, offset and bytes: a part of a file, read past the page cache where
    that is possible. An empty file has one row without bytes. Ray copies a row once, from the
    Buffer that it was read into to the object store.

    Args:
        paths: files that every node of the cluster has under this path, or URLs of other nodes,
            dmabuf://HOST:PORT/PATH. For these the environment of Ray's workers names certificates,
            or has DMABUF_TRUSTED_NETWORK=1 (`runtime_env`).
        row_size: bytes in a row, at most.

    Raises:
        OSError: a file cannot be opened from here.
        ValueError: an invalid path or size.
    """
    from dmabuf.integrations import ray_files

    size = parse_size(row_size, "row_size")
    if not size:
        raise ValueError("invalid row_size 0: use bytes or a size such as 64MiB")
    one = [paths] if isinstance(paths, str | os.PathLike) else paths
    parts = ray_files.parts_of_files([os.fspath(path) for path in one], size)
    return ray_files.BufferSource("DmabufFiles", parts, ray_files.read_files)


def model_source(source: str | os.PathLike[str] | list[str]) -> Datasource:
    """Return the tensors of a model for `ray.data.read_datasource`.

    A row has the columns path, name, dtype (of the safetensors format, such as "BF16"), shape and
    bytes: one tensor. A task reads whole files.

    Args:
        source: a safetensors file, a list of them, the index of a sharded model, or its folder; or
            URLs. As for `files_source`, and as `dmabuf.safetensors.load` takes them.

    Raises:
        OSError: a file cannot be opened from here.
        ValueError: an invalid path.
    """
    from dmabuf.integrations import ray_files

    parts = ray_files.parts_of_model(source)
    return ray_files.BufferSource("DmabufModel", parts, ray_files.read_models)
