"""Which process this is, without a system call, and what is left to the kernel at its end.

What was opened before a fork is the parent's.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import TypeVar

Handle = TypeVar("Handle")

pid = os.getpid()


def _after_fork() -> None:
    global pid
    pid = os.getpid()


os.register_at_fork(after_in_child=_after_fork)


def finalizer(end: Callable[[Handle], None]) -> Callable[[Handle], None]:
    """Return a __del__ that leaves an object to the kernel where the interpreter is gone already.

    `end` closes the object, if it is not closed. It is called again after an interrupt.

    If a library still refers to modules at exit, as PyTorch does, CPython sets their names to None.
    A destructor that runs after that finds neither `os` nor a function of its own module.
    """
    ending = sys.is_finalizing  # a name of this module would be None too

    @functools.wraps(end)
    def finalize(self: Handle) -> None:
        try:
            end(self)
        except (AttributeError, TypeError):
            if not ending():
                raise
        except Exception:
            raise
        except BaseException:
            end(self)  # the interrupt may have come before its first step
            raise

    return finalize
