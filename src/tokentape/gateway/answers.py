"""The requests of a session: those that are being answered, and those whose answer may have been lost."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
from typing import Any

from tokentape.errors import InternalError, TokentapeError
from tokentape.gateway.exchange import Done, Emit, Event
from tokentape.tape import Turn


class Answer:
    """What answers one request: work that samples its turns, then the committed turns `turn_ids`.

    Any number of connections hold it, each until it has been served; work that nobody holds is stopped.
    `committed`: the turns are in the session's tree. `delivered`: a connection has been sent all of it, which
    may have got lost behind us; `num_retries` asked for it again.
    """

    def __init__(self, turn_ids: list[str], *, committed: bool = False) -> None:
        self.turn_ids = turn_ids
        self.committed = committed
        self.delivered = False
        self.num_retries = 0
        self._num_holders = 0
        self._stopped = False
        self._when_ended: Callable[[bool], None] = _nothing
        self._why: Callable[[], TokentapeError] = InternalError
        self._task: asyncio.Task[list[Done]] | None = None
        self._events: list[Event] = []
        self._news = asyncio.Event()

    def start(
        self,
        work: Callable[[Emit], Coroutine[Any, Any, list[Done]]],
        *,
        ended: Callable[[bool], None],
        why: Callable[[], TokentapeError],
    ) -> None:
        """Begin the work. It is given what takes its events.

        `ended` is told when it has ended, and whether well; `why` says why it was stopped.
        """
        self._when_ended, self._why = ended, why
        self._task = asyncio.ensure_future(work(self._emit))
        self._task.add_done_callback(self._ended)

    @property
    def has_events(self) -> bool:
        """Whether the events of the work are still known."""
        return self._task is not None

    @property
    def running(self) -> bool:
        """Whether the work has not ended."""
        return self._task is not None and not self._task.done()

    @property
    def stopping(self) -> bool:
        """Whether the work was stopped and has not ended."""
        return self._stopped and self.running

    @property
    def in_use(self) -> bool:
        """Whether the work has not ended, or a connection holds the answer."""
        return self.running or self._num_holders > 0

    @property
    def lost(self) -> bool:
        """Whether nobody has received the committed turns, and nobody is about to."""
        return self.committed and not (self.delivered or self.in_use)

    @contextlib.contextmanager
    def held(self) -> Generator["Answer"]:
        """Hold the answer while the context is open."""
        self._num_holders += 1
        try:
            yield self
        finally:
            self._num_holders -= 1
            if not self._num_holders:
                self.stop()
                self._let_go()

    def stop(self) -> None:
        """End the work, unless it has ended; once: a second time would interrupt its cleaning up."""
        if self._task is not None and not self._stopped:
            self._stopped = True
            self._task.cancel()

    async def ended(self) -> None:
        """Wait until the work has ended, well or not."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def events(self, ping_s: float) -> AsyncGenerator[Event | None]:
        """All events from the first on, until the work ends; None where nothing came for `ping_s` seconds."""
        at = 0
        while True:
            while at < len(self._events):
                yield self._events[at]
                at += 1
            if not self.running:
                return
            try:
                await asyncio.wait_for(self._news.wait(), ping_s)
            except TimeoutError:
                yield None

    async def dones(self) -> list[Done] | None:
        """What the work has made of the turns, when it has ended; None where there was no work here.

        Raises:
            TokentapeError: what ended it.
        """
        if self._task is None:
            return None
        await self.ended()
        if self._task.cancelled():
            raise self._why()
        return self._task.result()

    async def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._tell()

    def _tell(self) -> None:
        """Wake everybody who waits; who comes later waits for the next time."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _ended(self, task: "asyncio.Task[list[Done]]") -> None:
        self._when_ended(not task.cancelled() and task.exception() is None)
        self._tell()
        self._let_go()

    def _let_go(self) -> None:
        """Keep no events and no prompts for an answer that nobody holds: the turns are in the tree."""
        if not self._num_holders and not self.running:
            self._events, self._task = [], None
            self._when_ended, self._why = (
                _nothing,
                InternalError,
            )  # the way back to the session


async def stop_all(answers: Sequence[Answer]) -> None:
    """Stop the work of them all, and wait until it has ended."""
    for answer in answers:
        answer.stop()
    for answer in answers:
        await answer.ended()


def _nothing(well: bool) -> None:
    """Nobody waits for work that never was."""


class Answers:
    """The answers of a session, by their request's digest."""

    def __init__(self) -> None:
        self._by_digest: dict[str, list[Answer]] = {}
        self._by_request: dict[str, Answer] = {}

    @property
    def in_use(self) -> bool:
        """Whether any is being made, or held by a connection."""
        return any(answer.in_use for answer in self._by_request.values())

    def delivered(self, turns: Iterable[Turn]) -> frozenset[str]:
        """The requests whose answer has arrived, but for those that the `turns` show it of: they went on."""
        went_on = {turn.parent_id for turn in turns}
        return frozenset(
            request_id
            for request_id, answer in self._by_request.items()
            if answer.delivered and went_on.isdisjoint(answer.turn_ids)
        )

    def add(self, digest: str, answer: Answer) -> None:
        """Keep an answer, until it fails."""
        self._by_digest.setdefault(digest, []).append(answer)
        self._by_request[answer.turn_ids[0]] = answer

    def remove(self, digest: str, answer: Answer) -> None:
        """Forget one that failed. What retries it must not get an earlier answer that was received."""
        kept = [one for one in self._by_digest[digest] if one is not answer and not one.delivered]
        self._by_digest[digest] = kept
        if not kept:
            del self._by_digest[digest]
        del self._by_request[answer.turn_ids[0]]

    def commit(self, turn: Turn) -> None:
        """A turn is in the tree; after a restart nobody knows who has received it."""
        origin = turn.origin
        answer = self._by_request.get(origin.request_id)
        if answer is None:
            answer = Answer([origin.request_id], committed=True)
            self.add(origin.digest, answer)
        answer.committed = True
        if turn.turn_id not in answer.turn_ids:
            answer.turn_ids.append(turn.turn_id)

    def received(self, request_id: str) -> None:
        """Whoever continues a turn has received it."""
        if (answer := self._by_request.get(request_id)) is not None:
            answer.delivered = True

    async def find(self, digest: str, *, is_retry: bool, is_first: bool) -> Answer | None:
        """The answer that a request is to get, None where it is to be sampled.

        `is_retry` and `is_first` are what it says of itself. One that was lost comes first; then, unless the
        request is no retry, one that is being made; then, if it is one, the latest.
        """
        for answer in tuple(self._by_digest.get(digest, ())):
            if answer.stopping:  # it may have been committed before it was stopped
                await answer.ended()
        known = self._by_digest.get(digest, ())
        lost = next((one for one in known if one.lost), None)
        if lost is not None or is_first:
            return lost
        running = next((one for one in known if one.running and not one.stopping), None)
        if running is not None or not is_retry:
            return running
        # All were sent, but one did not arrive: the latest, or another where that has been asked for again.
        sent = [one for one in reversed(known) if one.committed]
        again = min(sent, key=lambda one: one.num_retries, default=None)
        if again is not None:
            again.num_retries += 1
        return again

    async def stop(self) -> None:
        """Stop all work, and wait until it has ended."""
        await stop_all([one for answers in self._by_digest.values() for one in answers if one.running])
