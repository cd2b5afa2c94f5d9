"""SGLang's native protocol, sans-IO: bodies out, answers in. The only file that names its fields.

What its refusals mean is `engines/sglang_errors.py`'s, what it says of itself `engines/sglang_info.py`'s, how
it scores what is known already `engines/sglang_score.py`'s.

Facts were observed on SGLang 0.5.23 unless marked (source), which were read in that release's code.
"""

import math
import re
from itertools import pairwise
from typing import Any, NoReturn, cast

import msgspec

from tokentape import errors
from tokentape.engines.base import FinishReason, GenerateRequest, GenerateResult, TokenChunk
from tokentape.engines.captured import read_experts, read_support
from tokentape.engines.growing import GrowingList
from tokentape.engines.sglang_errors import code_of, find_message, lost, refusal
from tokentape.types import RoutedExperts, Support, VersionSpan

# A log-probability is at most 0. Rounding of `logit - logsumexp` in float32 stays below 1e-4 for logits up to
# 800; what lies in between is kept as sent, never clamped.
MAX_LOGPROB = 1e-4
# Engines write -9999, or the float minimum, for "no value"; a sampled token cannot be that improbable.
MIN_LOGPROB = -9999.0
# A larger bias says nothing more; near float32's limit (1e39) SGLang's log-probabilities are null.
_MAX_BIAS = 1e4
_CONSTRAINT_REFUSED = re.compile(
    r"Failed to compile \w+ grammar|Grammar-based generation|Grammar preprocessing timed out"
    r"|Grammar accept_token failed|(?:json_schema|structural_tag) is not supported"
)
_NOT_HELD = "the engine cannot hold the reply to what was asked of it"


def wire_rid(rid: str) -> str:
    """The id that SGLang is sent: no such id is a prefix of another.

    Observed: `/abort_request {"rid":"t1"}` also kills a running `t10`, because the scheduler compares with
    `startswith`. The length in front makes that impossible.
    """
    return f"{len(rid)}-{rid}"


def encode_request(request: GenerateRequest, rid: str, vocab_size: int, stream_interval: int | None) -> bytes:
    """The body of `/generate`; the prompt's ids are spliced in as the text made when they were new.

    `logprob_start_len` is left out: asking for prompt log-probabilities lowers the cache hit. `text` is not
    read, so nothing is said about how to decode it. `max_new_tokens` is always sent: SGLang's default is 128.

    Raises:
        InternalError: the prompt is empty, has an id outside the vocabulary, or `max_tokens` is not set; two
            constraints at once.
        RequestError: a sampling parameter is not a finite number, a stop id or a biased id is outside the
            vocabulary, or more likeliest tokens are asked for than there are.
    """
    _check_prompt(request, vocab_size)
    sampling = request.sampling
    if sampling.json_schema is not None and sampling.structural_tag is not None:
        raise errors.InternalError("json_schema and structural_tag exclude each other")
    if "" in (sampling.json_schema, sampling.structural_tag):  # to SGLang: no constraint at all (source)
        raise errors.InternalError("a constraint must not be empty")
    if not 0 <= request.num_top_logprobs <= vocab_size:  # observed: a number beyond it kills the server
        what = f"{request.num_top_logprobs} likeliest tokens of a vocabulary of {vocab_size} ids"
        raise errors.RequestError(what, param="top_logprobs")
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop": sampling.stop or None,
        "stop_token_ids": sampling.stop_token_ids or None,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "sampling_seed": sampling.seed,
        "logit_bias": _encode_bias(sampling.logit_bias, vocab_size),
        "json_schema": sampling.json_schema,
        "structural_tag": sampling.structural_tag,
        "stream_interval": stream_interval if request.stream else None,
    }
    for name, value in params.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON would carry it as null: "not given"
            raise errors.RequestError(f"{name} must be a finite number, not {value}", param=name)
    for i in sampling.stop_token_ids:
        if not 0 <= i < vocab_size:
            what = f"stop token id {i} is outside the vocabulary of {vocab_size} ids"
            raise errors.RequestError(what, param="stop_token_ids")
    fields: dict[str, Any] = {
        "rid": rid,
        "sampling_params": {name: value for name, value in params.items() if value is not None},
        "return_logprob": True,
        "stream": request.stream,
    }
    if request.num_top_logprobs:
        fields["top_logprobs_num"] = request.num_top_logprobs
    if request.capture_support:
        fields["return_sampling_mask"] = True
    if request.experts_from is not None:
        fields |= {"return_routed_experts": True, "routed_experts_start_len": request.experts_from}
    rest = msgspec.json.encode(fields)
    return b"".join((b'{"input_ids":', request.prompt.to_json(), b",", rest[1:]))


def _encode_bias(pairs: tuple[tuple[int, float], ...], vocab_size: int) -> dict[str, float] | None:
    """SGLang's `logit_bias`; None for no bias."""
    biases: dict[str, float] = {}
    for i, bias in pairs:
        problem = f"is outside the vocabulary of {vocab_size} ids" if not 0 <= i < vocab_size else None
        if str(i) in biases:
            problem = "is given twice"
        if not abs(bias) <= _MAX_BIAS:  # true for NaN, too
            problem = f"has the bias {bias}, which is not between -{_MAX_BIAS:g} and {_MAX_BIAS:g}"
        if problem is not None:
            raise errors.RequestError(f"logit_bias: token id {i} {problem}", param="logit_bias")
        biases[str(i)] = bias
    return biases or None


def _check_prompt(request: GenerateRequest, vocab_size: int) -> None:
    prompt, max_tokens = request.prompt, request.sampling.max_tokens
    if not len(prompt):
        raise errors.InternalError("the prompt has no ids")
    if prompt.max_id >= vocab_size:
        raise errors.InternalError(
            f"prompt id {prompt.max_id} is outside the engine's vocabulary of {vocab_size} ids and would "
            "kill it: --model must name the tokenizer of the model that the engine serves"
        )
    if max_tokens is None or max_tokens < 1:
        raise errors.InternalError(f"sampling.max_tokens must be set and at least 1, not {max_tokens}")


class _Finish(msgspec.Struct, gc=False):
    type: str
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None


class _Span(msgspec.Struct, gc=False):
    version: str
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: _Finish | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    weight_version: str | None = None
    weight_versions: list[_Span] | None = None
    # Left as text: in a cumulative stream all but the end of it was decoded with the event before.
    output_token_logprobs: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    output_top_logprobs: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    output_token_sampling_mask: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    output_token_sampling_logprobs: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    routed_experts: str | None = None


class _Answer(msgspec.Struct):  # of /generate, whole or one event
    output_ids: list[int] | None = None
    meta_info: _Meta | None = None
    error: Any = None


_Triple = tuple[float | None, int, str | None]  # log-probability, id, text (null unless asked for)
_Tops = list[_Triple]
_Sure = tuple[float, int, str | None]
_decode_answer = msgspec.json.Decoder(_Answer).decode
_TRIPLES = msgspec.json.Decoder(list[_Triple])
_TOPS = msgspec.json.Decoder(list[_Tops])
_KEPT = msgspec.json.Decoder(list[list[int]])
_FLOATS = msgspec.json.Decoder(list[float])


class Completion:
    """One generation as it arrives, sans-IO: takes events, checks all that can be checked, keeps the tokens.

    Work per event is proportional to its new tokens, but for the C code that reads the event and compares its
    beginning with what was seen. `done`: the answer is complete. `settled`: the engine itself has ended the
    generation, well or not, and nothing is left to abort.
    """

    __slots__ = (
        "_finish",
        "_kept",
        "_kept_list",
        "_kept_logprobs",
        "_kept_logprobs_list",
        "_logprobs_list",
        "_meta",
        "_request",
        "_top_list",
        "_version",
        "_vocab_size",
        "done",
        "ids",
        "logprobs",
        "settled",
    )

    def __init__(self, request: GenerateRequest, vocab_size: int) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.done = not request.stream
        self.settled = False
        self._request = request
        self._vocab_size = vocab_size
        self._meta = _Meta()
        self._finish: _Finish | None = None
        self._version: str | None = None
        self._logprobs_list = GrowingList("output_token_logprobs", _TRIPLES)
        self._top_list = GrowingList("output_top_logprobs", _TOPS)
        self._kept_list = GrowingList("output_token_sampling_mask", _KEPT)
        self._kept_logprobs_list = GrowingList("output_token_sampling_logprobs", _FLOATS)
        self._kept: list[list[int]] = []
        self._kept_logprobs: list[float] = []

    @property
    def num_tokens(self) -> int:
        """How many tokens have been received and checked."""
        return len(self.ids)

    def feed(self, payload: bytes) -> TokenChunk | None:
        """Take one event, or the whole answer; return its new tokens, if any."""
        if self.done and self._request.stream:
            self._disagree("the stream went on after [DONE]")
        if payload == b"[DONE]":
            self.done = True
            if self._finish is None:
                self.settled = True
                raise lost("the stream ended without a finish_reason", self.num_tokens)
            return None
        try:
            answer = _decode_answer(payload)
        except msgspec.MsgspecError as error:
            self._disagree(f"the answer is not SGLang's: {error}; it begins {payload[:80]!r}")
        if answer.error is not None:
            self.settled = True
            raise self.refused(code_of(answer.error), find_message(answer.error))
        meta = answer.meta_info
        if meta is None:
            self._disagree("meta_info is missing")
        if self._finish is not None:
            self._disagree("an event followed the one with finish_reason")
        if meta.finish_reason is not None:
            self.settled = True
            if meta.finish_reason.type == "abort":
                return self._abort(answer.output_ids, meta, meta.finish_reason)
        chunk = self._grow(answer.output_ids, meta)
        self._finish, self._meta = meta.finish_reason, meta
        return chunk

    def result(self) -> GenerateResult:
        """The checked end of the generation."""
        finish, meta = self._finish, self._meta
        if finish is None:
            self._disagree("finish_reason is null at the end")
        if not self.ids and finish.type != "abort":
            self._disagree(f"finish_reason is {finish.type!r} but no token was sampled")
        num_cached, num_prompt = meta.cached_tokens, len(self._request.prompt)
        if num_cached is not None and not 0 <= num_cached <= num_prompt:
            self._disagree(f"cached_tokens is {num_cached} for a prompt of {num_prompt} tokens")
        reason = self._check_finish(finish)
        return GenerateResult(
            self.ids,
            self.logprobs,
            reason,
            finish.matched,
            self._spans() if self.ids else (),
            num_cached,
            self._support(),
            self._experts(),
        )

    def _support(self) -> Support | None:
        if not self._request.capture_support:
            return None
        return read_support(self._kept, self._kept_logprobs)

    def _experts(self) -> RoutedExperts | None:
        """Those of the tokens from the asked place to the last but one."""
        start = self._request.experts_from
        num_rows = 0 if start is None else len(self._request.prompt) + len(self.ids) - 1 - start
        if start is None or not num_rows:
            return None
        if self._meta.routed_experts is None:
            if not self.ids:  # aborted before anything was computed
                return None
            self._disagree(
                "routed_experts is missing: the server needs --enable-return-routed-experts, "
                "and its model experts"
            )
        return read_experts(self._meta.routed_experts, num_rows)

    def _grow(self, ids: list[int] | None, meta: _Meta) -> TokenChunk | None:
        num_seen, num_total, num_prompt = len(self.ids), meta.completion_tokens, len(self._request.prompt)
        if ids is None:
            self._disagree("output_ids is missing")
        if num_total is None:
            if self._request.stream:  # it is what tells a cumulative event from an incremental one
                self._disagree("completion_tokens is missing")
            num_total = len(ids)
        if meta.prompt_tokens is not None and meta.prompt_tokens != num_prompt:
            self._disagree(f"prompt_tokens is {meta.prompt_tokens} but {num_prompt} ids were sent")
        if num_total > (max_tokens := self._request.sampling.max_tokens or 0):
            self._disagree(f"{num_total} tokens were sampled, {max_tokens} were asked for")
        # Cumulative or incremental is the server's choice; the counts tell which, event by event.
        if len(ids) == num_total:
            if ids[:num_seen] != self.ids:
                self._disagree(f"the event's {num_total} ids do not begin with the {num_seen} seen before")
            new = ids[num_seen:]
        elif num_seen + len(ids) == num_total:
            new = ids
        else:
            self._disagree(
                f"completion_tokens is {num_total}, output_ids has {len(ids)} after {num_seen} seen"
            )
        new_logprobs = self._new_logprobs(bytes(meta.output_token_logprobs), new)
        top: list[list[tuple[int, float]]] | None = None
        if self._request.num_top_logprobs:
            top = self._new_top(bytes(meta.output_top_logprobs), new, new_logprobs)
        if self._request.capture_support:
            self._grow_support(meta, new)
        self._version = meta.weight_version if self._version in (None, meta.weight_version) else ""
        if not new:
            return None
        self.ids += new
        self.logprobs += new_logprobs
        return TokenChunk(new, new_logprobs, top, self._version or None)

    def _new_logprobs(self, text: bytes, new: list[int]) -> list[float]:
        """The log-probabilities of the tokens `new`, checked; `text` is the event's JSON list of triples."""
        triples = self._logprobs_list.feed(text, len(new))
        ids = [triple[1] for triple in triples]
        if ids != new:
            at = next(i for i, (a, b) in enumerate(zip(ids, new, strict=True)) if a != b)
            where = self.num_tokens + at
            self._disagree(f"token {where} is {new[at]} in output_ids, {ids[at]} in output_token_logprobs")
        logprobs = [triple[0] for triple in triples]
        if None in logprobs:
            what = f"the log-probability of token {self.num_tokens + logprobs.index(None)} is null"
            if (
                self._request.sampling.is_constrained
            ):  # observed: the first event of a stream whose grammar allows no token
                raise errors.RequestError(f"{_NOT_HELD}: {what}", param="response_format")
            self._disagree(what)
        values = cast("list[float]", logprobs)
        if new and not (min(new) >= 0 and max(new) < self._vocab_size):
            self._disagree(f"sampled id {max(new)} is outside the vocabulary of {self._vocab_size} ids")
        if not all(MIN_LOGPROB < value <= MAX_LOGPROB for value in values):  # false for NaN, too
            at = next(i for i, value in enumerate(values) if not MIN_LOGPROB < value <= MAX_LOGPROB)
            self._disagree(f"{values[at]} of token {self.num_tokens + at} is not a log-probability")
        return values

    def _new_top(self, text: bytes, new: list[int], logprobs: list[float]) -> list[list[tuple[int, float]]]:
        """The likeliest tokens beside each of `new`, checked; impossible ones are left out."""
        entries = self._top_list.feed(text, len(new))
        checked: list[list[tuple[int, float]]] = []
        for at, (tops, token, logprob) in enumerate(zip(entries, new, logprobs, strict=True)):
            if (wrong := _wrong_top(tops, self._request.num_top_logprobs, self._vocab_size)) is not None:
                self._disagree(f"output_top_logprobs of token {self.num_tokens + at}: {wrong}")
            pairs = [(i, value) for value, i, _ in cast("list[_Sure]", tops) if value > MIN_LOGPROB]
            said = next((value for i, value in pairs if i == token), logprob)
            if abs(said - logprob) > MAX_LOGPROB:
                what = f"{said} in output_top_logprobs, {logprob} in output_token_logprobs"
                self._disagree(f"the log-probability of token {self.num_tokens + at} is {what}")
            checked.append(pairs)
        return checked

    def _grow_support(self, meta: _Meta, new: list[int]) -> None:
        """What truncation left at the places of `new`: the sampled token is always in it."""
        kept = self._kept_list.feed(bytes(meta.output_token_sampling_mask), len(new))
        logprobs = self._kept_logprobs_list.feed(bytes(meta.output_token_sampling_logprobs), len(new))
        for at, (ids, token, logprob) in enumerate(zip(kept, new, logprobs, strict=True)):
            if token not in ids or not MIN_LOGPROB < logprob <= MAX_LOGPROB:
                where = f"token {self.num_tokens + at}, id {token}"
                self._disagree(f"output_token_sampling_mask of {where}: {ids[:8]}, log-probability {logprob}")
        self._kept += kept
        self._kept_logprobs += logprobs

    def _check_finish(self, finish: _Finish) -> FinishReason:
        count, matched = len(self.ids), finish.matched
        if finish.type == "abort":
            return "abort"
        if finish.type == "length":
            # Fewer than asked for is possible: SGLang lowers the limit to what its cache holds (source).
            if finish.length is not None and finish.length != count:
                self._disagree(f"finish_reason says length {finish.length}, {count} tokens were sampled")
            return "length"
        if finish.type != "stop":
            self._disagree(f"finish_reason {finish.type!r} is unknown")
        if isinstance(matched, int) and matched != self.ids[-1]:
            self._disagree(f"stopped by id {matched}, but the last id is {self.ids[-1]}")
        if isinstance(matched, str) and matched not in self._request.sampling.stop:
            # "NaN happened": the sampler returned an id outside the vocabulary, and SGLang wrote an
            # end-of-turn id in its place (source). That id was never sampled.
            self._disagree(f"stopped by {matched!r}, which is not one of the stop strings that were sent")
        return "stop"

    def _spans(self) -> tuple[VersionSpan, ...]:
        """The weights that sampled each token; observed: the spans come with the last event only."""
        count, sent = len(self.ids), self._meta.weight_versions
        if sent is None:
            if not self._version:  # None: never said; "": changed on the way, nobody knows at which token
                self._disagree("weight_versions is missing, and weight_version is missing or changed")
            return (VersionSpan(self._version, 0, count),)
        end = 0
        for span in sent:
            if span.start != end or span.end <= span.start:
                self._disagree(f"weight_versions: {span.start}:{span.end} follows :{end}")
            end = span.end
        if end != count:
            self._disagree(f"weight_versions cover {end} of {count} tokens")
        return tuple(VersionSpan(span.version, span.start, span.end) for span in sent)

    def _abort(self, ids: list[int] | None, meta: _Meta, finish: _Finish) -> TokenChunk | None:
        """The end of an aborted generation: its last tokens. SGLang also says `abort` for its own failures.

        Such an event may lack all counts, of an incremental stream it repeats the last token, and its weight
        version may be the one that came after the abort (source).
        """
        if finish.status_code is not None:
            raise self.refused(finish.status_code, finish.message or "aborted")
        chunk = None
        if ids and (meta.completion_tokens or 0) > self.num_tokens:
            chunk = self._grow(ids, meta)
            self._version = self._version if self._request.stream else ""
        self._finish, self._meta = finish, meta
        return chunk

    def refused(self, status: int | None, message: str) -> errors.TokentapeError:
        """The error that a status means in answer to this request.

        Observed: SGLang compiles a constraint only after it took the request in. Whole, that fails with a
        status; streamed, with a 200 whose one event has finish_reason abort, the status in it and a token
        that nobody asked for. A grammar that comes to allow no token at all (a `$ref` to itself) is a 500, or
        streamed an event whose log-probability is null.
        """
        if self._request.sampling.is_constrained and _CONSTRAINT_REFUSED.match(message):
            return errors.RequestError(f"{_NOT_HELD}: {message.strip()[:500]}", param="response_format")
        return refusal(status, message, self.num_tokens)

    def _disagree(self, message: str) -> NoReturn:
        raise errors.EngineProtocolError(message, num_tokens=self.num_tokens)


def _wrong_top(tops: _Tops, num: int, vocab_size: int) -> str | None:
    """What is wrong with the `num` likeliest tokens of one place."""
    values = [value for value, _, _ in tops]
    ids = {i for _, i, _ in tops}
    if len(ids) != num or len(tops) != num:
        return f"{len(ids)} different ids in {len(tops)} entries, {num} were asked for"
    if min(ids) < 0 or max(ids) >= vocab_size:
        return f"an id outside the vocabulary of {vocab_size} ids"
    if None in values:
        return "a log-probability is null"
    sure = cast("list[float]", values)
    # What no token can have is said as the float minimum (observed), and is last as the list is sorted.
    if not MIN_LOGPROB < sure[0] <= MAX_LOGPROB or any(not a >= b for a, b in pairwise(sure)):
        return f"{sure} are not log-probabilities, best first"
    return None
