"""The messages between a client of the store and its server.

The socket is AF_UNIX SOCK_SEQPACKET: the kernel keeps messages apart and delivers descriptors
(SCM_RIGHTS) with the message they belong to. A message is one JSON object in UTF-8, at most 4 KiB
for a request and 32 KiB for a reply::

    {"op": "open", "name": "frames", "number": null, "mode": "r+", "trusted": false}
    {"result": {...}}    with the descriptors of a grant, if it is one
    {"error": [2, "there is no such buffer", "frames"]}

A ``load`` comes with the descriptor of the file, which the client has opened for reading.

A client sends one request at a time and reads the reply before it sends the next. A request with a
``number`` (Status.number, or null) fails with ESTALE if the name now belongs to another buffer.

The functions here touch no socket, and raise nothing but :class:`Refusal` for any input.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, TypeVar

REQUEST_BYTES = 4096
REPLY_BYTES = 32768
MOST_DESCRIPTORS = 253
"""The most descriptors in one message: SCM_MAX_FD in include/net/scm.h."""
NAME_BYTES = 255
UNCHANGED = -1
"""The value that leaves an owner, a group or a time as it is, as in chown(2)."""

_NOT_A_STORE = "the peer is not a dmabuf store, or one of another version"
_ID_MAX = 2**32 - 2  # 2**32 - 1 is chown(2)'s "leave it"
_SIZE_MAX = 2**62

Record = TypeVar("Record")


class Refusal(Exception):
    """An error that the other side reports: an errno, a sentence, and the name it is about."""

    def __init__(self, number: int, text: str, name: str | None = None) -> None:
        super().__init__(number, text, name)
        self.errno, self.text, self.name = number, text, name


class Request(NamedTuple):
    """A well-formed request: its operation, and all fields of that operation."""

    op: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Status:
    """The record of one name in the store.

    ``size`` is the memory in bytes, whole pages; ``length`` is the number of bytes of content.
    ``mode`` holds the nine permission bits. ``number`` identifies the buffer: no other buffer ever
    gets it, and a restart keeps it. The times are in nanoseconds since 1970: ``created_ns`` and
    ``changed_ns`` of the name, ``modified_ns`` and ``accessed_ns`` of the content; the server does
    not see writes to the memory itself. ``slabs`` counts the dma-bufs. ``cached`` is whether the
    content is final and the store may drop the buffer while nobody uses it (Store.link);
    ``accessed_ns`` is its last use then. ``in_use`` is True if anyone besides the server has a
    descriptor, a mapping or an attachment of the memory; None if the kernel cannot tell, and in the
    results of calls that do not ask the kernel.
    """

    name: str
    size: int
    length: int
    mode: int
    uid: int
    gid: int
    created_ns: int
    changed_ns: int
    modified_ns: int
    accessed_ns: int
    exporter: str
    reason: str
    slabs: int
    is_dmabuf: bool
    number: int
    cached: bool
    in_use: bool | None


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a store is."""

    charged: int
    """Bytes held."""
    max_memory: int
    """The most bytes that it holds."""
    names: int
    max_names: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What the descriptors of a reply are: first the slabs, then the memfd if ``memfd`` is True.

    ``kind`` is "dma-buf", or "memfd" where the only descriptor is the memory file. ``unnamed``
    identifies memory that was created without a name, on this connection; otherwise it is None.
    """

    kind: str
    slabs: int
    memfd: bool
    writable: bool
    unnamed: int | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """How the server read a file natively: the fields of a Transfer with the same names."""

    reason: str
    registered: bool
    registration: str
    requests: int
    reissues: int
    copied: int
    audited: str


def check_name(name: object) -> str:
    """Return a valid name.

    Raises Refusal: EINVAL, or ENAMETOOLONG above 255 bytes of UTF-8.
    """
    if not isinstance(name, str):
        raise Refusal(errno.EINVAL, "invalid name: use text")
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise Refusal(errno.EINVAL, "invalid name: use UTF-8", name) from None
    if length > NAME_BYTES:
        raise Refusal(errno.ENAMETOOLONG, f"invalid name: use at most {NAME_BYTES} bytes", name)
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        text = 'invalid name: use printable characters without "/", and not "." or ".."'
        raise Refusal(errno.EINVAL, text, name)
    return name


class Check(NamedTuple):
    """What the value of a field must be."""

    good: Callable[[object], bool]
    wanted: str


def _integer(least: int, most: int, shown: Callable[[int], str] = str) -> Check:
    wanted = f"an integer from {shown(least)} to {shown(most)}"
    return Check(lambda value: type(value) is int and least <= value <= most, wanted)


def _text(most: int) -> Check:
    wanted = f"text of at most {most} characters"
    return Check(lambda value: type(value) is str and len(value) <= most, wanted)


def _one_of(*values: object) -> Check:
    def good(value: object) -> bool:
        return any(value is one or (value == one and type(value) is str) for one in values)

    return Check(good, " or ".join(map(repr, values)))


def _either(*checks: Check) -> Check:
    wanted = " or ".join(check.wanted for check in checks)
    return Check(lambda value: any(check.good(value) for check in checks), wanted)


def _is_name(value: object) -> bool:
    check_name(value)
    return True


_NAME = Check(_is_name, "a name")
_NONE = _one_of(None)
_FLAG = _one_of(True, False)
_ID = _integer(UNCHANGED, _ID_MAX)
_NS = _integer(UNCHANGED, 2**63 - 1)
_LENGTH = _integer(0, _SIZE_MAX)
_NUMBER = _integer(1, _SIZE_MAX)
_MAYBE_NUMBER = _either(_NONE, _NUMBER)
_MODE = _integer(0, 0o777, oct)
_CREATE: dict[str, Check] = {
    "name": _either(_NONE, _NAME),
    "size": _integer(1, _SIZE_MAX),
    "mode": _MODE,
    "exporter": _text(64),
    "huge_pages": _either(_FLAG, _NUMBER),
    "trusted": _FLAG,
}
OPERATIONS: dict[str, dict[str, Check]] = {
    "create": _CREATE,
    "load": {**_CREATE, "file_offset": _LENGTH},
    "link": {
        "unnamed": _NUMBER,
        "name": _NAME,
        "replace": _either(_FLAG, _NUMBER),
        "length": _either(_NONE, _LENGTH),
        "cached": _FLAG,
    },
    "discard": {"unnamed": _NUMBER},
    "reserve": {"name": _NAME},
    "open": {
        "name": _NAME,
        "number": _MAYBE_NUMBER,
        "mode": _one_of("r", "r+"),
        "trusted": _one_of(True, False, None),
    },
    "stat": {"name": _NAME},
    "list": {"after": _text(NAME_BYTES)},
    "remove": {"name": _NAME, "number": _MAYBE_NUMBER},
    "rename": {
        "name": _NAME,
        "number": _MAYBE_NUMBER,
        "to": _NAME,
        "replace": _either(_FLAG, _NUMBER),
    },
    "truncate": {"name": _NAME, "number": _MAYBE_NUMBER, "length": _LENGTH},
    "chmod": {"name": _NAME, "number": _MAYBE_NUMBER, "mode": _MODE},
    "chown": {"name": _NAME, "number": _MAYBE_NUMBER, "uid": _ID, "gid": _ID},
    "utime": {"name": _NAME, "number": _MAYBE_NUMBER, "accessed_ns": _NS, "modified_ns": _NS},
    "usage": {},
    "hand_over": {},
}
"""Each operation with its fields, and the check of each field's value."""
REPEATABLE = {"open", "stat", "list", "truncate", "chmod", "chown", "utime", "usage", "reserve"}
"""Operations that may be carried out twice."""


def parse_request(data: bytes) -> Request:
    """Return the request in a message.

    Raises Refusal: EPROTO for what is not a request, EINVAL for an invalid field.
    """
    message = _object(data, REQUEST_BYTES)
    op = message.pop("op", None)
    known = OPERATIONS.get(op) if isinstance(op, str) else None
    if known is None:
        raise Refusal(errno.EPROTO, "unknown operation")
    if message.keys() != known.keys():
        raise Refusal(errno.EPROTO, f"{op}: the fields are {', '.join(known)}")
    for field, check in known.items():
        value = message[field]
        if not check.good(value):
            if isinstance(value, str):
                value = value[:40]
            plain = value is None or isinstance(value, (int, str))
            shown = repr(value)[:60] if plain else type(value).__name__
            raise Refusal(errno.EINVAL, f"{op}: invalid {field} {shown}: use {check.wanted}")
    return Request(str(op), message)


def pack_request(op: str, **fields: object) -> bytes:
    """Return a request as bytes. Raises the Refusal that the server would answer."""
    if isinstance(fields.get("name"), str):
        check_name(fields["name"])
    data = _dump({"op": op, **fields})
    parse_request(data)
    return data


def pack_result(**result: object) -> bytes:
    """Return the reply to a request that succeeded; records become JSON objects."""
    return _dump({"result": {key: _plain(value) for key, value in result.items()}})


def pack_listing(statuses: Iterable[Status]) -> bytes:
    """Return a reply with as many records as fit."""
    parts: list[bytes] = []
    room = REPLY_BYTES - 64
    for status in statuses:
        part = _dump(asdict(status))
        room -= len(part) + 1
        if room < 0:
            break
        parts.append(part)
    return b'{"result":{"names":[' + b",".join(parts) + b"]}}"


def pack_error(refusal: Refusal) -> bytes:
    """Return the reply to a request that failed."""
    return _dump({"error": [refusal.errno, refusal.text[:1024], refusal.name]})


def parse_reply(data: bytes) -> dict[str, Any]:
    """Return the result in a reply. Raises the Refusal it carries, or EPROTO if it is invalid."""
    match _object(data, REPLY_BYTES):
        case {"result": dict(result), **rest} if not rest:
            return result
        case {"error": [int(number), str(text), None | str() as name], **rest} if not rest:
            raise Refusal(number, text, name)
    raise Refusal(errno.EPROTO, _NOT_A_STORE)


_TYPES: dict[object, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "bool | None": (bool, type(None)),
}


def parse_record(kind: type[Record], value: object) -> Record:
    """Return a record (Status, Usage, Grant or Loaded) from a reply. Raises Refusal(EPROTO)."""
    known = {field.name: _TYPES[field.type] for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(value, dict) or value.keys() != known.keys():
        raise Refusal(errno.EPROTO, _NOT_A_STORE)
    if any(type(value[name]) not in types for name, types in known.items()):
        raise Refusal(errno.EPROTO, _NOT_A_STORE)
    return kind(**value)


def _plain(value: object) -> object:
    return asdict(value) if isinstance(value, (Status, Usage, Grant, Loaded)) else value


def _dump(message: object) -> bytes:
    # A lone surrogate is escaped in ASCII, so that the name's own check refuses it.
    try:
        return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(message, separators=(",", ":")).encode()


def _object(data: bytes, most: int) -> dict[str, Any]:
    if len(data) > most:
        raise Refusal(errno.EMSGSIZE, f"message longer than {most} bytes")
    try:
        message = json.loads(data.decode())
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise Refusal(errno.EPROTO, "message is not a JSON object in UTF-8")
    return message
