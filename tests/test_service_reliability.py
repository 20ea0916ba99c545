"""A short form of what is tried out at length by `python tests/service_reliability.py`."""

import pytest

pytest.importorskip("fastapi")

import service_reliability


def test_jobs_survive_kills_of_server_and_workers(capsys):
    assert service_reliability.main(["--short"]) == 0, capsys.readouterr().out
