"""The header of a safetensors file, read and made; pure but for the reading.

The format: eight bytes with the header's length, little-endian; the header, JSON; then the tensors'
bytes, without a hole. (github.com/huggingface/safetensors, README, "Format".) Where the format is
not exact, what the safetensors library refuses is refused here, and beyond that: a header that does
not begin with "{", and a name that comes twice in any object, which is chance to rely on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LONGEST = 100_000_000
"""The largest header in bytes, as the library has it."""
_LARGEST = 2**64 - 1
_METADATA = "__metadata__"


class Kind(NamedTuple):
    """A dtype of the format."""

    bits: int
    name: str | None
    """What NumPy (with ml_dtypes) and PyTorch call it."""


KINDS = {
    "BOOL": Kind(8, "bool"),
    "F4": Kind(4, "float4_e2m1fn_x2"),  # PyTorch only: two in a byte
    "F6_E2M3": Kind(6, None),
    "F6_E3M2": Kind(6, None),
    "U8": Kind(8, "uint8"),
    "I8": Kind(8, "int8"),
    "F8_E5M2": Kind(8, "float8_e5m2"),
    "F8_E4M3": Kind(8, "float8_e4m3fn"),
    "F8_E8M0": Kind(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Kind(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Kind(8, "float8_e5m2fnuz"),
    "I16": Kind(16, "int16"),
    "U16": Kind(16, "uint16"),
    "F16": Kind(16, "float16"),
    "BF16": Kind(16, "bfloat16"),
    "I32": Kind(32, "int32"),
    "U32": Kind(32, "uint32"),
    "F32": Kind(32, "float32"),
    "C64": Kind(64, "complex64"),
    "F64": Kind(64, "float64"),
    "I64": Kind(64, "int64"),
    "U64": Kind(64, "uint64"),
}
"""In the order of the library's own, by which a writer sorts: the largest first."""
KIND_OF = {kind.name: key for key, kind in KINDS.items() if kind.name}
_RANK = {key: rank for rank, key in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    """As the format has it: "F32", "BF16", ..."""
    shape: tuple[int, ...]
    offset: int
    """Where in the file its bytes begin."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    size: int
    """Of the header, with the eight bytes before it."""


class Malformed(ValueError):
    """What is wrong, without the file's name; for this module and the one that reads."""


def read(size: int, pread: Callable[[int, int], bytes]) -> Header:
    """The header of a file of `size` bytes, checked to the last byte of it.

    Args:
        size: of the file.
        pread: so many bytes from an offset on.

    Raises:
        Malformed: it is no whole safetensors file.
    """
    if size < 8:
        raise Malformed(f"{size} bytes are no safetensors file: its header's length alone takes 8")
    length = int.from_bytes(pread(8, 0), "little")
    if length > LONGEST:
        raise Malformed(f"a header of {length} bytes: no safetensors file has one over {LONGEST}")
    if 8 + length > size:
        raise Malformed(f"a header of {length} bytes in a file of {size}: it was cut short")
    return parse(pread(length, 8), size)


def parse(raw: bytes, size: int) -> Header:
    """The header of a file of `size` bytes from its JSON.

    Raises:
        Malformed: something about it, or the file's size, is wrong.
    """
    base = 8 + len(raw)
    if not raw.startswith(b"{"):
        raise Malformed("its header does not begin with '{'")
    found = strict_json(raw, "its header")
    metadata = _metadata(found.pop(_METADATA, None))
    entries = {name: _entry(name, value, base) for name, value in found.items()}
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            what = "a hole before" if entry.offset > end else "an overlap at"
            raise Malformed(f"{what} tensor {name!r}: it begins at {entry.offset}, not at {end}")
        end += entry.nbytes
    if end != size:
        what = "it was cut short" if end > size else "something follows that no tensor covers"
        raise Malformed(f"its tensors end at {end}, the file at {size}: {what}")
    return Header(metadata, entries, base)


def strict_json(raw: bytes, what: str) -> dict[str, Any]:
    """An object of JSON, with no name twice, no number that is none, and text that is Unicode.

    Raises:
        Malformed: it is not that; begins with `what`.
    """
    try:
        text = raw.decode()
        found = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_number,
        )
        if "\\u" in text:  # half of a surrogate pair would be no name in UTF-8
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is no sound JSON: {error}") from None
    if not isinstance(found, dict):
        raise Malformed(f"{what} is no JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} comes twice")
        found[name] = value
    return found


def _integer(text: str) -> int | float:
    if len(text) > 300:
        raise ValueError(f"a number of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number")
    return value


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise Malformed(f"its {_METADATA} is no mapping of text to text")
    return found


def _entry(name: str, found: Any, base: int) -> Entry:
    which = f"tensor {name!r}"
    if not isinstance(found, dict):
        raise Malformed(f"{which} is described by no JSON object")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in found:
            raise Malformed(f"{which} has no {field}")
    dtype = found["dtype"]
    if not isinstance(dtype, str) or dtype not in KINDS:
        raise Malformed(f"{which} has dtype {dtype!r}: one of {', '.join(KINDS)}")
    shape, offsets = found["shape"], found["data_offsets"]
    if not _are_sizes(shape):
        raise Malformed(f"{which} has no shape of whole numbers below 2^64")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Malformed(f"{which} has data_offsets that are no begin and end")
    nbytes = _size(which, shape, KINDS[dtype].bits)
    if offsets[1] - offsets[0] != nbytes:
        raise Malformed(
            f"{which} of shape {shape} and dtype {dtype} takes {nbytes} bytes, and data_offsets "
            f"give it {offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), base + offsets[0], nbytes)


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(
        type(one) is int and 0 <= one <= _LARGEST for one in found
    )


def _size(which: str, shape: Sequence[int], bits: int) -> int:
    product = 1
    for length in (*shape, bits):  # step by step, as the library: a 0 at the end saves nothing
        product *= length
        if product > _LARGEST:
            raise Malformed(f"{which} of shape {list(shape)} is larger than 2^64 bits")
    if product % 8:
        raise Malformed(f"{which} of shape {list(shape)} is no whole number of bytes")
    return product // 8


def make(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, Entry]]:
    """The bytes before the tensors, and where each goes: as the library's own writer has it.

    That one shuffles the metadata; here it stays as it is given, so that what was read is written.

    Args:
        tensors: of each name, the dtype as the format has it and the shape.
        metadata: text to text.

    Raises:
        ValueError: a name or text that cannot stand in the header, or too many of them.
        TypeError: names or metadata that are no text.
    """
    content: dict[str, Any] = {}
    if metadata is not None:
        for pair in metadata.items():
            if not all(isinstance(one, str) for one in pair):
                raise TypeError(f"metadata is text to text, not {pair!r}")
        content[_METADATA] = dict(metadata)
    places, at = {}, 0
    for name in sorted(tensors, key=lambda name: (-_RANK[tensors[name][0]], _utf8(name))):
        dtype, shape = tensors[name]
        if name == _METADATA:
            raise ValueError(f"no tensor can have the name {_METADATA}")
        nbytes = _size(f"tensor {name!r}", shape, KINDS[dtype].bits)
        offsets = [at, at + nbytes]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        places[name] = Entry(dtype, shape, at, nbytes)
        at += nbytes
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST:
        raise ValueError(f"a header of {len(text)} bytes: the format has {LONGEST} at most")
    base = 8 + len(text)
    moved = {
        name: Entry(entry.dtype, entry.shape, base + entry.offset, entry.nbytes)
        for name, entry in places.items()
    }
    return len(text).to_bytes(8, "little") + text, moved


def _utf8(name: object) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"a tensor's name is text, not {name!r}")
    return name.encode()
