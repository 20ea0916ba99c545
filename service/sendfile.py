"""Sends parts of files to clients without reading them into this program."""

import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

PIECE = 2**20
"""Bytes that are asked for at once, at most: a slow disk is waited for in a thread meanwhile."""

READERS = ThreadPoolExecutor(4, "files")
"""Threads of their own: where the disk is slow, nothing but downloads waits for it."""


async def send_file(
    connection: socket.socket, file: BinaryIO, start: int, count: int, patience: float
) -> None:
    """Send `count` bytes of a file from byte `start` on.

    Args:
        connection: to the client, non-blocking; nothing else is sent on it meanwhile.
        file: opened for reading.
        start: the first byte.
        count: of bytes.
        patience: seconds in which the client has to take something of them.

    Raises:
        ConnectionError: the client has gone.
        TimeoutError: it takes nothing.
        EOFError: the file is shorter.
        OSError: it cannot be read.
    """
    stop = start + count
    while start < stop:
        size = min(PIECE, stop - start)
        try:
            sent = await _sendfile(connection.fileno(), file.fileno(), start, size)
        except BlockingIOError:
            async with asyncio.timeout(patience):
                await _writable(connection)
            continue
        if not sent:
            raise EOFError("a file became shorter while it was sent")
        start += sent


async def _sendfile(to: int, source: int, start: int, size: int) -> int:
    """`os.sendfile` in a thread, which has ended when this has, also where this is cancelled.

    The descriptors are closed after that, and their numbers go to others.
    """
    running = asyncio.get_running_loop().run_in_executor(
        READERS, os.sendfile, to, source, start, size
    )
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def _writable(connection: socket.socket) -> None:
    """Wait until the client has taken so much that there is room for more."""
    loop, writable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(connection, writable.set)
    try:
        await writable.wait()
    finally:
        loop.remove_writer(connection)
