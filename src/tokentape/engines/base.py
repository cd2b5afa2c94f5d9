"""What tokentape asks of an engine: prompt ids in, sampled ids with one log-probability each out."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tokentape.types import Prompt, RoutedExperts, Sampling, Support, VersionSpan

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation.

    `rid` names it for an abort and must not be used again: two seconds after a stream has ended, SGLang
    aborts whatever runs under its rid (observed). `sampling.max_tokens` must be set: engines have surprising
    defaults (SGLang's is 128). With `stream` the tokens are yielded as they are sampled, else at once. With
    `num_top_logprobs` every sampled token comes with that many of the engine's likeliest. The result has
    `support` where it is asked for, and the `routed_experts` of all tokens but the last from place
    `experts_from` on. `session` is what a pool of engines keeps on one of them, for its prefix cache.
    """

    rid: str
    prompt: Prompt
    sampling: Sampling
    stream: bool = False
    num_top_logprobs: int = 0
    capture_support: bool = False
    experts_from: int | None = None
    session: str = ""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Newly sampled tokens: `ids` int[n] and `logprobs` float[n] (nats), parallel. n ≥ 1.

    `top` `[n][1 to k]` pairs (id, log-probability in nats), best first: the k = `num_top_logprobs` likeliest
    at each token's place, less those that were impossible there (a constraint allows no others). The sampled
    token is among them only if it is one of the likeliest. None when not asked for. `version` names the
    weights that sampled all tokens so far, None where that is not certain.
    """

    ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]] | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """The end of one generation: what has been checked about it. The tokens came in the chunks before.

    `completion_ids` int[C], `logprobs` float[C] nats, every one finite; `versions` cover 0:C without gap or
    overlap. C ≥ 1, but for "abort": the generation was ended on the engine before it was done. `matched` is
    what stopped it: an id (that is the last of `completion_ids`), a string, or None. `num_cached_tokens` of
    the prompt came from the prefix cache, None where the engine does not say.
    """

    completion_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    matched: int | str | None
    versions: tuple[VersionSpan, ...]
    num_cached_tokens: int | None
    support: Support | None = None
    routed_experts: RoutedExperts | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself. None where it does not say.

    `sampling` holds where a request does not say otherwise: an operator's choice, else empty.
    `weight_versions` are those of each server by its URL, where there are several.
    """

    model: str | None
    context_length: int | None
    weight_version: str | None
    sampling: Sampling = field(default_factory=Sampling)
    weight_versions: Mapping[str, str | None] = field(default_factory=dict[str, str | None])

    @property
    def differs(self) -> bool:
        """Whether there are several servers, and they sample with weights of different names."""
        return len(set(self.weight_versions.values())) > 1


class Engine(Protocol):
    """Maps prompt ids to sampled ids.

    Every failure is one `errors.EngineError` or `errors.ContextOverflow`. A request that must not be sent at
    all is an `errors.RequestError` (the caller's sampling) or `errors.InternalError` (the prompt is ours). A
    constraint that the engine cannot keep is a `RequestError` as well, its `param` "response_format".
    """

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult, None]:
        """Yield zero or more `TokenChunk`, then exactly one `GenerateResult`.

        The chunks' tokens, concatenated, are the result's. Closing the iterator early, or cancelling the task
        that reads it, aborts the generation on the engine: read it inside `contextlib.aclosing`.
        """
        ...

    async def interrupt(self) -> None:
        """End all generations under way: each yields the tokens it has, and a result that says "abort"."""
        ...

    async def info(self) -> EngineInfo:
        """Ask the engine who it is; raises an `EngineError` when it does not answer."""
        ...

    async def aclose(self) -> None:
        """Close connections. Generations under way are aborted."""
        ...
