# PYTHON_ARGCOMPLETE_OK
"""The console script `dmabuf`, also `python -m dmabuf.cli`."""

import os
import signal
import sys
from contextlib import suppress


def run() -> int:
    """Run the command; return its exit status, see `dmabuf.cli.main`.

    Until a command has begun, Ctrl-C ends the process by the signal, without a traceback. Under
    nohup and the like it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.stderr is None:  # it was closed, and the next file to be opened must not take its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end
    if "_ARGCOMPLETE" in os.environ:  # a shell wants to complete a command line
        with suppress(ImportError):
            from dmabuf.cli.complete import complete

            complete()
    from dmabuf.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
