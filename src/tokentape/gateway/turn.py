"""One turn: attach → extend → generate → parse → store → commit. Knows no HTTP."""

import asyncio
import contextlib
import logging
import secrets
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokentape.engines.base import Engine, GenerateRequest, GenerateResult, TokenChunk
from tokentape.errors import (
    ClientGone,
    ContextOverflow,
    InternalError,
    RequestError,
    StoreError,
    TokentapeError,
)
from tokentape.formats import Format
from tokentape.gateway.sessions import Session, Sessions, to_the_end
from tokentape.metrics import Metrics
from tokentape.parse import ParseEvent, Parser, ParseResult
from tokentape.render import Ended, Frame, NotExtendable, Rendered, Renderer
from tokentape.store import Store
from tokentape.tape import Turn, prompt_after
from tokentape.tokenizer import TextStream
from tokentape.tree import Attachment, Known, MessageKey, keys_of
from tokentape.types import Message, Prompt, Sampling, TokenRun, Usage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """What a wire asks for. `messages` are the whole conversation; `frame_key` is the identity of `frame`.

    `turn_id` names the turn if it is committed. `ignored` are the names of fields that had no effect.
    `parse_calls` is False where the caller wants no tool calls.
    """

    turn_id: str
    messages: Sequence[Known]
    frame: Frame
    frame_key: tuple[bytes, bytes]
    sampling: Sampling
    parse_calls: bool
    stream: bool
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """New tokens as they come: `ids` int[n] and `logprobs` float[n], and what the text means so far."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    events: Sequence[ParseEvent]


@dataclass(frozen=True, slots=True)
class Done:
    """A committed turn with what a reply needs. `prompt` is all that the engine was sent."""

    turn: Turn
    prompt: Prompt
    parsed: ParseResult
    usage: Usage


@dataclass(frozen=True, slots=True)
class _Plan:
    """A turn before it is sampled.

    `parent` is None where the prompt had to be rendered whole; `reason` then says why if the template is to
    blame. `new` are the messages that `rendered` renders, `keys` theirs.
    """

    parent: Turn | None
    reason: str | None
    new: tuple[Message, ...]
    keys: Sequence[MessageKey]
    rendered: Rendered
    prompt: Prompt
    sampling: Sampling


@dataclass(slots=True)
class _Reader:
    """Turns sampled ids into parse events. A token that may be the stop token waits until it is known."""

    text: TextStream
    parser: Parser
    maybe_stop: frozenset[int]
    held: list[int] = field(default_factory=list[int])

    def feed(self, ids: Sequence[int]) -> list[ParseEvent]:
        ready = [*self.held, *ids]
        self.held = [ready.pop()] if ready and ready[-1] in self.maybe_stop else []
        return self.parser.feed(self.text.feed(ready))

    def finish(self, stop_id: int | None) -> tuple[list[ParseEvent], ParseResult]:
        left = self.held[:-1] if stop_id is not None else self.held
        events = self.parser.feed(self.text.feed(left) + self.text.finish())
        last, result = self.parser.finish()
        return events + last, result


class Turns:
    """Runs turns of any session against one engine.

    `context_length` in tokens bounds prompt plus completion; None: only the engine knows it. `eos_ids` end a
    turn even where the engine does not say so.
    `default_max_tokens` holds where neither the request, the session, nor the context says how much to
    sample.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        format: Format,  # noqa: A002  # the field's word
        store: Store,
        sessions: Sessions,
        metrics: Metrics,
        *,
        context_length: int | None,
        eos_ids: frozenset[int] = frozenset(),
        default_max_tokens: int = 4096,
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._format = format
        self._store = store
        self._sessions = sessions
        self._metrics = metrics
        self.context_length = context_length
        self._default_max_tokens = default_max_tokens
        self._maybe_stop = renderer.tokenizer.added_ids | eos_ids
        self._eos_ids = eos_ids

    async def run(
        self,
        session: Session,
        request: TurnRequest,
        emit: Callable[[Progress], Awaitable[None]] | None = None,
    ) -> Done:
        """Sample one turn and commit it. With `emit`, progress is handed over as it comes.

        A cancelled caller, or an `emit` that raises `ClientGone`, aborts the generation; nothing is committed
        then.

        Raises:
            RequestError: the request cannot be served; the session is unchanged.
            EngineError, StoreError, ClientGone: the turn failed; the session has one failure more and is
                otherwise unchanged.
        """
        session.check_open()
        started = time.monotonic()
        try:
            plan = self._plan(session, request)
        except RecursionError:
            raise RequestError("tools or tool-call arguments are nested too deep", param="messages") from None
        num_tokens = 0

        async def count(progress: Progress) -> None:
            nonlocal num_tokens
            num_tokens += len(progress.ids)
            if emit is not None:
                await emit(progress)

        self._metrics.active_turns.inc()
        try:
            result, parsed = await self._generate(request, plan, count)
        except asyncio.CancelledError:
            await self._fail(session, ClientGone("the client left before the turn was committed"), num_tokens)
            raise
        except RequestError as error:  # a context that only the engine knows to be too long
            if num_tokens:
                await self._fail(session, error, num_tokens)
            raise
        except TokentapeError as error:
            await self._fail(session, error, num_tokens)
            raise
        except Exception as error:  # the boundary: a stream that has begun can only end with a typed error
            bug = InternalError(f"{type(error).__name__}: {error}")
            log.exception("session %s: turn failed", session.session_id)
            await self._fail(session, bug, num_tokens)
            raise bug from error
        finally:
            self._metrics.active_turns.dec()
        # To the end even if the client leaves meanwhile: a durable turn is always in the tree.
        turn = await to_the_end(self._commit(session, request, plan, result, parsed))
        self._metrics.turn_seconds.observe(time.monotonic() - started)
        usage = Usage(len(plan.prompt), len(turn.completion), turn.num_cached_tokens)
        return Done(turn, plan.prompt, parsed, usage)

    # -- before the engine

    def _plan(self, session: Session, request: TurnRequest) -> _Plan:
        budget = session.budget()
        keys = keys_of(request.messages)
        attachment = session.tree.attach(request.frame_key, keys)
        new = tuple(known.message for known in request.messages[attachment.num_matched :])
        parent = attachment.path[-1] if attachment.path else None
        reason = None
        if parent is not None:
            new = _with_recorded_ids(new, keys[attachment.num_matched :], parent)
            # An ordinary token that stopped the engine (`stop_token_ids`) ends no turn of the template's.
            stop_id = parent.stop_id if parent.stop_id in self._maybe_stop else None
            ended = Ended(parent.reply, stop_id, parent.in_reasoning)
            rendered = self._renderer.extend(request.frame, attachment.before, ended, new)
            if isinstance(rendered, NotExtendable):
                log.info(
                    "session %s: new branch: %s (%s)", session.session_id, rendered.reason, rendered.detail
                )
                reason = rendered.reason.value
                new, parent = (*_recorded(attachment), *new), None
                rendered = self._renderer.render(request.frame, new)
        else:
            rendered = self._renderer.render(request.frame, new)
        path = attachment.path if parent is not None else ()
        prompt = prompt_after(path, rendered.run)
        sampling = self._sampling(session.record.sampling, request.sampling, len(prompt), budget)
        new_keys = keys[attachment.num_matched :] if parent is not None else keys
        return _Plan(parent, reason, new, new_keys, rendered, prompt, sampling)

    def _sampling(
        self, session: Sampling, request: Sampling, num_prompt: int, budget: int | None
    ) -> Sampling:
        """The request's sampling over the session's, with a definite number of tokens to sample.

        Raises:
            ContextOverflow: the prompt, or prompt + `max_tokens`, does not fit.
        """
        merged = msgspec.structs.replace(
            session,
            **{
                f: getattr(request, f)
                for f in Sampling.__struct_fields__
                if getattr(request, f) not in (None, ())
            },
        )
        room = None if self.context_length is None else self.context_length - num_prompt
        if room is not None and room < (merged.max_tokens or 1):
            asked = f" and {merged.max_tokens} in the completion" if merged.max_tokens else ""
            raise ContextOverflow(
                f"This model's maximum context length is {self.context_length} tokens. However, your request "
                f"has {num_prompt} tokens in the messages{asked}. Please reduce the length of the messages "
                "or completion.",
                num_prompt_tokens=num_prompt,
                context_length=self.context_length,
            )
        limits = [n for n in (merged.max_tokens, budget) if n is not None]
        if merged.max_tokens is None:
            limits.append(room if room is not None else self._default_max_tokens)
        return msgspec.structs.replace(merged, max_tokens=min(limits))

    # -- the engine

    async def _generate(
        self, request: TurnRequest, plan: _Plan, emit: Callable[[Progress], Awaitable[None]]
    ) -> tuple[GenerateResult, ParseResult]:
        stops = self._maybe_stop | frozenset(plan.sampling.stop_token_ids)
        reader = _Reader(self._renderer.tokenizer.stream(), self._parser(request, plan), stops)
        call = GenerateRequest(request.turn_id, plan.prompt, plan.sampling, request.stream)
        async with contextlib.aclosing(self._engine.generate(call)) as parts:
            async for part in parts:
                if isinstance(part, TokenChunk):
                    await emit(Progress(part.ids, part.logprobs, reader.feed(part.ids)))
                else:
                    events, parsed = reader.finish(self._stop_id(part))
                    await emit(Progress((), (), events))
                    return part, parsed
        raise InternalError("the engine client ended without a result")

    def _stop_id(self, result: GenerateResult) -> int | None:
        """The stop token at the completion's end.

        An engine may stop at one without naming it, or call it a length cut where both fall together.
        """
        if isinstance(result.matched, int):
            return result.matched
        last = result.completion_ids[-1]
        unnamed = result.matched is None and result.finish_reason == "stop" and last in self._maybe_stop
        return last if unnamed or last in self._eos_ids else None

    def _parser(self, request: TurnRequest, plan: _Plan) -> Parser:
        tags = self._format.reasoning
        return Parser(
            self._format.syntax,
            tools=_tool_names(request.frame),
            parse_tools=request.parse_calls and bool(request.frame.tools),
            reasoning_open=tags is not None and plan.rendered.tail.rstrip().endswith(tags.open),
            stop=plan.sampling.stop,
            new_call_id=_new_call_id,
        )

    # -- after the engine

    async def _commit(
        self, session: Session, request: TurnRequest, plan: _Plan, result: GenerateResult, parsed: ParseResult
    ) -> Turn:
        """A committed and counted turn, or a recorded failure."""
        try:
            turn = await self._put(session, request, plan, result, parsed)
        except TokentapeError as error:  # the store failed; or the session is finished, or full, meanwhile
            await self._fail(session, error, len(result.completion_ids))
            raise
        self._count(turn, len(plan.prompt))
        return turn

    async def _put(
        self, session: Session, request: TurnRequest, plan: _Plan, result: GenerateResult, parsed: ParseResult
    ) -> Turn:
        """Make the turn durable, then part of the tree."""
        parent_id = plan.parent.turn_id if plan.parent is not None else None
        async with session.commit_lock:
            session.check_open()  # it may have been finished meanwhile
            session.check_budget(len(result.completion_ids))
            reason = plan.reason or session.tree.branch_reason(parent_id, request.frame_key, plan.keys)
            turn = Turn(
                turn_id=request.turn_id,
                parent_id=parent_id,
                branch_reason=reason,
                prompt=plan.rendered.run,
                completion=TokenRun(result.completion_ids),
                logprobs=array("f", result.logprobs),
                versions=result.versions,
                finish_reason=result.finish_reason,
                stop_id=self._stop_id(result),
                messages=plan.new,
                reply=Message(
                    role="assistant",
                    content=parsed.content,
                    reasoning=parsed.reasoning,
                    tool_calls=parsed.tool_calls,
                ),
                in_reasoning=not parsed.reasoning_closed,
                parse_status=parsed.status,
                attempts=tuple(msgspec.to_builtins(a) for a in parsed.attempts),
                tools=request.frame.tools,
                arguments=dict(request.frame.arguments),
                sampling=plan.sampling,
                neutralised=plan.rendered.neutralised,
                ignored=request.ignored,
                num_cached_tokens=result.num_cached_tokens,
                created_at=time.time(),
            )
            turn.verify()
            await self._store.put_turn(session.session_id, turn)
            session.commit(turn)
            return turn

    def _count(self, turn: Turn, num_prompt_tokens: int) -> None:
        metrics = self._metrics
        metrics.turns.labels(turn.finish_reason).inc()
        metrics.parse_statuses.labels(turn.parse_status).inc()
        if turn.branch_reason is not None:
            metrics.branches.labels(turn.branch_reason).inc()
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.prompt_length.observe(num_prompt_tokens)
        metrics.cached_tokens.inc(turn.num_cached_tokens or 0)
        metrics.sampled_tokens.inc(len(turn.completion))
        metrics.rendered_tokens.inc(len(turn.prompt))
        metrics.neutralised.inc(len(turn.neutralised))
        metrics.ignored_fields.inc(len(turn.ignored))

    async def _fail(self, session: Session, error: TokentapeError, num_tokens: int) -> None:
        log.warning("session %s: turn failed: %s: %s", session.session_id, error.kind, error)
        try:
            await self._sessions.fail(session, error, num_tokens)
        except StoreError:
            log.exception("session %s: the failure could not be stored", session.session_id)


def _recorded(attachment: Attachment) -> list[Message]:
    """The matched messages as they were recorded: with the reasoning that the agent did not replay."""
    return [message for turn in attachment.path for message in (*turn.messages, turn.reply)]


def _with_recorded_ids(
    new: tuple[Message, ...], keys: Sequence[MessageKey], parent: Turn
) -> tuple[Message, ...]:
    """Tool results under the recorded ids of the calls: agents renumber, templates look up."""
    calls = parent.reply.tool_calls
    out: list[Message] = []
    for position, (message, key) in enumerate(zip(new, keys, strict=True)):
        if message.role == "assistant":  # what follows answers that message's calls
            return (*out, *new[position:])
        if message.role == "tool" and 0 <= key.ordinal < len(calls):
            message = msgspec.structs.replace(message, tool_call_id=calls[key.ordinal].id)
        out.append(message)
    return tuple(out)


def _tool_names(frame: Frame) -> frozenset[str]:
    names: list[Any] = [tool.get("function", tool).get("name") for tool in frame.tools]
    return frozenset(name for name in names if isinstance(name, str))


def new_turn_id() -> str:
    """A turn's name: unique everywhere, and the engine's name for the generation."""
    return f"t-{secrets.token_hex(12)}"


def _new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
