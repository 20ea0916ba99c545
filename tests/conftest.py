"""Property tests draw the same examples every time, and are never failed for being slow.

Signals interrupt, also where the tests were started in the background or by nohup.
"""

import signal
from importlib.metadata import version

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

INTERRUPTS = {
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
for _number, _handler in INTERRUPTS.items():
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_report_header() -> str:
    """What results are loaded with."""
    return f"transformers {version('transformers')}, torch {version('torch')}"
