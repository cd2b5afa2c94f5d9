"""SGLang's native generation request as the embedded engine takes it: decoded, checked, then a `Generation`.

No torch and no web framework. Refusals have the words of SGLang 0.5.23 (recorded from a real server), so that
a client meets the same mistakes here. Where a real server would die (an id outside the vocabulary), or can do
more than this one, the refusal says so.
"""

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeAlias

import msgspec

from tokentape.errors import ContextOverflow, RequestError
from tokentape.types import GREEDY_BELOW, VersionSpan

TopLogprobs: TypeAlias = list[tuple[float, int]]

# The order and the words of SGLang 0.5.23's own refusal of an unknown key.
_PARAM_NAMES = [
    "max_new_tokens",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_new_tokens",
    "n",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    "stream_interval",
    "logit_bias",
    "sampling_seed",
    "custom_params",
    "beam_width",
    "watermark",
    "choice",
]

_REFUSED_PARAMS = [
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "stop_regex",
    "custom_params",
    "beam_width",
    "watermark",
    "choice",
]

# Fields that a real server acts upon and this one cannot: refused when set, where unknown ones are ignored.
_REFUSED_FIELDS = [
    "input_embeds",
    "image_data",
    "audio_data",
    "video_data",
    "lora_path",
    "session_params",
    "custom_logit_processor",
    "token_ids_logprob",
    "return_hidden_states",
    "return_routed_experts",
]


class UnknownParamError(RequestError):
    """A key that `sampling_params` does not have. SGLang answers it in a shape of its own."""


class BadBodyError(RequestError):
    """The body is not the JSON that was asked for. `detail` is the pydantic error that SGLang reports."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class SamplingParams(msgspec.Struct, frozen=True):
    """`sampling_params`, SGLang's names and defaults. `max_new_tokens` None: to the end of the context."""

    max_new_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    stop: str | list[str] = ""
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int = 1
    logit_bias: dict[str, float] = {}
    sampling_seed: int | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings; empty ones never match and are left out."""
        return tuple(s for s in ([self.stop] if isinstance(self.stop, str) else self.stop) if s)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: temperature 0, or `top_k` 1."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    def verify(self, vocab_size: int) -> None:
        """Raise `RequestError` in SGLang's words for the first value that is out of range."""
        for ok, message in self._checks():
            if not ok:
                raise RequestError(message, param="sampling_params")
        for key in self.logit_bias:
            if not key.isdecimal() or int(key) >= vocab_size:
                raise RequestError(f"logit_bias must has keys in [0, {vocab_size - 1}], got {key}.")

    def _checks(self) -> tuple[tuple[bool, str], ...]:
        most = self.max_new_tokens
        temperature = f"{self.temperature:g}"
        return (
            (
                math.isfinite(self.temperature) and self.temperature >= 0,
                f"temperature must be a non-negative finite number, got {temperature}.",
            ),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}."),
            (0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}."),
            (
                self.top_k == -1 or self.top_k >= 1,
                f"top_k must be -1 (disable) or at least 1, got {self.top_k}.",
            ),
            (
                -2 <= self.frequency_penalty <= 2,
                f"frequency_penalty must be in [-2, 2], got {self.frequency_penalty}.",
            ),
            (
                -2 <= self.presence_penalty <= 2,
                f"presence_penalty must be in [-2, 2], got {self.presence_penalty}.",
            ),
            (
                0 < self.repetition_penalty <= 2,
                f"repetition_penalty must be in (0, 2] (1.0 = no penalty), got {self.repetition_penalty}.",
            ),
            (
                self.min_new_tokens >= 0,
                f"min_new_tokens must be in [0, max_new_tokens], got {self.min_new_tokens}.",
            ),
            (most is None or most >= 0, f"max_new_tokens must be at least 0, got {most}."),
            (
                most is None or self.min_new_tokens <= most,
                f"min_new_tokens must be in [0, max_new_tokens({most})], got {self.min_new_tokens}.",
            ),
            (self.n == 1, "n must be 1: the embedded engine samples one completion per request."),
        )


class GenerateBody(msgspec.Struct, frozen=True):
    """The fields of `POST /generate` that this engine acts upon, beside the prompt and `sampling_params`.

    `input_logprob_temperature` is this engine's own: SGLang's prompt log-probabilities have temperature 1.
    """

    rid: str = ""
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: Annotated[int, msgspec.Meta(ge=0)] = 0
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    return_sampling_mask: bool = False
    input_logprob_temperature: Annotated[float, msgspec.Meta(gt=0)] | None = None


@dataclass(slots=True)
class Generation:
    """One generation: what was asked, and what the engine has answered so far.

    The engine's own thread writes, `on_progress` (called from that thread, must not block) tells that it has.
    Lists only ever grow and `completion_ids` grows last, so a reader that takes `n = len(completion_ids)` may
    slice all of them to `n`; to see the end it reads `finish_reason` first, then `n`.

    `prompt_ids` int[P], `completion_ids` int[C], `logprobs` float[C] (nats), `top_logprobs` [C][k] pairs of
    log-probability and id. `kept` [C][1 to k] are the ids that truncation left, `kept_logprobs` float[C] of
    the sampled ones under that distribution, both only where they were asked for. With `logprob_start_len`
    s ≥ 0, `input_logprobs` has P-s entries, the first of them None.
    """

    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    body: GenerateBody = field(default_factory=GenerateBody)
    rid: str = ""
    on_progress: Callable[[], None] = lambda: None

    completion_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top_logprobs: list[TopLogprobs] = field(default_factory=list[TopLogprobs])
    kept: list[list[int]] = field(default_factory=list[list[int]])
    kept_logprobs: list[float] = field(default_factory=list[float])
    input_logprobs: list[float | None] = field(default_factory=list[float | None])
    input_top_logprobs: list[TopLogprobs | None] = field(default_factory=list[TopLogprobs | None])
    weight_version: str = ""
    versions: list[VersionSpan] = field(default_factory=list[VersionSpan])
    num_cached_tokens: int | None = None
    num_retractions: int = 0
    finish_reason: dict[str, Any] | None = None
    cancelled: bool = False
    started_s: float = field(default_factory=time.monotonic)

    ABORTED: ClassVar[dict[str, Any]] = {
        "type": "abort",
        "message": "Aborted",
        "status_code": None,
        "err_type": None,
    }

    def __post_init__(self) -> None:
        self.rid = self.rid or self.body.rid or uuid.uuid4().hex

    def append(self, token: int, logprob: float, version: str, top: TopLogprobs) -> None:
        """Record one sampled token; only the engine's thread calls this."""
        at = len(self.completion_ids)
        if self.versions and self.versions[-1].version == version:
            self.versions[-1] = VersionSpan(version, self.versions[-1].start, at + 1)
        else:
            self.versions.append(VersionSpan(version, at, at + 1))
        self.weight_version = version
        self.logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.completion_ids.append(token)

    def finish(self, reason: dict[str, Any], version: str) -> None:
        """End it; nothing is appended afterwards."""
        self.weight_version = version
        if not self.versions:
            self.versions.append(VersionSpan(version, 0, 0))
        self.finish_reason = reason


def decode_body(raw: bytes) -> dict[str, Any]:
    """A JSON object, or `BadBodyError` in the words that SGLang's validation would use."""
    try:
        body: Any = msgspec.json.decode(raw or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # the last: nested too deep
        raise BadBodyError(
            "{'type': 'json_invalid', 'loc': ('body', 0), 'msg': 'JSON decode error', 'input': {}, "
            f"'ctx': {{'error': {str(error)!r}}}}}"
        ) from error
    if not isinstance(body, dict):
        raise BadBodyError(
            "{'type': 'dict_type', 'loc': ('body',), 'msg': 'Input should be a valid dictionary'}"
        )
    return body  # pyright: ignore[reportUnknownVariableType]


def parse_params(raw: object, vocab_size: int) -> SamplingParams:
    """`sampling_params` as sent → checked parameters.

    Null means: the default (but an explicit null `max_new_tokens` means no limit). Raises `UnknownParamError`
    or `RequestError`.
    """
    if raw is None:
        return SamplingParams()
    if not isinstance(raw, dict):
        raise RequestError(f"sampling_params must be one object, got {type(raw).__name__}.")
    given: dict[str, Any] = raw  # pyright: ignore[reportUnknownVariableType]
    for key in given:
        if key not in _PARAM_NAMES:
            names = ", ".join(f"`{name}`" for name in _PARAM_NAMES)
            raise UnknownParamError(f"unknown field `{key}`, expected one of {names}", param=key)
    for key in _REFUSED_PARAMS:
        if given.get(key) is not None:
            raise RequestError(f"{key} is not supported by the embedded engine.", param=key)
    known = {k: v for k, v in given.items() if v is not None or k == "max_new_tokens"}
    try:
        params = msgspec.convert(known, SamplingParams)
    except msgspec.ValidationError as error:
        raise RequestError(f"sampling_params: {error}", param="sampling_params") from error
    params.verify(vocab_size)
    return params


def parse_fields(body: dict[str, Any]) -> GenerateBody:
    """Every top-level field but the prompt and `sampling_params`. Raises `BadBodyError`."""
    for key in _REFUSED_FIELDS:
        if body.get(key):
            raise RequestError(f"{key} is not supported by the embedded engine.", param=key)
    known = {k: v for k, v in body.items() if v is not None and k in GenerateBody.__struct_fields__}
    try:
        return msgspec.convert(known, GenerateBody)
    except msgspec.ValidationError as error:
        raise BadBodyError(f"{{'type': 'value_error', 'loc': ('body',), 'msg': {str(error)!r}}}") from error


def parse_input_ids(value: object) -> list[int] | None:
    """`input_ids` as sent: a list of ints, or None where there is none. Raises `BadBodyError`."""
    if value is None:
        return None
    if not isinstance(value, list):
        what = f"must be list or null; got {type(value).__name__}"
        raise BadBodyError(
            f"{{'type': 'value_error', 'loc': ('body', 'input_ids'), 'msg': 'Value error, {what}', "
            f"'ctx': {{'error': ValueError({what!r})}}}}"
        )
    if value and isinstance(value[0], list):
        raise RequestError(
            "The embedded engine takes one prompt per request: input_ids must be a list of ints."
        )
    try:
        return msgspec.convert(value, list[int])
    except msgspec.ValidationError as error:
        raise BadBodyError(
            f"{{'type': 'value_error', 'loc': ('body', 'input_ids'), 'msg': {str(error)!r}}}"
        ) from error


def check_top(num: int, vocab_size: int) -> None:
    """Raise `RequestError` when more likeliest tokens are asked for than there are."""
    if num > vocab_size:
        raise RequestError(
            f"top_logprobs_num is {num}, more than the vocabulary has ({vocab_size}). "
            "A real SGLang server dies of this.",
            param="top_logprobs_num",
        )


def check_prompt(ids: list[int], max_new_tokens: int | None, *, vocab_size: int, context_length: int) -> None:
    """Raise `RequestError` or `ContextOverflow` for a prompt that cannot be run.

    `max_new_tokens` is what the caller asked for. None (not asked: the default of 128 holds) never overflows;
    the engine stops at the end of the context then.

    An input of exactly `context_length` tokens is refused as well, as SGLang does: nothing could follow it.
    """
    if not ids:
        raise RequestError("input_ids cannot be empty.", param="input_ids")
    if min(ids) < 0 or max(ids) >= vocab_size:
        at = next(i for i, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise RequestError(
            f"input_ids[{at}] is {ids[at]}, outside the vocabulary (0 to {vocab_size - 1}). "
            "A real SGLang server dies of this.",
            param="input_ids",
        )
    if len(ids) >= context_length:
        raise ContextOverflow(
            f"The input ({len(ids)} tokens) is longer than the model's context length "
            f"({context_length} tokens).",
            num_prompt_tokens=len(ids),
            context_length=context_length,
        )
    if max_new_tokens is not None and len(ids) + max_new_tokens > context_length:
        raise ContextOverflow(
            f"Requested token count exceeds the model's maximum context length of {context_length} tokens. "
            f"You requested a total of {len(ids) + max_new_tokens} tokens: {len(ids)} tokens from the "
            f"input messages and {max_new_tokens} tokens for the completion. Please reduce the number "
            "of tokens in the input messages or the completion to fit within the limit.",
            num_prompt_tokens=len(ids),
            context_length=context_length,
        )
