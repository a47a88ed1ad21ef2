"""connect() and Node: what a program uses of another node."""

from __future__ import annotations

import errno
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from typing import Literal

from dmabuf.errors import Uncopyable, os_error
from dmabuf.memory import Buffer
from dmabuf.remote.address import Certificates, parse_url, trusted_by_environment
from dmabuf.remote.connecting import open_session
from dmabuf.remote.file import RemoteFile
from dmabuf.remote.names import fetch
from dmabuf.remote.replicas import open_replicas
from dmabuf.remote.session import RemoteTransfer, Session, check_terms
from dmabuf.sizes import Size
from dmabuf.store import Status, check_name
from dmabuf.transfer import Audit, Mode, Terms

log = logging.getLogger("dmabuf.remote")

_open: weakref.WeakSet[Session] = weakref.WeakSet()


def _close_in_child() -> None:
    for session in list(_open):
        session.forget()


os.register_at_fork(after_in_child=_close_in_child)


def connect(
    address: str | Sequence[str],
    *,
    engine: Literal["auto", "tcp", "nixl"] = "auto",
    certificates: Certificates | None = None,
    trusted_network: bool = False,
    timeout: float = 30.0,
) -> Node:
    """Return a connection to a node, where ``dmabuf serve --listen ADDRESS`` runs.

    Beyond this machine, TLS with certificates at both ends is the rule. Without `certificates` and
    `trusted_network`, the environment decides: DMABUF_CERTIFICATE, DMABUF_KEY and DMABUF_AUTHORITY
    name the files of Certificates, or DMABUF_TRUSTED_NETWORK=1 does without.

    Args:
        address: "HOST:PORT", "[IPV6]:PORT" or "unix:PATH". Or several addresses, of nodes that
            serve the same files: these are read from all of them, and nothing else is possible.
        engine: what moves the bytes: "tcp", the connection itself, or "nixl", by which UCX moves
            them between processes that hold the memory for both ends. "auto" is NIXL if both ends
            have it, start it within a third of `timeout`, and the network is trusted or RDMA;
            `Node.reason` says why not.
        certificates: use TLS with these; the node must have been started with its own.
        trusted_network: do without TLS beyond this machine: everyone on the way can read and change
            the bytes. NIXL over TCP needs it, also on this machine.
        timeout: the most seconds to wait for the connection and for a reply without data, and
            without any progress in a transfer.

    Raises:
        OSError: ECONNREFUSED, no node listens there; EACCES, certificates are missing, or one end
            refuses the other's; EPROTO, the other end is not a node of this version; ETIMEDOUT;
            EHOSTUNREACH. With engine="nixl" EOPNOTSUPP, one end has no NIXL, and EACCES, one end
            does not trust the network. Of several addresses the first one's, if none can be
            connected to.
        ValueError: an invalid address, engine or timeout.
    """
    if engine not in ("auto", "tcp", "nixl"):
        raise ValueError(f"invalid engine {engine!r}: use 'auto', 'tcp' or 'nixl'")
    if not 0 < timeout < 1e6:
        raise ValueError(f"invalid timeout {timeout!r}: use seconds above 0")
    addresses = [address] if isinstance(address, str) else list(dict.fromkeys(address))
    if not addresses:
        raise ValueError("connect: no address is given")
    sessions, failures = list[Session](), list[OSError]()
    with ExitStack() as stack:
        for one in addresses:
            try:
                made = open_session(one, certificates, trusted_network, timeout)
                stack.callback(made.close)
                if engine != "tcp":
                    trusted = trusted_network or trusted_by_environment()
                    made.use_nixl(trusted=trusted, required=engine == "nixl")
                sessions.append(made)
            except OSError as error:
                if len(addresses) > 1:
                    log.warning("%s: not used: %s", one, error)
                failures.append(error)
        if not sessions:
            raise failures[0]
        stack.pop_all()
    return Node(sessions, several=len(addresses) > 1)


def open_url(url: str, mode: Mode = "r") -> tuple[Node, RemoteFile]:
    """Open the file of a URL over a connection of its own; closing the Node closes both."""
    addresses, path = parse_url(url)
    node = connect(addresses)
    try:
        return node, node.open(path, mode)
    except BaseException:
        node.close()
        raise


class Node(Uncopyable, instead="call dmabuf.remote.connect() again"):
    """A connection to another node, made by `connect`. A context manager.

    Names are those of the node's store (`dmabuf.store`), and belong there to the user who runs the
    server. Thread-safe: one request at a time; for more at once, connect several times.

    If the connection is lost, stalls or is interrupted within a request, the Node is closed. The
    error names the node. In the child of a fork it is closed, too.

    A Node of several addresses only opens files, for reading: see `ReplicaFile`.
    """

    def __init__(self, sessions: Sequence[Session], *, several: bool) -> None:
        self._sessions, self._several = sessions, several
        _open.update(sessions)

    @property
    def _session(self) -> Session:
        if self._several:
            text = "several nodes are only read from; connect to one of them for this"
            raise os_error(errno.EOPNOTSUPP, text, self.address)
        return self._sessions[0]

    @property
    def address(self) -> str:
        """The address that it is connected to; of several, those with a comma between them."""
        return ",".join(one.name for one in self._sessions)

    @property
    def transport(self) -> str:
        """What carries the bytes: "tcp", "tls" or "unix"; by NIXL "ucx_tcp" or "rc_verbs"."""
        return self._sessions[0].engine.transport

    @property
    def reason(self) -> str:
        """A sentence: why NIXL is used, or why it is not."""
        return self._sessions[0].engine.why

    @property
    def closed(self) -> bool:
        """Whether it was closed, or the connection is lost; of several, every one."""
        return all(one.closed for one in self._sessions)

    def close(self) -> None:
        """Close the connection, and with it the files that were opened. Can be called again."""
        for one in self._sessions:
            one.close()

    def revoke(self, buffer: Buffer) -> None:
        """Take a buffer's memory from the node.

        With the engine nixl the node can reach all of a Buffer from its first transfer on: until
        this, the end of the Buffer, or that of the connection.
        """
        for one in self._sessions:
            one.revoke(buffer)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.transport
        return f"<dmabuf.remote.Node {self.address!r} {state}>"

    # -- files

    def open(self, path: str, mode: Mode = "r") -> RemoteFile:
        """Open a regular file below the directory that the node serves.

        Args:
            path: relative to that directory; it must not lead out of it.
            mode: as for `dmabuf.open`: "r", "w", "r+" or "x".

        Raises:
            OSError: that of the node, such as ENOENT; EACCES for a path that leads out of the
                directory, EROFS if the node serves for reading only. ESTALE if the files of several
                nodes differ.
            ValueError: an unknown mode.
        """
        if mode not in ("r", "w", "r+", "x"):
            raise ValueError(f"invalid mode {mode!r}: use 'r', 'w', 'r+' or 'x'")
        path = os.fsdecode(path)
        if self._several and mode == "r":
            calls = [partial(_open_at, one, path, mode, mode) for one in self._sessions]
            return open_replicas(calls, path)
        return _open_at(self._session, path, mode, mode)

    @contextmanager
    def replacing(self, path: str, *, sync: bool = False) -> Iterator[RemoteFile]:
        """Give a new file, open for reading and writing, for a path that it gets at the end.

        A regular file of that path is replaced, and its permissions are kept. After an exception,
        or the end of either program, it is as it was before, and the new file vanishes. (Where the
        node itself is killed, the new file is left behind, with a name that ends in ".part".)
        `sync` has the name on the medium when the block ends; `RemoteFile.flush` does the content.
        """
        with _open_at(self._session, os.fsdecode(path), "replace", "r+") as file:
            yield file
            file.commit(sync=sync)

    # -- names of the node's store

    def fetch(
        self,
        name: str,
        into: Buffer,
        *,
        buffer_offset: Size = 0,
        audit: Audit = "first",
        timeout: float | None = None,
    ) -> RemoteTransfer:
        """Copy the content of a name of the node's store into a buffer.

        Args:
            name: the name.
            into: the destination; what lies outside the content keeps its bytes.
            buffer_offset: where in the buffer, in bytes.
            audit: as for RemoteFile: "first", "always" or "off".
            timeout: the most seconds to wait for fences, and that the request may take.

        Raises:
            OSError: ENOENT, there is no such name; ENOSPC, its content does not fit, and nothing
                was written; TransferError if the connection fails.
            IntegrityError: the checksum of the other end differs.
        """
        terms = Terms(timeout=timeout, audit=audit)
        [outcome] = fetch(self._session, [(name, buffer_offset, None)], into, terms)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    def fetch_many(
        self,
        names: Iterable[tuple[str, Size, Size]],
        into: Buffer,
        *,
        audit: Audit = "first",
        timeout: float | None = None,
    ) -> list[RemoteTransfer | OSError]:
        """Copy the contents of many names into a buffer; the next requests are always under way.

        Args:
            names: for each the name, the offset in the buffer, and the bytes of room there.
            into: the destination.
            audit: as for `fetch`.
            timeout: as for `fetch`.

        Returns:
            For each, in the order of `names`, its record, or the OSError of the node.

        Raises:
            TransferError: the connection failed.
            ValueError: a range outside the buffer; nothing was requested.
        """
        return fetch(self._session, names, into, Terms(timeout=timeout, audit=audit))

    def publish(
        self,
        name: str,
        buffer: Buffer,
        size: Size | None = None,
        *,
        buffer_offset: Size = 0,
        replace: bool = True,
        mode: int = 0o600,
        audit: Audit = "first",
        timeout: float | None = None,
    ) -> RemoteTransfer:
        """Copy a range of a buffer into the node's store, and give it a name when it is whole.

        Args:
            name: the name; its owner is the user who runs the server.
            buffer: the source.
            size: bytes; by default all of the buffer from `buffer_offset` on.
            buffer_offset: where in the buffer, in bytes.
            replace: whether a buffer of that name is replaced.
            mode: of the name, as for `Store.create`.
            audit: as for `fetch`.
            timeout: as for `fetch`.

        Raises:
            OSError: ENOSPC, the store is full, and nothing was sent; FileExistsError without
                `replace`; EROFS if the node serves for reading only; TransferError if the
                connection fails, and then there is no name.
            ValueError: no bytes, or a range outside the buffer.
        """
        session, terms = self._session, Terms(timeout=timeout, audit=audit)
        check_terms(buffer, terms, session.engine, session.name)
        start, nbytes = buffer.check_range(buffer_offset, size)
        if not nbytes:
            raise ValueError(f"publish {name!r}: there are no bytes; use at least one")
        if not 0 <= mode <= 0o777:
            raise ValueError(f"publish {name!r}: invalid mode {mode:#o}: use permission bits")
        request = {
            "op": "publish",
            "name": check_name(name),
            "size": nbytes,
            "mode": mode,
            "replace": replace,
        }
        return session.move("write", buffer, [(start, nbytes)], name, terms, request)

    def remove(self, name: str) -> None:
        """Remove a name from the node's store. Raises OSError, such as ENOENT."""
        self._session.ask("remove", name=check_name(name))

    def ls(self) -> list[Status]:
        """Return the status of every name of the node's store, sorted by name."""
        found: list[Status] = []
        while True:
            after = found[-1].name if found else ""
            page = self._session.ask("ls", after=after).get("names", list)
            if not page:
                return found
            found += [_status(one, self.address) for one in page]


_KINDS: dict[str, type] = {"str": str, "int": int, "bool": bool}


def _status(record: object, node: str) -> Status:
    """Return the status of a name. Raises OSError(EPROTO) if it is invalid."""
    kinds = {field.name: _KINDS.get(str(field.type), type(None)) for field in fields(Status)}
    if not isinstance(record, dict) or kinds != {
        name: type(value) for name, value in record.items()
    }:
        raise os_error(errno.EPROTO, "the node sent an invalid status", node)
    return Status(**record)


def _open_at(session: Session, path: str, how: str, mode: str) -> RemoteFile:
    reply = session.ask("open", path=path, mode=how)
    return RemoteFile(session, path, mode, reply.number("file"))
