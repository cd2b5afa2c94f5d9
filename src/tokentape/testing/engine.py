"""An engine without a socket: for tests of everything above the engine."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import cast

from tokentape import errors
from tokentape.engines.base import EngineInfo, GenerateRequest, GenerateResult, TokenChunk
from tokentape.testing.script import Reply, Sampled
from tokentape.types import VersionSpan

_VOCAB_SIZE = 32_000


class FakeEngine:
    """An `engines.base.Engine` that answers what it is told, in order, then what `responder` says.

    An item of the script is a `Reply`, or an error to raise; one with `num_tokens` set is raised after that
    many tokens of the responder's reply. A stream yields one token per chunk. `num_top_logprobs` is answered
    with `pseudo_top`, of a vocabulary of 32,000 ids. `requests` are those received, `aborted` the rids of
    those that were left before their end.
    """

    def __init__(
        self,
        *script: Reply | errors.TokentapeError,
        responder: Callable[[GenerateRequest], Reply] | None = None,
        info: EngineInfo | None = None,
    ) -> None:
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.closed = False
        self.interrupts = 0
        self.responder = responder
        self._script = deque(script)
        self._info = info or EngineInfo(model="fake", context_length=8192, weight_version="default")

    def script(self, *items: Reply | errors.TokentapeError) -> None:
        """Answer these next, in order."""
        self._script.extend(items)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
        """Yield the next item of the script; see `engines.base.Engine.generate`."""
        self.requests.append(request)
        ended = False
        try:
            item = self._script.popleft() if self._script else self._respond(request)
            error = item if isinstance(item, errors.TokentapeError) else None
            num_good = error.num_tokens if isinstance(error, errors.EngineError) else 0
            if error is not None and not num_good:
                ended = True
                raise error
            reply = item if isinstance(item, Reply) else self._respond(request)
            max_tokens = request.sampling.max_tokens or len(reply.ids)
            sampled = reply.sample(max_tokens, request.sampling.stop_token_ids)
            ids, logprobs = sampled.ids, cast("list[float]", sampled.logprobs)
            step = 1 if request.stream else max(len(ids), 1)
            interrupts = self.interrupts
            for start in range(0, len(ids), step):
                for num_slept in range(step):
                    await asyncio.sleep(reply.delay_s)
                    if self.interrupts > interrupts:
                        done = start + num_slept
                        if not request.stream and done:
                            yield TokenChunk(ids[:done], logprobs[:done])
                        ended = True
                        yield _result(sampled, reply, self._info, done)
                        return
                if error is not None and start >= num_good:
                    break
                yield TokenChunk(
                    ids[start : start + step],
                    logprobs[start : start + step],
                    _top(sampled, range(start, min(start + step, len(ids))), request.num_top_logprobs),
                )
            ended = True
            if error is not None:
                raise error
            yield _result(sampled, reply, self._info)
        finally:
            if not ended:
                self.aborted.append(request.rid)

    def _respond(self, request: GenerateRequest) -> Reply:
        if self.responder is None:
            raise errors.InternalError(f"FakeEngine has no answer left for request {len(self.requests)}")
        return self.responder(request)

    async def interrupt(self) -> None:
        """End all generations under way, each with the tokens whose `delay_s` has passed."""
        self.interrupts += 1

    async def info(self) -> EngineInfo:
        """What was passed as `info`."""
        return self._info

    async def aclose(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def _result(sampled: Sampled, reply: Reply, info: EngineInfo, num: int | None = None) -> GenerateResult:
    """The end of a generation; interrupted behind `num` tokens."""
    ids, logprobs = sampled.ids[:num], cast("list[float]", sampled.logprobs[:num])
    versions = reply.versions or [(info.weight_version or "default", 0, len(sampled.ids))]
    spans = tuple(VersionSpan(v, start, min(end, len(ids))) for v, start, end in versions if start < len(ids))
    finish, matched = (sampled.finish, sampled.matched) if num is None else ("abort", None)
    return GenerateResult(ids, logprobs, finish, matched, spans, reply.cached or 0)


def _top(sampled: Sampled, places: range, num: int) -> list[list[tuple[int, float]]] | None:
    if not num:
        return None
    return cast("list[list[tuple[int, float]]]", [sampled.top(at, num, _VOCAB_SIZE) for at in places])
