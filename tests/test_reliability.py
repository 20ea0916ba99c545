"""The short form of the campaigns of `reliability.py`, each in a process without threads."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("reliability.py")


@pytest.mark.parametrize(
    ("campaign", "more", "done"),
    [
        ("faults", ["--step", "1409"], "SIGKILL"),
        ("kills", ["--count", "9"], "kills"),
        ("starts", ["--count", "6"], "rounds"),
        ("disk", [], ""),  # what it does where no disk can be made is said there
        ("inputs", [], "vanished"),
    ],
)
def test_every_run_ends_as_it_may(campaign, more, done):
    command = [sys.executable, PROGRAM, campaign, "--short", *more]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    (line,) = (line for line in found.stdout.splitlines() if line.startswith(f"{campaign}: "))
    assert done in line
