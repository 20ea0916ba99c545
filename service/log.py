"""What is said to whoever runs the service."""

import os
import sys
import traceback


def log(text: str) -> None:
    """Say something on stderr. Where nobody reads it any more, the service goes on in silence."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # as long as the process


def log_error() -> None:
    """The same of the error that is being handled."""
    log(traceback.format_exc().rstrip())
