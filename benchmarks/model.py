"""The file of the loaders: safetensors of random bytes, and its digest.

Tensors are bfloat16. The header is padded with spaces to HEADER bytes, as the format allows, for
loaders that support whole blocks only.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Mapping
from typing import Any

HEADER = 64 << 10
TENSOR = 32 << 20
PIECE = 1 << 16
"""Bytes made at once; few, because children inherit the resident maximum of their parent."""


def names(size: int) -> list[str]:
    """Return the tensors of a file with `size` bytes of them, in order."""
    return [f"layer.{number:03}.weight" for number in range(size // TENSOR)]


def write(path: str, size: int) -> str:
    """Write the file; return the digest of its tensors."""
    header: dict[str, Any] = {}
    for number, name in enumerate(names(size)):
        span = [number * TENSOR, (number + 1) * TENSOR]
        header[name] = {"dtype": "BF16", "shape": [TENSOR >> 13, 1 << 12], "data_offsets": span}
    text = json.dumps(header).encode().ljust(HEADER - 8)
    source, digest = random.Random(0), hashlib.blake2b()
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(len(header) * TENSOR // PIECE):
            piece = source.randbytes(PIECE)
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def of_file(memory: memoryview) -> dict[str, memoryview]:
    """Return the tensors in the bytes of a whole file."""
    return {name: memory[start:end] for name, (start, end) in ranges_of(memory).items()}


def ranges_of(memory: memoryview | bytes) -> dict[str, tuple[int, int]]:
    """Return the first byte and the end of each tensor; memory holds the header at least."""
    (length,) = struct.unpack_from("<Q", memory)
    header = json.loads(bytes(memory[8 : 8 + length]))
    base = 8 + length
    return {
        name: (base + about["data_offsets"][0], base + about["data_offsets"][1])
        for name, about in header.items()
        if name != "__metadata__"
    }


def digest_of(tensors: Mapping[str, memoryview]) -> str:
    """Return the digest of tensors, in the order of their names."""
    digest = hashlib.blake2b()
    for name in sorted(tensors):
        digest.update(tensors[name])
    return digest.hexdigest()
