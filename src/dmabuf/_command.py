"""The console script `dmabuf`: Ctrl-C before a command has begun ends it as any program."""

import signal


def main() -> int:
    """Run the command; returns its exit status: see :func:`dmabuf.cli.main`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dmabuf import cli  # which takes the longest

    return cli.main()
