"""Slices of a tensor in a file: which of its bytes a selection needs, without any I/O.

A selection is read in blocks, one for each combination of indexes of its outer dimensions. A block
spans its inner dimensions from the first selected byte to the last. Dimensions belong to a block as
long as the bytes that it would leave out are less than a page, which is read anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dmabuf.safetensors.layout import UNIT

_MOST = 64 << 20
"""The most bytes of blocks that are read at once where only a part of them is selected."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """What is selected of one dimension."""

    start: int
    count: int
    step: int
    stride: int
    """Bytes from one index to the next in the file."""

    @property
    def lowest(self) -> int:
        """The lowest index that is selected."""
        return min(self.start, self.start + (self.count - 1) * self.step)


@dataclass(frozen=True, slots=True)
class Selection:
    """A part of a tensor, whose elements are contiguous in the result."""

    dimensions: tuple[Dimension, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        nbytes = self.itemsize
        for one in self.dimensions:
            nbytes *= one.count
        return nbytes

    def inner(self) -> tuple[int, int]:
        """Return the first dimension that belongs to a block, and the bytes that a block spans."""
        span, first = self.itemsize, len(self.dimensions)
        for one in reversed(self.dimensions):
            pitch = abs(one.step) * one.stride
            if one.count > 1 and pitch - span >= UNIT:
                break
            span += (one.count - 1) * pitch
            first -= 1
        return first, span

    def is_packed(self, first: int, span: int) -> bool:
        """Return whether all bytes of a block are selected, in their order."""
        inner = self.dimensions[first:]
        nbytes = self.itemsize
        for one in inner:
            nbytes *= one.count
        return nbytes == span and all(one.step > 0 or one.count == 1 for one in inner)

    def first_byte(self) -> int:
        """Return where in the tensor the first element of the result is."""
        return sum(one.start * one.stride for one in self.dimensions)

    def offsets(self, numpy: Any, first: int) -> Any:
        """Return where in the tensor each block begins, in the order of the result."""
        begin = sum(one.stride * one.lowest for one in self.dimensions[first:])
        offsets = numpy.array([begin], "i8")
        for one in self.dimensions[:first]:
            indexes = numpy.arange(one.count, dtype="i8") * one.step + one.start
            offsets = numpy.add.outer(offsets, indexes * one.stride).reshape(-1)
        return offsets

    def in_block(self, first: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Return shape, strides and first element of the selected elements of a block, in bytes."""
        inner = self.dimensions[first:]
        shape = tuple(one.count for one in inner)
        strides = tuple(one.step * one.stride for one in inner)
        at = sum(-strides[i] * (shape[i] - 1) for i in range(len(inner)) if strides[i] < 0)
        return shape, strides, at

    def pieces(self) -> Iterator[Selection]:
        """Yield parts that follow each other in the result, each small or read without a gap."""
        first, span = self.inner()
        whole = span
        for one in self.dimensions[:first]:
            whole *= one.count
        if whole <= _MOST or self.is_packed(first, span):
            yield self
            return
        for index, one in enumerate(self.dimensions):
            if one.count > 1:
                half = one.count // 2
                before, after = self.dimensions[:index], self.dimensions[index + 1 :]
                later = replace(one, start=one.start + half * one.step, count=one.count - half)
                for part in (replace(one, count=half), later):
                    yield from Selection((*before, part, *after), self.itemsize).pieces()
                return


def select(shape: Sequence[int], itemsize: int, index: object) -> tuple[Selection, tuple[int, ...]]:
    """Return what an index selects of a tensor, and the shape of the result.

    Raises:
        IndexError: an int outside, or more indexes than dimensions.
        TypeError: something other than ints, slices and an Ellipsis.
    """
    asked = list(index) if isinstance(index, tuple) else [index]
    gaps = sum(one is Ellipsis for one in asked)
    if gaps > 1:
        raise IndexError("an index can have one Ellipsis")
    missing = len(shape) - len(asked) + gaps
    if missing < 0:
        raise IndexError(f"{len(asked) - gaps} indexes of a tensor with {len(shape)} dimensions")
    at = next((i for i, one in enumerate(asked) if one is Ellipsis), len(asked))
    asked[at : at + gaps] = [slice(None)] * missing
    dimensions: list[Dimension] = []
    result: list[int] = []
    stride = itemsize
    for length, one in zip(reversed(shape), reversed(asked), strict=True):
        if isinstance(one, slice):
            start, stop, step = one.indices(length)
            count = len(range(start, stop, step))
            dimensions.append(Dimension(start, count, step, stride))
            result.append(count)
        else:
            dimensions.append(Dimension(_index(one, length), 1, 1, stride))
        stride *= length
    return Selection(tuple(reversed(dimensions)), itemsize), tuple(reversed(result))


def _index(given: object, length: int) -> int:
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        kind = type(given).__name__
        raise TypeError(f"a tensor is sliced by ints, slices and an Ellipsis, not {kind}")
    index = operator.index(given)
    if not -length <= index < length:
        raise IndexError(f"index {index} is outside of a dimension of {length}")
    return index + length if index < 0 else index
