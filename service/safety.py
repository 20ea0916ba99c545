"""Who may ask, and how much: checked before anything of a request is believed.

The service has no accounts. On loopback it answers this machine; a page that its user visits could
send requests there as well, so names of hosts and origins are checked (DNS rebinding, cross-site
requests). Beyond loopback every request needs the token.
"""

import asyncio
import hashlib
import ipaddress
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.settings import LOOPBACK, Settings

COOKIE = "llama_merge"
OPEN_PATHS = ("/login", "/static/")
"""What needs no token."""

SAFE = ("GET", "HEAD", "OPTIONS")
MOST_CLIENTS = 10_000
MOST_HEADERS = 100

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


class Bucket:
    """Lets through so many a second, and a few seconds' worth at once."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._rate, self._burst = per_second, burst
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
        self._names |= {settings.host.lower()} - {"0.0.0.0", "::"}
        self._reads = Bucket(settings.reads_per_second, 2 * settings.reads_per_second)
        per_second = settings.changes_per_minute / 60
        self._changes = Bucket(per_second, settings.changes_per_minute)
        self._guesses = Bucket(0.2, 10)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_origin(scope, headers)
            self._check_rate(scope)
            self._check_token(scope, headers)
            body = await self._body(scope, headers, receive)
        except RefusalError as refusal:
            await _refuse(refusal, scope, send)
            return
        await self._app(scope, _replayed(body, receive), _with_headers(send))

    def _check_host(self, headers: Headers) -> None:
        """A name that we are known by: others lead here by DNS rebinding alone."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or len(headers.raw) > MOST_HEADERS:
            raise RefusalError(400, "expected one Host header, and no flood of others")
        name = _host_name(hosts[0])
        if name not in self._names and not (_is_address(name) and not self._settings.is_local):
            raise RefusalError(
                421,
                "this name is not one that the service is known by. Add it to its setting `hosts`",
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """No page of another site may ask through its visitor's browser."""
        origins = headers.getlist("origin")
        host = headers.get("host", "")
        for origin in origins:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or parts.netloc.lower() != host.lower():
                raise RefusalError(403, "requests from pages of other sites are not answered")
        site = headers.get("sec-fetch-site", "none")
        navigates = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
        if site not in ("none", "same-origin") and not navigates:
            raise RefusalError(403, "requests from pages of other sites are not answered")

    def _check_rate(self, scope: Scope) -> None:
        client = scope["client"][0] if scope.get("client") else ""
        is_change = scope["method"] not in SAFE and not scope["path"].endswith("/plan")
        wait = (self._changes if is_change else self._reads).wait(client)
        if wait:
            text = f"too many requests. Try again in {wait:.1f} s"
            raise RefusalError(429, text, {"retry-after": str(int(wait) + 1)})

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        if self._token is None or scope["path"].startswith(OPEN_PATHS):
            return
        if self.knows(_given_token(headers)):
            return
        client = scope["client"][0] if scope.get("client") else ""
        wait = self._guesses.wait(client)
        if wait:
            raise RefusalError(429, "too many wrong tokens", {"retry-after": str(int(wait) + 1)})
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            raise RefusalError(303, "log in first", {"location": "/login"})
        raise RefusalError(
            401, "send the token as `Authorization: Bearer TOKEN`", {"www-authenticate": "Bearer"}
        )

    def knows(self, given: str) -> bool:
        """Whether this is the token, or the cookie that stands for it."""
        if self._token is None:
            return True
        known = (self._token, cookie_of(self._token))
        return any(secrets.compare_digest(given.encode(), each.encode()) for each in known)

    async def _body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """The whole body, if it is small enough and arrives in time."""
        most = int(self._settings.max_body)
        too_large = f"the request has more than {most:,} bytes"
        length = headers.get("content-length")
        if length is not None and (not length.isdecimal() or int(length[:18]) > most):
            raise RefusalError(413, too_large, {"connection": "close"})
        body = b""
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise RefusalError(400, "the request broke off")
                    body += bytes(message.get("body", b""))
                    if len(body) > most:
                        raise RefusalError(413, too_large, {"connection": "close"})
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise RefusalError(408, "the request took too long", {"connection": "close"}) from None
        if scope["method"] not in SAFE and scope["path"] != "/login":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and (body or kind):
                raise RefusalError(415, "expected JSON: Content-Type: application/json")
        return body


def cookie_of(token: str) -> str:
    """What a browser keeps instead of the token."""
    return hashlib.sha256(f"llama-merge {token}".encode()).hexdigest()


def _given_token(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


def _host_name(host: str) -> str:
    """A Host header without its port."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more; then what else there is to hear of the client."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

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


async def _refuse(refusal: RefusalError, scope: Scope, send: Send) -> None:
    content = {"success": False, "error": str(refusal), "problems": []}
    body = b"" if refusal.status == HTTPStatus.SEE_OTHER else json.dumps(content).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **refusal.headers,
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await _with_headers(send)(
        {"type": "http.response.start", "status": refusal.status, "headers": raw}
    )
    body = b"" if scope["method"] == "HEAD" else body
    await send({"type": "http.response.body", "body": body})
