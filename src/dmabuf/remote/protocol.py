"""The messages between a node and its clients; nothing here touches a socket.

Each end first sends `HELLO`. Then everything is messages: a header of two numbers, the bytes of
JSON and the bytes of data that follow. A message has one of the two::

    {"op": "read", "file": 1, "segments": [[0, 8388608]], ...}     a request
    8388608 bytes of data                                          as many messages as are needed
    {"nbytes": 8388608, "side": {...}}                             the reply
    {"error": {"kind": "OSError", "errno": 2, ...}}                or the reply to what failed
    {"wait": true}                                                 before a reply that takes long

The client sends data only after the reply {"go": true}, and the reply to the data follows. It may
send requests before it has read the replies; they are carried out one after the other.

With the engine nixl a request has the addresses of its data in the client's pump, which the node's
writes and reads by itself. Then {"moved": 8388608} comes for each part, and no data. After a reply
with {"broken": true} the client ends its pump, since bytes may be on their way to it.

After a reply with an error the connection is in order; after anything else that is unexpected it is
closed.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Mapping
from typing import TypeVar

from dmabuf.copying import CopySide
from dmabuf.errors import RouteUnavailable, ShortReadError, TransferError
from dmabuf.sizes import OFFSET_MAX
from dmabuf.transfer import Route, Terms

VERSION = 1
HELLO_START = b"dmabuf-remote/"
HELLO = (HELLO_START + str(VERSION).encode()).ljust(24) + b"\n"
"""What each end sends first. The version changes with every change that an older end would not
understand, and then nothing but equal versions work together."""

HEADER = struct.Struct("!II")
MOST_JSON = 4 << 20
MOST_DATA = 8 << 20
MOST_PAIRS = 1 << 16
"""The most segments in one request, and the most names."""
AUDITED = 4 << 20
"""The first bytes of a first transfer that are compared."""

Kind = TypeVar("Kind")
Word = TypeVar("Word", bound=str)


class Malformed(OSError):
    """A message that no node or client of this version sends; errno is EPROTO."""

    def __init__(self, what: str) -> None:
        text = f"the other end sent what this version does not understand: {what}"
        super().__init__(errno.EPROTO, text)


class Message:
    """A JSON object, whose fields are checked when they are used; raises Malformed."""

    def __init__(self, fields: dict[str, object]) -> None:
        self._fields = fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def get(self, key: str, kind: type[Kind]) -> Kind:
        """Return a value of a type of JSON."""
        value = self._fields.get(key)
        if type(value) is not kind:
            raise _invalid(key)
        return value

    def choice(self, key: str, *allowed: Word) -> Word:
        """Return one of the texts allowed."""
        value = self.get(key, str)
        for one in allowed:
            if value == one:
                return one
        raise _invalid(key)

    def number(self, key: str) -> int:
        """Return a size, an offset or another number from 0 to the largest file offset."""
        return _number(self.get(key, int))

    def maybe(self, key: str) -> int | None:
        """Return a number, or None where it is null."""
        return None if self.is_null(key) else self.number(key)

    def is_null(self, key: str) -> bool:
        """Return whether a field is null."""
        return key in self._fields and self._fields[key] is None

    def message(self, key: str) -> Message:
        """Return an object of its own."""
        return Message(self.get(key, dict))

    def pairs(self, key: str, kind: type[Kind]) -> list[tuple[Kind, int]]:
        """Return pairs of a value, an offset or a name, and a size."""
        value = self.get(key, list)
        if len(value) > MOST_PAIRS:
            raise Malformed(f"a message has more than {MOST_PAIRS} {key}")
        try:
            found = [(one, _number(size)) for one, size in value]
        except (TypeError, ValueError):
            raise _invalid(key) from None
        for one, _ in found:
            if type(one) is not kind:
                raise _invalid(key)
            if kind is int:
                _number(one)
        return found

    def numbers(self, key: str) -> list[int]:
        """Return numbers, such as addresses."""
        return [_number(one) for one in self.get(key, list)]

    def outcomes(self, key: str) -> list[int | Message]:
        """Return sizes, or messages in the place of those that failed."""
        return [Message(one) if type(one) is dict else _number(one) for one in self.get(key, list)]


def parse(raw: bytes | bytearray) -> Message:
    """Return the JSON object in a message."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Malformed("a message is not a JSON object")
    return Message(found)


def _invalid(key: str) -> Malformed:
    return Malformed(f"a message has no valid {key}")


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= OFFSET_MAX:
        raise Malformed(f"a message has the number {value!r:.40}")
    return value


def pack(**fields: object) -> bytes:
    """Return a message of JSON with its header."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    data = text.encode(errors="surrogatepass")  # names of files need not be UTF-8
    if len(data) > MOST_JSON:
        raise ValueError(f"a request of {len(data)} bytes: a message has at most {MOST_JSON}")
    return HEADER.pack(len(data), 0) + data


# -- terms and records


def terms_fields(terms: Terms) -> dict[str, object]:
    """Return the fields of a message that carry the caller's terms."""
    return {name: getattr(terms, name) for name in ("require", "route", "prefer", "sync")}


def parse_terms(message: Message) -> Terms:
    """Return the terms for the node's file."""
    fields = message.message("terms")
    return Terms(
        fields.choice("require", "zero-copy", "uncached", "any"),
        None if fields.is_null("route") else fields.choice("route", *Route),
        fields.choice("prefer", "zero-copy", "fastest"),
        audit="off",
        sync=fields.get("sync", bool),
    )


_SIDE = (
    "nbytes", "route", "reason", "registered", "requests", "reissues", "copied", "seconds",
)  # fmt: skip


def side_fields(side: CopySide) -> dict[str, object]:
    """Return the record of what the node's end did."""
    return {name: getattr(side, name) for name in _SIDE} | {"rejected": dict(side.rejected)}


def parse_side(message: Message) -> CopySide:
    """Return the record of what the node's end did."""
    fields = message.message("side")
    nbytes, route = fields.number("nbytes"), fields.choice("route", *Route)
    return CopySide(
        nbytes, route, fields.get("reason", str), parse_reasons(fields), {route: nbytes},
        fields.get("registered", bool), fields.number("requests"), fields.number("reissues"),
        fields.number("copied"), fields.get("seconds", float),
    )  # fmt: skip


def parse_reasons(message: Message) -> Mapping[Route, str]:
    """Return the reason against each route."""
    found = message.get("rejected", dict)
    if not found.keys() <= set(Route) or not all(type(why) is str for why in found.values()):
        raise _invalid("rejected")
    return {Route(route): why for route, why in found.items()}


# -- errors


def error_fields(error: BaseException, path: str) -> dict[str, object]:
    """Return the error of a request as fields of a reply; `path` is the client's name for it."""
    kind = "ValueError" if isinstance(error, ValueError) else "OSError"
    for known in (RouteUnavailable, ShortReadError):
        kind = known.__name__ if isinstance(error, known) else kind
    number = error.errno if isinstance(error, OSError) else None
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return {
        "kind": kind,
        "errno": errno.EIO if number is None or not 0 < number < 4096 else number,
        "text": text[:1000],
        "path": path,
        "nbytes": _count(error, "nbytes") or 0,
        "file_offset": _count(error, "file_offset"),
        "index": _count(error, "index"),
    }


def _count(error: BaseException, name: str) -> int | None:
    value = getattr(error, name, None)
    return value if type(value) is int and 0 <= value <= OFFSET_MAX else None


def parse_error(message: Message, node: str) -> Exception:
    """Return the exception of a reply, which names the node."""
    fields = message.message("error") if "error" in message else message
    kind, text = fields.get("kind", str), fields.get("text", str)
    number, nbytes = fields.number("errno"), fields.number("nbytes")
    path, at = f"dmabuf://{node}/{fields.get('path', str)}", fields.maybe("file_offset")
    if kind == "ValueError":
        return ValueError(text)
    if kind == "ShortReadError":
        return ShortReadError(text, fields.maybe("index"), nbytes)
    if kind == "RouteUnavailable":
        return RouteUnavailable(f"on the node: {text}", path)
    if nbytes or at is not None:
        return TransferError(number, text, path, nbytes=nbytes, file_offset=at)
    return OSError(number, text, path)


class Reported(Exception):
    """An error that the node reports; the connection is in order."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def checked(reply: Message, node: str) -> Message:
    """Return a reply, or raise the error that it carries as Reported."""
    if "error" in reply:
        raise Reported(parse_error(reply, node))
    return reply
