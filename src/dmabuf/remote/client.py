"""connect() and Node: what a program uses of another node."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from dmabuf.errors import Uncopyable, os_error
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.address import (
    Address,
    Certificates,
    Target,
    certificates_from_environment,
    needs_certificates,
    parse_address,
    parse_url,
    trusted_by_environment,
)
from dmabuf.remote.channel import Channel
from dmabuf.remote.file import RemoteFile
from dmabuf.remote.session import RemoteTransfer, Reported, Session, check_terms, mapped
from dmabuf.sizes import Size, parse_size
from dmabuf.store import Status, check_name
from dmabuf.transfer import Audit, Mode, Terms, terms_of

_BATCH = 128
"""Names in one request of fetch_many; two requests are under way.

So few that the kernel holds a request that the node does not read while it sends data: else both
ends would wait for each other."""

_open: weakref.WeakSet[Session] = weakref.WeakSet()


def _close_in_child() -> None:
    for session in list(_open):
        session.forget()


os.register_at_fork(after_in_child=_close_in_child)


def connect(
    address: str,
    *,
    engine: Literal["auto", "tcp"] = "auto",
    certificates: Certificates | None = None,
    trusted_network: bool = False,
    timeout: float = 30.0,
) -> Node:
    """Return a connection to a node, where ``dmabuf serve --listen ADDRESS`` runs.

    Beyond this machine, TLS with certificates at both ends is the rule. Without `certificates` and
    `trusted_network`, the environment decides: DMABUF_CERTIFICATE, DMABUF_KEY and DMABUF_AUTHORITY
    name the files of Certificates, or DMABUF_TRUSTED_NETWORK=1 does without.

    Args:
        address: "HOST:PORT", "[IPV6]:PORT" or "unix:PATH".
        engine: what moves the bytes; there is one, "tcp".
        certificates: use TLS with these; the node must have been started with its own.
        trusted_network: do without TLS beyond this machine: everyone on the way can read and change
            the bytes.
        timeout: the most seconds to wait for the connection, and without any progress in a request.

    Raises:
        OSError: ECONNREFUSED, no node listens there; EACCES, certificates are missing, or one end
            refuses the other's; EPROTO, the other end is not a node of this version; ETIMEDOUT;
            EHOSTUNREACH.
        ValueError: an invalid address, engine or timeout.
    """
    if engine not in ("auto", "tcp"):
        raise ValueError(f"invalid engine={engine!r}: use 'auto' or 'tcp'")
    if not 0 < timeout < 1e6:
        raise ValueError(f"invalid timeout={timeout!r}: use seconds above 0")
    where = parse_address(address)
    if certificates is not None and where.path is not None:
        raise ValueError(f"connect to {where}: a Unix socket takes no certificates; leave them out")
    channel = Channel(
        _connected(where, certificates, trusted_network, timeout), str(where), timeout
    )
    try:
        _greet(channel)
    except BaseException:
        channel.close()
        raise
    return Node(Session(channel))


def open_url(url: str, mode: Mode = "r") -> tuple[Node, RemoteFile]:
    """Open the file of a URL over a connection of its own; closing the Node closes both."""
    address, path = parse_url(url)
    node = connect(address)
    try:
        return node, node.open(path, mode)
    except BaseException:
        node.close()
        raise


def _connected(
    where: Address, certificates: Certificates | None, trusted: bool, timeout: float
) -> socket.socket:
    targets: Sequence[Target]
    if where.path is not None:
        targets = [(socket.AF_UNIX, where.path)]
    else:
        targets = where.resolve()
        beyond = any(needs_certificates(target) for _, target in targets)
        if certificates is None and not trusted and beyond:
            certificates = certificates_from_environment()
            if certificates is None and not trusted_by_environment():
                text = (
                    "connect: certificates are needed beyond this machine; pass certificates=, "
                    "or set DMABUF_CERTIFICATE"
                )
                raise os_error(errno.EACCES, text, str(where))
    context = None if certificates is None else certificates.context(server=False)
    for family, target in targets:
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.settimeout(timeout)
            made.connect(target)
            if context is not None:
                made = context.wrap_socket(made, server_hostname=where.host)
            return made
        except OSError as error:
            made.close()
            failure = _refused(error, where, timeout)
        except BaseException:
            made.close()
            raise
    raise failure


def _refused(error: OSError, where: Address, timeout: float) -> OSError:
    number, text = error.errno or errno.EIO, f"connect: {error.strerror or error}"
    if isinstance(error, ssl.SSLCertVerificationError):
        number, text = errno.EACCES, f"the node's certificate is refused: {error.verify_message}"
    elif isinstance(error, ssl.SSLError):
        number = errno.EPROTO
        text = f"TLS is not possible ({error.reason or error}); was the node given certificates?"
    elif isinstance(error, TimeoutError):
        number, text = errno.ETIMEDOUT, f"connect: no answer in {timeout:g} s"
    elif isinstance(error, ConnectionRefusedError | FileNotFoundError):
        text = "connect: no node listens there; start one: dmabuf serve --listen ADDRESS"
    return os_error(number, text, str(where))


def _greet(channel: Channel) -> None:
    """Exchange greetings. Raises OSError for anything but a node of this version."""
    try:
        hello = channel.greet()
    except ConnectionError as error:
        if channel.transport == "tls" and "ALERT" in str(error.strerror):
            text = f"the node refuses this certificate: {error.strerror}"
            raise os_error(errno.EACCES, text, channel.name) from None
        text = "the other end closed the connection at once; a node that wants certificates does so"
        raise os_error(errno.ECONNRESET, text, channel.name) from None
    if hello != protocol.HELLO:
        text = "the other end is not a node of dmabuf"
        if hello.startswith(protocol.HELLO_START):
            version = hello[len(protocol.HELLO_START) :].strip().decode("ascii", "replace")
            text = (
                f"the node has version {version} of the protocol, this end {protocol.VERSION}; "
                "install the same release of dmabuf"
            )
        raise os_error(errno.EPROTO, text, channel.name)


class Node(Uncopyable, instead="call dmabuf.remote.connect() again"):
    """A connection to another node, made by `connect`. A context manager.

    Names are those of the node's store (`dmabuf.store`), and belong there to the user who runs the
    server. Thread-safe: one request at a time; for more at once, connect several times.

    If the connection is lost, stalls or is interrupted within a request, the Node is closed. The
    error names the node. In the child of a fork it is closed, too.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        _open.add(session)

    @property
    def address(self) -> str:
        """The address that it is connected to."""
        return self._session.name

    @property
    def transport(self) -> str:
        """What carries the bytes: "tcp", "tls" or "unix"."""
        return self._session.transport

    @property
    def closed(self) -> bool:
        """Whether it was closed, or the connection is lost."""
        return self._session.closed

    def close(self) -> None:
        """Close the connection, and with it the files that were opened. Can be called again."""
        self._session.close()

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
                directory, EROFS if the node serves for reading only.
            ValueError: an unknown mode.
        """
        if mode not in ("r", "w", "r+", "x"):
            raise ValueError(f"invalid mode {mode!r}: use 'r', 'w', 'r+' or 'x'")
        return self._open(path, mode, mode)

    @contextmanager
    def replacing(self, path: str, *, sync: bool = False) -> Iterator[RemoteFile]:
        """Give a new file, open for reading and writing, for a path that it gets at the end.

        A regular file of that path is replaced, and its permissions are kept. After an exception,
        or the end of either program, it is as it was before, and the new file vanishes. (Where the
        node itself is killed, the new file is left behind, with a name that ends in ".part".)
        `sync` has the name on the medium when the block ends; `RemoteFile.flush` does the content.
        """
        with self._open(path, "replace", "r+") as file:
            yield file
            file.commit(sync=sync)

    def _open(self, path: str, how: str, mode: str) -> RemoteFile:
        path = os.fsdecode(path)
        reply = self._session.ask("open", path=path, mode=how)
        return RemoteFile(self._session, path, mode, reply.number("file"))

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
            timeout: seconds to wait for fences, and the most without any progress.

        Raises:
            OSError: ENOENT, there is no such name; ENOSPC, its content does not fit, and nothing
                was written; TransferError if the connection fails.
            IntegrityError: the checksum of the other end differs.
        """
        start = parse_size(buffer_offset, "buffer_offset")
        terms = terms_of("any", None, "zero-copy", timeout, True, audit)
        outcome = self._fetch([(name, start, None)], into, terms)[0]
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
        terms = terms_of("any", None, "zero-copy", timeout, True, audit)
        wanted = [
            (name, parse_size(offset, "buffer_offset"), parse_size(size))
            for name, offset, size in names
        ]
        return self._fetch(wanted, into, terms)

    def _fetch(
        self, wanted: Sequence[tuple[str, int, int | None]], into: Buffer, terms: Terms
    ) -> list[RemoteTransfer | OSError]:
        session = self._session
        check_terms(into, terms, session.transport, session.name)
        places = list[tuple[str, int, int]]()
        for name, start, size in wanted:
            room = max(into.size - start, 0) if size is None else size
            check_name(name)
            if start + room > into.size:
                text = f"fetch {name!r}: buffer_offset={start} size={room} leaves the buffer"
                raise ValueError(f"{text} of {into.size} bytes")
            places.append((name, start, room))
        if not places:
            return []
        limit = session.audit_limit(into, terms, "read", [place[1:] for place in places])
        head = 1 if terms.audit == "first" and limit else 0
        batches = [places[:head]] if head else []
        batches += [places[at : at + _BATCH] for at in range(head, len(places), _BATCH)]
        requests = [
            protocol.pack(
                op="fetch",
                names=[(name, room) for name, _, room in batch],
                checksum=limit if terms.audit == "always" or not index else 0,
            )
            for index, batch in enumerate(batches)
        ]
        outcomes: list[RemoteTransfer | OSError] = []
        first = min(start for _, start, _ in places)
        last = max(start + room for _, start, room in places)
        with (
            mapped(into, terms, "read", first, last - first) as view,
            session.exchange(terms.timeout) as channel,
        ):
            for request in requests[:2]:
                channel.send(request)
            for index, batch in enumerate(batches):
                audited = limit if terms.audit == "always" or not index else 0
                shifted = [(name, start - first, room) for name, start, room in batch]
                try:
                    outcomes += session.receive_names(channel, into, view, shifted, audited)
                except Reported:
                    if len(requests) > 1:  # whose replies are under way
                        channel.close()
                    raise
                for request in requests[index + 2 : index + 3]:
                    channel.send(request)
        return outcomes

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
        session, begun = self._session, time.perf_counter()
        terms = terms_of("any", None, "zero-copy", timeout, True, audit)
        check_terms(buffer, terms, session.transport, session.name)
        start = parse_size(buffer_offset, "buffer_offset")
        nbytes = max(buffer.size - start, 0) if size is None else parse_size(size)
        if not nbytes or start + nbytes > buffer.size:
            text = f"publish {name!r}: buffer_offset={start} size={nbytes}"
            raise ValueError(f"{text} is not a range with bytes of the buffer of {buffer.size}")
        if not 0 <= mode <= 0o777:
            raise ValueError(f"publish {name!r}: invalid mode {mode:#o}: use permission bits")
        limit = session.audit_limit(buffer, terms, "write", ())
        request = protocol.pack(
            op="publish",
            name=check_name(name),
            size=nbytes,
            mode=mode,
            replace=replace,
            checksum=limit,
        )
        place = [(0, nbytes)]
        with (
            mapped(buffer, terms, "write", start, nbytes) as view,
            session.exchange(terms.timeout) as channel,
        ):
            channel.send(request)
            reply = session.send(channel, view, place, name)
            return session.finish(reply, "write", buffer, view, place, limit, name, begun)

    def remove(self, name: str) -> None:
        """Remove a name from the node's store. Raises OSError, such as ENOENT."""
        self._session.ask("remove", name=check_name(name))

    def ls(self) -> list[Status]:
        """Return the status of every name of the node's store, sorted by name."""
        found: list[Status] = []
        while True:
            after = found[-1].name if found else ""
            page = self._session.ask("ls", after=after).records("names")
            if not page:
                return found
            found += [self._session.status(one) for one in page]
