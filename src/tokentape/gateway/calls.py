"""A request while it is being answered, for every connection that asks it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any

from tokentape.errors import TokentapeError
from tokentape.gateway.exchange import Done, Emit, Event


class Call:
    """One piece of work with any number of followers; it is stopped when the last of them leaves.

    `work` is given what takes its events, and returns the committed turns. `why` says to its followers why it
    was stopped. `stopped`: it was, and is ending, or has ended. `failed`: it has ended without an answer.
    """

    def __init__(
        self,
        work: Callable[[Emit], Coroutine[Any, Any, list[Done]]],
        *,
        why: Callable[[], TokentapeError],
    ) -> None:
        self.stopped = False
        self._why = why
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._num_followers = 0
        self._task = asyncio.ensure_future(work(self._emit))
        self._task.add_done_callback(self._ended)

    @contextlib.contextmanager
    def followed(self) -> Generator[None]:
        """Follow the call while the context is open."""
        self._num_followers += 1
        try:
            yield
        finally:
            self._num_followers -= 1
            if not self._num_followers:
                self.stop()

    @property
    def failed(self) -> bool:
        """Whether the work has ended, and not well."""
        return self._task.done() and (self._task.cancelled() or self._task.exception() is not None)

    def stop(self) -> None:
        """End the work, unless it has ended."""
        self.stopped = True
        self._task.cancel()

    def then(self, callback: Callable[[], object]) -> None:
        """Call back when the work has ended."""
        self._task.add_done_callback(lambda _: callback())

    async def ended(self) -> None:
        """Wait until the work has ended, well or not."""
        await asyncio.wait({self._task})

    async def events(self, ping_s: float) -> AsyncGenerator[Event | None]:
        """All events from the first on, until the work ends; None where nothing came for `ping_s` seconds."""
        at = 0
        while True:
            self._news.clear()
            while at < len(self._events):
                yield self._events[at]
                at += 1
            if self._task.done():
                return
            try:
                await asyncio.wait_for(self._news.wait(), ping_s)
            except TimeoutError:
                yield None

    async def done(self) -> list[Done]:
        """The committed turns, when the work has ended.

        Raises:
            TokentapeError: what ended it.
        """
        await self.ended()
        if self._task.cancelled():
            raise self._why()
        return self._task.result()

    async def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._news.set()

    def _ended(self, task: "asyncio.Task[list[Done]]") -> None:
        self._news.set()
        if not task.cancelled():
            task.exception()  # somebody has looked at it, also where every follower has gone
