"""What in a kernel log means that the kernel, not the command, found something wrong."""

import re

TROUBLE = re.compile(
    r"""
      \bWARNING:
    | \bBUG:
    | \bkernel\ BUG\ at
    | \bOops\b
    | \bKernel\ panic\b
    | \bgeneral\ protection\ fault[,:]
    | \b(KASAN|KCSAN|KFENCE|KMSAN|UBSAN):
    | \bINFO:\ (task\ .*\ blocked|possible|suspicious|rcu_|lockdep|trying\ to\ register)
    | \b(rcu|watchdog):\ .*(stall|stuck|LOCKUP)
    | \brefcount_t:
    | \blist_(add|del)\ corruption
    | \bDEBUG_LOCKS_WARN_ON
    | \bCall\ Trace:
    """,
    re.VERBOSE,
)
"""WARN and BUG, Oops, sanitisers, lockdep, hung tasks, stalls, and any call trace."""

END = re.compile(r"---\[ end (trace|Kernel panic)")
BLOCK = 40


def trouble(lines: list[str]) -> list[str]:
    """Return the lines that tell of trouble, each with the report that follows it.

    A report ends at its "end trace" line, or 40 lines on.
    """
    found: list[str] = []
    until = -1
    for number, line in enumerate(lines):
        if number > until and TROUBLE.search(line):
            until = number + BLOCK
        if number <= until:
            found.append(line)
        if END.search(line):
            until = -1
    return found
