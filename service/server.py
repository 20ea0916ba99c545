"""Runs the application under uvicorn, with a patience for slow clients that it does not have."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.settings import Settings

HEADER_SECONDS = 15.0
"""In which the first line and the headers of a request must have arrived."""

BACKLOG = 512
CONNECTIONS = 2000
"""That are answered at once; others are told to come again (503)."""


class Protocol(H11Protocol):
    """HTTP/1.1 for clients of whom some never finish their headers."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there; it has so long for its first request."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Something of a request, or of several, has arrived."""
        if self._patience is None and self.cycle is not None and self.cycle.response_complete:
            self._patience = self.loop.call_later(HEADER_SECONDS, self._give_up)
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._calm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._calm()
        super().connection_lost(exc)

    def _calm(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def serve(create: Callable[..., Any], settings: Settings) -> None:
    """Answer until a signal comes.

    Args:
        create: makes the application of settings, and has it call a function when it is ready.
        settings: how it runs.

    Raises:
        OSError: the address or the data folder cannot be used.
    """
    listening = _listening(settings)
    port = listening.getsockname()[1]
    config = uvicorn.Config(
        create(settings, started=lambda: say(settings, port)),
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=32 * 1024,
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn passes on what has stopped it
        uvicorn.Server(config).run(sockets=[listening])


def _listening(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"cannot listen on {settings.host}, port {settings.port}: {reason}. Choose another "
            "with --port or --host"
        ) from None


def say(settings: Settings, port: int) -> None:
    """Where it can be reached, and with what."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    lines = [f"llama-merge: http://{host}:{port}/", f"results and jobs: {settings.data}"]
    if settings.token is not None:
        lines.append(f"token: {settings.token}")
    print("\n".join(lines), file=sys.stderr, flush=True)
