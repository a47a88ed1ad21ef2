"""Running a part of a test in a fork()ed child."""

import os
import traceback
import warnings
from collections.abc import Callable


def in_child(work: Callable[[], object]) -> None:
    """Run ``work`` in a child; an exception there, shown on standard error, fails the test."""
    with warnings.catch_warnings():
        # What the child may do beside the parent's threads is what these tests are about.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
