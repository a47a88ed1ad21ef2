"""Which process this is, without a system call: what was opened before a fork is its parent's."""

import os

pid = os.getpid()


def _after_fork() -> None:
    global pid
    pid = os.getpid()


os.register_at_fork(after_in_child=_after_fork)
