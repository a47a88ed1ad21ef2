"""The directory and what is done to its files, in terms of the store: no FUSE in here."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from dmabuf.errors import os_error
from dmabuf.mount import numbered
from dmabuf.mount.connections import Connections
from dmabuf.mount.content import Growing, copy
from dmabuf.mount.node import Attributes, Node
from dmabuf.sizes import format_size
from dmabuf.store import Status, Store, Usage
from dmabuf.store.protocol import SAME

_ATTRIBUTES: dict[str, Callable[[Status], object]] = {
    "user.dmabuf.exporter": lambda status: status.exporter,
    "user.dmabuf.in_use": lambda status: "yes" if status.in_use else "no",
    "user.dmabuf.is_dmabuf": lambda status: "yes" if status.is_dmabuf else "no",
    "user.dmabuf.reason": lambda status: status.reason,
    "user.dmabuf.size": lambda status: status.size,
    "user.dmabuf.slabs": lambda status: status.slabs,
}

_LATEST_NS = 2**63 - 1  # in the year 2262


class Files:
    """The files of a store, for one mount. Not thread-safe but for what says so.

    Every method raises OSErrors, ConnectionError where the store is gone among them; the next call
    tries to reach it again.
    """

    def __init__(self, path: str) -> None:
        self._stores = Connections(path, self._lost)
        self._nodes: dict[int, Node] = {}  # by inode number
        self._numbered: dict[int, Node] = {}  # by the store's number
        self._coming: dict[str, Node] = {}  # names that the store does not have yet
        self._inodes = itertools.count(2)  # 1 is the directory

    def _lost(self) -> None:
        """The store has ended. One that comes after it knows nothing of what there was."""
        for node in list(self._numbered.values()):
            node.name = None
        self._numbered.clear()

    def close(self) -> None:
        """Give the store what was written so far, and let go of everything."""
        for node in list(self._nodes.values()):
            with suppress(OSError):
                self.settle(node)
            if node.growing is not None:
                with suppress(OSError):
                    node.growing.discard()
            if node.buffer is not None:
                node.buffer.close()
        self._stores.close()

    # Names.

    def lookup(self, name: str) -> Node:
        """The file of a name."""
        node = self._coming.get(name)
        if node is not None:
            return node
        with self._stores.asking() as store:
            return self._known(store.stat(name))

    def listing(self) -> list[tuple[str, Node]]:
        """Every name and its file."""
        names = dict(self._coming)
        with self._stores.asking() as store:
            found = store.list()
        names.update((s.name, self._known(s)) for s in found if s.name not in names)
        return sorted(names.items())

    def _known(self, status: Status) -> Node:
        node = self._numbered.get(status.number)
        if node is None:
            node = Node(next(self._inodes), status.name, status.number, status)
            self._nodes[node.ino] = self._numbered[status.number] = node
        if not node.aside:
            node.name = status.name
            node.refresh(status)
        return node

    def node(self, ino: int) -> Node:
        """The file that the kernel calls by this number."""
        return self._nodes[ino]

    def forget(self, ino: int, lookups: int) -> None:
        """The kernel has forgotten as many lookups."""
        node = self._nodes.get(ino)
        if node is not None:
            node.lookups -= lookups
            self.drop_if_unknown(node)

    def drop_if_unknown(self, node: Node) -> None:
        """Forget a file that nobody knows of."""
        if node.lookups <= 0 and not node.handles and node.growing is None:
            self._nodes.pop(node.ino, None)
            if node.number is not None and self._numbered.get(node.number) is node:
                del self._numbered[node.number]

    def create(self, name: str, mode: int, uid: int, gid: int) -> Node:
        """A new file, which takes no memory yet; the store gets to know it by :meth:`settle`."""
        with self._stores.asking() as store:
            try:
                store.stat(name)
            except FileNotFoundError:
                pass
            else:
                raise os_error(errno.EEXIST, "there is a buffer of that name", name)
            usage = store.usage(settle=False)
        if name in self._coming:
            raise os_error(errno.EEXIST, "there is a file of that name", name)
        if usage.names + len(self._coming) >= usage.max_names:
            raise os_error(errno.ENOSPC, f"the store takes no more than {usage.max_names} names")
        now = time.time_ns()
        status = Status(name, 0, 0, mode & 0o777, uid, gid, now, now, "", "", 0, False, 0, now, now,
                        False)  # fmt: skip
        node = Node(next(self._inodes), name, None, status)
        node.growing = self._new_content(node)
        node.modified_ns = now
        self._nodes[node.ino] = self._coming[name] = node
        return node

    def _new_content(self, node: Node) -> Growing:
        return Growing(self._stores.get("memory"), node.status.mode)

    def coming(self, name: str) -> Node | None:
        """The file of a name that the store does not have yet, if it is one."""
        return self._coming.get(name)

    def unlink(self, name: str, uid: int) -> None:
        """Have a user take a name away; who has the file open keeps it."""
        node = self._coming.get(name)
        if node is not None:
            _check_owner(node.status, uid)
            del self._coming[name]
            node.name = None
            self.drop_if_unknown(node)
            return
        with self._stores.asking() as store:
            status = store.stat(name)
            _check_owner(status, uid)
            store.remove(name, number=status.number)
        self._lost_name(status.number)

    def _lost_name(self, number: int) -> None:
        node = self._numbered.get(number)
        if node is not None:
            node.name = None
            self.drop_if_unknown(node)

    def rename(self, old: str, new: str, uid: int, *, replace: bool) -> None:
        """Have a user give a file another name, and replace what has it.

        The store has to have both.
        """
        node = self.lookup(old)
        _check_owner(node.status, uid)
        if old == new:
            return
        with self._stores.asking() as store:
            replaced = None
            with suppress(FileNotFoundError):
                there = store.stat(new)
                if replace:
                    _check_owner(there, uid)
                    replaced = there.number
            try:
                store.rename(old, new, replace=replaced or False, number=node.number)
            except FileExistsError:
                if not replace:
                    raise
                raise os_error(errno.ESTALE, "another client took it meanwhile", new) from None
        if replaced is not None:
            self._lost_name(replaced)
        node.name = new

    # A file.

    def attributes(self, node: Node) -> Attributes:
        """What stat(2) tells of it."""
        self._look(node)
        return node.attributes()

    def _look(self, node: Node) -> None:
        """Ask the store about it, if it is there."""
        if not node.stored or node.aside:
            return
        with self._stores.asking() as store:
            status = numbered.found(store, node)
        if status is not None:
            node.refresh(status)
        elif not node.handles:
            raise os_error(errno.ESTALE, "its name is gone", node.status.name)

    def chmod(self, node: Node, mode: int) -> None:
        """Change who may open it."""
        if node.stored:
            with self._stores.asking() as store:
                numbered.ask(store, node, partial(store.chmod, mode=mode & 0o777))
        node.status = node.status._replace(mode=mode & 0o777)

    def chown(self, node: Node, uid: int, gid: int) -> None:
        """Change its owner and group."""
        if node.stored:
            with self._stores.asking() as store:
                numbered.ask(store, node, partial(store.chown, uid=uid, gid=gid))
        node.status = node.status._replace(uid=uid, gid=gid)

    def utime(self, node: Node, accessed_ns: int | None, modified_ns: int | None) -> None:
        """Set its times, each left as it is for None."""
        if accessed_ns is not None:
            node.accessed_ns = min(max(accessed_ns, 0), _LATEST_NS)
        if modified_ns is not None:
            node.modified_ns = min(max(modified_ns, 0), _LATEST_NS)
        if node.growing is None:
            self._tell(node)

    def extended(self, node: Node) -> dict[str, bytes]:
        """The extended attributes, in so far as the store knows it."""
        self._look(node)
        if node.number is None:
            return {}
        return {name: str(tell(node.status)).encode() for name, tell in _ATTRIBUTES.items()}

    def usage(self) -> Usage:
        """How full the store is."""
        with self._stores.asking() as store:
            return store.usage(settle=False)

    # Its bytes.

    def open(self, node: Node, *, write: bool) -> None:
        """Have its memory here. One :meth:`release` belongs to each."""
        if node.growing is None and (node.buffer is None or (write and not node.buffer.writable())):
            with self._stores.asking() as store:
                buffer, status = numbered.memory(store, node, "r+" if write else "r")
            node.refresh(status)
            if node.buffer is not None:
                node.buffer.close()
            node.buffer = buffer
        node.handles += 1

    def release(self, node: Node) -> None:
        """One that had it open is done."""
        node.handles -= 1
        if node.handles:
            return
        if node.buffer is not None:
            node.buffer.close()
            node.buffer = None
        self.drop_if_unknown(node)

    def leave(self, node: Node) -> None:
        """Its last descriptor goes: the store gets its content, or it keeps what it had.

        May take long; from any thread. The last close(2) was told of what did not fit.
        """
        with suppress(OSError):
            self.settle(node)
        if node.growing is not None:
            node.growing.discard()
            node.growing = node.modified_ns = None
            node.length = node.status.length
            if node.number is None and node.name is not None:
                self._coming.pop(node.name, None)
                node.name = None

    def wrote(self, node: Node) -> None:
        """Its content has changed now."""
        node.modified_ns = time.time_ns()

    def make_room(self, node: Node, end: int) -> None:
        """Have room for bytes up to ``end``. May take long; from any thread.

        Raises OSError: EBUSY while others have its memory, ENOSPC for more than the store takes.
        """
        if node.fits(end):
            return
        if node.growing is None:
            self._begin_growing(node, keep=True)
        assert node.growing is not None
        with (
            self._held_by(node, node.growing),
            _explaining(node, f"it cannot grow to {format_size(end)}"),
        ):
            node.growing.reserve(end)

    def _begin_growing(self, node: Node, *, keep: bool) -> None:
        if self._others_have(node):
            raise os_error(
                errno.EBUSY,
                f"others have its {format_size(node.status.size)} of memory, which they would not "
                "share any more if it got other memory: it grows when they have let go of it",
                node.name,
            )
        store, mode, buffer = self._stores.get("memory"), node.status.mode, node.memory()
        if keep:
            node.growing = Growing(store, mode, buffer, node.length)
        else:
            node.growing = Growing(store, mode)
            buffer.close()
        node.buffer = None

    def _others_have(self, node: Node) -> bool:
        """Whether anyone but this mount has its memory: told while the mount has it not."""
        buffer = node.memory()
        if not node.stored:
            return False
        with self._stores.asking() as store:
            if numbered.found(store, node) is None:
                return False
            buffer.close()
            node.buffer = None
            status = numbered.found(store, node)
            node.buffer, _ = numbered.memory(store, node, "r+")
        return status is None or bool(status.in_use)

    def resize(self, node: Node, length: int) -> None:
        """Cut its content short, or lengthen it with zeros. May take long; from any thread."""
        if length == 0 and node.growing is None and node.size and node.name is not None:
            with suppress(OSError):  # where others have it, the memory stays
                self._begin_growing(node, keep=False)
        self.make_room(node, length)
        if node.growing is not None:
            node.growing.resize(length)
            if length:  # its length is known now, and so others can have it
                self.wrote(node)
                self.settle(node)
        else:
            node.lengthen(length)
            node.length = length
        self.wrote(node)

    def settle_if_whole(self, node: Node) -> None:
        """Give the store what it has to know of a file that nobody has open for writing now."""
        if node.handles == 1:
            self.settle(node)
        else:
            self._tell(node)

    def settle(self, node: Node) -> None:
        """Give the store what it has to know. May take long; from any thread."""
        if node.growing is not None:
            with self._held_by(node, node.growing) as store:
                if node.name is not None:
                    self._seal(store, node, node.growing)
        self._tell(node)

    @contextmanager
    def _held_by(self, node: Node, growing: Growing) -> Iterator[Store]:
        """The connection that growing content has its memory by. Raises OSError(EIO) if it ended.

        Its store let go of the name and the memory then, and the next store does not know them.
        """
        with self._stores.asking("memory") as store:
            if not growing.of(store):
                text = "the store that had it is gone"
                raise os_error(errno.EIO, text, node.name or node.status.name)
            yield store

    def _seal(self, store: Store, node: Node, growing: Growing) -> None:
        """Growing content becomes one buffer, under the name of the file."""
        length = growing.length
        with _explaining(node, f"it cannot become one buffer of {format_size(length)}"):
            whole = growing.whole()
        growing.become(whole)
        memory, new = whole, node.number is None
        status: Status | None
        if new:
            assert node.name is not None
            status = store.link(whole, node.name, replace=False, length=length)
        else:
            try:
                status = numbered.ask(store, node, partial(store.swap, whole, length=length))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                # Others came to have its memory meanwhile.
                memory, status = numbered.memory(store, node, "r+")
                if length > memory.size:
                    memory.close()
                    raise
                copy(whole, memory, 0, length, 0)
        if status is None:
            return
        wanted = node.status if new else status
        # In this order, since the loop looks at the file meanwhile.
        node.number, node.length, node.buffer = status.number, length, memory
        node.status = status._replace(mode=wanted.mode, uid=wanted.uid, gid=wanted.gid)
        self._numbered[status.number] = node
        node.growing = None
        if new:
            self._coming.pop(status.name, None)
        if memory is not whole:
            growing.discard()
        if not node.handles:
            node.buffer = None
            memory.close()
        if status.mode != wanted.mode:
            numbered.ask(store, node, partial(store.chmod, mode=wanted.mode))
        if (status.uid, status.gid) != (wanted.uid, wanted.gid):
            numbered.ask(store, node, partial(store.chown, uid=wanted.uid, gid=wanted.gid))

    def _tell(self, node: Node) -> None:
        cut = node.length != node.status.length
        accessed, modified = node.accessed_ns, node.modified_ns
        if not node.stored or (cut, accessed, modified) == (False, None, None):
            return
        with self._stores.asking() as store:
            if cut:
                numbered.ask(store, node, partial(store.truncate, length=node.length))
            utime = partial(
                store.utime,
                accessed_ns=SAME if accessed is None else accessed,
                modified_ns=SAME if modified is None else modified,
            )
            numbered.ask(store, node, utime)
            status = numbered.found(store, node)
        if status is not None:
            node.accessed_ns = node.modified_ns = None
            node.refresh(status)


@contextmanager
def _explaining(node: Node, what: str) -> Iterator[None]:
    """Errors that say which file it is about, and what it cannot have."""
    try:
        yield
    except OSError as error:
        text = f"{what}: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, node.name) from None


def _check_owner(status: Status, uid: int) -> None:
    """As the kernel did, of what had the name then (a sticky directory: inode(7))."""
    if uid not in (0, status.uid):
        raise os_error(errno.EPERM, "is another user's", status.name)
