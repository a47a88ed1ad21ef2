"""Copies of any source to any target, and files that appear whole or not at all.

What enters here moves bytes between two ends by the transfers of a File: opening the ends, the pool
of buffers between them, the record of a copy, and the replacement of a target. How one transfer
between a File and a Buffer works is not decided here.
"""

from dmabuf.copying.blocks import (
    Filled,
    Reader,
    check_block_count,
    check_block_size,
    next_size,
    sizes_to_plan,
)
from dmabuf.copying.many import (
    DEPTH,
    AnyFileRange,
    FileRange,
    in_threads,
    read_files,
    write_files,
)
from dmabuf.copying.opening import SourceEnd, TargetEnd, same_file
from dmabuf.copying.pipeline import Meter, Writer, copy
from dmabuf.copying.record import Copy, CopySide, Tally
from dmabuf.copying.replace import Replacement, sync_folder
from dmabuf.copying.sources import OffsetSource, Source, file_source
from dmabuf.copying.staging import Staging
from dmabuf.copying.targets import FileTarget, OffsetTarget, Target

__all__ = [
    "DEPTH",
    "AnyFileRange",
    "Copy",
    "CopySide",
    "FileRange",
    "FileTarget",
    "Filled",
    "Meter",
    "OffsetSource",
    "OffsetTarget",
    "Reader",
    "Replacement",
    "Source",
    "SourceEnd",
    "Staging",
    "Tally",
    "Target",
    "TargetEnd",
    "Writer",
    "check_block_count",
    "check_block_size",
    "copy",
    "file_source",
    "in_threads",
    "next_size",
    "read_files",
    "same_file",
    "sizes_to_plan",
    "sync_folder",
    "write_files",
]
