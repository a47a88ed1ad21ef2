"""Files and named buffers of other nodes, into Buffers and back: over sockets, or by NIXL.

    >>> import dmabuf.remote
    >>> with dmabuf.remote.connect("10.0.0.5:7777") as node:
    ...     with node.open("model.safetensors") as file:
    ...         file.read_into(buf)
    ...     node.fetch("kv-7", into=buf)

``dmabuf serve --listen ADDRESS --files DIR`` runs on the other node; docs/guides/remote.md is the
guide.

What may enter this room: the protocol between nodes, its transport, what is served, and the
client's view of it. What does not: how a file is read at the node (transfer/, copying/), the memory
of named buffers (store/), the command line (cli/).

``protocol.py`` has the messages and ``channel.py`` the socket of both ends; ``ranges.py`` cuts what
is requested; ``address.py`` decides who may connect to what. The client's end: ``connecting.py``
and ``client.py`` (connect and Node), ``session.py`` (requests and records), ``engine.py`` and
``nixl.py`` (which move their bytes), ``file.py``, ``replicas.py`` (a file at several nodes),
``names.py`` and ``aio.py`` (in an event loop). The node's end: ``server.py``, ``requests.py``,
``data.py`` and ``nixl_node.py`` (which move their bytes), ``folder.py`` and ``lending.py``.
``pump.py`` is the process that holds NIXL for either end.
"""

from dmabuf.remote.address import Certificates, certificates_from_environment, parse_url
from dmabuf.remote.client import Node, connect, open_url
from dmabuf.remote.file import RemoteFile
from dmabuf.remote.lending import Lending
from dmabuf.remote.replicas import ReplicaFile
from dmabuf.remote.server import Listener, serving
from dmabuf.remote.session import RemotePlan, RemoteTransfer
from dmabuf.store import Status

__all__ = [
    "Certificates",
    "Lending",
    "Listener",
    "Node",
    "RemoteFile",
    "RemotePlan",
    "RemoteTransfer",
    "ReplicaFile",
    "Status",
    "certificates_from_environment",
    "connect",
    "open_url",
    "parse_url",
    "serving",
]
