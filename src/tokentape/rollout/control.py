"""The gateway's control API over HTTP. A call is repeated until it is answered: each of them may be."""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

# pyright: reportUnknownMemberType=false
import aiohttp
import msgspec
import pyarrow as pa

from tokentape.errors import GatewayRefused, GatewayUnavailable
from tokentape.rollout.records import Attempt, Result, Settings
from tokentape.types import Json

log = logging.getLogger(__name__)

ARROW_STREAM = "application/vnd.apache.arrow.stream"
_PAGE = 1000
_REQUEST_S = 120.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


@dataclass(frozen=True, slots=True)
class Opened:
    """A new session, as its agent reaches it. `api_key` is None where the gateway needs none."""

    base_url: str
    api_key: str | None


@dataclass(frozen=True, slots=True)
class Listed:
    """A session in the gateway's list."""

    session_id: str
    state: str
    reward: float | None
    metadata: Json


class Control:
    """Sessions of one gateway. A call waits through restarts and overload, `gateway_timeout_s` at most.

    `last_away` is when the gateway, or what it needs, was last not there (`time.monotonic()`).

    Raises:
        GatewayUnavailable: there was no answer in that time. Whether the call was done is not known.
        GatewayRefused: the gateway will not do it.
    """

    def __init__(self, settings: Settings) -> None:
        self.last_away = -math.inf
        self._gateway = settings.gateway.rstrip("/")
        self._settings = settings
        key = settings.api_key
        self._http = aiohttp.ClientSession(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=aiohttp.ClientTimeout(total=_REQUEST_S),
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def ready(self) -> None:
        """Return when the gateway says that its engine answers."""
        await self._ask("GET", "/readyz")

    async def create(self, attempt: Attempt) -> Opened:
        """Open the attempt's session. One that a lost call has left is removed first: nobody has used it."""
        settings = self._settings
        body: Json = {
            **settings.session,
            "session_id": attempt.session_id,
            "group_id": attempt.group_id,
            "deadline_s": settings.deadline_s,
            "metadata": {"rollout": attempt.notes},
        }
        while True:
            try:
                said = msgspec.json.decode(await self._ask("POST", "/sessions", body))
            except GatewayRefused as error:
                if error.code != 409:
                    raise
                await self.delete(attempt.session_id)
                continue
            return Opened(said["base_url"], said.get("api_key"))

    async def finish(self, session_id: str, result: Result) -> None:
        """Close the session. Repeated until answered, since the same call again changes nothing."""
        body = msgspec.to_builtins(result)
        await self._ask("POST", f"/sessions/{session_id}/finish", body)

    async def delete(self, session_id: str, *, within_s: float | None = None) -> None:
        """Remove the session, or see that there is none: it will never be finished."""
        try:
            await self._ask("DELETE", f"/sessions/{session_id}", within_s=within_s)
        except GatewayRefused as error:
            if error.code != 404:
                raise

    async def finished(self, session_id: str) -> tuple[float | None] | None:
        """The reward of a finished session, in a tuple; None where it is not finished or not there."""
        try:
            said = msgspec.json.decode(await self._ask("GET", f"/sessions/{session_id}"))
        except GatewayRefused as error:
            if error.code != 404:
                raise
            return None
        return (said["reward"],) if said["state"] == "finished" else None

    async def samples(self, session_id: str) -> pa.Table:
        """The session's samples, from the gateway's Arrow stream; the arrays are the received bytes."""
        received = await self._ask("GET", f"/sessions/{session_id}/samples", accept=ARROW_STREAM)
        with pa.ipc.open_stream(pa.py_buffer(received)) as reader:
            return reader.read_all()

    async def listed(self, prefix: str) -> AsyncGenerator[Listed]:
        """All sessions whose id begins with `prefix`, in the order of their ids."""
        after = prefix
        while True:
            page = msgspec.json.decode(
                await self._ask("GET", "/sessions", query={"limit": str(_PAGE), "after": after})
            )
            for row in page["sessions"]:
                if not row["session_id"].startswith(prefix):
                    return
                yield Listed(row["session_id"], row["state"], row["reward"], row["metadata"])
                after = row["session_id"]
            if not page["has_more"]:
                return

    async def _ask(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        query: Json | None = None,
        accept: str = "application/json",
        within_s: float | None = None,
    ) -> bytes:
        within_s = self._settings.gateway_timeout_s if within_s is None else within_s
        until, pause_s = time.monotonic() + within_s, _FIRST_PAUSE_S
        data = None if body is None else msgspec.json.encode(body)
        while True:
            try:
                async with (
                    asyncio.timeout_at(
                        asyncio.get_running_loop().time() + max(until - time.monotonic(), 0.05)
                    ),
                    self._http.request(
                        method, self._gateway + path, data=data, params=query, headers={"Accept": accept}
                    ) as answer,
                ):
                    received = await answer.read()
                    if answer.status < 300:
                        return received
                    why = f"{method} {path}: {answer.status} {_message(received)}"
                    if answer.status != 429 and answer.status < 500:
                        raise GatewayRefused(why, code=answer.status)
                    if answer.status != 429:
                        self.last_away = time.monotonic()
                    wait_s = max(pause_s, float(answer.headers.get("Retry-After", "0")))
            except (aiohttp.ClientError, OSError, ValueError) as error:  # a TimeoutError is an OSError
                why, wait_s = f"{method} {path}: {type(error).__name__} {error}".rstrip(), pause_s
                self.last_away = time.monotonic()
            wait_s *= random.uniform(0.5, 1.0)  # noqa: S311  # so that not all come back at once
            if time.monotonic() + wait_s >= until:
                raise GatewayUnavailable(f"no answer from {self._gateway} within {within_s:g} s; last, {why}")
            if pause_s == _LONGEST_PAUSE_S:
                log.warning("the gateway does not answer, asking again: %s", why)
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _message(received: bytes) -> str:
    """What the gateway says of an error."""
    try:
        said: Any = msgspec.json.decode(received)
        return str(said["error"]["message"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return received[:200].decode(errors="replace")
