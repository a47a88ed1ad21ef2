"""Sizes in bytes: parsing, formatting and checking them."""

import operator
import re
from typing import SupportsIndex

__all__ = ["Size", "as_int", "format_size", "parse_size", "round_up"]

Size = SupportsIndex | str
"""A size or offset in bytes as callers pass it: an integer of any type, or text like "1MiB"."""

OFFSET_MAX = 2**63 - 1  # the largest file offset of Linux (loff_t)

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_FACTORS = {unit.lower(): 1024**power for power, unit in enumerate(_BINARY)}
_FACTORS |= {unit[0].lower(): 1024**power for power, unit in enumerate(_BINARY) if power}
_FACTORS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgtpe", start=1)}
_FACTORS[""] = 1
_PATTERN = re.compile(r"(\d+)(?:\.(\d+))?\s*([a-z]*)", re.ASCII)


def as_int(value: object, what: str) -> int:
    """Return ``value`` as a plain int, for anything with ``__index__`` except bool.

    Raises TypeError, which names ``what``, for everything else: ``True`` as an offset would
    otherwise count as 1.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an int, not {type(value).__name__}")
    return operator.index(value)


def parse_size(value: object, what: str = "size") -> int:
    """Return a size or offset in bytes as a plain int, from an int or text such as ``"256MiB"``.

    The units are those of GNU tools, in upper or lower case: KiB, MiB, GiB, TiB, PiB, EiB and the
    single letters K, M, G, T, P, E are powers of 1024; kB, MB, GB, TB, PB, EB powers of 1000; B or
    nothing is bytes. A fraction is accepted if the result is whole bytes: ``"1.5GiB"``.

    Raises ValueError for other text, a negative size and one above 2**63-1; TypeError for bool,
    float and anything else that is neither an integer nor str.
    """
    if type(value) is int:
        nbytes = value
    elif not isinstance(value, str):
        nbytes = as_int(value, what)
    else:
        match = _PATTERN.fullmatch(value.strip().lower())
        if match is None or match[3] not in _FACTORS:
            raise ValueError(
                f"invalid {what} {value!r}: use bytes or a unit such as 4KiB, 256MiB, 1.5GiB"
            )
        whole, fraction, unit = match[1], match[2] or "", match[3]
        scale = 10 ** len(fraction)
        nbytes, rest = divmod(int(whole + fraction) * _FACTORS[unit], scale)
        if rest:
            raise ValueError(f"invalid {what} {value!r}: use a whole number of bytes")
    if nbytes < 0:
        raise ValueError(f"invalid {what} {nbytes}: use 0 or more bytes")
    if nbytes > OFFSET_MAX:
        raise ValueError(f"invalid {what} {nbytes}: use at most 2**63-1 bytes")
    return nbytes


def format_size(nbytes: int) -> str:
    """Return a size as text: ``"256 MiB"``, ``"1.5 GiB"``, ``"12 B"``; one decimal at most."""
    if nbytes < 0:
        return "-" + format_size(-nbytes)
    power = min(max(nbytes.bit_length() - 1, 0) // 10, len(_BINARY) - 1)
    tenths = (nbytes * 10 + 1024**power // 2) // 1024**power
    if tenths >= 10240 and power + 1 < len(_BINARY):
        power, tenths = power + 1, 10
    whole, tenth = divmod(tenths, 10)
    return f"{whole}.{tenth} {_BINARY[power]}" if tenth else f"{whole} {_BINARY[power]}"


def round_up(nbytes: int, unit: int) -> int:
    """Return the smallest multiple of ``unit`` that is not below ``nbytes``."""
    return -(-nbytes // unit) * unit
