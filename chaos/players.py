"""Agents that go on whatever happens: sessions of tool turns, retried as the providers' SDKs retry.

An SDK tries a request three times, with a wait between that doubles, and says so in
`x-stainless-retry-count`. It does not retry what fails inside a stream. Whatever it gives up, the agent's own
loop asks again, from zero.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
from truth import Account, Acknowledged, Episode, Retry
from wires import Chat, Json, Messages, Reply, StreamFailed, Wire

_TRIES = 3
_TIMEOUT_S = 30.0
_LINE_BYTES = 1 << 20
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 2.0
_TURNS = (4, 12)


class Refused(Exception):
    """An answer after which no agent could go on: a 4xx that is the caller's fault."""


class _Failed(Exception):
    """A try that did not succeed. `retryable`: an SDK would try again; `wait_s`: when."""

    def __init__(self, why: str, *, retryable: bool, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.retryable, self.wait_s = retryable, wait_s


class Agent:
    """One agent: it plays session after session while `goes_on()`, and ends the one it is in.

    What it learns goes into `account`.
    """

    def __init__(self, name: str, url: str, account: Account, goes_on: Callable[[], bool], seed: str) -> None:
        self.name = name
        self._url = url
        self._account = account
        self._goes_on = goes_on
        self._rng = random.Random(f"{seed} {name}")
        self._numbers = itertools.count()
        self._http: aiohttp.ClientSession

    async def run(self) -> None:
        """Play sessions."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, read_bufsize=_LINE_BYTES) as self._http:
            for number in itertools.count():
                if number and not self._goes_on():
                    return
                await self._session(f"{self.name}-{number}")

    async def _session(self, session_id: str) -> None:
        """One session, from its creation to its end."""
        rng = self._rng
        episode = Episode(session_id, self.name, is_linear=rng.random() < 0.7)
        self._account.episodes.append(episode)
        await self._control("/sessions", {"session_id": session_id, "metadata": {"agent": self.name}})
        conversation = _Conversation(rng.choice((Chat(), Messages())), rng, f"{session_id} hello")
        for number in range(rng.randint(*_TURNS)):
            if number > 1 and not self._goes_on():
                break
            if not episode.is_linear and rng.random() < 0.3:
                conversation.go_back()
            max_tokens = rng.choice((24, 400, 400, 400))
            num_times = 2 if not episode.is_linear and rng.random() < 0.2 else 1
            stream = rng.random() < 0.5
            body = conversation.wire.body(conversation.messages, max_tokens, stream=stream)
            path = f"/sessions/{session_id}/v1/{conversation.wire.path}"
            for _ in range(num_times):  # the last reply is the one that it goes on from
                reply = await self._ask(path, body, conversation.wire, session_id, stream=stream)
            conversation.take(reply)
            await asyncio.sleep(rng.uniform(0, 0.4))
        finish = f"/sessions/{session_id}/finish"
        episode.summary = await self._control(finish, {"reward": rng.randrange(5) / 4})

    async def _control(self, path: str, body: Json) -> Json:
        """Ask the control side until it answers; that a session is there already is an answer, too."""
        number = next(self._numbers)
        while True:
            try:
                async with self._post(path, json.dumps(body).encode(), {}) as response:
                    if response.status == 409 and path == "/sessions":
                        return {}
                    await self._check(response)
                    return await response.json()
            except (_Failed, aiohttp.ClientError, TimeoutError) as error:
                self._note(number, error)
                await asyncio.sleep(_FIRST_WAIT_S)

    async def _ask(self, path: str, body: bytes, wire: Wire, session_id: str, *, stream: bool) -> Reply:
        """A reply, however often it takes."""
        number, count = next(self._numbers), 0
        while True:
            try:
                reply = await self._try(path, body, wire, str(count), stream=stream)
            except (_Failed, StreamFailed, aiohttp.ClientError, TimeoutError) as error:
                self._note(number, error)
                wait_s = min(_FIRST_WAIT_S * 2**count, _LONGEST_WAIT_S) * self._rng.uniform(0.75, 1)
                is_final = isinstance(error, StreamFailed) or (
                    isinstance(error, _Failed) and not error.retryable
                )
                count = 0 if is_final else (count + 1) % _TRIES
                if isinstance(error, _Failed) and error.wait_s is not None:
                    wait_s = error.wait_s
                await asyncio.sleep(wait_s)
                continue
            said = reply.tokentape
            self._account.acknowledged.append(
                Acknowledged(
                    self.name,
                    number,
                    session_id,
                    *(said[k] for k in ("turn_id", "parent_turn_id", "branch_reason")),
                    *(said[k] for k in ("prompt_ids", "completion_ids", "logprobs")),
                    time.monotonic(),
                )
            )
            return reply

    async def _try(self, path: str, body: bytes, wire: Wire, count: str, *, stream: bool) -> Reply:
        """One try."""
        async with self._post(path, body, {"x-stainless-retry-count": count}) as response:
            await self._check(response)
            if not stream:
                return wire.whole(await response.json())
            put_together = wire.stream()
            try:
                async for event in _events(response):
                    if put_together.feed(event):
                        return put_together.reply()
            except aiohttp.ClientError:
                raise StreamFailed("connection") from None
        raise StreamFailed("connection")

    def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Any:
        headers = {"Content-Type": "application/json", **headers}
        return self._http.post(self._url + path, data=body, headers=headers)

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raise what an SDK makes of a status."""
        if response.status < 400:
            return
        text = await response.text()
        try:
            error = json.loads(text)["error"]
            why = f"{response.status} {error.get('code') or error['type']}"
        except (ValueError, KeyError):
            why = f"{response.status} {text[:300]}"
        should = response.headers.get("x-should-retry")
        retryable = response.status in (408, 409, 429) or response.status >= 500
        if not retryable and should != "true":
            raise Refused(f"{why}: {text[:300]}")
        wait = response.headers.get("Retry-After")
        wait_s = None if wait is None else min(float(wait), _LONGEST_WAIT_S)
        raise _Failed(why, retryable=should != "false", wait_s=wait_s)

    def _note(self, number: int, error: Exception) -> None:
        why = "connection"
        if isinstance(error, TimeoutError):
            why = "timeout"
        elif isinstance(error, _Failed | StreamFailed):
            why = str(error)
        self._account.retries.append(Retry(self.name, number, time.monotonic(), why))


class _Conversation:
    """What an agent sends: its first message, and what came of it."""

    def __init__(self, wire: Wire, rng: random.Random, first: str) -> None:
        self.wire = wire
        self.messages: list[Json] = [{"role": "user", "content": first}]
        self._rng = rng
        self._places = [1]  # lengths at which it was the model's turn

    def take(self, reply: Reply) -> None:
        """Append a reply and what follows it: results for its calls, or a question."""
        text = f"the weather is {self._rng.getrandbits(24):x}"
        self.messages.append(reply.message)
        self.messages += (
            self.wire.results(reply.calls, text) if reply.calls else [{"role": "user", "content": text}]
        )
        self._places.append(len(self.messages))

    def go_back(self) -> None:
        """Forget what came after an earlier question; ask it again, or another in its place."""
        at = self._rng.randrange(len(self._places))
        self.messages = self.messages[: self._places[at]]
        self._places = self._places[: at + 1]
        last = self.messages[-1]
        if isinstance(last["content"], str) and self._rng.random() < 0.5:
            self.messages[-1] = {**last, "content": f"{last['content']}, world"}


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The data of each event."""
    async for line in response.content:
        if line.startswith(b"data: "):
            yield line[6:].strip().decode()
