"""Run a part of a test in a child made by fork()."""

import os
import traceback
from collections.abc import Callable


def in_child(work: Callable[[], object]) -> None:
    """Run `work` in a child; an exception there is printed to standard error and fails the test."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
