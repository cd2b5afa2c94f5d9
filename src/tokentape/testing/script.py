"""What a fake engine answers: completions, and faults that spoil them."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

FaultKind: TypeAlias = Literal[
    "status",
    "error_event",
    "disconnect",
    "stall",
    "cut",
    "no_done",
    "die",
    "abort",
    "grammar",
    "not_json",
    "missing",
    "wrong_count",
    "shifted_ids",
    "logprob",
]


def pseudo_logprob(token_id: int, position: int) -> float:
    """The log-probability (nats, in [-10, 0)) that a fake gives `token_id` at `position` of a completion.

    It depends on both, so that a test notices log-probabilities that were swapped, shifted or defaulted.
    """
    return -((token_id * 7919 + position * 104_729 + 1) % 9973 + 1) / 1000


def pseudo_top(token_id: int, position: int, num: int, vocab_size: int) -> list[tuple[int, float]]:
    """The `num` likeliest tokens (id, nats), best first, that a fake reports where it sampled `token_id`.

    They are that token and those that follow it in the vocabulary, each with its `pseudo_logprob` there.
    """
    ids = [(token_id + n) % vocab_size for n in range(num)]
    return sorted(((i, pseudo_logprob(i, position)) for i in ids), key=lambda pair: -pair[1])


def pseudo_support(token_id: int, vocab_size: int) -> list[int]:
    """The ids that truncation kept where a fake sampled `token_id`: that one and the one behind it."""
    return [token_id, (token_id + 1) % vocab_size]


def pseudo_experts(token_id: int, place: int) -> list[int]:
    """The experts that a fake sent `token_id` to, at its `place` of the sequence: three layers of two."""
    return [(token_id * 31 + place * 7 + n) % 128 for n in range(6)]


@dataclass(frozen=True, slots=True)
class Reply:
    """One completion, int[C] `ids`, as a fake engine samples it.

    It is cut at the request's `max_new_tokens`, or behind the first of its `stop_token_ids`, whichever comes
    first. None elsewhere means: as a healthy engine would. `logprobs` float[C] are then `pseudo_logprob`;
    `finish` is "length" when `max_new_tokens` is reached by an id that is not `matched`, else "stop";
    `matched` is the last id; `versions` (version, start, end) is the server's one version; `cached` is the
    longest prefix shared with what the server has seen.
    """

    ids: Sequence[int]
    logprobs: Sequence[float | None] | None = None
    finish: Literal["stop", "length"] | None = None
    matched: int | str | None = None
    versions: Sequence[tuple[str, int, int]] | None = None
    cached: int | None = None
    delay_s: float = 0.0
    """Seconds before each token."""

    def sample(self, max_tokens: int, stop_token_ids: Collection[int] = ()) -> "Sampled":
        """What comes out under these limits."""
        ids = list(self.ids[:max_tokens])
        stop_at = next((at for at, i in enumerate(ids) if i in stop_token_ids), None)
        if stop_at is not None:
            ids = ids[: stop_at + 1]
        cut = len(ids) < len(self.ids) and stop_at is None
        full = len(ids) == max_tokens and stop_at is None and self.matched is None
        finish = "length" if cut else self.finish or ("length" if full else "stop")
        logprobs = [pseudo_logprob(i, at) for at, i in enumerate(ids)]
        if self.logprobs is not None:
            logprobs = list(self.logprobs[: len(ids)])
        matched: int | str | None = None
        if finish == "stop" and ids:
            matched = ids[-1] if stop_at is not None or self.matched is None else self.matched
        return Sampled(ids, logprobs, finish, matched)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A `Reply` under the limits of one request; `ids` and `logprobs` are parallel."""

    ids: list[int]
    logprobs: list[float] | list[float | None]
    finish: Literal["stop", "length"]
    matched: int | str | None

    def top(self, at: int, num: int, vocab_size: int) -> list[tuple[int, float | None]]:
        """`pseudo_top` of the token at `at`, whose own log-probability is the one it was sampled with."""
        pairs: dict[int, float | None] = dict(pseudo_top(self.ids[at], at, num, vocab_size))
        pairs[self.ids[at]] = self.logprobs[at]
        return sorted(pairs.items(), key=lambda pair: -math.inf if pair[1] is None else -pair[1])


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong with one request.

    - `status`: HTTP `status` (500) with `body`, else SGLang's error object with `message`.
    - `error_event`: an error with code `status` (500); inside a 200 behind `after` tokens when streaming.
    - `disconnect`: the connection is reset: before the headers, or, with `after`, behind that many tokens.
    - `stall`: nothing more is sent behind `after` tokens, until the client leaves.
    - `cut`: the stream ends cleanly behind `after` tokens, without finish_reason and [DONE].
    - `no_done`: the whole stream, but for [DONE].
    - `die`: the server resets every connection and refuses new ones, as on an id outside the vocabulary.
    - `abort`: finish_reason abort behind `after` tokens, with `status` (null) and `message`.
    - `grammar`: the constraint is refused with `message`: 400, or when streaming a 200 whose only event has
      finish_reason abort and, as from the real server, a token that was never sampled for this request.
    - `not_json`: a 200 with `body`, else some HTML.
    - `missing`: the answer, every event of it, lacks `field` (dotted: `meta_info.cached_tokens`).
    - `wrong_count`: completion_tokens is one too high.
    - `shifted_ids`: the ids in output_token_logprobs are not those in output_ids.
    - `logprob`: the last log-probability is `value`: None, nan, -9999.0, 0.5, …

    `wrong_count`, `shifted_ids` and `logprob` spoil the last event of a stream. `reply` is the completion
    that is spoiled; None: the one that the responder gives.
    """

    kind: FaultKind
    after: int | None = None
    status: int | None = None
    message: str = "scripted fault"
    body: bytes | None = None
    field: str = ""
    value: float | None = None
    reply: Reply | None = None

    def spoil(self, answer: dict[str, Any], *, last: bool) -> None:
        """Falsify one answer of `/generate`, in place."""
        meta = answer["meta_info"]
        pairs = meta.get("output_token_logprobs", [])
        if self.kind == "missing":
            *parents, name = self.field.split(".")
            (answer[parents[0]] if parents else answer).pop(name, None)
        elif last and self.kind == "wrong_count":
            meta["completion_tokens"] += 1
        elif last and self.kind == "shifted_ids":
            meta["output_token_logprobs"] = [[p[0], p[1] + 1, p[2]] for p in pairs]
        elif last and self.kind == "logprob":
            meta["output_token_logprobs"] = [*pairs[:-1], [self.value, *pairs[-1][1:]]]
