"""`tokentape serve --workers N`: a parent that accepts connections, and N processes that answer them.

The parent looks at the first bytes of a connection, sees whose session it is, and hands the socket over: from
then on it has no part in it. A process that dies is started again; its sessions are in the store.
"""

import array
import asyncio
import contextlib
import logging
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from aiohttp import web

from tokentape.engines.server import running
from tokentape.errors import ConfigError
from tokentape.gateway.app import make_app, session_named
from tokentape.gateway.catchup import catch_up, orders
from tokentape.gateway.parts import parts
from tokentape.gateway.pinned import Place, pinning
from tokentape.gateway.service import ServiceConfig
from tokentape.store import lock_store

log = logging.getLogger(__name__)

_PATH = re.compile(rb"\A[A-Z]+ (?:http://[^/ ]+)?/sessions/([^/? ]+)")
_HEADER = re.compile(
    rb"\r\n(?:x-session-id: *|authorization: *bearer +|x-api-key: *)([^\r\n]+)", re.IGNORECASE
)
_PATIENCE_S = 5.0  # for a connection's first bytes
_RESTART_S = 0.5


# -- the processes


@contextlib.asynccontextmanager
async def one_of_many(
    config: ServiceConfig, place: Place, channel: socket.socket
) -> AsyncGenerator[asyncio.Event]:
    """Answer the connections that come through `channel`; yields what is set when the parent is gone.

    Raises:
        ConfigError: as `service.running`.
    """
    loop, gone, current = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    async with parts(config) as gateway:
        gateway.engine.is_current, before = current.is_set, orders(gateway)
        gateway.sessions.new_id = place.new_session_id
        async with (
            pinning(place, lambda request: session_named(request, config.http.api_key)) as (pinned, others),
            running(make_app(gateway, pinned), drain_s=config.drain_s) as runner,
        ):
            await web.UnixSite(runner, place.socket_of(place.index)).start()
            server = runner.server
            assert server is not None  # noqa: S101  # it is set up
            tasks: set[asyncio.Task[object]] = set()

            def take() -> None:
                connection = _received(channel)
                if connection is None:
                    loop.remove_reader(channel)
                    gone.set()
                    return
                task = asyncio.ensure_future(loop.connect_accepted_socket(server, connection))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            channel.setblocking(False)
            loop.add_reader(channel, take)
            await catch_up(gateway, others, before)
            current.set()
            channel.send(b"ready")
            yield gone
            loop.remove_reader(channel)


def _received(channel: socket.socket) -> socket.socket | None:
    """The next connection, None at the channel's end."""
    fds = array.array("i")
    data, ancillary, *_ = channel.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: fds.itemsize])
    if not data or not fds:
        return None
    connection = socket.socket(fileno=fds[0])
    connection.setblocking(False)
    return connection


# -- the parent


class _Process:
    """One process and the channel to it; None while it is being started."""

    def __init__(self) -> None:
        self.channel: socket.socket | None = None
        self.process: asyncio.subprocess.Process | None = None


class _Parent:
    def __init__(
        self,
        count: int,
        command: Callable[[Place, int], Sequence[str]],
        directory: Path,
        inherited: Sequence[int],
    ) -> None:
        self._inherited = inherited
        self._command = command
        self._places = [Place(index, count, directory) for index in range(count)]
        self._processes = [_Process() for _ in self._places]
        self._next = 0
        self.stopping = False

    async def start(self, index: int) -> None:
        """Start a process, and wait until it is ready.

        Raises:
            ConfigError: it ended before it was; it has said why.
        """
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place = self._places[index]
        Path(place.socket_of(index)).unlink(missing_ok=True)  # noqa: ASYNC240  # once, at a start
        with its:
            process = await asyncio.create_subprocess_exec(
                *self._command(place, its.fileno()),
                pass_fds=(its.fileno(), *self._inherited),
                stdout=sys.stderr,
                start_new_session=True,  # Ctrl-C is the parent's: it lets them finish
            )
        ours.setblocking(False)
        self._processes[index].process = process
        if await asyncio.get_running_loop().sock_recv(ours, 16) != b"ready":
            ours.close()
            code = await process.wait()
            raise ConfigError(f"process {index} ended with {code} before it was ready: its message is above")
        self._processes[index].channel = ours

    async def keep(self, index: int) -> None:
        """Start a process again whenever it ends."""
        own = self._processes[index]
        while not self.stopping:
            assert own.process is not None  # noqa: S101  # it was started
            code = await own.process.wait()
            if own.channel is not None:
                own.channel.close()
                own.channel = None
            if self.stopping:
                return
            log.warning("process %d ended with %s: starting it again", index, code)
            await asyncio.sleep(_RESTART_S)
            if not self.stopping:
                with contextlib.suppress(ConfigError, OSError):
                    await self.start(index)

    async def accept(self, listener: socket.socket) -> None:
        """Hand every connection to the process that it is for."""
        loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left: the connection waits for one
                log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(_RESTART_S)
                continue
            task = loop.create_task(self._hand_over(connection))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _hand_over(self, connection: socket.socket) -> None:
        """A connection whose process is away is closed: its client tries again."""
        with connection:
            connection.setblocking(False)
            session_id = _session_of(await _first_bytes(connection))
            if session_id is None:
                self._next += 1
                index = self._next % len(self._processes)
                index = next(
                    (i for i in (index, *range(len(self._processes))) if self._processes[i].channel), index
                )
            else:
                index = self._places[0].owner(session_id)
            channel = self._processes[index].channel
            if channel is not None:
                with contextlib.suppress(OSError):
                    socket.send_fds(channel, [b"c"], [connection.fileno()])

    async def stop(self) -> None:
        """Let every process finish what it answers."""
        self.stopping = True
        running = [one.process for one in self._processes if one.process is not None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        await asyncio.gather(*(process.wait() for process in running))


async def _first_bytes(connection: socket.socket) -> bytes:
    """What a connection begins with, left where it is; b"" where nothing comes."""
    loop, there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, there.set)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await there.wait()
        return connection.recv(1 << 16, socket.MSG_PEEK)
    except OSError:  # also its TimeoutError
        return b""
    finally:
        loop.remove_reader(connection)


def _session_of(head: bytes) -> str | None:
    """The session that a request's head names; one that it hides is found by the process that gets it."""
    head = head.partition(b"\r\n\r\n")[0]
    found = _PATH.search(head) or _HEADER.search(head)
    if found is None:
        return None
    return found[1].strip().decode(errors="surrogateescape")


@contextlib.asynccontextmanager
async def many(
    config: ServiceConfig, count: int, command: Callable[[Place, int], Sequence[str]]
) -> AsyncGenerator[str]:
    """Run a gateway in `count` processes while the context is open; yields its URL.

    `command` starts the process of a place, which is given the channel's descriptor.

    Raises:
        ConfigError: the store is another's, or a process does not start.
    """
    with contextlib.ExitStack() as stack:
        inherited: list[int] = []
        if config.store is not None:  # locked until the last process that has it is gone
            inherited.append(stack.enter_context(lock_store(str(config.store))).fileno())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokentape-")))
        listener = stack.enter_context(socket.create_server((config.host, config.port), backlog=1024))
        listener.setblocking(False)
        parent = _Parent(count, command, directory, inherited)
        tasks: list[asyncio.Task[None]] = []
        try:
            await parent.start(0)  # alone: it may have to make the store
            await asyncio.gather(*(parent.start(index) for index in range(1, count)))
            tasks = [asyncio.ensure_future(parent.keep(index)) for index in range(count)]
            tasks.append(asyncio.ensure_future(parent.accept(listener)))
            host, port = listener.getsockname()[:2]
            yield f"http://{host}:{port}"
        finally:
            if tasks:
                tasks[-1].cancel()
            await parent.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
