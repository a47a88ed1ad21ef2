"""The console script `dmabuf`, also `python -m dmabuf.cli`."""

import signal
import sys


def run() -> int:
    """Run the command; return its exit status, see `dmabuf.cli.main`.

    Until a command has begun, Ctrl-C ends the process by the signal, without a traceback. Under
    nohup and the like it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dmabuf.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
