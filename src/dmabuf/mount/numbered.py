"""What the store is asked about one file: by its name, and for its number alone.

Other clients rename and replace what the mount has open, also between two requests.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from dmabuf.buffer import Buffer
from dmabuf.errors import os_error
from dmabuf.mount.node import Node
from dmabuf.store import Status, Store, as_trusted_as_may_be

T = TypeVar("T")


def found(store: Store, node: Node) -> Status | None:
    """What the store has under its number, whatever other clients call it now.

    None, and the file has no name any more, where others took it away.
    """
    name = node.name if node.stored else None
    while name is not None:
        with suppress(FileNotFoundError):
            status = store.stat(name)
            if status.number == node.number:
                node.name = name
                return status
        name = next((s.name for s in store.list() if s.number == node.number), None)
    if node.stored:
        node.name = None
    return None


def ask(store: Store, node: Node, request: Callable[..., T]) -> T | None:
    """Make a request, with its name and ``number``. None, and none was made, where it has none."""
    while (name := node.name) is not None and node.number is not None:
        try:
            return request(name, number=node.number)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        found(store, node)
    return None


def memory(store: Store, node: Node, mode: str) -> tuple[Buffer, Status]:
    """Its memory, and what the store says of it. Raises OSError(ESTALE) where it has no name."""

    def request(name: str, number: int) -> tuple[Buffer, Status]:
        one = partial(store.open_with_status, name, mode, number=number)
        return as_trusted_as_may_be(one)

    opened = ask(store, node, request)
    if opened is None:
        raise os_error(errno.ESTALE, "its name is gone", node.status.name)
    return opened
