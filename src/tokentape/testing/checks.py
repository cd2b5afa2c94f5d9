"""What SGLang refuses, in its words: as recorded from a real 0.5.23 server."""

import json
from collections.abc import Container
from typing import Any, cast

from tokentape.testing.generation import ReceivedRequest

_SAMPLING_PARAMS = (
    *("max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema"),
    *(
        "regex",
        "ebnf",
        "structural_tag",
        "ignore_eos",
        "skip_special_tokens",
        "spaces_between_special_tokens",
    ),
    *("no_stop_trim", "stream_interval", "logit_bias", "sampling_seed", "custom_params"),
)


class RefusedError(Exception):
    """A 400 with SGLang's words; inside a 200 when a stream was asked for, unless `early`."""

    def __init__(self, message: str, *, early: bool = False) -> None:
        super().__init__(message)
        self.early = early


class GrammarRefusedError(Exception):
    """A constraint that SGLang cannot compile: found out after the request was taken in."""


def check(received: ReceivedRequest, running: Container[str], vocab_size: int, context_length: int) -> int:
    """`max_new_tokens`, when the real server would accept the request while those rids are `running`.

    Raises:
        RefusedError: it would not.
        GrammarRefusedError: it would accept it, and then fail to compile its constraint.
    """
    body, params = received.body, received.sampling_params
    if "input_ids" not in body:
        raise RefusedError("Either text, input_ids or input_embeds should be provided.")
    if not isinstance(body["input_ids"], list):
        what = "1 validation error:\n  {'type': 'value_error', 'loc': ('body', 'input_ids')}"
        raise RefusedError(what, early=True)
    if not received.input_ids:
        raise RefusedError("input_ids cannot be empty.")
    unknown = next((name for name in params if name not in _SAMPLING_PARAMS), None)
    if unknown is not None:
        names = ", ".join(f"`{name}`" for name in _SAMPLING_PARAMS)
        raise RefusedError(f"unknown field `{unknown}`, expected one of {names}", early=True)
    if received.rid in running:
        raise RefusedError(f"Duplicate request ID detected: {received.rid}")
    _check_types(params)
    num_prompt, context = len(received.input_ids), context_length
    max_tokens = int(params.get("max_new_tokens", min(128, max(context - num_prompt, 0))))
    if max_tokens < 0:
        raise RefusedError(f"max_new_tokens must be at least 0, got {max_tokens}.")
    if (temperature := params.get("temperature", 1.0)) < 0:
        raise RefusedError(f"temperature must be a non-negative finite number, got {temperature}.")
    if num_prompt >= context:
        what = f"longer than the model's context length ({context} tokens)."
        raise RefusedError(f"The input ({num_prompt} tokens) is {what}")
    if (total := num_prompt + max_tokens) > context:
        raise RefusedError(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. "
            f"You requested a total of {total} tokens: {num_prompt} tokens from the input messages and "
            f"{max_tokens} tokens for the completion. Please reduce the number of tokens in the input "
            "messages or the completion to fit within the limit."
        )
    for key in params.get("logit_bias") or ():
        if not 0 <= int(key) < vocab_size:
            raise RefusedError(f"logit_bias must has keys in [0, {vocab_size - 1}], got {key}.")
    _check_grammar(params.get("json_schema"), params.get("structural_tag"))
    return max_tokens


def _check_types(params: dict[str, Any]) -> None:
    for name in ("json_schema", "structural_tag"):
        if not isinstance(params.get(name), str | None):
            raise RefusedError("invalid type: map, expected a string", early=True)
    biases: Any = params.get("logit_bias") or {}
    if not isinstance(biases, dict):
        raise RefusedError("invalid type: sequence, expected a map", early=True)
    for bias in cast("dict[str, object]", biases).values():
        if not isinstance(bias, int | float):
            raise RefusedError("invalid type: null, expected f64", early=True)


def _check_grammar(json_schema: str | None, structural_tag: str | None) -> None:
    """Only whether it is one at all: a fake compiles no grammar."""
    if json_schema and structural_tag:
        raise RefusedError("Only one of json_schema, regex, ebnf, or structural_tag can be set.")
    kind = "json" if json_schema else "structural_tag"
    try:
        said: object = json.loads(json_schema or structural_tag or "{}")
    except ValueError as error:
        raise GrammarRefusedError(f"Failed to compile {kind} grammar: {error}") from error
    if json_schema and not isinstance(said, dict | bool):
        raise GrammarRefusedError(
            f"Failed to compile json grammar: Schema should be an object or bool, but got {said}"
        )
    if structural_tag and not (isinstance(said, dict) and ("format" in said or "structures" in said)):
        raise GrammarRefusedError("Failed to compile structural_tag grammar: Grammar compilation failed: ")
