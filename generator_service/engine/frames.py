"""Length-prefixed frames over a socket pair, between the service and a worker process."""

from __future__ import annotations

import asyncio
import socket
import struct

_LENGTH = struct.Struct("<I")


def send_frame(connection: socket.socket, payload: bytes) -> None:
    """Send one frame, blocking."""
    connection.sendall(_LENGTH.pack(len(payload)) + payload)


def receive_frame(connection: socket.socket) -> bytes | None:
    """Receive one frame, blocking; None once the other side has closed."""
    header = _receive_exactly(connection, _LENGTH.size)
    return None if header is None else _receive_exactly(connection, _LENGTH.unpack(header)[0])


def write_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    """Queue one frame for sending."""
    writer.write(_LENGTH.pack(len(payload)) + payload)


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Receive one frame; None once the other side has closed."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    parts, missing = [], count
    while missing:
        try:
            part = connection.recv(min(missing, 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
