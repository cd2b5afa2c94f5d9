"""The agents' side of the gateway without HTTP: a request of any wire in, the pieces of its reply out."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any

from tokentape.errors import Overloaded, TokentapeError
from tokentape.gateway.admission import Admission, Deadline
from tokentape.gateway.answers import Answer, stop_all
from tokentape.gateway.exchange import Done, Emit, Event, Progress, Started, TurnRequest
from tokentape.gateway.session import Session
from tokentape.gateway.turn import Turns, new_turn_id
from tokentape.gateway.wire import AgentRequest, Decoded, Wire, WireConfig, Writer
from tokentape.parse import CallDelta, ReasoningDelta, SaidEvent, TextDelta
from tokentape.types import Message


class AgentApi:
    """Answers agents, each request once: an SDK's retry gets the answer that the first try got.

    A request is a retry of one with the same digest (wire, label, idempotency key, body) in the same session

    - when its headers say so: `x-stainless-retry-count` above 0, or an `Idempotency-Key`;
    - when the answer to the first one did not reach anybody;
    - while the first one is still being answered, unless its headers say that it is no retry.

    Of several answers, each is given to one retry before any is given to two.

    Every other request of the same digest is sampled again. After `ping_s` seconds without a token a stream
    says that it is alive.
    """

    def __init__(
        self, turns: Turns, config: WireConfig, admission: Admission, *, ping_s: float = 15.0
    ) -> None:
        self.config = config
        self.admission = admission
        self._turns = turns
        self._ping_s = ping_s
        self._running: set[Answer] = set()

    def decode(self, wire: Wire, session: Session, body: bytes, headers: Mapping[str, str]) -> Decoded:
        """Read a request.

        Raises:
            RequestError: it cannot be served; `param` names the field.
            SessionClosed: the session takes no more turns.
        """
        session.check_open()
        return wire.decode(AgentRequest(body, headers, session, self.config))

    @contextlib.asynccontextmanager
    async def answering(
        self, session: Session, decoded: Decoded, headers: Mapping[str, str]
    ) -> AsyncGenerator["Answering"]:
        """One connection that is being answered: it is open until the reply has been sent.

        Leaving it before its end aborts the turn, unless somebody else waits for it, too.
        """
        digest = decoded.request.origin.digest
        count = headers.get("x-stainless-retry-count")
        is_retry = "Idempotency-Key" in headers or count not in (None, "0")
        answer = await session.answers.find(digest, is_retry=is_retry, is_first=count == "0" and not is_retry)
        if answer is not None:
            self._turns.metrics.answered_again.inc()
        with (answer or self._start(session, decoded)).held() as held:
            yield Answering(self._turns, session, decoded.writer, held, self._ping_s)

    def count_tokens(self, session: Session, decoded: Decoded) -> int:
        """How many tokens the request's prompt would have."""
        return self._turns.planner.count(session, decoded.request)

    async def aclose(self) -> None:
        """Abort what is being sampled, and wait until that is recorded."""
        await stop_all(tuple(self._running))

    def _start(self, session: Session, decoded: Decoded) -> Answer:
        request = decoded.request
        answer = Answer([new_turn_id() for _ in range(request.num_choices)])

        def ended(well: bool) -> None:
            self._running.discard(answer)
            if not well:
                session.answers.remove(request.origin.digest, answer)

        def work(emit: Emit) -> Coroutine[Any, Any, list[Done]]:
            return self._admitted(session, request, answer.turn_ids, emit)

        self._running.add(answer)
        session.answers.add(request.origin.digest, answer)
        answer.start(work, ended=ended, why=session.cancelled)
        return answer

    async def _admitted(
        self, session: Session, request: TurnRequest, turn_ids: Sequence[str], emit: Emit
    ) -> list[Done]:
        """Run the turns of a request when they have their place; what ends the wait is a failed turn, too."""
        deadline = Deadline(session, self.admission.limits.turn_timeout_s)
        try:
            await self.admission.enter(session.session_id, deadline)
        except asyncio.CancelledError:
            await self._turns.fail(session, session.cancelled(), 0)
            raise
        except Overloaded:  # nothing has begun
            raise
        except TokentapeError as error:
            await self._turns.fail(session, error, 0)
            raise
        try:
            return await self._turns.run(session, request, turn_ids, emit, deadline)
        finally:
            self.admission.leave()


class Answering:
    """What one connection gets: the turns, or the pieces of a stream."""

    def __init__(self, turns: Turns, session: Session, writer: Writer, answer: Answer, ping_s: float) -> None:
        self._turns = turns
        self._session = session
        self._writer = writer
        self._answer = answer
        self._ping_s = ping_s

    @property
    def turn_ids(self) -> Sequence[str]:
        """The turns that answer, one a choice."""
        return self._answer.turn_ids

    async def dones(self) -> list[Done]:
        """The committed turns, one a choice.

        Raises:
            TokentapeError: there is no answer.
        """
        dones = await self._answer.dones()
        return dones or self._turns.recorded(self._session, self._answer.turn_ids)

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The pieces of a streamed reply. The first comes with the first tokens.

        Raises:
            TokentapeError: before the first piece; a later failure is the last piece.
        """
        writer, begun = self._writer, False
        try:
            waiting = b""  # what the stream begins with waits for the first tokens, or for a failure
            async with contextlib.aclosing(self._events()) as events:
                async for item in events:
                    piece = waiting + (writer.ping() if item is None else _write(writer, item))
                    if isinstance(item, Started):
                        waiting = piece
                    elif piece:
                        waiting, begun = b"", True
                        yield piece
            yield waiting + writer.end(await self.dones())
        except TokentapeError as error:
            if not begun:
                raise
            yield writer.error(error)

    def delivered(self) -> None:
        """The reply has been sent, all of it: the same request again is no retry."""
        self._answer.delivered = True

    async def _events(self) -> AsyncGenerator[Event | None]:
        if self._answer.has_events:
            async with contextlib.aclosing(self._answer.events(self._ping_s)) as events:
                async for item in events:
                    yield item
        else:
            for item in _events(await self.dones()):
                yield item


def _write(writer: Writer, item: Event) -> bytes:
    return writer.start(item) if isinstance(item, Started) else writer.progress(item)


def _events(dones: Sequence[Done]) -> list[Event]:
    """The events of turns that were committed before."""
    first = dones[0]
    started = Started(
        tuple(done.turn.turn_id for done in dones), first.usage.num_prompt, first.turn.created_at
    )
    return [
        started,
        *(
            Progress(choice, done.turn.completion.ids, done.turn.logprobs, _parse_events(done.turn.reply))
            for choice, done in enumerate(dones)
        ),
    ]


def _parse_events(reply: Message) -> list[SaidEvent]:
    events: list[Any] = []
    if reply.reasoning:
        events.append(ReasoningDelta(reply.reasoning))
    if reply.content:
        events.append(TextDelta(reply.content))
    return [*events, *(CallDelta(index, call) for index, call in enumerate(reply.tool_calls))]
