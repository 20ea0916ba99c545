"""Who may ask, and how much: checked before anything of a request is believed.

The service has no accounts. On loopback it answers this machine; a page that its user visits could
send requests there as well, so names of hosts and origins are checked (DNS rebinding, cross-site
requests). Beyond loopback every request needs the token.
"""

import asyncio
import hashlib
import ipaddress
import json
import re
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.settings import EVERYWHERE, LOOPBACK, Settings

COOKIE = "llama_merge"
LOGIN, STATIC = "/login", "/static/"
"""What needs no token."""

SAFE = ("GET", "HEAD", "OPTIONS")
MOST_CLIENTS = 10_000
MOST_HEADERS = 100
MOST_BODIES = 4
"""Of the largest size, that are held at once; what comes besides must be small."""
SMALL = 2**14
STRANGERS = 2**12
"""Bytes of a body that is read of somebody who has not shown the token."""
MOST_VALUES = 20_000
"""Of a body. JSON of a megabyte can come to many megabytes of empty lists."""
VERSIONS = ("1.0", "1.1")

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""Of JSON; where its end is missing, all that follows."""

_HOST = re.compile(r"(?:\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer that does not say otherwise."""

CLOSE = {"connection": "close"}
"""Of an answer after which the rest of the request is not read."""


class Bucket:
    """Lets through so many a second, and a few seconds' worth at once."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._rate, self._burst = per_second, max(1.0, burst)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str, cost: float = 1.0) -> float:
        """Seconds that a client has to wait; 0 if it need not, and then one is taken."""
        now = time.monotonic()
        left, since = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        short = cost - left
        self._left[client] = (left if short > 0 else left - cost, now)
        if len(self._left) > MOST_CLIENTS:
            self._left.popitem(last=False)
        return max(0.0, short / self._rate)


class RefusalError(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] = {}) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers)


class Guard:
    """The outermost layer of the application.

    Args:
        app: what it guards.
        settings: of the service.
        token: that clients must send; None for none.
    """

    def __init__(self, app: ASGIApp, settings: Settings, token: str | None) -> None:
        self._app = app
        self._settings = settings
        self._token = token
        self._names = {*LOOPBACK, *(name.lower() for name in settings.hosts)}
        everywhere = settings.host in EVERYWHERE
        self._names.add((socket.gethostname() if everywhere else settings.host).lower())
        self._reads = Bucket(settings.reads_per_second, 2 * settings.reads_per_second)
        per_second = settings.changes_per_minute / 60
        self._changes = Bucket(per_second, settings.changes_per_minute)
        self._strangers = Bucket(10, 100)
        self._guesses = Bucket(0.2, 10)
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            headers = Headers(scope=scope)
            _check_framing(scope, headers)
            self._check_host(headers)
            self._check_origin(scope, headers)
            is_known = self._is_known(headers)
            self._check_rate(scope, is_known=is_known)
            if not is_known:
                self._check_stranger(scope, headers)
            await self._read_body(scope, headers, receive, body, is_known=is_known)
            await self._app(scope, _replayed(body, receive), _with_headers(send))
        except RefusalError as error:
            if "expect" in headers:  # its client may send the body or not: RFC 9110, 10.1.1
                error.headers |= CLOSE
            await _refuse(error, scope, send)
        finally:
            self._held -= len(body)

    def _check_host(self, headers: Headers) -> None:
        """A name that we are known by: others lead here by DNS rebinding alone."""
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise RefusalError(400, "expected one Host header")
        name = host_name(hosts[0])
        known = name in self._names or (_is_address(name) and not self._settings.is_local)
        if not name or not known:
            raise RefusalError(
                421,
                "this name is not one that the service is known by. Add it to its setting `hosts`",
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """No page of another site may ask through its visitor's browser."""
        host = headers.get("host", "").lower()
        for origin in headers.getlist("origin"):
            if origin.lower() not in (f"http://{host}", f"https://{host}"):
                raise RefusalError(403, "requests from pages of other sites are not answered")
        site = headers.get("sec-fetch-site", "none")
        navigates = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
        if site not in ("none", "same-origin") and not navigates:
            raise RefusalError(403, "requests from pages of other sites are not answered")

    def _check_rate(self, scope: Scope, *, is_known: bool) -> None:
        """How often a client asks; strangers do not use up what those who are known may."""
        is_change = scope["method"] not in SAFE and not scope["path"].endswith("/plan")
        bucket = self._changes if is_change else self._reads
        wait = (bucket if is_known else self._strangers).wait(client_of(scope))
        if wait:
            text = f"too many requests. Try again in {wait:.1f} s"
            raise RefusalError(429, text, {"retry-after": str(int(wait) + 1)})

    def _check_stranger(self, scope: Scope, headers: Headers) -> None:
        """There is little that can be had without the token."""
        path = scope["path"]
        if path == LOGIN or path.startswith(STATIC):
            return
        if _bearer(headers):
            self.count_guess(scope)
            text = "this is not the token. One that the service makes itself is another each time"
            raise RefusalError(401, text, {"www-authenticate": "Bearer"})
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            query = scope["query_string"].decode("latin-1")
            wanted = f"{path}?{query}" if query else path
            where = LOGIN if wanted == "/" else f"{LOGIN}?next={quote(wanted, safe='/')}"
            raise RefusalError(303, "log in first", {"location": where})
        text = "send the token as `Authorization: Bearer TOKEN`"
        raise RefusalError(401, text, {"www-authenticate": "Bearer"})

    def count_guess(self, scope: Scope) -> None:
        """Count a token that was wrong. A right one is taken at any time, whatever came before.

        Else a program with an old token would lock out all who share its address.

        Raises:
            RefusalError: there were too many.
        """
        wait = self._guesses.wait(client_of(scope))
        if wait:
            raise RefusalError(429, "too many wrong tokens", {"retry-after": str(int(wait) + 1)})

    def _is_known(self, headers: Headers) -> bool:
        """Whether a client has the token, or the cookie that stands for it."""
        if self._token is None or self.is_token(_bearer(headers)):
            return True
        return _is_same(_cookie(headers), cookie_of(self._token))

    def is_token(self, given: str) -> bool:
        """Whether this is the token; so is anything where none is needed."""
        return self._token is None or _is_same(given, self._token)

    async def _read_body(
        self, scope: Scope, headers: Headers, receive: Receive, body: bytearray, *, is_known: bool
    ) -> None:
        """Read a body that is small enough, arrives in time, and is of a kind that is read.

        The rest of one that is too large is passed over: to close the connection at once could
        take the answer from who still sends. A body that has no meaning is read and forgotten.
        """
        whole = int(self._settings.max_body)
        most = whole if is_known and scope["path"] != LOGIN else min(STRANGERS, whole)
        too_large = f"the request has more than {most:,} bytes"
        length = headers.get("content-length")
        if length is not None and (not length.isdecimal() or int(length[:18]) > most):
            raise RefusalError(413, too_large)
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise RefusalError(400, "the request broke off")
                    piece = message.get("body", b"")
                    self._held += len(piece)
                    body += piece
                    if len(body) > most:
                        raise RefusalError(413, too_large)
                    if self._held > MOST_BODIES * whole and len(body) > SMALL:
                        text = "too many large requests at once. Try again later"
                        raise RefusalError(429, text, {"retry-after": "1"})
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise RefusalError(408, "the request took too long", CLOSE) from None
        if scope["method"] in SAFE:
            self._held -= len(body)
            body.clear()
        elif scope["path"] != LOGIN:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and (body or kind):
                raise RefusalError(415, "expected JSON: Content-Type: application/json")
            if b"\0" in body:  # UTF-16 and UTF-32, which are no JSON any more (RFC 8259, 8.1)
                raise RefusalError(400, "expected JSON in UTF-8")
            if values_in(body) > MOST_VALUES:
                raise RefusalError(413, f"the request has more than {MOST_VALUES:,} values")


def _check_framing(scope: Scope, headers: Headers) -> None:
    """A request whose end others could see elsewhere is none (RFC 9112, 6.3)."""
    if scope["http_version"] not in VERSIONS:
        raise RefusalError(400, "expected HTTP/1.1", CLOSE)
    if len(headers.raw) > MOST_HEADERS:
        raise RefusalError(400, f"more than {MOST_HEADERS} headers", CLOSE)
    if "transfer-encoding" in headers and "content-length" in headers:
        raise RefusalError(400, "Content-Length and Transfer-Encoding do not go together", CLOSE)


def values_in(body: bytes | bytearray) -> int:
    """At most how many values JSON holds, without reading it.

    Where there are many, those are left out that only seem to be some, within texts.

    >>> values_in(b'{"a": [1, 2], "b": {}}'), values_in(b'["' + b"," * 30_000 + b'"]')
    (5, 1)
    """
    most = sum(body.count(each) for each in b",[{")
    if most <= MOST_VALUES:
        return most
    rest = _STRING.sub(b"", body)
    return sum(rest.count(each) for each in b",[{")


def cookie_of(token: str) -> str:
    """What a browser keeps instead of the token."""
    return hashlib.sha256(f"llama-merge {token}".encode()).hexdigest()


def client_of(scope: Scope) -> str:
    """By what a client is told from others: its address, or of IPv6 the network that it is in.

    >>> client_of({"client": ("::ffff:10.0.0.7", 1)}), client_of({"client": ("2001:db8::1:2", 1)})
    ('10.0.0.7', '2001:db8::')
    """
    text = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return str(text)
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)).network_address)


def _is_same(given: str, known: str) -> bool:
    return secrets.compare_digest(given.encode(), known.encode())


def _bearer(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _cookie(headers: Headers) -> str:
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


def host_name(host: str) -> str:
    """A Host header without its port; empty if it is none.

    >>> [host_name(each) for each in ("merge.LAN:80", "[::1]", "[::1]x", "a:b", "a/b")]
    ['merge.lan', '::1', '', '', '']
    """
    found = _HOST.fullmatch(host)
    return "" if found is None else (found[1] or found[2]).lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _replayed(body: bytearray, receive: Receive) -> Receive:
    """The body once more; then what else there is to hear of the client."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return replay


def _with_headers(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                if name not in headers:
                    headers[name] = value
        await send(message)

    return guarded


def refusal(
    status: int, error: str, more: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an error, in the form that all errors have."""
    content = {"success": False, "error": error, "problems": []}
    body = b"" if status == HTTPStatus.SEE_OTHER else json.dumps(content).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **HEADERS,
        **more,
    }
    return [(name.encode(), value.encode()) for name, value in headers.items()], body


async def _refuse(error: RefusalError, scope: Scope, send: Send) -> None:
    headers, body = refusal(error.status, str(error), error.headers)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
