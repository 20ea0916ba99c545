"""Answers that are files, or archives of files: whole, or the part that a client asks for.

The bytes of files do not pass through this program: the server has the system send them
("http.response.zerocopysend", an extension of ASGI).
"""

from collections.abc import Mapping
from types import MappingProxyType

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.archive import Archive, File, Span
from service.core import RefusedError
from service.log import log


class Parts(Response):
    """Bytes of a source.

    Args:
        source: of which they are.
        start, stop: the first byte, and the one after the last.
        status, headers: of the answer.
        kind: their media type.

    Raises:
        RefusedError: files of the source are not there any more.
    """

    def __init__(
        self,
        source: Archive | File,
        start: int,
        stop: int,
        status: int,
        headers: Mapping[str, str],
        kind: str,
    ) -> None:
        headers = {**headers, "content-length": str(stop - start)}
        super().__init__(None, status, headers, media_type=kind)
        self._parts = [*source.parts(start, stop)]
        if not all(part.is_there for part in self._parts if isinstance(part, Span)):
            raise RefusedError(410, "files of the merged model are missing, or have changed")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application; an answer that breaks off is told from a whole one by its length."""
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        try:
            await self._send_parts(send)
        except (OSError, EOFError) as error:
            log(f"a download broke off: {error}")
            return
        await send({"type": "http.response.body"})

    async def _send_parts(self, send: Send) -> None:
        for part in self._parts:
            if isinstance(part, bytes):
                await send({"type": "http.response.body", "body": part, "more_body": True})
                continue
            with part.open() as file:
                await send(
                    {
                        "type": "http.response.zerocopysend",
                        "file": file,
                        "offset": part.start,
                        "count": part.length,
                        "more_body": True,
                    }
                )


def part_of(
    request: Request,
    source: Archive | File,
    tag: str,
    kind: str,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Response:
    """What is asked for of some bytes: all of them, or a range, if they are what a client expects.

    Args:
        request: with Range, If-Range, If-Match and If-None-Match (RFC 9110, 13.2.2), or without.
        source: the bytes.
        tag: changes with the bytes.
        kind: their media type.
        more: headers.
    """
    etag, length = f'"{tag}"', source.length
    headers = {**more, "accept-ranges": "bytes", "etag": etag}
    expected, known = (request.headers.get(name) for name in ("if-match", "if-none-match"))
    if expected is not None and not _names(expected, etag):
        raise RefusedError(412, "it is another one than expected", headers={"etag": etag})
    if known is not None and _names(known.replace("W/", ""), etag):
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range") if request.headers.get("if-range", etag) == etag else None
    span = byte_range(wanted, length)
    start, stop = span or (0, length)
    if span is not None and start >= stop:
        content_range = {"content-range": f"bytes */{length}"}
        raise RefusedError(416, "there is no such part of it", headers=content_range)
    if span is not None:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{length}"
    return Parts(source, start, stop, 200 if span is None else 206, headers, kind)


def _names(header: str, etag: str) -> bool:
    """Whether a list of entity tags has one, or stands for any."""
    return header.strip() == "*" or etag in (each.strip() for each in header.split(","))


def byte_range(header: str | None, length: int) -> tuple[int, int] | None:
    """What a Range header asks for: first byte, and the one after the last.

    None for all of it: also where several ranges are asked for, or it cannot be understood, as
    RFC 9110 (14.2) allows. A range that does not exist is empty.

    >>> byte_range("bytes=2-3", 10), byte_range("bytes=8-", 10), byte_range("bytes=-4", 10)
    ((2, 4), (8, 10), (6, 10))
    >>> byte_range("bytes=10-", 10), byte_range("bytes=1-2,4-5", 10), byte_range("lines=1-2", 10)
    ((10, 10), None, None)
    """
    unit, _, wanted = (header or "").partition("=")
    first, dash, last = wanted.strip().partition("-")
    numbers = [each for each in (first, last) if each]
    if unit.strip() != "bytes" or not dash or not numbers:
        return None
    if not all(each.isascii() and each.isdecimal() and len(each) < 20 for each in numbers):
        return None
    if not first:
        return max(0, length - int(last)), length
    if last and int(last) < int(first):
        return None
    return min(int(first), length), min(int(last) + 1 if last else length, length)
