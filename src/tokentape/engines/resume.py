"""Generations that outlive an abort: what was sampled becomes prompt, and the engine goes on behind it.

A weight update aborts what runs (SGLang's `/pause_generation`, `/update_weight_version`, `/abort_request`
with `abort_all`). The tokens sampled before it are kept, with their versions, and the next weights sample
the rest: one turn, two spans.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from msgspec.structs import replace

from tokentape.engines.base import Engine, EngineInfo, GenerateRequest, GenerateResult, TokenChunk
from tokentape.errors import EngineAborted, EngineUnavailable, InternalError
from tokentape.types import RoutedExperts, Sampling, Support, TokenRun, VersionSpan

log = logging.getLogger(__name__)

MAX_STALLS = 8
"""Aborts in a row without a token between them, after which a generation is given up."""
UNNAMED = "default"
"""The name of weights that nobody has named: SGLang's own, and the embedded engine's."""
_GRACE_S = 2.0
"""How long a pause waits for an interrupted engine before it leaves generations without a token."""
_LOOK_S = 0.1
_PATIENCE_S = 30.0  # until it is known again what the engine samples with
_STALL_S = 0.05  # the first wait of a generation that is aborted again and again; doubled each time


class ResumingEngine:
    """An `engines.base.Engine` that resumes what is aborted, and holds everything while it is paused.

    `stop_ids` end a turn: an engine that aborts with one of them sampled was done. `on_resume` is called for
    each resumption. `version`, where set, names the weights that the engine itself has no name for.

    `is_current` says whether `version` and the pause are up to date: what may have missed a change of them
    begins no generation.
    """

    def __init__(
        self, engine: Engine, *, stop_ids: frozenset[int] = frozenset(), on_resume: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._stop_ids = stop_ids
        self._on_resume = on_resume
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._waiting: set[_Waiting] = set()
        self._num_doubts = 0
        self.num_running = 0
        self.version: str | None = None
        self.is_current: Callable[[], bool] = lambda: True

    @property
    def paused(self) -> bool:
        """Whether generations wait for `resume`."""
        return not self._open.is_set()

    async def pause(self) -> None:
        """Hold every generation; return when the engine runs none. Those it ran go on after `resume`.

        An engine that is paused itself does not answer an abort: what has no token yet is left, and asked for
        again.
        """
        self._open.clear()
        until = asyncio.get_running_loop().time() + _GRACE_S
        while self.num_running and self.paused:
            if asyncio.get_running_loop().time() >= until:
                for waiting in self._waiting:
                    waiting.leave()
            await self._engine.interrupt()
            # Again and again: an abort misses what was still on its way to the engine.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 0.2)

    def resume(self) -> None:
        """Let all generations go on."""
        self._open.set()

    def doubt(self) -> None:
        """The weights may have changed under what runs now, and nobody can say at which token."""
        self._num_doubts += 1

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
        """Yield the sampled tokens, then one `GenerateResult`, as if nothing had happened in between.

        Raises:
            EngineAborted: it was aborted and cannot go on exactly: the engine had more of a state than the
                ids (a constraint, a penalty, a stop string) and a reader has had tokens of it; or it is
                aborted again and again; or the weights that nobody named may have changed under it.
            EngineUnavailable: it is not known, for half a minute, whether there is a pause.
        """
        done = _Done(request, self._stop_ids)
        whole = not _resumable(request.sampling)
        stalls = 0
        while done.result is None:
            await self._until_current()
            while self.paused:
                await self._open.wait()
                await self._until_current()
            async with contextlib.aclosing(self._run(done.next_request())) as parts:
                async for part in parts:
                    if isinstance(part, TokenChunk):
                        if not whole or request.stream:
                            yield part
                        done.chunk = part
                        continue
                    stalls = 0 if part.completion_ids else stalls + 1
                    done.add(part, whole=whole)
            if done.result is None:
                await self._check(stalls)
                self._on_resume()
                log.info("generation %s was aborted: resuming behind %d tokens", request.rid, done.num_tokens)
        if whole and not request.stream and done.chunk is not None:
            yield done.chunk
        yield done.result

    async def _check(self, stalls: int) -> None:
        """Wait before another try; raises `EngineAborted` after too many."""
        if self.paused:
            return
        if stalls >= MAX_STALLS:
            raise EngineAborted(
                f"the engine aborted the generation {stalls} times before it sampled a token: "
                "is somebody pausing or updating it? Send the request again"
            )
        if stalls:
            await asyncio.sleep(_STALL_S * 2**stalls)

    async def _until_current(self, num_doubts: int | None = None) -> None:
        """Wait until nothing can have been missed, or until there are more doubts than so many."""
        until = asyncio.get_running_loop().time() + _PATIENCE_S
        while not self.is_current() and num_doubts in (None, self._num_doubts):
            if asyncio.get_running_loop().time() > until:
                raise EngineUnavailable(
                    "this gateway may have missed a pause, or new weights: it waits to learn"
                )
            await asyncio.sleep(_LOOK_S)

    async def _check_known(self, part: GenerateResult, num_doubts: int) -> None:
        """Raise `EngineAborted` where nobody can say what has sampled it."""
        if all(span.version != UNNAMED for span in part.versions):
            return
        await self._until_current(num_doubts)
        if self._num_doubts != num_doubts:
            raise EngineAborted(
                "the weights may have changed while this gateway was cut off from the others, and the engine "
                "has no name for them: send the request again",
                num_tokens=len(part.completion_ids),
            )

    async def _run(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
        """One call of the engine, its weights named."""
        version, num_doubts = self.version, self._num_doubts
        self.num_running += 1
        self._idle.clear()
        try:
            async with contextlib.aclosing(self._engine.generate(request)) as parts:
                part = await self._first(parts) or _NOTHING
                while part is not None:
                    if isinstance(part, GenerateResult):
                        await self._check_known(part, num_doubts)
                    if isinstance(part, GenerateResult) and version is not None:
                        yield dataclasses.replace(part, versions=_named(part.versions, version))
                    else:
                        yield part
                    part = None if part is _NOTHING else await anext(parts, None)
        finally:
            self.num_running -= 1
            if not self.num_running:
                self._idle.set()

    async def _first(
        self, parts: AsyncGenerator[TokenChunk | GenerateResult]
    ) -> TokenChunk | GenerateResult | None:
        """The first part, None where a pause leaves the generation before it comes."""
        waiting = _Waiting()
        self._waiting.add(waiting)
        try:
            return await anext(parts)
        except asyncio.CancelledError:
            if waiting.was_left():
                return None
            raise
        finally:
            self._waiting.discard(waiting)

    async def interrupt(self) -> None:
        """End what the engine runs; it is resumed at once, unless this is paused."""
        await self._engine.interrupt()

    async def reported(self) -> EngineInfo:
        """What the engine says of itself."""
        return await self._engine.info()

    async def info(self) -> EngineInfo:
        """What the engine says of itself; weights without a name have the one that was announced."""
        info = await self._engine.info()
        if self.version is not None and info.weight_version in (None, UNNAMED) and not info.differs:
            return dataclasses.replace(info, weight_version=self.version)
        return info

    async def aclose(self) -> None:
        """Close the engine."""
        await self._engine.aclose()


class _Waiting:
    """A task that waits for a generation's first token, and may be told to leave it."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a generation is read by a task
        self._task = task
        self._cancelling = task.cancelling()
        self._left = False

    def leave(self) -> None:
        """End the waiting, as a time limit would."""
        if not self._left:
            self._left = True
            self._task.cancel()

    def was_left(self) -> bool:
        """Whether what cancelled the task was `leave` and nothing else; the task goes on then."""
        return self._left and self._task.uncancel() <= self._cancelling


_NOTHING = GenerateResult([], [], "abort", None, (), None)


class _Done:
    """A request, and what was sampled for it so far. `result` is set at its end."""

    def __init__(self, request: GenerateRequest, stop_ids: frozenset[int]) -> None:
        self._request = request
        self._stop_ids = stop_ids | frozenset(request.sampling.stop_token_ids)
        self._parts: list[GenerateResult] = []
        self._num_calls = 0
        self.chunk: TokenChunk | None = None
        self.result: GenerateResult | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens are kept."""
        return sum(len(part.completion_ids) for part in self._parts)

    def next_request(self) -> GenerateRequest:
        """What the engine is to be asked now: the rest, behind what was sampled."""
        request, self._num_calls = self._request, self._num_calls + 1
        if self._num_calls == 1:
            return request
        rid = f"{request.rid}.{self._num_calls}"  # none is used twice: see `GenerateRequest`
        if not self._parts:
            return dataclasses.replace(request, rid=rid)
        sampled = TokenRun([i for part in self._parts for i in part.completion_ids])
        max_tokens = request.sampling.max_tokens
        if max_tokens is None:
            raise InternalError("a generation without max_tokens cannot be resumed")
        at = len(request.prompt) + len(sampled)
        return dataclasses.replace(
            request,
            rid=rid,
            prompt=request.prompt.followed_by(sampled),
            sampling=replace(request.sampling, max_tokens=max_tokens - len(sampled)),
            experts_from=None if request.experts_from is None else at - 1,
        )

    def add(self, part: GenerateResult, *, whole: bool) -> None:
        """Take the end of one call. With `whole` an aborted one is worth nothing."""
        if part.finish_reason == "abort" and whole:
            if self._request.stream and part.completion_ids:
                raise EngineAborted(
                    "the engine aborted the generation, which cannot go on exactly: its constraint, "
                    "penalties or stop strings depend on what was sampled before; send the request again",
                    num_tokens=len(part.completion_ids),
                )
            self.chunk = None
            return
        if part.completion_ids:
            self._parts.append(part)
        if part.finish_reason != "abort":
            self.result = _joined(self._parts, part)
        elif self._parts and self._parts[-1].completion_ids[-1] in self._stop_ids:
            last = self._parts[-1].completion_ids[-1]
            self.result = _joined(self._parts, dataclasses.replace(part, finish_reason="stop", matched=last))
        elif self.num_tokens == self._request.sampling.max_tokens:
            self.result = _joined(self._parts, dataclasses.replace(part, finish_reason="length"))


def _joined(parts: Sequence[GenerateResult], last: GenerateResult) -> GenerateResult:
    """One result of several; how it ended is the last's."""
    if len(parts) == 1 and parts[0] is last:  # never aborted: as nearly all are
        return last
    spans: list[VersionSpan] = []
    ids: list[int] = []
    for part in parts:
        for span in part.versions:
            start, end = span.start + len(ids), span.end + len(ids)
            if spans and spans[-1].version == span.version:
                start = spans.pop().start
            spans.append(VersionSpan(span.version, start, end))
        ids += part.completion_ids
    return GenerateResult(
        ids,
        [logprob for part in parts for logprob in part.logprobs],
        last.finish_reason,
        last.matched,
        tuple(spans),
        parts[0].num_cached_tokens,
        Support.joined([part.support for part in parts]),
        RoutedExperts.joined([part.routed_experts for part in parts]),
    )


def _named(spans: Sequence[VersionSpan], version: str) -> tuple[VersionSpan, ...]:
    return tuple(
        dataclasses.replace(span, version=version) if span.version == UNNAMED else span for span in spans
    )


def _resumable(sampling: Sampling) -> bool:
    """Whether the ids are all that the rest depends on: no grammar, counter or text stands beside them."""
    return not (sampling.is_constrained or sampling.is_penalised or sampling.stop)
