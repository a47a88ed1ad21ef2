"""Named buffers that outlive the programs that fill them, shared between processes.

    >>> import dmabuf.store
    >>> with dmabuf.store.connect() as store:
    ...     with store.create("frames", "64MiB", mode=0o640) as buf:
    ...         ...
    ...     with store.open("frames") as again:  # in any process: the same memory
    ...         ...

``dmabuf serve`` runs the server; docs/guides/sharing.md is the guide.

What may enter this room: the protocol between client and server, the rules for names and their
memory, the socket. What does not: how memory is allocated or mapped (memory/), how bytes are moved
(transfer/, copying/), files (mount/), the command line (cli/). Users who may connect are trusted
not to exhaust memory on purpose, so nothing here keeps accounts of users.

``protocol.py`` has the messages, ``names.py`` the rules, ``memory.py`` the server's descriptors,
``loading.py`` files that it reads, ``server.py`` the loop, ``clients.py`` its connections,
``restart.py`` what outlives it, ``metrics.py`` its figures. ``client.py``, ``connection.py`` and
``grant.py`` are the other side, and ``place.py`` is the socket of both.
"""

from dmabuf.store.client import Store, check_name, connect
from dmabuf.store.memory import default_limit
from dmabuf.store.metrics import serving_metrics
from dmabuf.store.place import default_path, listening, notify_systemd
from dmabuf.store.protocol import Status, Usage
from dmabuf.store.server import Lent, Server, started

__all__ = [
    "Lent",
    "Server",
    "Status",
    "Store",
    "Usage",
    "check_name",
    "connect",
    "default_limit",
    "default_path",
    "listening",
    "notify_systemd",
    "serving_metrics",
    "started",
]
