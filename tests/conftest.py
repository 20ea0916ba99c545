"""Property tests draw the same examples every time, and are never failed for being slow."""

from importlib.metadata import version

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def pytest_report_header() -> str:
    """What results are loaded with."""
    return f"transformers {version('transformers')}, torch {version('torch')}"
