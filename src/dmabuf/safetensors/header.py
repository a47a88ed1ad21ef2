"""The header of a safetensors file: parsed, checked and made, without any I/O.

The format: the length of the header in eight bytes, little-endian; the header, in JSON; the bytes
of the tensors, without a hole (github.com/huggingface/safetensors, README, "Format").

The checks are about bytes: each tensor has exactly the bytes that its dtype and shape need, and the
tensors cover the rest of the file without a hole or an overlap. Of JSON, this accepts what Python's
``json`` accepts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

LONGEST = 100_000_000
"""The largest header in bytes (MAX_HEADER_SIZE of the safetensors package)."""
_LARGEST = 2**64 - 1
_METADATA = "__metadata__"

NAMES = {
    "BOOL": "bool", "F4": "float4_e2m1fn_x2", "F6_E2M3": None, "F6_E3M2": None, "U8": "uint8",
    "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64",
    "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip
"""The name in PyTorch, and in NumPy with ml_dtypes, of each dtype of the format, if any.

In the order of the safetensors package, by which a writer sorts: the largest first.
"""
DTYPES = {known: name for name, known in NAMES.items() if known}
BITS = {name: int(name.partition("_")[0].strip("BCFIU") or 8) for name in NAMES if name != "BOOL"}
BITS["BOOL"] = 8
_RANK = {name: -rank for rank, name in enumerate(NAMES)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor."""

    dtype: str
    """The format's name of it: "F32", "BF16", ..."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte: in a file here, in the buffer in `Tensors.entries`."""
    nbytes: int


class Malformed(ValueError):
    """What is wrong with a file, without its name, which the reader of the file adds."""


def parse_object(raw: bytes, what: str, hook: Any = None) -> dict[str, Any]:
    """Return a JSON object in UTF-8; raise Malformed, which begins with `what`."""
    try:
        found = json.loads(raw.decode(), object_hook=hook)
        if b"\\u" in raw:  # half of a surrogate pair is not text: this raises UnicodeEncodeError
            every = json.loads(raw.decode(), object_pairs_hook=tuple)  # keys that are twice, too
            json.dumps(every, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise Malformed(f"{what} is not a JSON object")
    return found


def parse(
    raw: bytes, size: int, *, padded: bool = False
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors of a file, in the order of their bytes, and its metadata.

    Args:
        raw: the header.
        size: of the file, in bytes.
        padded: whether anything may follow the tensors: memory is a number of whole pages.

    Raises:
        Malformed: the header is malformed, or the tensors are not what the file holds.
    """
    found = parse_object(raw, "its header", _tensor)
    metadata = found.pop(_METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or {type(text) for text in metadata.values()} - {str}:
        raise Malformed(f"its {_METADATA} is not a mapping of text to text")
    for name, about in found.items():
        if type(about) is not tuple:
            text = "lacks a known dtype, a shape, and data_offsets that fit them"
            raise Malformed(f"tensor {name!r} {text}: {about!r:.80}")
    base, at = 8 + len(raw), 0
    entries = {}
    for name, (begin, end, dtype, shape) in sorted(found.items(), key=itemgetter(1)):
        if begin != at:
            what = "a hole before" if begin > at else "an overlap at"
            raise Malformed(f"{what} tensor {name!r}: it begins at {begin}, not at {at}")
        entries[name] = Entry(dtype, shape, base + begin, end - begin)
        at = end
    if base + at > size or (base + at < size and not padded):
        cut = "; it was cut short: get it again" if base + at > size else ""
        raise Malformed(f"its tensors end at {base + at}, the file ends at {size}{cut}")
    return entries, metadata


def _tensor(about: dict[str, Any]) -> object:
    """Return begin, end, dtype and shape of a tensor; its description itself if that is invalid."""
    try:
        shape, (begin, end), dtype = about["shape"], about["data_offsets"], about["dtype"]
        bits = BITS[dtype]
    except (KeyError, TypeError, ValueError):
        return about
    if not type(begin) is type(end) is int or type(shape) is not list:
        return about
    for length in shape:
        if type(length) is not int or not 0 <= length <= _LARGEST or bits > _LARGEST:
            return about
        bits *= length
    return (begin, end, dtype, tuple(shape)) if bits == 8 * (end - begin) else about


def make(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the tensors, and the offset of each, in the file's order.

    They are those of the safetensors package, except that it shuffles the metadata, which keeps its
    order here.

    Args:
        tensors: by name, the format's dtype, the shape, and the size in bytes.
        metadata: text by text.

    Raises:
        ValueError: a name or text that a header cannot hold, or a header over 100 MB.
        TypeError: a name, or metadata, that is not text.
    """
    for text in (*tensors, *(metadata or {}), *(metadata or {}).values()):
        if not isinstance(text, str):
            raise TypeError(f"names and metadata must be text, not {text!r}")
    if _METADATA in tensors:
        raise ValueError(f"a tensor cannot have the name {_METADATA}")
    quote = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    parts = [] if metadata is None else [f'"{_METADATA}":{quote(dict(metadata))}']
    places, at = {}, 0
    names = sorted(tensors, key=str.encode)
    names.sort(key=lambda name: _RANK[tensors[name][0]])
    for name in names:
        dtype, shape, nbytes = tensors[name]
        lengths = ",".join(map(str, shape))
        parts.append(
            f'{quote(name)}:{{"dtype":"{dtype}","shape":[{lengths}],'
            f'"data_offsets":[{at},{at + nbytes}]}}'
        )
        places[name] = at
        at += nbytes
    header = f"{{{','.join(parts)}}}".encode()
    header += b" " * (-len(header) % 8)
    if len(header) > LONGEST:
        raise ValueError(f"a header of {len(header)} bytes: the format allows {LONGEST}")
    base = 8 + len(header)
    places = {name: base + at for name, at in places.items()}
    return len(header).to_bytes(8, "little") + header, places
