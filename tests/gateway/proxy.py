"""A TCP proxy between an agent and a gateway that loses replies on demand."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal

Loss = Literal["none", "reply", "patience"]


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection at once with a RST: what was not read yet is lost on both sides."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@dataclass
class Proxy:
    """`losses` are what happens to the next connections, in order; then nothing is lost.

    - `reply`: the request goes through; the reply is taken, and the client's connection reset instead.
    - `patience`: the client may leave: the gateway's side stays open, and the reply is read to nobody.

    `replies` are what came back, by connection.
    """

    target: tuple[str, int]
    url: str = ""
    losses: list[Loss] = field(default_factory=list[Loss])
    replies: list[bytearray] = field(default_factory=list[bytearray])
    running: set["asyncio.Task[None]"] = field(default_factory=set["asyncio.Task[None]"])

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._connected(reader, writer))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loss: Loss = self.losses.pop(0) if self.losses else "none"
        reply = bytearray()
        self.replies.append(reply)
        up_reader, up_writer = await asyncio.open_connection(*self.target)
        sending = asyncio.ensure_future(self._send(reader, up_writer, hold=loss == "patience"))
        try:
            while data := await up_reader.read(65536):
                reply += data
                if loss == "reply":
                    await asyncio.sleep(0.05)  # it is whole, and the gateway knows that it has sent it
                    reset(writer)
                    return
                with contextlib.suppress(ConnectionError):
                    writer.write(data)
                    await writer.drain()
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await sending
            for closing in (writer, up_writer):
                closing.close()
                with contextlib.suppress(ConnectionError):
                    await closing.wait_closed()

    async def _send(
        self, reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter, *, hold: bool
    ) -> None:
        while data := await reader.read(65536):
            up_writer.write(data)
            await up_writer.drain()
        if not hold:
            up_writer.close()


@contextlib.asynccontextmanager
async def proxy_to(url: str) -> AsyncGenerator[Proxy]:
    """A proxy in front of a gateway, on a free port."""
    host, port = url.removeprefix("http://").split(":")
    proxy = Proxy((host, int(port)))
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield proxy
        for task in tuple(proxy.running):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
