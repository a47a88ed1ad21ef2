"""What a client and the server of the store say to each other: pure, and believes nothing.

The socket is AF_UNIX SOCK_SEQPACKET: the kernel keeps messages apart, so there is no half of one to
wait for, and descriptors (SCM_RIGHTS) come with the message that they belong to. A message is a
JSON object in UTF-8, a request of at most 4 KiB and a reply of at most 32 KiB::

    {"op": "open", "name": "frames", "number": null, "mode": "r+", "trusted": false}
    {"result": {...}}    with the descriptors of a grant, where there is one
    {"error": [2, "no buffer of that name", "frames"]}

A client has one request under way at a time: it reads the reply before it sends the next. Where a
request has a ``number`` (Status.number, or null), it is refused (ESTALE) unless its name is that
number's: so it is for the buffer that was looked at before, or for none.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

REQUEST_BYTES = 4096
REPLY_BYTES = 32768
MOST_DESCRIPTORS = 253
"""The kernel's SCM_MAX_FD: with one message."""
NAME_BYTES = 255
MODES = ("r", "r+")
SAME = -1
"""In chown: leave it."""

_ANOTHER_VERSION = "what answers there is no store of dma-bufs, or one of another version"
_ID_MAX = 2**32 - 2  # 2**32 - 1 is chown(2)'s "leave it"
_SIZE_MAX = 2**62


class Refusal(Exception):
    """What the other side is told: an errno, a sentence, and the name it is about."""

    def __init__(self, number: int, text: str, name: str | None = None) -> None:
        super().__init__(number, text, name)
        self.errno, self.text, self.name = number, text, name


class Request(NamedTuple):
    """A request that is well-formed: its operation, and all of the operation's fields."""

    op: str
    fields: dict[str, Any]


class Status(NamedTuple):
    """What the store says of a name. A frozen record.

    ``size`` is the memory's, in bytes and whole pages, and ``length`` how many of them are content:
    what was asked for, or set by truncate. ``mode`` is the nine permission bits. The times are in
    ns since 1970: of its making, and of the last change of its name, owner, mode or length.
    ``number`` is never another's while the store serves, whatever it is called. ``modified_ns`` and
    ``accessed_ns`` are the content's times: of its making, or set by link, truncate, swap and
    utime; the store does not see who writes the memory. ``in_use`` is whether anyone but the store
    has a descriptor, a mapping or an attached device of the memory; None where it is not asked: in
    a listing, and with what was opened.
    """

    name: str
    size: int
    length: int
    mode: int
    uid: int
    gid: int
    created_ns: int
    changed_ns: int
    exporter: str
    reason: str
    slabs: int
    is_dmabuf: bool
    number: int
    modified_ns: int
    accessed_ns: int
    in_use: bool | None


class Usage(NamedTuple):
    """How full the store is: bytes and names, and the most of each. A frozen record."""

    charged: int
    max_memory: int
    names: int
    max_names: int


class Grant(NamedTuple):
    """What the descriptors of a reply are: the slabs first, then the memfd if it is there too.

    ``kind`` is "dma-buf", or "memfd" where the one descriptor is the memory file itself.
    ``unnamed`` is what "link" calls memory by that was created without a name, on this connection;
    else None.
    """

    kind: str
    slabs: int
    memfd: bool
    writable: bool
    unnamed: int | None = None


def check_name(name: object) -> str:
    """A name of the store: as a file's, without what would change how a listing looks.

    Raises Refusal: EINVAL, or ENAMETOOLONG above 255 bytes of UTF-8.
    """
    if not isinstance(name, str):
        raise Refusal(errno.EINVAL, "a name is text")
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise Refusal(errno.EINVAL, "a name is UTF-8") from None
    if length > NAME_BYTES:
        raise Refusal(errno.ENAMETOOLONG, f"a name is at most {NAME_BYTES} bytes of UTF-8", name)
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise Refusal(
            errno.EINVAL, 'a name is neither empty nor "." nor "..", without "/", and printable'
        )
    return name


def _integer(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _text(most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is str and len(value) <= most


def _flag(value: object) -> bool:
    return type(value) is bool


def _page_size(value: object) -> bool:
    return _flag(value) or _integer(1, _SIZE_MAX)(value)


def _name(value: object) -> bool:
    check_name(value)
    return True


def _replaced(value: object) -> bool:
    return _flag(value) or _NUMBER(value)


def _optional(good: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or good(value)


_ID = _integer(SAME, _ID_MAX)
_NS = _integer(SAME, 2**63 - 1)
_LENGTH = _integer(0, _SIZE_MAX)
_NUMBER = _integer(1, _SIZE_MAX)
_STILL = _optional(_NUMBER)
_OPERATIONS: dict[str, dict[str, Callable[[object], bool]]] = {
    "create": {
        "name": _optional(_name),
        "size": _integer(1, _SIZE_MAX),
        "mode": _integer(0, 0o777),
        "exporter": _text(64),
        "huge_pages": _page_size,
        "trusted": _flag,
    },
    "open": {
        "name": _name,
        "number": _STILL,
        "mode": lambda value: value in MODES,
        "trusted": _flag,
    },
    "link": {
        "unnamed": _NUMBER,
        "name": _name,
        "replace": _flag,
        "length": _optional(_LENGTH),
    },
    "stat": {"name": _name},
    "list": {"after": _text(NAME_BYTES)},
    "remove": {"name": _name, "number": _STILL},
    "swap": {"unnamed": _NUMBER, "name": _name, "number": _STILL, "length": _LENGTH},
    "discard": {"unnamed": _NUMBER},
    "rename": {"name": _name, "number": _STILL, "to": _name, "replace": _replaced},
    "truncate": {"name": _name, "number": _STILL, "length": _LENGTH},
    "chmod": {"name": _name, "number": _STILL, "mode": _integer(0, 0o777)},
    "chown": {"name": _name, "number": _STILL, "uid": _ID, "gid": _ID},
    "utime": {"name": _name, "number": _STILL, "accessed_ns": _NS, "modified_ns": _NS},
    "usage": {"settle": _flag},
}


def parse_request(data: bytes) -> Request:
    """A request out of what a client sent.

    Raises Refusal (EPROTO for what is no request, EINVAL and such for a field): nothing else,
    whatever the bytes.
    """
    fields = _object(data, REQUEST_BYTES)
    op = fields.pop("op", None)
    known = _OPERATIONS.get(op) if isinstance(op, str) else None
    if known is None:
        raise Refusal(errno.EPROTO, f"no such operation; there are {', '.join(_OPERATIONS)}")
    if fields.keys() != known.keys():
        raise Refusal(errno.EPROTO, f"{op} has the fields {', '.join(known)}, and no others")
    for field, good in known.items():
        if not good(fields[field]):
            raise Refusal(errno.EINVAL, f"{op}: the field {field} cannot be that")
    return Request(str(op), fields)


def pack_request(op: str, **fields: object) -> bytes:
    """A request as bytes. Raises what :func:`parse_request` would refuse, before it is sent."""
    data = _dump({"op": op, **fields})
    parse_request(data)
    return data


def pack_result(result: dict[str, Any]) -> bytes:
    """A reply that says what came of it."""
    return _dump({"result": result})


def pack_listing(found: Iterable[Status]) -> bytes:
    """A reply with as many of them as go into it."""
    parts: list[bytes] = []
    room = REPLY_BYTES - 64
    for one in found:
        parts.append(_dump(one))
        room -= len(parts[-1]) + 1
        if room < 0:
            parts.pop()
            break
    return b'{"result":{"names":[' + b",".join(parts) + b"]}}"


def pack_error(refusal: Refusal) -> bytes:
    """A reply that says why not."""
    return _dump({"error": [refusal.errno, refusal.text[:1024], refusal.name]})


def parse_reply(data: bytes) -> dict[str, Any]:
    """What a reply says. Raises the Refusal that it carries, or one of EPROTO for no reply."""
    fields = _object(data, REPLY_BYTES)
    match fields:
        case {"result": dict(result), **rest} if not rest:
            return result
        case {"error": [int(number), str(text), None | str() as name], **rest} if not rest:
            raise Refusal(number, text, name)
    raise Refusal(errno.EPROTO, _ANOTHER_VERSION)


def status(value: object) -> Status:
    """A Status out of a reply. Raises Refusal(EPROTO)."""
    match value:
        case [
            str(), int(), int(), int(), int(), int(), int(), int(), str(), str(), int(),
            bool(), int(), int(), int(), None | bool(),
        ]:  # fmt: skip
            return Status(*cast("list[Any]", value))
    raise Refusal(errno.EPROTO, _ANOTHER_VERSION)


def usage(value: object) -> Usage:
    """A Usage out of a reply. Raises Refusal(EPROTO)."""
    match value:
        case [int(), int(), int(), int()]:
            return Usage(*value)
    raise Refusal(errno.EPROTO, _ANOTHER_VERSION)


def grant(value: object) -> Grant:
    """A Grant out of a reply. Raises Refusal(EPROTO)."""
    match value:
        case [str(), int(), bool(), bool(), None | int()]:
            return Grant(*cast("list[Any]", value))
    raise Refusal(errno.EPROTO, _ANOTHER_VERSION)


def _dump(message: object) -> bytes:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode(
        errors="surrogatepass"  # so that it is refused as what it is, and not here
    )


def _object(data: bytes, most: int) -> dict[str, Any]:
    if len(data) > most:
        raise Refusal(errno.EMSGSIZE, f"a message is at most {most} bytes")
    try:
        message = json.loads(data.decode())
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise Refusal(errno.EPROTO, "a message is a JSON object in UTF-8")
    return message
