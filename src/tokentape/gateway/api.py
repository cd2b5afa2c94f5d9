"""The agents' side of the gateway without HTTP: a request of any wire in, the pieces of its reply out."""

import contextlib
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping, Sequence
from typing import Any

from tokentape.errors import TokentapeError
from tokentape.gateway.calls import Call
from tokentape.gateway.exchange import Done, Emit, Event, Progress, Started
from tokentape.gateway.sessions import Session
from tokentape.gateway.turn import Turns
from tokentape.gateway.wire import AgentRequest, Decoded, Wire, WireConfig, Writer
from tokentape.parse import CallDelta, ParseEvent, ReasoningDelta, TextDelta
from tokentape.types import Message


class AgentApi:
    """Answers agents, each request once: an SDK's retry gets the answer that the first try got.

    A request is a retry of one with the same digest (wire, idempotency key, body) in the same session

    - when its headers say so: `x-stainless-retry-count` above 0, or an `Idempotency-Key`;
    - when the answer to the first one did not reach anybody;
    - while the first one is still being answered, unless its headers say that it is no retry.

    Every other request of the same digest is sampled again. After `ping_s` seconds without a token a stream
    says that it is alive.
    """

    def __init__(self, turns: Turns, config: WireConfig, *, ping_s: float = 15.0) -> None:
        self.config = config
        self._turns = turns
        self._ping_s = ping_s
        self._calls: set[Call] = set()

    def decode(self, wire: Wire, session: Session, body: bytes, headers: Mapping[str, str]) -> Decoded:
        """Read a request.

        Raises:
            RequestError: it cannot be served; `param` names the field.
            SessionClosed: the session takes no more turns.
        """
        session.check_open()
        return wire.decode(AgentRequest(body, headers, session, self.config))

    async def whole(self, session: Session, decoded: Decoded, headers: Mapping[str, str]) -> list[Done]:
        """The turns that answer a request; call `delivered` when the reply has been sent.

        Raises:
            TokentapeError: there is no answer.
        """
        with _answering(session, decoded):
            answer = await self._answer(session, decoded, headers)
            if not isinstance(answer, Call):
                return answer
            with answer.followed():
                return await answer.done()

    async def stream(
        self, session: Session, decoded: Decoded, headers: Mapping[str, str]
    ) -> AsyncGenerator[bytes]:
        """The pieces of a streamed reply. The first comes with the first tokens.

        Closing the iterator early aborts the turn, unless somebody else waits for it, too.

        Raises:
            TokentapeError: before the first piece; a later failure is the last piece.
        """
        writer, begun = decoded.writer, False
        try:
            with _answering(session, decoded):
                answer = await self._answer(session, decoded, headers)
                if isinstance(answer, Call):
                    with answer.followed():
                        async for piece in self._pieces(answer, writer):
                            begun = True
                            yield piece
                        dones = await answer.done()
                else:
                    dones = answer
                    yield b"".join(_write(writer, item) for item in _events(dones))
                yield writer.end(dones)
        except TokentapeError as error:
            if not begun:
                raise
            yield writer.error(error)

    def delivered(self, session: Session, decoded: Decoded) -> None:
        """The reply has been sent, all of it: the same request again is no retry."""
        session.undelivered.discard(decoded.request.origin.digest)

    def count_tokens(self, session: Session, decoded: Decoded) -> int:
        """How many tokens the request's prompt would have."""
        return self._turns.planner.count(session, decoded.request)

    async def aclose(self) -> None:
        """Abort what is being sampled, and wait until that is recorded."""
        calls = tuple(self._calls)
        for call in calls:
            call.stop()
        for call in calls:
            await call.ended()

    async def _pieces(self, call: Call, writer: Writer) -> AsyncGenerator[bytes]:
        """Written events; what the stream begins with waits for the first of them."""
        waiting = b""
        async with contextlib.aclosing(call.events(self._ping_s)) as events:
            async for item in events:
                piece = waiting + (writer.ping() if item is None else _write(writer, item))
                if isinstance(item, Started):
                    waiting = piece
                elif piece:
                    waiting = b""
                    yield piece

    async def _answer(
        self, session: Session, decoded: Decoded, headers: Mapping[str, str]
    ) -> Call | list[Done]:
        """The work that answers a request, or the turns that have answered it before."""
        digest = decoded.request.origin.digest
        for call in tuple(session.running.get(digest, ())):
            if call.stopped:  # it may have been committed before it was
                await call.ended()
        count = headers.get("x-stainless-retry-count")
        is_retry = "Idempotency-Key" in headers or count not in (None, "0")
        running = [call for call in session.running.get(digest, ()) if not call.stopped]
        if running and (is_retry or count is None):
            return running[0]
        answered = session.answered.get(digest)
        # Whoever says that it is no retry does not take what another connection is just being sent.
        lost = digest in session.undelivered and (count is None or session.answering[digest] == 1)
        if answered and (is_retry or lost):
            return self._turns.recorded(session, answered)
        return self._call(session, decoded)

    def _call(self, session: Session, decoded: Decoded) -> Call:
        digest = decoded.request.origin.digest
        calls = session.running.setdefault(digest, set())

        def work(emit: Emit) -> Coroutine[Any, Any, list[Done]]:
            return self._turns.run(session, decoded.request, emit)

        def forget() -> None:
            self._calls.discard(call)
            calls.discard(call)
            if call.failed and digest not in session.undelivered:
                # What retries it must not get the answer of an earlier request of the same words.
                session.answered.pop(digest, None)
            if not calls:
                session.running.pop(digest, None)

        call = Call(work, why=session.cancelled)
        calls.add(call)
        self._calls.add(call)
        call.then(forget)
        return call


@contextlib.contextmanager
def _answering(session: Session, decoded: Decoded) -> Generator[None]:
    """Count the connections that are being answered."""
    digest = decoded.request.origin.digest
    session.answering[digest] += 1
    try:
        yield
    finally:
        session.answering[digest] -= 1
        if not session.answering[digest]:
            del session.answering[digest]


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


def _parse_events(reply: Message) -> list[ParseEvent]:
    events: list[Any] = []
    if reply.reasoning:
        events.append(ReasoningDelta(reply.reasoning))
    if reply.content:
        events.append(TextDelta(reply.content))
    return [*events, *(CallDelta(index, call) for index, call in enumerate(reply.tool_calls))]
