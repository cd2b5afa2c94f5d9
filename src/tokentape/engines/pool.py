"""Several engines as one: a session stays with its worker, a worker that fails loses it to another.

A generation that fails before its first token is asked of another worker. One that fails after it ends as an
aborted generation would, with the tokens that came: `engines.resume` goes on behind them, elsewhere. Where
nobody can say which weights sampled these tokens, the failure stays one.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tokentape.engines.base import EngineInfo, GenerateRequest, GenerateResult, TokenChunk
from tokentape.engines.router import joined_info
from tokentape.engines.sglang import SGLangEngine
from tokentape.errors import (
    ConfigError,
    EngineDisconnected,
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    NotFound,
    RequestError,
    TokentapeError,
    WorkerNeeded,
)
from tokentape.types import VersionSpan

log = logging.getLogger(__name__)

State = Literal["healthy", "ejected", "draining"]
_MAX_SESSIONS = 200_000  # of which the pool remembers the worker
_EJECT_AFTER = 3  # failures in a row of a worker that answers; one that does not is out at once
_MAX_WAIT_S = 30.0  # between two looks at a worker that stays away
_GONE = (EngineUnavailable, EngineDisconnected, EngineTimeout)


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """How several workers are used. `more` are the URLs of all workers but the first.

    `retries` bounds how often a generation without a token is asked of another worker. A worker is looked at
    every `health_interval_s` seconds, and has `health_timeout_s` to answer. A session leaves its worker for
    the least loaded one where that runs `slack` generations fewer, and not half as many.
    """

    more: tuple[str, ...] = ()
    retries: int = 3
    health_interval_s: float = 5.0
    health_timeout_s: float = 3.0
    slack: int = 8


@dataclass(eq=False, slots=True)
class Worker:
    """One engine of the pool, and how it does.

    `num_failures` is in a row. `outcomes` counts generations by how they ended: "ok", or the error's kind.
    `num_prompt` and `num_cached` are tokens.
    """

    url: str
    engine: SGLangEngine
    state: State = "healthy"
    num_running: int = 0
    num_failures: int = 0
    num_ejections: int = 0
    last_error: str | None = None
    outcomes: Counter[str] = field(default_factory=Counter[str])
    num_prompt: int = 0
    num_cached: int = 0
    watching: asyncio.Task[None] | None = None


class EnginePool:
    """An `engines.base.Engine` over the workers of `urls`, each made by `make`.

    `moved` counts the generations that went on at another worker, by the kind of error that drove them away.
    `changes` has the URLs that were added (True) or removed (False) since the start.
    """

    def __init__(
        self, urls: Iterable[str], make: Callable[[str], SGLangEngine], config: PoolConfig = PoolConfig()
    ) -> None:
        self._make = make
        self._config = config
        self._workers: dict[str, Worker] = {}
        self._of_session: OrderedDict[str, Worker] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self.moved: Counter[str] = Counter()
        self.changes: dict[str, bool] = {}
        for url in urls:
            self._add(url)

    @property
    def workers(self) -> tuple[Worker, ...]:
        """All workers, in the order of their coming."""
        return tuple(self._workers.values())

    def num_sessions(self) -> Mapping[str, int]:
        """How many sessions each worker has, by its URL."""
        return Counter(worker.url for worker in self._of_session.values())

    async def add(self, url: str) -> Worker:
        """Take in a worker that answers; one that is there already comes back into use.

        Raises:
            EngineError: it does not answer.
            RequestError: it is no URL.
        """
        url = url.rstrip("/")
        worker = self._workers.get(url)
        if worker is None:
            try:
                engine = self._make(url)
            except ConfigError as error:
                raise RequestError(str(error), param="url") from None
            try:
                await engine.info()
            except TokentapeError:
                await engine.aclose()
                raise
            worker = self._workers.get(url) or self._add(url, engine)
        else:
            await worker.engine.info()
        worker.state, worker.num_failures = "healthy", 0
        self.changes[url] = True
        return worker

    async def remove(self, url: str, *, abort: bool = False) -> None:
        """Give a worker no more generations; it is gone when those it runs have ended.

        With `abort` they do not end there: they go on elsewhere.

        Raises:
            NotFound: there is no such worker.
            WorkerNeeded: it is the last one.
        """
        worker = self._workers.get(url.rstrip("/"))
        if worker is None:
            raise NotFound(f"there is no worker {url!r}: GET /workers lists them")
        if all(other is worker or other.state == "draining" for other in self.workers):
            raise WorkerNeeded(f"{url} is the last worker: add another one first", param="url")
        worker.state = "draining"
        self.changes[worker.url] = False
        if abort:
            await worker.engine.drop()
        self._leave_if_idle(worker)

    def watch(self) -> None:
        """Look at the workers from now on, until the pool is closed."""
        for worker in self.workers:
            self._watch(worker)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
        """Yield the sampled tokens, then one `GenerateResult`; see `engines.base.Engine.generate`."""
        tried: list[Worker] = []
        while True:
            worker = self._place(request.session, tried)
            rid = f"{request.rid}-{len(tried)}" if tried else request.rid  # none is used twice
            sent = dataclasses.replace(request, rid=rid) if tried else request
            received: list[TokenChunk] = []
            worker.num_running += 1
            try:
                async with contextlib.aclosing(worker.engine.generate(sent)) as parts:
                    async for part in parts:
                        if isinstance(part, TokenChunk):
                            received.append(part)
                            if not request.stream:
                                continue  # until it is known to be sound: it could not be taken back
                        else:
                            self._ended(worker, request, part)
                            if not request.stream:
                                for chunk in received:
                                    yield chunk
                        yield part
            except EngineError as error:
                self._failed(worker, error)
                tried.append(worker)
                if isinstance(error, EngineRejected) or self._another(tried) is None:
                    raise
                if request.stream and received:
                    kept = _kept(request, received, error)
                    if kept is None:
                        raise
                    self._moved(worker, request, error, kept)
                    yield kept
                    return
                if len(tried) > self._config.retries:
                    raise
                self._moved(worker, request, error, None)
            else:
                return
            finally:
                worker.num_running -= 1
                self._leave_if_idle(worker)

    async def interrupt(self) -> None:
        """End all generations under way: each yields the tokens it has, and a result that says "abort"."""
        await asyncio.gather(*(worker.engine.interrupt() for worker in self.workers))

    async def info(self) -> EngineInfo:
        """What the workers say of themselves: the first that answers, with the shortest context of all.

        Raises:
            EngineError: none of them answers; the error is the first one's.
        """
        asked = [worker for worker in self.workers if worker.state != "draining"]
        said = await asyncio.gather(*(worker.engine.info() for worker in asked), return_exceptions=True)
        infos = [info for info in said if isinstance(info, EngineInfo)]
        for other in infos[1:]:
            if (other.model, other.sampling) != (infos[0].model, infos[0].sampling):
                log.warning("workers differ: %s and %s", infos[0], other)
        return joined_info(dict(zip([worker.url for worker in asked], said, strict=True)))

    async def aclose(self) -> None:
        """Close all workers. Generations under way are aborted."""
        watching = [worker.watching for worker in self.workers if worker.watching is not None]
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, *self._closing, return_exceptions=True)
        await asyncio.gather(*(worker.engine.aclose() for worker in self.workers))

    # -- which worker

    def _place(self, session: str, tried: list[Worker]) -> Worker:
        """The session's own worker, or the least loaded one; all being ill, one that may have come back.

        Raises:
            EngineUnavailable: all were tried.
        """
        if len(self._workers) == 1 and not tried:
            return next(iter(self._workers.values()))
        least = self._another(tried) or min(
            (w for w in self.workers if w.state == "ejected" and _may_try(w, tried)),
            key=lambda w: w.num_failures,
            default=None,
        )
        if least is None:
            said = "; ".join(f"{w.url}: {w.last_error}" for w in self.workers)
            raise EngineUnavailable(f"no worker answers: {said}")
        own = self._of_session.get(session)
        if own is not None and own.state == "healthy" and _may_try(own, tried):
            limit = max(least.num_running + self._config.slack, 2 * least.num_running)
            if own.num_running <= limit:
                least = own
        if session:
            self._of_session[session] = least
            self._of_session.move_to_end(session)
            if len(self._of_session) > _MAX_SESSIONS:
                self._of_session.popitem(last=False)
        return least

    def _another(self, tried: list[Worker]) -> Worker | None:
        """The least loaded healthy worker that was not tried, or is a router."""
        healthy = (w for w in self._workers.values() if w.state == "healthy" and _may_try(w, tried))
        return min(healthy, key=lambda w: w.num_running, default=None)

    # -- how it did

    def _ended(self, worker: Worker, request: GenerateRequest, result: GenerateResult) -> None:
        worker.outcomes["ok"] += 1
        worker.num_failures = 0
        worker.num_prompt += len(request.prompt)
        worker.num_cached += result.num_cached_tokens or 0

    def _failed(self, worker: Worker, error: EngineError) -> None:
        worker.outcomes[error.kind] += 1
        if isinstance(error, EngineRejected):  # it does its work; the request is to blame, or the URL
            return
        worker.num_failures += 1
        worker.last_error = str(error)
        is_out = isinstance(error, _GONE) or worker.num_failures >= _EJECT_AFTER
        if is_out and worker.state == "healthy" and len(self._workers) > 1:
            self._eject(worker)
            self._watch(worker)  # anew: it may be back at once

    def _moved(
        self, worker: Worker, request: GenerateRequest, error: EngineError, kept: GenerateResult | None
    ) -> None:
        self.moved[error.kind] += 1
        num_kept = len(kept.completion_ids) if kept is not None else 0
        log.warning(
            "worker %s: generation %s goes on elsewhere, behind %d tokens: %s",
            worker.url, request.rid, num_kept, error,
        )  # fmt: skip

    # -- health

    def _eject(self, worker: Worker) -> None:
        log.warning("worker %s: ejected: %s", worker.url, worker.last_error)
        worker.state = "ejected"
        worker.num_ejections += 1

    def _watch(self, worker: Worker) -> None:
        if worker.watching is not None:
            worker.watching.cancel()
        worker.watching = asyncio.get_running_loop().create_task(self._look_after(worker))

    async def _look_after(self, worker: Worker) -> None:
        """Look at a worker again and again: one that does not answer loses what it runs to the others."""
        interval_s, wait_s = self._config.health_interval_s, 0.25
        while True:
            ill = worker.state == "ejected"
            await asyncio.sleep(wait_s if ill else interval_s)
            error = await worker.engine.ill(self._config.health_timeout_s)
            if error is None and worker.state == "ejected":
                log.info("worker %s: answers again", worker.url)
                worker.state, worker.num_failures = "healthy", 0
            if error is None:
                wait_s = 0.25
                continue
            worker.last_error = error
            worker.num_failures += 1
            wait_s = min(2 * wait_s, _MAX_WAIT_S)
            if worker.state == "healthy" and worker.num_failures > 1 and self._another([worker]) is not None:
                self._eject(worker)
                await worker.engine.drop()

    # -- who is in

    def _add(self, url: str, engine: SGLangEngine | None = None) -> Worker:
        url = url.rstrip("/")
        worker = Worker(url, engine or self._make(url))
        self._workers[url] = worker
        if engine is not None:
            self._watch(worker)
        return worker

    def _leave_if_idle(self, worker: Worker) -> None:
        if worker.state != "draining" or worker.num_running or self._workers.get(worker.url) is not worker:
            return
        del self._workers[worker.url]
        if worker.watching is not None:
            worker.watching.cancel()
        for session in [s for s, w in self._of_session.items() if w is worker]:
            del self._of_session[session]
        task = asyncio.get_running_loop().create_task(worker.engine.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _may_try(worker: Worker, tried: list[Worker]) -> bool:
    """Whether a generation that failed at `tried` may be asked of it; a router has other servers."""
    return worker not in tried or worker.engine.routed


def _kept(request: GenerateRequest, received: list[TokenChunk], error: EngineError) -> GenerateResult | None:
    """What came of a stream before it failed, as if it had been aborted; None where that is not certain.

    An answer that contradicts itself is worth nothing. Support and experts come with the end of an answer.
    """
    version = received[-1].version
    asked_more = request.capture_support or request.experts_from is not None
    if isinstance(error, EngineProtocolError) or version is None or asked_more:
        return None
    ids = [i for chunk in received for i in chunk.ids]
    logprobs = [logprob for chunk in received for logprob in chunk.logprobs]
    return GenerateResult(ids, logprobs, "abort", None, (VersionSpan(version, 0, len(ids)),), None)
