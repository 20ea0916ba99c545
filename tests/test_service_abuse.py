"""The short forms of the campaigns of `service_abuse.py`, and that they see what is wrong."""

import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the service needs its packages: pip install '.[service]'")

import service_abuse

from service.core import MOST_TEXT, Service
from service.processes import this_process
from service.settings import Settings
from service.store import Store

PROGRAM = Path(__file__).with_name("service_abuse.py")
HAS_SCHEMATHESIS = importlib.util.find_spec("schemathesis") is not None


def short(campaign):
    command = [sys.executable, PROGRAM, campaign, "--short"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_hostile_requests_are_refused_and_leave_nothing():
    found = short("hostile")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "hostile: 0 wrong" in found.stdout


@pytest.mark.skipif(not HAS_SCHEMATHESIS, reason="needs schemathesis: pip install schemathesis")
def test_the_api_does_what_its_description_promises():
    found = short("schema")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert ", 0 promises broken" in found.stdout


FINE = (
    b"HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\n"
    b"content-security-policy: x\r\n\r\n"
)
BODY = b'{"success": false, "error": "no", "problems": []}'


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (FINE + BODY, ""),
        (FINE.replace(b"404 Not Found", b"500 Oh") + BODY, "500, expected [404]"),
        (FINE.replace(b"404 Not Found", b"403 No") + BODY, "403, expected [404]"),
        (FINE.replace(b"application/json", b"text/plain") + BODY, "an error as text/plain"),
        (FINE.replace(b"content-security-policy", b"x") + BODY, "without the headers"),
        (FINE + b"Not Found", "an error that is no JSON"),
        (FINE + BODY.replace(b'"no"', b'""'), "an error without a text"),
        (FINE + BODY.replace(b"problems", b"x"), "an error of another form"),
        (FINE + BODY.replace(b"no", service_abuse.SECRET.encode()), "holds the secret"),
        (FINE + BODY.replace(b"no", bytes(service_abuse.ROOT)), "tells of"),
    ],
)
def test_what_is_wrong_with_an_answer_is_seen(tmp_path, raw, text):
    campaign = service_abuse.Campaign(tmp_path)
    case = service_abuse.case("group", "name", b"GET / HTTP/1.1", 404)
    found = [*campaign.problems(case, service_abuse.parsed(raw), b"GET / HTTP/1.1")]
    assert (found == []) if not text else any(each.startswith(text) for each in found)


def test_parts_of_downloads_are_compared():
    check = service_abuse._part_of(b"0123456789")
    part = b"HTTP/1.1 206 Partial Content\r\ncontent-range: bytes 2-4/10\r\n\r\n"
    assert check(service_abuse.parsed(part + b"234")) == ""
    assert check(service_abuse.parsed(part + b"235")) == "3 other bytes"
    assert check(service_abuse.parsed(part.replace(b"/10", b"/11") + b"234")).startswith("Content-")
    assert service_abuse._part_of(b"0123456789", (2, 5))(service_abuse.parsed(part + b"234")) == ""
    other = service_abuse._part_of(b"0123456789", (2, 6))(service_abuse.parsed(part + b"234"))
    assert other == "(2, 5), expected (2, 6)"


def test_texts_that_are_kept_for_others_have_a_limit(tmp_path):
    async def kept():
        async with Service(Settings(data=tmp_path)) as service:
            for number in range(100):
                await service._shared(f"list {number}", lambda: "x" * 10**6)
            return sum(len(each.result()) for each in service._texts.values())

    assert 10**6 < asyncio.run(kept()) <= MOST_TEXT


def test_what_is_long_is_left_out_of_lists(tmp_path):
    text = "x" * 10**5
    with Store(tmp_path / "jobs.sqlite3") as store:
        plan = {"plan": {"method": "ties", "disk_bytes": 7, "x": text}, "base": "b", "models": []}
        key = store.add("name", {"evaluation": {"text": text}}, text, plan, 10)
        (number,) = store.next_jobs(1)
        store.claim(number, "holder", this_process(), 10.0)
        assert store.finish(number, "holder", "completed")
        (listed,) = store.experiments(10)
        assert listed.evaluation is not None
        assert len(repr(listed)) < 5000
        assert listed.plan["plan"] == {"method": "ties", "disk_bytes": 7}
        assert len(repr(store.experiment(key))) > 4 * 10**5
