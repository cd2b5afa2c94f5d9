"""One turn: plan → generate → parse → store → commit. Knows no HTTP."""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import string
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
from msgspec.structs import replace

from tokentape.engines.base import Engine, GenerateRequest, GenerateResult, TokenChunk
from tokentape.errors import (
    EngineUnavailable,
    InternalError,
    LimitReached,
    RequestError,
    StoreError,
    TokentapeError,
)
from tokentape.formats import FORMATS, Format, foreign
from tokentape.gateway.admission import Deadline
from tokentape.gateway.clock import Clock, note_failure
from tokentape.gateway.exchange import Done, Emit, Event, Progress, Started, TurnRequest
from tokentape.gateway.plan import Plan, Planner
from tokentape.gateway.session import Session
from tokentape.gateway.sessions import Sessions, to_the_end
from tokentape.gateway.weights import Weights
from tokentape.metrics import Metrics
from tokentape.parse import ArgumentsDelta, CallDelta, ParseEvent, Parser, ParseResult, SaidEvent
from tokentape.render import Renderer
from tokentape.store import Store
from tokentape.tape import BranchReason, LogprobBasis, Turn
from tokentape.tokenizer import TextStream
from tokentape.types import Json, Message, Prompt, Sampling, TokenRun, Usage
from tokentape.volatile import Volatile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Capture:
    """What the engine is asked for beside the tokens.

    `support`: what top-k, top-p and min-p left, of turns that set `top_k`: SGLang tells no other (up to its
    `--sampling-mask-max-tokens`). `routed_experts`: of every token, from a mixture of experts.
    """

    support: bool = False
    routed_experts: bool = False


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A generation that has ended well, and what it says."""

    result: GenerateResult
    parsed: ParseResult
    top: Sequence[Sequence[tuple[int, float]]] | None


@dataclass(slots=True)
class _Reader:
    """Turns sampled ids into parse events. A token that may be the stop token waits until it is known.

    Arguments of calls that are still being written are left out: a call may turn out malformed, and nothing
    that a client was sent can be taken back. The complete call has them all.
    """

    text: TextStream
    parser: Parser
    maybe_stop: frozenset[int]
    held: list[int] = field(default_factory=list[int])

    def feed(self, ids: Sequence[int]) -> list[SaidEvent]:
        ready = [*self.held, *ids]
        self.held = [ready.pop()] if ready and ready[-1] in self.maybe_stop else []
        return _said(self.parser.feed(self.text.feed(ready)))

    def finish(self, stop_id: int | None) -> tuple[list[SaidEvent], ParseResult]:
        left = self.held[:-1] if stop_id is not None else self.held
        events = self.parser.feed(self.text.feed(left) + self.text.finish())
        last, result = self.parser.finish()
        return _said(events + last), result


class Turns:
    """Runs turns of any session against one engine.

    `context_length` in tokens bounds prompt plus completion; None: only the engine knows it. `eos_ids` end a
    turn even where the engine does not say so. `formats` are all rows, to tell another family's calls by.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        format: Format,  # noqa: A002  # the field's word
        volatile: Volatile,
        store: Store,
        sessions: Sessions,
        weights: Weights,
        metrics: Metrics,
        *,
        context_length: int | None,
        context_is_fixed: bool = False,
        eos_ids: frozenset[int] = frozenset(),
        default_max_tokens: int = 4096,
        formats: Sequence[Format] = FORMATS,
        capture: Capture = Capture(),
    ) -> None:
        self._engine = engine
        self._tokenizer = renderer.tokenizer
        self._format = format
        self._formats = formats
        self._new_call_id = _new_short_call_id if renderer.template.short_call_ids else _new_call_id
        self._store = store
        self._sessions = sessions
        self._weights = weights
        self.metrics = metrics
        self._capture = capture
        self._maybe_stop = renderer.tokenizer.added_ids | eos_ids
        self._eos_ids = eos_ids
        self.planner = Planner(
            renderer,
            format,
            volatile,
            context_length=context_length,
            is_fixed=context_is_fixed,
            end_ids=self._maybe_stop,
            default_max_tokens=default_max_tokens,
        )

    async def run(
        self,
        session: Session,
        request: TurnRequest,
        turn_ids: Sequence[str],
        emit: Emit,
        deadline: Deadline,
    ) -> list[Done]:
        """Sample the turns that a request asks for, one a choice, and commit them together.

        A cancelled caller aborts the generations; nothing is committed then.

        Raises:
            RequestError: the request cannot be served; the session is unchanged.
            EngineError, StoreError: the turn failed; the session has one failure more and is otherwise
                unchanged.
        """
        session.check_open()
        clock = Clock(self.metrics, turn_ids[0])
        if self.planner.engine_sampling is None:
            await self._ask_engine()
        plan = await self.planner.plan(session, request)
        clock.planned()
        num_tokens = 0
        calls: list[Progress] = []

        async def forward(event: Event) -> None:
            nonlocal num_tokens
            if isinstance(event, Progress):
                if request.stream and not num_tokens:
                    clock.first_token()
                num_tokens += len(event.ids)
                event = _without_calls(event, calls)
            if request.stream:
                await emit(event)

        self.metrics.active_turns.inc()
        try:
            await forward(Started(tuple(turn_ids), len(plan.prompt), time.time()))
            async with deadline.within():
                sampled = await self._sample(session, request, plan, turn_ids, forward)
        except asyncio.CancelledError:
            await self.fail(session, session.cancelled(), num_tokens, clock)
            raise
        except RequestError as error:  # a context that only the engine knows to be too long
            if num_tokens or isinstance(error, LimitReached):
                await self.fail(session, error, num_tokens, clock)
            raise
        except TokentapeError as error:
            await self.fail(session, error, num_tokens, clock)
            raise
        except Exception as error:  # the boundary: a stream that has begun can only end with a typed error
            bug = InternalError(f"{type(error).__name__}: {error}")
            log.exception("session %s: turn failed", session.session_id)
            await self.fail(session, bug, num_tokens, clock)
            raise bug from error
        finally:
            self.metrics.active_turns.dec()
        clock.sampled()
        # To the end even if everybody leaves, or the session is being ended: a durable turn is in the tree,
        # and whoever asked for it gets it.
        turns = await to_the_end(self._commit(session, request, plan, turn_ids, sampled), then_cancel=False)
        if request.stream:
            for held in calls:  # agents run a call as soon as they have read it: not before it is durable
                await emit(held)
        clock.committed(session.session_id, turns, len(plan.prompt))
        return [
            Done(turn, plan.prompt, _usage(turn, plan.prompt), one.top)
            for turn, one in zip(turns, sampled, strict=True)
        ]

    def recorded(self, session: Session, turn_ids: Sequence[str]) -> list[Done]:
        """Committed turns once more, as `run` returned them.

        Raises:
            InternalError: one is not in the session.
        """
        dones: list[Done] = []
        for turn_id in turn_ids:
            turn = session.tree.turn(turn_id)
            if turn is None:
                raise InternalError(f"turn {turn_id} is not in session {session.session_id!r}")
            prompt = session.tree.prompt(turn_id)
            dones.append(Done(turn, prompt, _usage(turn, prompt)))
        return dones

    async def fail(
        self, session: Session, error: TokentapeError, num_tokens: int, clock: Clock | None = None
    ) -> None:
        """Record a turn that was not committed: `num_tokens` were sampled for it."""
        note_failure(session.session_id, error, num_tokens, clock)
        try:
            await self._sessions.fail(session, error, num_tokens)
        except StoreError:
            log.exception("session %s: the failure could not be stored", session.session_id)

    # -- the engine

    async def _ask_engine(self) -> None:
        """What it samples with by itself belongs to the turn. One that is not there will fail the turn."""
        try:
            self.planner.learn(await self._engine.info())
        except EngineUnavailable:
            pass
        except TokentapeError as error:
            log.warning("engine: it does not say what it samples with by itself: %s", error)
            self.planner.engine_sampling = Sampling()

    async def _sample(
        self, session: Session, request: TurnRequest, plan: Plan, turn_ids: Sequence[str], emit: Emit
    ) -> list[_Sampled]:
        """All choices, side by side; where one fails, the others are aborted."""
        if len(turn_ids) == 1:
            return [await self._generate(session, request, plan, turn_ids[0], 0, emit)]
        tasks = [
            asyncio.ensure_future(self._generate(session, request, plan, turn_id, choice, emit))
            for choice, turn_id in enumerate(turn_ids)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate(
        self, session: Session, request: TurnRequest, plan: Plan, turn_id: str, choice: int, emit: Emit
    ) -> _Sampled:
        sampling = _of_choice(plan.sampling, choice)
        stops = self._maybe_stop | frozenset(sampling.stop_token_ids)
        reader = _Reader(self._tokenizer.stream(), self._parser(request, plan), stops)
        cut = LogprobBasis.of(sampling) is LogprobBasis.UNTRUNCATED and (sampling.top_k or 0) > 1
        call = GenerateRequest(
            turn_id,
            plan.prompt,
            sampling,
            request.stream,
            request.num_top_logprobs,
            capture_support=self._capture.support and cut,
            experts_from=_experts_from(plan) if self._capture.routed_experts else None,
            session=session.session_id,
        )
        top: list[list[tuple[int, float]]] = []
        async with contextlib.aclosing(self._engine.generate(call)) as parts:
            async for part in parts:
                if isinstance(part, TokenChunk):
                    top += part.top or []
                    await emit(Progress(choice, part.ids, part.logprobs, reader.feed(part.ids), part.top))
                else:
                    events, parsed = reader.finish(self._stop_id(part))
                    await emit(Progress(choice, (), (), events))
                    return _Sampled(part, parsed, top if request.num_top_logprobs else None)
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

    def _parser(self, request: TurnRequest, plan: Plan) -> Parser:
        return Parser(
            self._format.syntax,
            tools=_parameters(request.frame.tools),
            parse_tools=request.parse_calls and bool(request.frame.tools),
            reasoning_open=plan.reasoning_open,
            stop=plan.stop,
            new_call_id=self._new_call_id,
        )

    # -- after the engine

    async def _commit(
        self,
        session: Session,
        request: TurnRequest,
        plan: Plan,
        turn_ids: Sequence[str],
        sampled: Sequence[_Sampled],
    ) -> list[Turn]:
        """Committed and counted turns, or a recorded failure."""
        num_tokens = sum(len(one.result.completion_ids) for one in sampled)
        try:
            async with session.commit_lock:
                session.check_open()  # it may have been finished meanwhile
                session.check_budget(num_tokens, len(sampled))
                turns = [
                    self._turn(session, request, plan, turn_ids, choice, one)
                    for choice, one in enumerate(sampled)
                ]
                for turn in turns:
                    turn.verify()
                await self._weights.saw(span.version for turn in turns for span in turn.versions)
                await self._sessions.commit(session, turns)
        except TokentapeError as error:  # the store failed; or the session is finished, or full, meanwhile
            await self.fail(session, error, num_tokens)
            raise
        for turn in turns:
            self._count(turn, len(plan.prompt))
            self._check_format(session, turn)
        return turns

    def _turn(
        self,
        session: Session,
        request: TurnRequest,
        plan: Plan,
        turn_ids: Sequence[str],
        choice: int,
        sampled: _Sampled,
    ) -> Turn:
        result, parsed = sampled.result, sampled.parsed
        parent_id = plan.parent.turn_id if plan.parent is not None else None
        if choice:
            reason = BranchReason.CHOICE.value
        else:
            reason = plan.reason or session.tree.branch_reason(parent_id, request.frame_key, plan.keys)
        return Turn(
            turn_id=turn_ids[choice],
            parent_id=parent_id,
            branch_reason=reason,
            prompt=plan.rendered.run,
            completion=TokenRun(result.completion_ids),
            logprobs=array("f", result.logprobs),
            versions=result.versions,
            logprob_basis=LogprobBasis.of(plan.sampling).value,
            support=result.support,
            routed_experts=result.routed_experts,
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
            sampling=_of_choice(plan.sampling, choice),
            neutralised=plan.rendered.neutralised,
            superseded=plan.superseded,
            origin=replace(request.origin, request_id=turn_ids[0]),
            num_cached_tokens=result.num_cached_tokens,
            created_at=time.time(),
        )

    def _check_format(self, session: Session, turn: Turn) -> None:
        """Say so if another family's calls stand in the text: a wrong format finds no calls at all."""
        if not turn.tools or not turn.reply.content:
            return
        other = foreign(turn.reply.content, _parameters(turn.tools), self._format, self._formats)
        if other is not None:
            self.metrics.foreign_calls.labels(other).inc()
            log.warning(
                "session %s: turn %s has a tool call of format %s in its text; this gateway reads %s "
                "(--tool-format): it was not delivered",
                session.session_id, turn.turn_id, other, self._format.name,
            )  # fmt: skip

    def _count(self, turn: Turn, num_prompt_tokens: int) -> None:
        metrics = self.metrics
        metrics.turns.labels(turn.finish_reason).inc()
        metrics.parse_statuses.labels(turn.parse_status).inc()
        if turn.branch_reason is not None:
            metrics.branches.labels(turn.branch_reason).inc()
        if turn.parent_id is not None:
            metrics.extended.inc()
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.prompt_length.observe(num_prompt_tokens)
        metrics.cached_tokens.inc(turn.num_cached_tokens or 0)
        metrics.sampled_tokens.inc(len(turn.completion))
        metrics.rendered_tokens.inc(len(turn.prompt))
        metrics.neutralised.inc(len(turn.neutralised))
        metrics.ignored_fields.inc(len(turn.origin.ignored))


def _experts_from(plan: Plan) -> int:
    """The first token whose experts no earlier turn of the path has: the parent's last sampled one."""
    return len(plan.prompt) - len(plan.rendered.run) - (plan.parent is not None)


def _said(events: Sequence[ParseEvent]) -> list[SaidEvent]:
    return [event for event in events if not isinstance(event, ArgumentsDelta)]


def _without_calls(progress: Progress, calls: list[Progress]) -> Progress:
    """Progress without its tool calls; these are put aside."""
    found = [event for event in progress.events if isinstance(event, CallDelta)]
    if not found:
        return progress
    calls.append(Progress(progress.choice, (), (), found))
    rest = [event for event in progress.events if not isinstance(event, CallDelta)]
    return dataclasses.replace(progress, events=rest)


def _of_choice(sampling: Sampling, choice: int) -> Sampling:
    """Each choice has a seed of its own: the same one would sample the same tokens."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice + 2**63) % 2**64 - 2**63)  # within 64 bits


def _usage(turn: Turn, prompt: Prompt) -> Usage:
    return Usage(len(prompt), len(turn.completion), turn.num_cached_tokens)


def _parameters(tools: Sequence[Json]) -> dict[str, Json]:
    """The schema of each tool's parameters, by the tool's name."""
    functions: list[Json] = [tool.get("function", tool) for tool in tools]
    schemas = {function.get("name"): function.get("parameters") for function in functions}
    return {
        name: cast("Json", schema) if isinstance(schema, dict) else {}
        for name, schema in schemas.items()
        if isinstance(name, str)
    }


def new_turn_id() -> str:
    """A turn's name: unique everywhere, and the engine's name for the generation."""
    return f"t-{secrets.token_hex(12)}"


def _new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _new_short_call_id() -> str:
    """Nine letters and digits: Mistral's templates refuse any other id."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
