"""The merge service among those who mean it harm: `python tests/service_abuse.py` does everything.

    python tests/service_abuse.py hostile    requests that break rules, over sockets
    python tests/service_abuse.py schema     Schemathesis: what the API's description promises
    python tests/service_abuse.py --short    the same with less patience, and fewer of the second

Each hostile case says which statuses may come back. Of all answers: none says 5xx, none holds what
lies outside of the service's reach or tells of its folders, every error is JSON of one form. At the
end nothing has been written beside the data folder, nothing is open that was not before, and the
server has stayed small and answers at once. Prints a line for each group of cases; ends with
status 1 if something went wrong.
"""

import argparse
import base64
import functools
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from service_server import API, TWO, Server  # noqa: E402

from service.safety import COOKIE, cookie_of  # noqa: E402

SECRET = "canary-3f9d1c"
"""What a file outside of the service's reach says."""

TOKEN = "the-token-of-this-test-0123456789"
MOST_MEMORY = 150 * 10**6
SLOWEST = 1.0
"""Seconds in which /health answers, whatever came before."""

LONG = 100
"""Cases of a group that are no longer all sent in the short form."""

BODY = 1_000_000
"""Bytes of a request, at most."""


# Requests and answers


@dataclass
class Answer:
    """What came back on a connection.

    Attributes:
        status: 0 if nothing came.
        headers: by lower-case names; the last of each.
        body: of the first answer.
        raw: all that came.
        seconds: until the connection was closed, or nothing more came.
        closed: by the server.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    raw: bytes = b""
    seconds: float = 0.0
    closed: bool = False


def parsed(raw: bytes) -> Answer:
    """The first answer of some bytes."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        head, _, rest = rest.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    found = re.match(r"HTTP/1\.1 (\d{3})", lines[0])
    if found is None:
        return Answer(raw=raw)
    pairs = (line.partition(":") for line in lines[1:])
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if "content-length" in headers:
        rest = rest[: int(headers["content-length"])]
    elif headers.get("transfer-encoding") == "chunked":
        rest = b"".join(_chunks(rest))
    return Answer(int(found[1]), headers, rest, raw)


def _chunks(rest: bytes) -> Iterator[bytes]:
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length:
            return
        yield rest[:length]
        rest = rest[length + 2 :]


def exchange(port: int, parts: Sequence[bytes | float], wait: float = 20.0) -> Answer:
    """Send bytes, with pauses where there are numbers, and read until the connection is closed.

    Args:
        port: of the server.
        parts: what is sent.
        wait: seconds without a word from the server, after which it is given up.
    """
    started, raw, closed = time.monotonic(), b"", False
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        try:
            for part in parts:
                if isinstance(part, float):
                    time.sleep(part)
                else:
                    connection.sendall(part)
        except OSError:  # the server has heard enough
            pass
        try:
            while piece := connection.recv(2**16):
                raw += piece
            closed = True
        except TimeoutError:
            pass
        except OSError:
            closed = True
    answer = parsed(raw)
    answer.seconds, answer.closed = time.monotonic() - started, closed
    return answer


Headers = Sequence[tuple[str, str]]


def request(
    method: str, path: str, body: bytes | None = None, headers: Headers = (), host: str | None = ""
) -> bytes:
    """A request on a connection that ends with it; `host` "" is the right one, None is none."""
    lines = [f"{method} {path} HTTP/1.1"]
    if host is not None:
        lines.append(f"Host: {host or '127.0.0.1'}")
    names = {name.lower() for name, _ in headers}
    if body is not None and "content-type" not in names:
        lines.append("Content-Type: application/json")
    if body is not None and not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in headers]
    if "connection" not in names:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + (body or b"")


def post(path: str, content: Any, headers: Headers = ()) -> bytes:
    """A request with JSON; texts are sent as they are."""
    text = content if isinstance(content, str) else json.dumps(content)
    return request("POST", path, text.encode("utf-8", "surrogatepass"), headers)


class Case(NamedTuple):
    """A request, and what may come back.

    Attributes:
        group, name: of the case.
        parts: what is sent; see `exchange`.
        allowed: statuses; 0 is a connection that is closed without an answer.
        check: says what is wrong with an answer besides; nothing if it is all right.
    """

    group: str
    name: str
    parts: Sequence[bytes | float]
    allowed: frozenset[int]
    check: Callable[[Answer], str] = lambda _: ""


def case(group: str, name: str, sent: Any, *allowed: int, check: Any = None) -> Case:
    """A case with its parts in any form."""
    parts = [sent] if isinstance(sent, bytes) else sent
    return Case(group, name, parts, frozenset(allowed), check or (lambda _: ""))


# Hostile names

ESCAPES = (
    *("../../../../outside/secret.txt", "..%2f..%2f..%2f..%2foutside%2fsecret.txt"),
    *("%2e%2e/%2e%2e/%2e%2e/%2e%2e/outside/secret.txt", "..%252f..%252f..%252foutside%252fsecret"),
    *("%252e%252e%252f%252e%252e%252foutside", "..\\..\\..\\outside\\secret.txt"),
    *("..%5c..%5c..%5coutside%5csecret.txt", "..;/..;/..;/outside/secret.txt", "%2e%2e%3b%2f"),
    *("x%00.json", "..%00/", "%00", "//outside/secret.txt", "%2f%2foutside%2fsecret.txt"),
    *("/etc/passwd", "%2fetc%2fpasswd", "....//....//outside", "..%c0%af..%c0%afoutside"),
    *("%c0%ae%c0%ae/", "..%e2%81%84outside", "%ef%bc%8e%ef%bc%8e%ef%bc%8foutside", "%u002e%u002e"),
    *("file:///etc/passwd", "http://127.0.0.1:1/", "%5c%5cserver%5cshare", "C:%5csecret.txt", "~"),
    *(".", "..", "%2e", "%2e%2e", "-", "*", "%", "%zz", "jobs.sqlite3", "lock", "CON", "a" * 5000),
)
"""In addresses."""

NAMES = (
    *("../outside", "../../outside/model", "..", ".", "/etc", "/etc/passwd", "//outside/model"),
    *("..\\..\\outside", "\\\\server\\share\\model", "C:\\models\\x", "~/model", "~root"),
    *("%2e%2e%2foutside", "..%2foutside", "..;/outside", "capitals/../../outside", "./capitals"),
    *(
        "capitals\0",
        "capitals\n",
        "\uff0e\uff0e\uff0foutside",
        "\u2024\u2024/outside",
        "cap\u0456tals",
    ),
    *("file:///etc/passwd", "http://127.0.0.1:1/model", "https://example.com/m.safetensors"),
    *("org/model", "org/model@main", "hf://org/model", "s3://bucket/model", "ssh://host/model"),
    *("capitals+../outside", "capitals+/etc", "../outside+capitals-lora", "capitals+org/lora:0.5"),
    *("jobs.sqlite3", "link", "${HOME}", "$(id)", "`id`", "{{7*7}}", "capitals ", "-", "a" * 5000),
)
"""Of models, in requests."""

HARMLESS = {
    *((place, "./capitals") for place in ("tokenizer_source", "vocabulary", "tokens")),
    *(("recipe's tokenizer", "./capitals"), ("chat_template", "{{7*7}}")),
}
"""Names that are told from those of the recipe's models by their last part, and a template."""


def addresses(key: str) -> Iterator[Case]:
    """Names in every place of an address."""
    places = [
        *(
            ("GET", f"{API}/experiments/%s{end}")
            for end in ("", "/download", "/report", "/findings")
        ),
        *(("GET", f"{API}/experiments/%s{end}") for end in ("/comparison", "/events")),
        ("GET", f"{API}/experiments/{key}/files/%s"),
        ("GET", f"{API}/experiments/%s/files/config.json"),
        ("DELETE", f"{API}/experiments/%s"),
        ("POST", f"{API}/experiments/%s/cancel"),
        *(("GET", f"{place}%s") for place in ("/", "/static/", f"{API}/", f"{API}/../")),
    ]
    for method, place in places:
        for name in ESCAPES:
            if place == f"{API}/experiments/%s" and method == "GET" and name in (".", "%2e"):
                continue
            sent = request(method, place.replace("%s", name))
            yield case("addresses", f"{method} {place} {name[:60]}", sent, 404, 400, 405, 422, 415)


def models_in_requests() -> Iterator[Case]:
    """Names in every place of a request where a model can be named."""
    two = TWO["models"]
    places: dict[str, Callable[[str], Any]] = {
        "models[].id": lambda name: {"method": "linear", "models": [two[0], {"id": name}]},
        "base_model": lambda name: {"method": "ties", "base_model": name, "models": two},
        "parameters.base_model": lambda name: {
            "method": "ties", "parameters": {"base_model": name}, "models": two
        },
        "tokenizer_source": lambda name: {**TWO, "tokenizer_source": name},
        "chat_template": lambda name: {**TWO, "chat_template": name},
        "vocabulary": lambda name: {**TWO, "vocabulary": {"mode": f"model:{name}"}},
        "tokens": lambda name: {
            **TWO, "vocabulary": {"mode": "union", "tokens": {"<s>": {"source": name}}}
        },
        "slices": lambda name: {
            "method": "passthrough",
            "slices": [{"sources": [{"model": name, "layer_range": [0, 1]}]}],
        },
        "stage": lambda name: {"recipe": _yaml(
            {"name": name, "method": "linear", "models": ["capitals", "elements"]}
        )},
        "recipe": lambda name: {"recipe": _yaml(
            {"merge_method": "linear", "models": [
                {"model": name, "parameters": {"weight": 1}}, {"model": "capitals"}]}
        )},
        "recipe of mappings": lambda name: {"recipe": _yaml(
            {"merge_method": "linear", "models": [
                {"model": {"model": {"path": name}, "lora": {"path": name}}}, {"model": "base"}]}
        )},
        "recipe's tokenizer": lambda name: {"recipe": _yaml(
            {"merge_method": "linear", "models": [{"model": "base"}, {"model": "capitals"}],
             "parameters": {"weight": 1}, "tokenizer": {"source": name}}
        )},
        "recipe's base": lambda name: {"recipe": _yaml(
            {"merge_method": "ties", "base_model": name, "models": [{"model": "capitals"}],
             "parameters": {"weight": 1, "density": 0.5}}
        )},
    }  # fmt: skip
    for place, made in places.items():
        for name in NAMES:
            sent = post(f"{API}/experiments/plan", made(name))
            allowed = (200, 422) if (place, name) in HARMLESS or place == "stage" else (422,)
            yield case("names of models", f"{place}: {name[:60]!r}", sent, *allowed)
    for key in ("out_path", "output", "output_dir", "out", "folder", "cache", "device", "hub_id"):
        sent = post(f"{API}/experiments/plan", {**TWO, key: "../outside"})
        yield case("names of models", key, sent, 422)
    for name in ("../x", "..", "a/b", "a\\b", "\r\nX: y", "<script>alert(1)</script>", "\x1b[2J"):
        sent = post(f"{API}/experiments/plan", {**TWO, "name": name})
        yield case("names of models", f"name: {name!r}", sent, 200)


def _yaml(content: Any) -> str:
    return json.dumps(content)  # what is JSON is YAML


# Who asks


def hosts(port: int) -> Iterator[Case]:
    """Names that the service is not known by, and such as are no names."""
    health = f"{API}/health"
    for host in (
        *("evil.com", "127.0.0.1.evil.com", "evil.com:80", "localhost.evil.com", "localhost.", "*"),
        *("7f000001.rbndr.us", "127.0.0.1.nip.io", "0.0.0.0", "10.0.0.1", "169.254.169.254", "0"),
        *("2130706433", "0x7f000001", "127.1", "[::]", "[::ffff:127.0.0.1]", "[::1]evil.com"),
        *("127.0.0.1:evil", "127.0.0.1@evil.com", "evil.com#127.0.0.1", "127.0.0.1/../", "::1"),
        *("127.0.0.1:80:80", "127.0.0.1,evil.com", "127.0.0.1 evil.com", "localhost\\evil.com"),
        *("127.0.0.1:999999", "[::1", "::1]", "[127.0.0.1]", "\xe9vil", "a" * 3000, " ", "-"),
    ):
        sent = request("GET", health, host=host)
        yield case("hosts", repr(host[:40]), sent, 421, 400)
        yield case("hosts", f"DELETE {host[:40]!r}", request("DELETE", health, host=host), 421, 400)
    yield case("hosts", "none", request("GET", health, host=None), 400)
    twice = request("GET", health, headers=[("Host", "127.0.0.1")])
    yield case("hosts", "twice", twice, 400)
    twice = request("GET", health, headers=[("Host", "evil.com")])
    yield case("hosts", "a second one", twice, 400)
    for first in (f"GET http://evil.com{health} HTTP/1.1", f"GET {health} HTTP/1.0"):
        yield case("hosts", first, f"{first}\r\n\r\n".encode(), 400, 404)
    for host in ("localhost", "LOCALHOST", "127.0.0.1", f"127.0.0.1:{port}", "[::1]", "[::1]:80"):
        yield case("hosts", f"known: {host}", request("GET", health, host=host), 200)


def origins(port: int) -> Iterator[Case]:
    """Pages of other sites."""
    health, create = f"{API}/health", f"{API}/experiments"
    here = f"127.0.0.1:{port}"
    for origin in (
        *("null", "http://evil.com", "https://evil.com", "http://localhost", "file://", "", "*"),
        *(f"http://{here}.evil.com", f"http://{here}@evil.com", f"http://evil.com#{here}"),
        *("http://127.0.0.1", "http://127.0.0.1:1", f"http://{here}/", f"ftp://{here}", here),
        *(
            "http://[",
            "http://a]b",
            "http://[::1",
            "http://\xe2\x84\x80.com",
            "chrome-extension://x",
        ),
        *("javascript:alert(1)", f"http://{here} http://evil.com", "http://" + "a" * 9000),
    ):
        for method, path, body in (("GET", health, None), ("POST", create, b"{}")):
            sent = request(method, path, body, [("Origin", origin)], host=here)
            yield case("origins", f"{method} {origin[:40]!r}", sent, 403)
    for site in ("cross-site", "same-site", "x"):
        for more in ([], [("Sec-Fetch-Mode", "no-cors")], [("Sec-Fetch-Mode", "cors")]):
            sent = request("GET", health, headers=[("Sec-Fetch-Site", site), *more])
            yield case("origins", f"{site} {more}", sent, 403)
        navigate = [("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", "navigate")]
        sent = request("POST", create, b"{}", navigate)
        yield case("origins", f"{site}, a form that is sent", sent, 403)
    twice = [("Origin", f"http://{here}"), ("Origin", "http://evil.com")]
    yield case("origins", "two", request("GET", health, headers=twice, host=here), 403)
    own = [("Origin", f"http://{here}"), ("Sec-Fetch-Site", "same-origin")]
    allowed = request("GET", health, headers=own, host=here)
    yield case("origins", "its own", allowed, 200, check=_no_cors)
    preflight = [("Origin", "http://evil.com"), ("Access-Control-Request-Method", "POST")]
    sent = request("OPTIONS", create, headers=preflight, host=here)
    yield case("origins", "preflight", sent, 403, check=_no_cors)
    form = json.dumps(TWO).encode()
    for kind in (
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
        *("text/json", "application/json-patch+json", "application/jsonx", "text/plain; a=/json"),
    ):
        for path in (create, f"{create}/plan", f"{create}/exp-0/cancel"):
            sent = request("POST", path, form, [("Content-Type", kind)])
            yield case("origins", f"{kind} to {path}", sent, 415)
    bare = request("POST", create, form, [("Content-Type", "")])
    yield case("origins", "no kind", bare, 415)


def _no_cors(answer: Answer) -> str:
    allowed = [name for name in answer.headers if name.startswith("access-control")]
    return f"CORS: {allowed}" if allowed else ""


ROUTES = (
    *(("GET", f"{API}/{path}") for path in ("health", "models", "experiments", "openapi.json")),
    *(("POST", f"{API}/{path}") for path in ("experiments", "experiments/plan")),
    *(("GET", f"{API}/experiments/KEY{end}") for end in ("", "/events", "/download", "/report")),
    *(("GET", f"{API}/experiments/KEY{end}") for end in ("/findings", "/comparison")),
    ("GET", f"{API}/experiments/KEY/files/config.json"),
    ("DELETE", f"{API}/experiments/KEY"),
    *(("POST", f"{API}/experiments/KEY{end}") for end in ("/cancel", "/evaluation")),
)


def tokens(key: str) -> Iterator[Case]:
    """Wrong tokens on every route; then the right one."""
    encoded = base64.b64encode(f"user:{TOKEN}".encode()).decode()
    wrong: dict[str, Headers] = {
        "none": [],
        "another": [("Authorization", f"Bearer {TOKEN[:-1]}x")],
        "a part": [("Authorization", f"Bearer {TOKEN[:-1]}")],
        "too much": [("Authorization", f"Bearer {TOKEN}x")],
        "empty": [("Authorization", "Bearer ")],
        "basic": [("Authorization", f"Basic {encoded}")],
        "bare": [("Authorization", TOKEN)],
        "not ASCII": [("Authorization", "Bearer t\xf6k\xe9n\xff")],
        "long": [("Authorization", "Bearer " + "a" * 20_000)],
        "upper case": [("Authorization", f"Bearer {TOKEN.upper()}")],
        "two": [("Authorization", "Bearer x"), ("Authorization", f"Bearer {TOKEN}")],
        "a cookie": [("Cookie", f"{COOKIE}=0000")],
        "an empty cookie": [("Cookie", f"{COOKIE}=; {COOKIE}=")],
        "a long cookie": [("Cookie", f"{COOKIE}=" + "a" * 20_000)],
        "another's cookie": [("Cookie", f"x{COOKIE}={cookie_of(TOKEN)}")],
        "in another header": [("X-Token", TOKEN), ("Proxy-Authorization", f"Bearer {TOKEN}")],
    }
    for name, headers in wrong.items():
        for method, path in ROUTES:
            body = b"{}" if method == "POST" else None
            sent = request(method, path.replace("KEY", key), body, headers)
            yield case("tokens", f"{name}: {method} {path}", sent, 401, 429)
    for path in (f"{API}/health?token={TOKEN}", f"{API}/health?access_token={TOKEN}"):
        yield case("tokens", path, request("GET", path), 401, 429)
    for path in ("/loginx", "/login/../api/model-merger/health", "/LOGIN", "/login%2f", "/statics"):
        yield case("tokens", path, request("GET", path), 401, 429)
    for path in ("/static/..%2fapi/model-merger/health", f"/static/../..{API}/models"):
        yield case("tokens", path, request("GET", path), 404, 429)
    html = [("Accept", "text/html")]
    yield case("tokens", "a browser", request("GET", "/", headers=html), 303, 429)
    for method, path in ROUTES[:4]:
        for name, headers in {
            "the token": [("Authorization", f"Bearer {TOKEN}")],
            "its cookie": [("Cookie", f"a=b; {COOKIE}={cookie_of(TOKEN)}; c=d")],
        }.items():
            yield case("tokens", f"{name}: {path}", request(method, path, headers=headers), 200)


# How they ask


def framing() -> Iterator[Case]:
    """What is no HTTP, or could be read in two ways."""
    health, create = f"{API}/health", f"{API}/experiments"
    body = b'{"x":1}'
    length, chunked = ("Content-Length", "7"), ("Transfer-Encoding", "chunked")
    hidden = b"GET /hidden HTTP/1.1\r\nHost: evil.com\r\n\r\n"
    for name, headers, content in (
        ("CL.TE", [length, chunked], b"0\r\n\r\n" + hidden),
        ("TE.CL", [chunked, length], b"7\r\n" + body + b"\r\n0\r\n\r\n"),
        ("two lengths", [length, ("Content-Length", "50")], body + hidden),
        ("two lengths in one", [("Content-Length", "7, 50")], body),
        ("a length below 0", [("Content-Length", "-1")], body),
        ("a length with a sign", [("Content-Length", "+7")], body),
        ("a length in hex", [("Content-Length", "0x7")], body),
        ("a length with a space", [("Content-Length", "7 7")], body),
        ("other digits", [("Content-Length", "\xb2")], body),
        ("an endless length", [("Content-Length", "9" * 400)], body),
        ("two encodings", [chunked, chunked], b"0\r\n\r\n"),
        ("gzip, chunked", [("Transfer-Encoding", "gzip, chunked")], b"0\r\n\r\n"),
        ("an unknown encoding", [("Transfer-Encoding", "xchunked")], b"0\r\n\r\n"),
        ("a tab", [("Transfer-Encoding", "\tchunked")], b"0\r\n\r\n"),
        ("a space before the colon", [("Transfer-Encoding ", "chunked")], b"0\r\n\r\n"),
        ("a wrong chunk", [chunked], b"zz\r\n" + body),
        ("a chunk below 0", [chunked], b"-7\r\n" + body),
        ("a chunk without end", [chunked], b"f" * 64 + b"\r\n" + body),
        ("a chunk with much beside it", [chunked], b"1;" + b"x" * 70_000 + b"\r\na\r\n"),
    ):
        sent = request("POST", create, content, headers)
        right = {"a tab": (422, 400)}.get(name, (400, 408, 413))
        yield case("framing", name, sent, *right, check=_one_answer)
    for name, sent in (
        ("HTTP/0.9", b"GET /\r\n\r\n"),
        ("HTTP/0.9 with a path", f"GET {health}\r\n\r\n".encode()),
        ("HTTP/2.0", f"GET {health} HTTP/2.0\r\nHost: 127.0.0.1\r\n\r\n".encode()),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n"),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300)),
        ("bytes", bytes(range(256)) * 4 + b"\r\n\r\n"),
        ("zeros", bytes(70_000)),
        ("nothing but lines", b"\r\n" * 200 + b"x\r\n\r\n"),
        ("SSH", b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
        ("a path with bytes", b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
        ("a path with a space", b"GET /a b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
        ("a header without a name", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n: x\r\n\r\n"),
        ("a header with NUL", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\0b\r\n\r\n"),
        (
            "a folded header",
            b"GET /x HTTP/1.1\r\nConnection: close\r\nHost: 127.0.0.1\r\n\tevil.com\r\n\r\n",
        ),
        ("a bare CR", b"GET / HTTP/1.1\rHost: 127.0.0.1\r\r"),
        ("101 headers", request("GET", health, headers=[("X", "y")] * 101)),
        ("3000 headers", request("GET", health, headers=[("X", "y")] * 3000)),
        ("a long header", request("GET", health, headers=[("X", "y" * 200_000)])),
        ("a long path", request("GET", "/" + "a" * 200_000)),
    ):
        ended = sent if sent.endswith(b"\r\n\r\n") else [sent, 0.2, b"\r\n\r\n"]
        yield case("framing", name, ended, 400, 404, 421, check=_one_answer)
    for name, sent in (
        ("a long query", request("GET", f"{API}/experiments?before={'9' * 30_000}")),
        ("a query of bytes", request("GET", f"{API}/experiments?before=%00%ff&limit=%ed%a0%80")),
        ("a number in other digits", request("GET", f"{API}/experiments?limit=%d9%a1")),
        ("numbers out of range", request("GET", f"{API}/experiments?limit=-1&before=1e9")),
        ("beyond 64 bits", request("GET", f"{API}/experiments?before=9223372036854775808")),
    ):
        yield case("framing", name, sent, 422)
    thousands = "&".join(f"a{index}=1" for index in range(3000))
    yield case("framing", "a query of 3000", request("GET", f"{API}/experiments?{thousands}"), 200)
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "eA==")]
    plain = request("GET", health, headers=[*upgrade, ("Sec-WebSocket-Version", "13")])
    ended = [plain, request("GET", health)]
    yield case("framing", "a web socket", ended, 200, 400, 426)
    h2c = [("Connection", "Upgrade, HTTP2-Settings, close"), ("Upgrade", "h2c")]
    yield case("framing", "h2c", request("GET", health, headers=h2c), 200, 400)
    for name in ("X-Forwarded-Host", "X-Original-URL", "X-Rewrite-URL", "Forwarded"):
        sent = request("GET", f"{API}/nothing", headers=[(name, f"{API}/health")])
        yield case("framing", name, sent, 404)
    override = [("X-HTTP-Method-Override", "DELETE"), ("X-Method-Override", "DELETE")]
    yield case("framing", "an override", request("POST", f"{API}/health", b"{}", override), 405)


def _one_answer(answer: Answer) -> str:
    count = len(re.findall(rb"HTTP/1\.1 \d{3} ", answer.raw))
    return f"{count} answers" if count > 1 else ""


def methods(key: str) -> Iterator[Case]:
    """Methods that a route does not have."""
    for path in dict.fromkeys(path for _, path in ROUTES):
        right = {method for method, other in ROUTES if other == path}
        if "GET" in right:
            right.add("HEAD")
        others = {"GET", "POST", "DELETE", "HEAD"} - right
        if path.endswith("experiments/plan"):
            others -= {"GET", "HEAD", "DELETE"}  # an experiment that is called so
        for method in (*sorted(others), "PUT", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "X"):
            sent = request(method, path.replace("KEY", key))
            yield case("methods", f"{method} {path}", sent, 405, 400, check=_allows(right))
    for path in ("*", "x", "http://127.0.0.1", "//", "/.", "/api", f"{API}", f"{API}/"):
        yield case("methods", f"OPTIONS {path}", request("OPTIONS", path), 404, 405, 400)
    for path in ("/health/", "/models/", "/experiments/", "/experiments/plan/", "//health"):
        where = f"{API}{path}"
        yield case("methods", where, request("GET", where), 404, check=_no_location)
        evil = request("GET", where, host="127.0.0.1:12345")
        yield case("methods", f"{where} elsewhere", evil, 404, check=_no_location)


def _allows(methods: Set[str]) -> Callable[[Answer], str]:
    def check(answer: Answer) -> str:
        said = answer.headers.get("allow", "")
        right = answer.status != 405 or {*said.split(", ")} == methods
        return "" if right else f"Allow: {said}, expected {sorted(methods)}"

    return check


def _no_location(answer: Answer) -> str:
    return f"leads to {answer.headers['location']}" if "location" in answer.headers else ""


def bodies() -> Iterator[Case]:
    """Bodies that are too large, or are not what they are said to be."""
    plan = f"{API}/experiments/plan"
    large = b'{"name":"' + b"x" * BODY + b'"}'
    pieces = b"".join(b"%x\r\n%s\r\n" % (60_000, b"y" * 60_000) for _ in range(40)) + b"0\r\n\r\n"
    small = b"".join(b"1\r\n \r\n" for _ in range(100_000)) + b"0\r\n\r\n"
    chunked = [("Transfer-Encoding", "chunked")]
    for path in (plan, f"{API}/experiments", f"{API}/experiments/x/cancel", f"{API}/x", "/login"):
        yield case("bodies", f"too large for {path}", request("POST", path, large), 413)
        sent = request("POST", path, pieces, chunked)
        yield case("bodies", f"too large in chunks for {path}", sent, 413, 408)
        sent = request("POST", path, b"{", [("Content-Length", str(10**12))])
        yield case("bodies", f"said to be too large for {path}", sent, 413)
    more = [("Connection", "keep-alive")]
    both = [request("POST", plan, large, more), request("GET", f"{API}/health")]
    yield case("bodies", "too large, and another request", both, 413, check=_and_another)
    yield case("bodies", "of GET", request("GET", f"{API}/health", large), 413)
    yield case("bodies", "in the smallest chunks", request("POST", plan, small, chunked), 422, 408)
    early = [request("POST", plan, b"{}", [("Content-Length", "50")]), 0.1]
    yield case("bodies", "shorter than said", early, 408)
    late = request("POST", plan, b"{}" + b"x" * 500, [("Content-Length", "2")])
    yield case("bodies", "longer than said", late, 422)
    packed = b"\x1f\x8b\x08\0\0\0\0\0\0\3" + bytes(500)
    for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
        sent = request("POST", plan, packed, [("Content-Encoding", coding)])
        yield case("bodies", coding, sent, 400, 415, 422)
    for name, body in (
        ("nothing", b""), ("a space", b" "), ("NUL", b"\0"), ("a byte", b"\xff"),
        ("BOM", b"\xef\xbb\xbf{}"), ("UTF-16", '{"name": "x"}'.encode("utf-16")),
        ("UTF-32", '{"name": "x"}'.encode("utf-32")), ("UTF-7", b"+AHsAIg-name+ACI-"),
        ("XML", b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
        ("pickle", b"\x80\4\x95\0"), ("half", b'{"method": "lin'), ("two", b"{}{}"),
        ("a list", b"[]"), ("a number", b"1"), ("null", b"null"), ("a text", b'"a"'),
        ("comments", b"{/**/}"), ("NaN alone", b"NaN"), ("a comma", b'{"a":1,}'),
        ("twice", b'{"method":"x","method":"y"}'),
    ):  # fmt: skip
        yield case("bodies", name, request("POST", plan, body), 400, 422)
    expect = [("Expect", "100-continue")]
    yield case("bodies", "100-continue", request("POST", plan, b"{}", expect), 422)
    refused = request("POST", plan, large, expect, host="evil.com")
    yield case("bodies", "100-continue, refused", refused, 421)


def _and_another(answer: Answer) -> str:
    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", answer.raw)
    return "" if statuses == [b"413", b"200"] else f"answers {statuses}"


def contents() -> Iterator[Case]:
    """JSON and recipes that blow up, and values that are none."""
    plan, create = f"{API}/experiments/plan", f"{API}/experiments"
    evaluation = f"{create}/exp-0123456789abcdef/evaluation"  # read before it is looked for

    def two(**more: str) -> str:
        """A request for a merge, with entries as JSON that may be wrong."""
        given = {"method": '"linear"', "models": json.dumps(TWO["models"]), **more}
        return "{" + ", ".join(f'"{name}": {value}' for name, value in given.items()) + "}"

    def deep(depth: int) -> str:
        return '{"a":' * depth + "1" + "}" * depth

    for depth in (30, 60, 200, 490, 520, 700, 990, 1100, 5000, 100_000):
        for name, text in (
            ("parameters", two(parameters=deep(depth))),
            (
                "a weight",
                two(models=f'[{{"id": "base", "weight": {deep(depth)}}}, {{"id": "base"}}]'),
            ),
            ("an unknown entry", two(x=deep(depth))),
            ("lists", two(include="[" * depth + "]" * depth)),
        ):
            yield case("contents", f"{name}, {depth} deep", post(plan, text), 400, 413, 422)
        sent = post(evaluation, deep(depth))
        yield case("contents", f"evaluation, {depth} deep", sent, 400, 413, 422)
    for value in (
        *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "9" * 5000, "1e-400"),
        *('"\\ud800"', '"a\\udfffb"', '"\\u0000"', "null", "true", "[]", "{}", '""', '"1"', "-1"),
        *('"' + "x" * 100_000 + '"', "0.1" + "0" * 90_000, '{"value": {}}', '[{"filter": 1}]'),
    ):
        weighted = f'[{{"id": "base", "weight": {value}}}, {{"id": "capitals"}}]'
        dare = {"method": '"dare"', "base_model": '"base"'}
        for name, text in (
            ("a weight", two(models=weighted)),
            ("normalize", two(parameters=f'{{"normalize": {value}}}')),
            ("a parameter", two(**dare, parameters=f'{{"drop_rate": {value}}}')),
            ("a seed", two(**dare, parameters=f'{{"seed": {value}}}')),
            ("t", two(method='"slerp"', parameters=f'{{"alpha": {value}}}')),
        ):
            yield case("contents", f"{name} of {value[:30]}", post(plan, text), 200, 400, 422)
        for name in ("method", "models", "base_model", "recipe", "findings", "evaluation", "dtype"):
            sent = post(plan, two(**{name: value}))
            yield case("contents", f"{name}: {value[:30]}", sent, 200, 400, 422)
        for name in ("prompts", "text", "max_new_tokens", "chat"):
            sent = post(evaluation, f'{{"{name}": {value}}}')
            yield case("contents", f"{name}: {value[:30]}", sent, 400, 404, 422)
    for key_text in (
        '"\\ud800"',
        '"\\u0000"',
        '""',
        '"__class__"',
        '"__proto__"',
        '"model_config"',
    ):
        entry = f"{{{key_text}: 1}}"
        for path, text in ((plan, entry), (evaluation, entry), (plan, two(parameters=entry))):
            yield case("contents", f"the key {key_text} for {path}", post(path, text), 422)
    many = ",".join(f'"k{index:x}":1' for index in range(80_000))
    for path in (plan, create, evaluation):
        sent = post(path, "{" + many + "}")
        yield case("contents", f"80,000 entries for {path}", sent, 413, check=_short)
        sent = post(path, '{"recipe": "x",' + many + "}")
        yield case("contents", f"80,000 beside a recipe for {path}", sent, 413, check=_short)
    few = ",".join(f'"k{index:x}":1' for index in range(15_000))
    for path in (plan, create, evaluation):
        for more in ("", '"recipe": "x",'):
            sent = post(path, "{" + more + few + "}")
            yield case("contents", f"15,000 entries for {path}", sent, 422, check=_short)
    hidden = '{"name": "\u2200", "include": [' + "[]," * 50_000 + "[]]}"
    for coding in ("utf-16", "utf-32", "utf-16-le"):
        sent = request("POST", plan, hidden.encode(coding))
        yield case("contents", f"many lists in {coding}", sent, 400)
    unclosed = request("POST", plan, b'"' + b'\\"' * 490_000)
    yield case("contents", "a text without end", unclosed, 400, 422)
    lists = {
        "prompts": (evaluation, '{"prompts": [' + "1," * 300_000 + "1]}"),
        "empty lists": (plan, two(parameters='{"a": [' + "[]," * 300_000 + "1]}")),
        "models": (plan, two(models="[" + '{"id":"base"},' * 60_000 + '{"id":"base"}]')),
        "models that are none": (plan, two(models="[" + "1," * 300_000 + "1]")),
        "weights": (plan, two(models='[{"id":"base","weight":[' + "1," * 300_000 + "1]}]")),
    }  # fmt: skip
    for name, (path, text) in lists.items():
        less = text.replace("1," * 300_000, "1," * 2_000).replace("[]," * 300_000, "[]," * 9_900)
        if less != text:
            sent = post(path, less)
            yield case("contents", f"as many {name} as may be", sent, 200, 422, check=_short)
        yield case("contents", f"many {name}", post(path, text), 413, check=_short)
    for name, text in _bombs():
        yield case("contents", name, post(plan, {"recipe": text}), 422, 200, check=_short)
    for pattern in (
        *("(a+)+$", "(a|a)*b", "(.*)*x", "a{99999}", "(?P<a>", "[[", "*" * 5000, "?" * 5000),
        *("**/**/**/**/**/**/x", "[!a-", "{a,b}" * 3000, "\\", "../*", "/etc/*", "a*" * 2000 + "b"),
    ):
        for name in ("include", "exclude"):
            sent = post(plan, {**TWO, name: [pattern] * 20})
            yield case("contents", f"{name} {pattern[:30]}", sent, 422, 200, check=_short)
    prompt = post(create, {**TWO, "evaluation": {"prompts": []}})
    yield case("contents", "an evaluation by nothing", prompt, 422)


def _bombs() -> Iterator[tuple[str, str]]:
    """Recipes whose few bytes come to much."""
    head = "merge_method: linear\nmodels: [{model: base}, {model: capitals}]\n"
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    yield "a billion laughs", "\n".join(levels) + "\n" + head
    yield "an anchor in itself", f"{head}parameters: &a {{x: *a}}"
    yield "a tag of Python", f'{head}parameters: !!python/object/apply:os.system ["id"]'
    yield "a tag of a file", f"{head}parameters: !include /etc/passwd"
    yield "merge keys", f"{head}x: &x {{a: 1}}\nparameters: {{<<: *x, <<: *x}}"
    yield "brackets", head + "x: " + "[" * 90_000
    yield "braces", head + "x: " + "{a: " * 40_000
    yield "dashes", head + "x:\n" + "- " * 90_000
    yield "questions", head + "? " * 90_000
    yield "documents", "---\n" * 60_000
    yield "a long line", head + "x: " + "a" * 190_000
    yield "a long key", "a" * 190_000 + ": 1"
    yield "a long model", f"merge_method: linear\nmodels: [{{model: {'a' * 190_000}}}]"
    yield (
        "many adapters",
        f"merge_method: linear\nmodels: [{{model: base{'+capitals-lora' * 12_000}}}]",
    )
    yield "a long number", f"{head}parameters: {{weight: {'9' * 190_000}}}"
    yield "a number in hex", f"{head}parameters: {{weight: 0x{'f' * 100_000}}}"
    yield "base 60", f"{head}parameters: {{weight: {'1:' * 50_000}1}}"
    yield "a date", f"{head}parameters: {{weight: 2001-12-14t21:59:43.10-05:00}}"
    yield "NUL", f"{head}x: a\0b"
    yield "a surrogate", f'{head}"\\ud800": 1'
    yield "a surrogate in a template", f'{head}chat_template: "{{{{ \\ud800 }}}}"'
    yield "lines of another kind", head.replace("\n", "\u2028")
    yield (
        "tokens",
        f"{head}vocabulary: {{tokens: {{{', '.join(f't{n}: base' for n in range(9000))}}}}}",
    )
    models = "".join(f"  - model: base{'+capitals-lora' * n}\n" for n in range(15))
    yield "15 models", f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n{models}"
    one = (
        "name: s{n}\nmerge_method: linear\nmodels: [{{model: {m}}}, {{model: base}}]\n"
        "parameters: {{weight: 1}}\n"
    )
    stages = (one.format(n=n, m=f"s{n - 1}" if n else "capitals") for n in range(1500))
    yield "1500 stages", "---\n".join(stages)
    source = "  - sources: [{model: base, layer_range: [0, 2]}]\n"
    yield "3500 slices", "merge_method: passthrough\nslices:\n" + source * 3500
    wide = "[{sources: [{model: base, layer_range: [0, 999999999999]}]}]"
    yield "a range", f"merge_method: passthrough\nslices: {wide}"


def _short(answer: Answer) -> str:
    return f"{len(answer.body):,} bytes" if len(answer.body) > 10**6 else ""


def ranges(paths: Sequence[tuple[str, bytes]]) -> Iterator[Case]:
    """Parts of downloads: each answer has just the bytes that it says."""
    for path, whole in paths:
        length = len(whole)
        for wanted in (
            *("bytes=0-0", "bytes=5-9", f"bytes={length - 1}-", "bytes=-1", f"bytes=-{length + 9}"),
            *(f"bytes=0-{length + 5}", f"bytes={length // 2}-{length // 2 + 300_000}", "bytes=0-"),
            *(f"bytes={length}-", "bytes=99999999999999-", "bytes=-0", f"bytes=0-{'9' * 30}"),
            *(f"bytes={'9' * 30}-", "bytes=9-5", "bytes=a-b", "bytes=0x1-0x2", "bytes=-", "bytes="),
            *("bytes", "", "lines=1-2", "BYTES=0-1", "bytes=--5", "bytes=-5-", "bytes=+1-2"),
            *("bytes=1-2,4-5", "bytes=0-,0-", "bytes=0-9,5-14", "bytes=1-2,x", "bytes=1.0-2.0"),
            *("bytes=\xb2-\xb3", "bytes=0-0\t", "bytes= 1-2", "bytes=1 - 2", "none", "bytes=1-2;3"),
            "bytes=" + ",".join(f"{n}-{n}" for n in range(2000)),
            "bytes=" + ",".join(["0-"] * 5000),
        ):
            sent = request("GET", path, headers=[("Range", wanted)])
            check = _part_of(whole, _span(wanted, length))
            allowed = (200, 206, 416) if wanted.lower().startswith("bytes=") else (200,)
            yield case("ranges", f"{path} {wanted[:40]!r}", sent, *allowed, check=check)
        for validator in ('"x"', "*", 'W/"x"', "Thu, 01 Jan 1970 00:00:00 GMT", "\xff", ""):
            headers = [("Range", "bytes=0-3"), ("If-Range", validator)]
            sent = request("GET", path, headers=headers)
            yield case("ranges", f"If-Range {validator}", sent, 200, check=_part_of(whole))
        twice = [("Range", "bytes=0-0"), ("Range", "bytes=5-9")]
        sent = request("GET", path, headers=twice)
        yield case("ranges", "two headers", sent, 200, 206, 416, check=_part_of(whole))


def _span(wanted: str, length: int) -> tuple[int, int] | None:
    """What a Range asks for as RFC 9110 (14.1.2) has it, empty if there is no such part.

    None for what is no single range, or is none at all.
    """
    found = re.fullmatch(r"bytes=(\d{0,19})-(\d{0,19})", wanted, re.ASCII)
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        return max(0, length - int(last)), length
    if last and int(last) < int(first):
        return None
    stop = min(int(last) + 1, length) if last else length
    return min(int(first), length), stop


def _part_of(whole: bytes, span: tuple[int, int] | None = None) -> Callable[[Answer], str]:
    """Whether an answer is what it says, and the part that was asked for, if that is known."""
    status = 0 if span is None else 206 if span[0] < span[1] else 416

    def check(answer: Answer) -> str:
        expected, said = whole, answer.headers.get("content-range")
        if status and answer.status != status:
            return f"{answer.status}, expected {status}"
        if answer.status == 416:
            return "" if said == f"bytes */{len(whole)}" else f"Content-Range: {said}"
        if answer.status == 206:
            found = re.fullmatch(rf"bytes (\d+)-(\d+)/{len(whole)}", said or "")
            if found is None:
                return f"Content-Range: {said}"
            part = int(found[1]), int(found[2]) + 1
            if span is not None and part != span:
                return f"{part}, expected {span}"
            expected = whole[slice(*part)]
        return "" if answer.body == expected else f"{len(answer.body)} other bytes"

    return check


def slow(times: "Times") -> Iterator[Case]:
    """Clients that take their time; the server takes no more than it says."""
    health, plan = f"{API}/health", f"{API}/experiments/plan"
    start = f"GET {health} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
    whole = start + b"\r\n"
    drip: list[bytes | float] = [
        part for n in range(60) for part in (b"X: y\r\n", times.header / 8)
    ]
    begun = request("POST", plan, b"{", [("Content-Length", "5000"), ("Connection", "keep-alive")])
    body: list[bytes | float] = [part for _ in range(60) for part in (b" ", times.body / 8)]
    refused = begun.replace(b"127.0.0.1", b"evil.com")
    within = times.header + SLOWEST

    def after(seconds: float) -> Callable[[Answer], str]:
        def check(answer: Answer) -> str:
            if not answer.closed:
                return "is not closed"
            slack = 1 + seconds / 4
            return "" if answer.seconds < seconds + slack else f"after {answer.seconds:.1f} s"

        return check

    def now_and_then(sent: bytes, pause: float) -> list[bytes | float]:
        return [part for _ in range(60) for part in (sent, pause)]

    lines = now_and_then(b"\r\n", times.header / 8)
    letters = [part for each in start[:30] for part in (bytes([each]), times.header / 9)]
    chunked = begun[:-1].replace(b"Content-Length: 5000", b"Transfer-Encoding: chunked")
    chunks = now_and_then(b"1\r\n \r\n", times.body / 8)
    body_time = times.body + SLOWEST
    # An answer that has come is no reason to be patient with what follows it.
    for name, parts, statuses, seconds in (
        ("nothing", [], (0,), within),
        ("half a line", [b"GET /"], (0,), within),
        ("a header now and then", [start, *drip], (0,), within),
        ("a byte now and then", letters, (0,), within),
        ("empty lines now and then", lines, (0, 400), within),
        ("a second request now and then", [whole, 0.3, start, *drip], (200,), within + 0.3),
        ("half a request behind another", [whole + start, *drip], (200,), within + 0.3),
        ("two, and half another", [whole + whole + start, *drip], (200,), within + 0.3),
        ("a body now and then", [begun, *body], (408,), body_time),
        ("a body that stops", [begun], (408,), body_time),
        ("a body that was refused, now and then", [refused, *body], (421,), within + 1),
        ("a chunk now and then", [chunked, *chunks], (408,), body_time),
        ("nothing after an answer", [whole], (200,), within),
    ):
        yield Case("slow clients", name, parts, frozenset(statuses), after(seconds))


@dataclass(frozen=True)
class Times:
    """Seconds that the server has for slow clients."""

    header: float
    body: float
    stalled: float

    @property
    def options(self) -> list[str]:
        """Of the command line."""
        values = {"header": self.header, "body": self.body, "stalled": self.stalled}
        return [
            each for name, value in values.items() for each in (f"--{name}-seconds", str(value))
        ]


# The servers


class Target(Server):
    """A server that has no place to write to but its data."""

    def __init__(self, place: Path, name: str, *options: str, token: str = "") -> None:
        (place / name).mkdir()
        (place / "tmp").mkdir(exist_ok=True)
        environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(place / "tmp")}
        environment["LLAMA_MERGE_TOKEN"] = token
        super().__init__(place / name / "data", *options, environment=environment)

    def memory(self) -> int:
        """Bytes that it has held at most."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]

    def descriptors(self) -> int:
        """Files and connections that it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def models_of_strangers(place: Path) -> None:
    """Folders of models that are made to break what looks at them."""
    outside, roots = place / "outside", place / "roots"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (outside / "config.json").write_text(json.dumps({"model_type": SECRET}))
    tiny = ROOT / "examples/tiny_llamas/base"
    for name in ("weights", "config", "pipe", "odd", "surrogate", "license", "list"):
        shutil.copytree(tiny, roots / f"s-{name}")
    for name, file in (("weights", "model.safetensors"), ("config", "config.json")):
        (roots / f"s-{name}" / file).unlink()
        (roots / f"s-{name}" / file).symlink_to(outside / "secret.txt")
    (roots / "s-license/LICENSE").symlink_to(outside / "secret.txt")
    (roots / "s-pipe/config.json").unlink()
    os.mkfifo(roots / "s-pipe/config.json")
    config = json.loads((tiny / "config.json").read_text())
    (roots / "s-odd/config.json").write_text(json.dumps({**config, "model_type": {"a": [1]}}))
    (roots / "s-surrogate/config.json").write_text(json.dumps({**config, "model_type": "\ud800"}))
    (roots / "s-list/config.json").write_text("[]")
    for name, text in {
        "list": "[]",
        "deep": '{"r":' * 20_000 + "1" + "}" * 20_000,
        "odd": '{"r": {"x": "' + "y" * 5000 + '"}, "peft_type": ["a"]}',
        "path": json.dumps({"r": 1, "base_model_name_or_path": str(outside)}),
        "surrogate": '{"r": 1, "base_model_name_or_path": "\\ud800"}',
        "NUL": '{"r": 1, "base_model_name_or_path": "..\\u0000"}',
        "broken": '{"r": 1',
    }.items():
        (roots / f"a-{name}").mkdir()
        (roots / f"a-{name}" / "adapter_config.json").write_text(text)
    for name in (b"n\xff\xfe", b"n\nnew", b"n ..%2f;<script>+", b"n'\"", b"-n", b"n\x1b[2J"):
        folder = os.path.join(os.fsencode(roots), name)
        os.mkdir(folder)
        Path(os.fsdecode(folder), "config.json").write_text("{}")
    (roots / "loop").symlink_to(".")
    (roots / "out").symlink_to(outside)


class Campaign:
    """Sends cases and notes what is wrong with the answers.

    Args:
        place: with all folders of the servers.
        every: of a long list of cases, one in so many is sent.
    """

    def __init__(self, place: Path, every: int = 1) -> None:
        self.place = place
        self.every = every
        prefixes = (sys.prefix, str(ROOT), str(Path.home()), "site-packages", "/proc/")
        self.private = [each for each in (str(place), *prefixes) if len(each) > 5]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.seconds: Counter[str] = Counter()

    def send(self, port: int, cases: Sequence[Case], *, at_once: int = 4, wait: float = 60) -> None:
        """All cases, some of them at once."""
        cases = cases[:: self.every] if len(cases) > LONG else cases
        started = time.monotonic()
        with ThreadPoolExecutor(at_once) as pool:
            answers = pool.map(lambda each: exchange(port, each.parts, wait), cases)
            for each, answer in zip(cases, answers, strict=True):
                self.judge(each, answer)
        self.seconds[cases[0].group] += int(1000 * (time.monotonic() - started))

    def judge(self, each: Case, answer: Answer) -> None:
        """Whether an answer is as it may be."""
        self.counts[each.group] += 1
        self.statuses[answer.status] += 1
        sent = b"".join(part for part in each.parts if isinstance(part, bytes))
        for wrong in self.problems(each, answer, sent):
            self.complain(f"{each.group}: {each.name}: {wrong}")

    def problems(self, each: Case, answer: Answer, sent: bytes) -> Iterator[str]:
        """What is wrong with an answer."""
        if answer.status not in each.allowed:
            yield f"{answer.status}, expected {sorted(each.allowed)}: {answer.raw[:300]!r}"
        yield from self.leaks(answer.raw, sent)
        if answer.status >= 500:
            yield f"status {answer.status}"
        if answer.status >= 400 and not sent.startswith(b"HEAD "):
            yield from error_problems(answer)
        if answer.status and "content-security-policy" not in answer.headers:
            yield "without the headers that every answer has"
        if found := each.check(answer):
            yield found

    def leaks(self, raw: bytes, sent: bytes = b"") -> Iterator[str]:
        """What an answer tells of this machine, and was not in the question."""
        text = raw.decode("utf-8", "replace")
        if SECRET in text:
            yield "holds the secret"
        for each in self.private:
            if each in text and each.encode() not in sent:
                yield f"tells of {each}: {text[max(0, text.index(each) - 100) :][:300]!r}"

    def complain(self, text: str) -> None:
        """Note that something went wrong."""
        self.wrong.append(text)
        print(f"WRONG: {text[:600]}", flush=True)

    def expect(self, group: str, holds: bool, text: str) -> None:
        """Count a case that is no single request."""
        self.counts[group] += 1
        if not holds:
            self.complain(f"{group}: {text}")


def error_problems(answer: Answer) -> Iterator[str]:
    """Whether an error has the form of all errors."""
    if answer.headers.get("content-type") != "application/json":
        yield f"an error as {answer.headers.get('content-type')}"
    try:
        content = json.loads(answer.body)
    except ValueError:
        yield f"an error that is no JSON: {answer.body[:100]!r}"
        return
    if content.keys() != {"success", "error", "problems"} or content["success"] is not False:
        yield f"an error of another form: {str(content)[:200]}"
    elif not isinstance(content["error"], str) or not content["error"]:
        yield f"an error without a text: {str(content)[:200]}"
    elif not all(each.keys() == {"where", "text"} for each in content["problems"]):
        yield f"problems of another form: {str(content)[:200]}"


# Floods


def watchers(campaign: Campaign, server: Target, most: int, place: str = "watchers") -> None:
    """As many watch as may, and when they have gone, others can."""
    key = server.merge()
    sent = request("GET", f"{API}/experiments/{key}/events")
    before = server.descriptors()
    with server.frozen(key):
        for round_ in range(2):
            open_, statuses = [], Counter()  # type: ignore[var-annotated]
            for _ in range(most + 20):
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
                connection.sendall(sent)
                open_.append(connection)
            for connection in open_:
                statuses[parsed(connection.recv(4096)).status] += 1
            campaign.expect(place, statuses == {200: most, 429: 20}, f"round {round_}: {statuses}")
            for connection in open_:  # half of them without a word
                if round_:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.close()
            until(lambda: server.descriptors() <= before + 2)
        campaign.expect(place, server.descriptors() <= before + 2, "connections stay open")
    server.finished(key)


def until(holds: Callable[[], bool], seconds: float = 20) -> bool:
    """Wait until something holds; whether it does."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def queue(campaign: Campaign, server: Target, most: int) -> None:
    """Many ask for merges at once, each with as much as fits; some are told to wait."""
    long = {"text": "x" * 390_000, "prompts": ["y" * 4000] * 20}
    sent = [
        post(f"{API}/experiments", {**TWO, "name": f"{n}", "evaluation": long}) for n in range(60)
    ]

    def send(part: bytes) -> Answer:
        return exchange(server.port, [part])

    first = send(sent[0])
    with server.frozen(json.loads(first.body)["experiment_id"]):
        with ThreadPoolExecutor(4) as pool:  # of such large ones, more are refused as that
            answers = [first, *pool.map(send, sent[1:])]
        statuses = Counter(answer.status for answer in answers)
        accepted = [json.loads(a.body)["experiment_id"] for a in answers if a.status == 201]
        for answer in answers:
            campaign.judge(case("queue", "flood", sent[0], 201, 429), answer)
        health = server.get("/health")
        there = health["running"] + health["queued"]
        campaign.expect("queue", len(accepted) == there == most, f"{statuses}, {there} open")
        listed = server.ask("GET", f"{API}/experiments?limit=200")
        campaign.expect("queue", listed.status == 200 and len(listed.body) < 10**6, "a long list")
        for key in accepted[::-1]:
            server.cancel(key)
    closed = until(lambda: server.get("/health")["running"] == 0)
    campaign.expect("queue", closed, "what was cancelled runs on")


def plans(campaign: Campaign, server: Target) -> None:
    """Many large requests at once: the server holds a few of them, and answers others meanwhile."""
    values = [f"{index:x}" * 8 for index in range(19_000)]
    text = json.dumps({**TWO, "parameters": {"a": values}})
    slow_health = []

    def ask_health() -> None:
        while not over.wait(0.05):
            answer = exchange(server.port, [request("GET", f"{API}/health")])
            slow_health.append(answer.seconds if answer.status == 200 else 99.0)

    over = threading.Event()
    thread = threading.Thread(target=ask_health)
    thread.start()
    flood = case("plans", "flood", post(f"{API}/experiments/plan", text), 422, 429, 408)
    campaign.send(server.port, [flood] * 40, at_once=40)
    over.set()
    thread.join()
    worst = max(slow_health)
    campaign.expect("plans", worst < 5, f"/health took {worst:.1f} s meanwhile")


def stalled(campaign: Campaign, server: Target, key: str, times: Times) -> None:
    """Clients that ask for much and take nothing of it."""
    before = server.descriptors()
    ask = request(
        "GET", f"{API}/experiments/{key}/download", headers=[("Connection", "keep-alive")]
    )
    open_ = []
    for _ in range(5):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(ask * 20)
        open_.append(connection)
    time.sleep(0.3)
    there = server.descriptors()
    gone = until(lambda: server.descriptors() <= before + 1, times.stalled + 10)
    campaign.expect("stalled readers", there >= before + 5, f"{there - before} connections of 5")
    campaign.expect("stalled readers", gone, "the server waits for who takes nothing")
    for connection in open_:
        connection.close()
    for _ in range(10):  # who leaves in the middle leaves nothing open
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(ask)
            connection.recv(1000)
    gone = until(lambda: server.descriptors() <= before + 1)
    campaign.expect("stalled readers", gone, f"{server.descriptors() - before} stay open")


def rates(campaign: Campaign, server: Target) -> None:
    """A server with low limits: who asks too often is told when to come again."""
    key = [("Authorization", f"Bearer {TOKEN}")]
    wrong = [("Authorization", f"Bearer {TOKEN}x")]

    def waits(answer: Answer) -> str:
        wait = answer.headers.get("retry-after", "")
        return "" if answer.status != 429 or wait.isdecimal() else f"Retry-After: {wait!r}"

    for name, sent, status, at_once, per_second in (
        ("reads", request("GET", f"{API}/health", headers=key), 200, 40, 20),
        ("changes", request("POST", f"{API}/experiments/x/cancel", headers=key), 404, 6, 0.1),
        ("wrong tokens", request("GET", f"{API}/health", headers=wrong), 401, 10, 0.2),
    ):
        statuses, started = Counter(), time.monotonic()  # type: ignore[var-annotated]
        for _ in range(80):
            answer = exchange(server.port, [sent])
            campaign.judge(case("rates", name, sent, status, 429, check=waits), answer)
            statuses[answer.status] += 1
        most = at_once + 1 + per_second * (time.monotonic() - started)
        holds = at_once - 1 <= statuses[status] <= most
        campaign.expect("rates", holds, f"{name}: {statuses}, expected at most {most:.0f}")
        time.sleep(1)


# Campaigns


def hostile(options: argparse.Namespace) -> int:
    """Requests that break rules; how many things went wrong."""
    times = Times(1.5, 1.5, 2.0) if options.short else Times(4.0, 4.0, 6.0)
    with tempfile.TemporaryDirectory(prefix="abuse-") as name:
        place = Path(name).resolve()
        models_of_strangers(place)
        campaign = Campaign(place, every=4 if options.short else 1)
        fast = ["--reads-per-second", "100000", "--changes-per-minute", "1000000"]
        most = {"queue": 10, "watchers": 30}
        limits = [each for name, value in most.items() for each in (f"--{name}", str(value))]
        narrow_limits = ["--reads-per-second", "20", "--changes-per-minute", "6"]
        models = ["--models", str(place / "roots")]
        known = [("Cookie", f"{COOKIE}={cookie_of(TOKEN)}")]
        with (
            Target(place, "open", *models, *fast, *limits, *times.options) as server,
            Target(place, "closed", *fast, token=TOKEN) as closed,
            Target(place, "narrow", *narrow_limits, token=TOKEN) as narrow,
        ):
            attack(campaign, server, closed, narrow, times, most)
            for each in (server, closed, narrow):
                started = time.monotonic()
                answer = exchange(each.port, [request("GET", f"{API}/health", headers=known)])
                seconds, memory = time.monotonic() - started, each.memory()
                campaign.expect("in the end", answer.status == 200, f"/health: {answer.status}")
                campaign.expect("in the end", seconds < SLOWEST, f"/health took {seconds:.1f} s")
                campaign.expect("in the end", memory < MOST_MEMORY, f"{memory:,} bytes of memory")
                name = each.data.parent.name
                print(f"{name}: at most {memory / 1e6:.0f} MB, /health {seconds:.3f} s")
        traces = [
            line for each in (server, closed, narrow) for line in each.said if "Traceback" in line
        ]
        campaign.expect("in the end", not traces, f"{len(traces)} errors in the servers' logs")
        left = sorted(path.name for path in place.iterdir())
        wanted = ["closed", "narrow", "open", "outside", "roots", "tmp"]
        campaign.expect("in the end", left == wanted, f"there is {left}")
        for folder, wanted in (("tmp", []), ("outside", ["config.json", "secret.txt"])):
            found = sorted(path.name for path in (place / folder).iterdir())
            found = [each for each in found if not each.startswith("torchinductor_")]
            campaign.expect("in the end", found == wanted, f"{folder} has {found}")
    for group, count in campaign.counts.items():
        wrong = sum(text.startswith(f"{group}: ") for text in campaign.wrong)
        seconds = f"; {campaign.seconds[group] / 1000:.0f} s" if group in campaign.seconds else ""
        print(f"{group}: {count} cases, {wrong} wrong{seconds}")
    statuses = ", ".join(
        f"{count} x {status}" for status, count in sorted(campaign.statuses.items())
    )
    print(f"hostile: {campaign.counts.total()} cases, {len(campaign.wrong)} wrong; {statuses}")
    return len(campaign.wrong)


def attack(
    campaign: Campaign,
    server: Target,
    closed: Target,
    narrow: Target,
    times: Times,
    most: dict[str, int],
) -> None:
    """All groups of cases, one after the other."""
    listed = server.ask("GET", f"{API}/models")
    for wrong in campaign.leaks(listed.body):
        campaign.complain(f"models of strangers: {wrong}")
    strangers = [
        each for each in listed.json.get("models", []) if each["id"][:2] in ("s-", "a-", "n-")
    ]
    campaign.expect(
        "models of strangers", len(strangers) > 10, f"{len(strangers)}: {listed.body[:300]!r}"
    )
    cases = [
        case("models of strangers", model, post(f"{API}/experiments/plan", asked), 422, 200)
        for each in strangers
        for model in (each["id"], f"base+{each['id']}")
        for asked in [{"method": "linear", "models": [{"id": "base"}, {"id": model}]}]
    ]
    campaign.send(server.port, cases)
    key = server.merge()
    server.finished(key)
    before = server.descriptors()
    campaign.send(server.port, [*slow(times)], at_once=20)
    for made in (addresses(key), models_in_requests(), hosts(server.port), origins(server.port)):
        campaign.send(server.port, [*made])
    campaign.send(closed.port, [*tokens("exp-0123456789abcdef")])
    for made in (framing(), methods(key), bodies(), contents()):
        campaign.send(server.port, [*made])
    files = f"{API}/experiments/{key}"
    paths = [f"{files}/download", f"{files}/files/config.json", f"{files}/report"]
    wholes = [(path, server.ask("GET", path).body) for path in paths]
    campaign.send(server.port, [*ranges(wholes)])
    stalled(campaign, server, key, times)
    plans(campaign, server)
    queue(campaign, server, most["queue"])
    watchers(campaign, server, most["watchers"])
    rates(campaign, narrow)
    until(lambda: server.descriptors() <= before + 2)
    now = server.descriptors()
    campaign.expect("in the end", now <= before + 2, f"{now} files are open, {before} at first")
    there = server.experiment(key)
    campaign.expect("in the end", there["status"] == "completed", "a result has gone")


PROMISES = """
[checks.negative_data_rejection]
expected-statuses = [400, 404, 405, 408, 409, 413, 415, 422, 429]
"""
"""Of `schemathesis.toml`: a body can also be too large, before it is looked at."""

NOT_PROMISED = (
    "positive_data_acceptance",  # a merge can be refused for more than the form of its request
    "ensure_resource_availability",  # what comes out of a merge is there when it is done
    "missing_required_header",
    "ignored_auth",  # without a token there is none; with one, `hostile` tries
)


def schema(options: argparse.Namespace) -> int:
    """What the description of the API promises; how many promises were broken."""
    wanted, examples = (1, 1) if options.short else (10_000, 150)
    done, wrong = 0, 0
    with tempfile.TemporaryDirectory(prefix="abuse-") as name:
        place = Path(name).resolve()
        (place / "schemathesis.toml").write_text(PROMISES)
        seeds = itertools.count(options.seed)
        jobs = 1 if options.short else options.jobs
        run = functools.partial(_run_schemathesis, place, examples, options.short)
        with ThreadPoolExecutor(jobs) as pool:
            while done < wanted and not wrong:
                for count, broken in pool.map(run, itertools.islice(seeds, jobs)):
                    done, wrong = done + count, wrong + broken
    print(f"schema: {done:,} requests, {wrong} promises broken")
    return wrong


def _run_schemathesis(place: Path, examples: int, short: bool, seed: int) -> tuple[int, int]:
    """Requests to a server of their own, and kinds of failures, which are printed."""
    report = place / f"report-{seed}.json"
    limits = ["--reads-per-second", "100000", "--changes-per-minute", "1000000", "--queue", "2"]
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", "--seed", str(seed), "--no-color"),
        *("--exclude-checks", ",".join(NOT_PROMISED), "--continue-on-failure", "--no-shrink"),
        *("--generation-database", "none", "--report", "json", "--report-json-path", str(report)),
        *("--request-timeout", "30", "--max-examples", str(examples)),
        *("--phases", "coverage" if short else "examples,coverage,fuzzing,stateful"),
    ]
    with Target(place, f"server-{seed}", *limits) as server:
        command.append(f"http://127.0.0.1:{server.port}{API}/openapi.json")
        ended = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        seconds = exchange(server.port, [request("GET", f"{API}/health")]).seconds
        memory = server.memory()
    traces = sum("Traceback" in line for line in server.said)
    if not report.is_file():
        print(f"WRONG: schema: no report: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        return 0, 1
    found = json.loads(report.read_text())
    for each in (*found["failures"], *found["errors"]):
        print(f"WRONG: schema, --seed {seed}: {json.dumps(each)[:1500]}")
    if found["failures"] or found["errors"]:
        said = re.split(r"=+ (?:ERRORS|FAILURES) =+", ended.stdout, maxsplit=1)[-1]
        print("\n".join(line[:300] for line in said.splitlines()[:200]))
    cases = found["test_cases"]["generated"]
    phases = ", ".join(f"{name} {phase['status']}" for name, phase in found["phases"].items())
    print(
        f"seed {seed}: {cases:,} requests to {found['operations']['tested']} operations in "
        f"{found['running_time']:.0f} s; {phases}; {traces} errors in the server's log, at most "
        f"{memory / 1e6:.0f} MB, /health {seconds:.3f} s",
        flush=True,
    )
    wrong = len(found["failures"]) + len(found["errors"]) + traces
    return cases, wrong + (seconds > SLOWEST) + (memory > MOST_MEMORY)


CAMPAIGNS = {"hostile": hostile, "schema": schema}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", nargs="*", choices=[*CAMPAIGNS, []], default=[])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of schema")
    parser.add_argument("--jobs", type=int, default=2, help="processes of schema")
    arguments = parser.parse_args(argv)
    wrong = 0
    for name in arguments.campaign or CAMPAIGNS:
        started = time.monotonic()
        wrong += CAMPAIGNS[name](arguments)
        print(f"{name}: {wrong} wrong; {time.monotonic() - started:.0f} s", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
