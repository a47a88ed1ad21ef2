"""Named buffers that outlive the programs which fill them, shared between processes.

    >>> import dmabuf.store
    >>> with dmabuf.store.connect() as store:
    ...     with store.create("frames", "64MiB", mode=0o640) as buf:
    ...         ...
    ...     with store.open("frames") as again:  # in any process: the same memory
    ...         ...

``dmabuf serve`` is the server; docs/store.md has the rest.
"""

from dmabuf.store.client import Store, as_trusted_as_may_be, connect
from dmabuf.store.place import default_path
from dmabuf.store.protocol import Status, Usage

__all__ = ["Status", "Store", "Usage", "as_trusted_as_may_be", "connect", "default_path"]
