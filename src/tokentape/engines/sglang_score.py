"""Scoring with SGLang's `/generate`, sans-IO: ids that are known out, the log-probability of each in.

A prefill of the whole sequence that samples nothing. Observed on SGLang 0.5.23: `max_new_tokens` 0 is taken;
with `logprob_start_len` s the answer's `input_token_logprobs` are those of the tokens s, s+1, …, and the
first of them is null. They are at temperature 1 whatever is asked for (source: nothing scales them); only the
embedded engine knows `input_logprob_temperature`, and says in its answer that it has obeyed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tokentape import errors
from tokentape.engines.sglang_protocol import MAX_LOGPROB, MIN_LOGPROB


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of ids `start:`, float[N - start] nats, all finite, at this `temperature`.

    `weight_version` is the name of the weights that gave them, None where the engine does not say.
    """

    logprobs: list[float]
    temperature: float
    weight_version: str | None


class _Finish(msgspec.Struct):
    type: str
    message: str | None = None


class _Meta(msgspec.Struct):
    finish_reason: _Finish | None = None
    prompt_tokens: int | None = None
    weight_version: str | None = None
    input_token_logprobs: list[tuple[float | None, int, str | None]] | None = None
    input_logprob_temperature: float = 1.0


class _Answer(msgspec.Struct):
    meta_info: _Meta


def encode_score(
    ids: Sequence[int], start: int, rid: str, vocab_size: int, temperature: float = 1.0
) -> bytes:
    """The body that asks for the log-probabilities of `ids[start:]`, each behind all that precede it.

    Raises:
        RequestError: there is no such id, nothing precedes the first, an id is outside the vocabulary (it
            would kill a real server), or the temperature is no positive number.
    """
    if not 1 <= start < len(ids):
        raise errors.RequestError(f"nothing to score from token {start} on in {len(ids)} tokens")
    if not math.isfinite(temperature) or temperature <= 0:
        raise errors.RequestError(f"nothing can be scored at temperature {temperature}")
    if min(ids) < 0 or max(ids) >= vocab_size:
        at = next(at for at, i in enumerate(ids) if not 0 <= i < vocab_size)
        what = f"token {at}: id {ids[at]} is outside the vocabulary of {vocab_size} ids"
        raise errors.RequestError(what, param="input_ids")
    body: dict[str, Any] = {
        "input_ids": list(ids),
        "rid": rid,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": start - 1,
        "stream": False,
    }
    if temperature != 1:
        body["input_logprob_temperature"] = temperature
    return msgspec.json.encode(body)


def decode_scores(payload: bytes, ids: Sequence[int], start: int, vocab_size: int) -> Scores:
    """The answer to `encode_score`, checked id by id.

    SGLang names the vocabulary's last id 0 (observed; source: what is not below `vocab_size - 1` is taken for
    an image's placeholder), and gives the log-probability of the id that was sent: that alone is let pass.

    Raises:
        EngineAborted: the engine was told to abort.
        EngineProtocolError: ids, counts or log-probabilities are not what was asked for.
    """
    try:
        meta = msgspec.json.decode(payload, type=_Answer).meta_info
    except msgspec.MsgspecError as error:
        what = f"the answer is not SGLang's: {error}; it begins {payload[:80]!r}"
        raise errors.EngineProtocolError(what) from error
    if meta.finish_reason is not None and meta.finish_reason.type == "abort":
        raise errors.EngineAborted(f"scoring was aborted: {meta.finish_reason.message}")
    entries, expected = meta.input_token_logprobs, list(ids[start - 1 :])
    if entries is None or meta.prompt_tokens not in (None, len(ids)):
        raise errors.EngineProtocolError(
            f"{len(ids)} ids were sent, the answer is of {meta.prompt_tokens} and has "
            f"{'no' if entries is None else len(entries)} input_token_logprobs"
        )
    said = [i for _, i, _ in entries]
    if len(said) != len(expected):
        what = f"{len(said)} input_token_logprobs, asked was for {len(expected)}"
        raise errors.EngineProtocolError(what)
    for at, (i, sent) in enumerate(zip(said, expected, strict=True), start=start - 1):
        if i != sent and (i, sent) != (0, vocab_size - 1):
            raise errors.EngineProtocolError(f"token {at} is {sent}, {i} in input_token_logprobs")
    logprobs: list[float] = []
    for at, (logprob, _, _) in enumerate(entries[1:], start=start):
        if logprob is None or not MIN_LOGPROB < logprob <= MAX_LOGPROB:  # false for NaN, too
            raise errors.EngineProtocolError(f"{logprob} of token {at} is not a log-probability")
        logprobs.append(logprob)
    return Scores(logprobs, meta.input_logprob_temperature, meta.weight_version)
