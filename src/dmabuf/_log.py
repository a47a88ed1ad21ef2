"""What is told to the logger "dmabuf", without importing logging for those who do not listen."""

import sys


def info(text: str, *args: object) -> None:
    """Tell what was found out, at level INFO."""
    if "logging" in sys.modules:  # else nobody has asked to hear it
        import logging

        logging.getLogger("dmabuf").info(text, *args, stacklevel=2)
