"""Runs the application under uvicorn, with a patience for slow clients that it does not have."""

import asyncio
import contextlib
import functools
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.safety import CLOSE, refusal
from service.sendfile import send_file
from service.settings import EVERYWHERE, Settings

BACKLOG = 128
"""That are accepted at once."""
CONNECTIONS = 2000
"""That are answered at once; others are told to come again (503)."""

OVER = 128
"""Others that are told so; those beyond them are closed."""

FILES_EACH = 3
"""That a connection may have open: itself, and for a download a second time, and the file."""

KEEP_ALIVE = 10
"""Seconds in which another request may come on a connection."""

SPARE_FILES = 150 + OVER + BACKLOG
"""That the server opens beside connections that are answered."""


class Protocol(H11Protocol):
    """HTTP/1.1 for clients of whom some never finish their headers, or never read an answer.

    Args:
        settings: of the service.
        most: connections that are answered at once.
        given: by uvicorn.
    """

    def __init__(self, settings: Settings, most: int, **given: Any) -> None:
        super().__init__(**given)
        self._settings = settings
        self._most = most
        self._app, self.app = self.app, self._answer
        self._patience: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._second: socket.socket | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there; it has so long for its first request."""
        super().connection_made(transport)
        if len(self.connections) > self._most + OVER:
            transport.abort()
            return
        transport.set_write_buffer_limits(0)  # what is not taken at once is waited for
        self._be_patient()

    def data_received(self, data: bytes) -> None:
        """Something of a request, or of several, has arrived."""
        if self._patience is None and self.cycle is not None and self.cycle.response_complete:
            self._be_patient()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._calm()

    def pause_writing(self) -> None:
        """The client does not take what it has asked for; it has so long to go on."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(
                self._settings.stalled_seconds, self.transport.abort
            )

    def resume_writing(self) -> None:
        """The client has taken something."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._calm()
        self.resume_writing()
        if self._second is not None:
            with contextlib.suppress(OSError):
                self._second.shutdown(socket.SHUT_RDWR)  # what sends a file is told so
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP; said in the form of all errors, if there is still a way to say it.

        uvicorn's own answer is a plain text without the headers that all others have.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what it has to say of the request is not said any more
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head, body = refusal(400, "this is no request of HTTP/1.1", CLOSE)
            for event in (
                h11.Response(status_code=400, headers=head, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """The application, unless there are too many to be answered."""
        if len(self.connections) <= self._most:

            async def send_also_files(message: Any) -> None:
                if message["type"] == "http.response.zerocopysend":
                    await self._send_file(message["file"], message["offset"], message["count"])
                else:
                    await send(message)

            await self._app(scope, receive, send_also_files)
            return
        head, body = refusal(503, "too many connections. Try again later", CLOSE)
        await send({"type": "http.response.start", "status": 503, "headers": head})
        await send({"type": "http.response.body", "body": body})

    async def _send_file(self, file: BinaryIO, start: int, count: int) -> None:
        """Have the system send a part of a file, as part of the body.

        The connection is given a second descriptor: the loop keeps the first for itself.
        """
        cycle = self.cycle
        if self.flow.write_paused:
            await self.flow.drain()
        if cycle.disconnected:
            return
        counted = h11.Data(data=range(count))  # type: ignore[arg-type]  # of which it takes the length
        self.conn.send_with_data_passthrough(counted)
        patience = self._settings.stalled_seconds
        with self.transport.get_extra_info("socket").dup() as self._second:
            try:
                await send_file(self._second, file, start, count, patience)
            except (ConnectionError, TimeoutError):
                cycle.disconnected = True  # nothing more is sent
                self.transport.abort()
            finally:
                self._second = None

    def _be_patient(self) -> None:
        self._patience = self.loop.call_later(self._settings.header_seconds, self._give_up)

    def _calm(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def serve(create: Callable[..., Any], settings: Settings, *, show_token: bool = False) -> None:
    """Answer until a signal comes.

    Args:
        create: makes the application of settings, and has it call a function when it is ready.
        settings: how it runs.
        show_token: say the token, which has just been made.

    Raises:
        OSError: the address or the data folder cannot be used.
    """
    listening = _listening(settings)
    port = listening.getsockname()[1]
    config = uvicorn.Config(
        create(settings, started=lambda: say(settings, port, show_token=show_token)),
        http=functools.partial(Protocol, settings, _connections()),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        backlog=BACKLOG,
        lifespan="on",
        log_level="error",  # a warning for each broken request would fill a disk
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=[*settings.trusted_proxies],
        timeout_keep_alive=min(KEEP_ALIVE, int(settings.header_seconds) or 1),
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=32 * 1024,
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn passes on what has stopped it
        uvicorn.Server(config).run(sockets=[listening])


def _connections() -> int:
    """How many can be answered at once, with as many open files as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_EACH * CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return CONNECTIONS
    return max(1, min(CONNECTIONS, (soft - SPARE_FILES) // FILES_EACH))


def _listening(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    both = settings.host == "::" and socket.has_dualstack_ipv6()
    where = settings.host, settings.port
    try:
        return socket.create_server(where, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"cannot listen on {settings.host}, port {settings.port}: {reason}. Choose another "
            "with --port or --host"
        ) from None


def say(settings: Settings, port: int, *, show_token: bool) -> None:
    """Where it can be reached, and with what, where nobody knows that yet."""
    host = socket.gethostname() if settings.host in EVERYWHERE else settings.host
    host = f"[{host}]" if ":" in host else host
    lines = [f"llama-merge: http://{host}:{port}/", f"results and jobs: {settings.data}"]
    if show_token:
        lines += [
            "a token for this time; set LLAMA_MERGE_TOKEN, or `token` in the file, to keep one",
            f"token: {settings.token}",
        ]
    print("\n".join(lines), file=sys.stderr, flush=True)
