"""Landlock: a process gives up its access to files for good (landlock(7), Linux 5.13).

Constants and structs are those of include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping
from contextlib import suppress

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System calls; the numbers are common to all architectures."""
_VERSION = 1
_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

WRITE, READ, LIST, IOCTL = 1 << 1, 1 << 2, 1 << 3, 1 << 15
"""Write to files, read them, list folders, and use ioctls of device files."""
_OF_VERSION = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: IOCTL}
"""The rights to files that each version of the interface added."""
_SCOPES = 3
"""Since version 6: abstract sockets of other processes, and signals to them."""


def confine(kept: Mapping[str, int]) -> bool:
    """Take all access to files from this thread, and from the threads that it starts later.

    Since Linux 6.12 it also cannot signal other processes. Files that are open stay usable.

    Args:
        kept: folders, and the rights that are kept to all below each; a missing one is left out.

    Returns whether it was done: False where the kernel has no Landlock, or does not use it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version < 1:
        return False
    rights = sum(bits for since, bits in _OF_VERSION.items() if since <= version)
    wanted = struct.pack("=QQQ", rights, 0, _SCOPES)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    rules = libc.syscall(_CREATE_RULESET, wanted, ctypes.c_size_t(len(wanted)), 0)
    if rules < 0:
        return False
    try:
        for path, bits in kept.items():
            with suppress(FileNotFoundError):
                folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
                try:
                    rule = struct.pack("=Qi", bits & rights, folder)
                    libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0)
                finally:
                    os.close(folder)
        return not (
            libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(_RESTRICT_SELF, rules, 0)
        )
    finally:
        os.close(rules)
