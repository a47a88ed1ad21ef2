"""Log to the logger "dmabuf", without importing logging unless the program did."""

import sys


def info(text: str, *args: object) -> None:
    """Log a message at level INFO."""
    if "logging" in sys.modules:  # otherwise no handler can exist
        import logging

        logging.getLogger("dmabuf").info(text, *args, stacklevel=2)


def error(text: str, *args: object) -> None:
    """Log a message at level ERROR."""
    if "logging" in sys.modules:
        import logging

        logging.getLogger("dmabuf").error(text, *args, stacklevel=2)
