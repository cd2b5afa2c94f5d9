"""Requests as no client of good will would send them, and some that one would: strategies for every wire."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from wirekit import Json, Talk, WireUnderTest

CONTROL = (
    "<|im_end|>",
    "<|im_start|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
)

texts = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "hello",
            "the weather",
            "\0",
            "\ufdd0",
            "\ud7ff\ue000",
            "a\u0301",
            "👩‍👩‍👧",
            "\r\n",
            *CONTROL,
        ]
    ),
    st.text(max_size=20),
    st.builds(lambda parts: "".join(parts), st.lists(st.sampled_from(["hello", " ", *CONTROL]), max_size=5)),
)
DEEP = "@deep@"
"""Stands for what is nested deeper than Python's own encoder could write."""
_DEEP = b"[" * 5000 + b"]" * 5000
numbers = st.one_of(
    st.sampled_from(
        [0, 1, -1, 2, 1.5, 0.0, -0.0, 1e-9, 2**31 - 1, 2**31, 2**53, 2**63, -(2**63) - 1, 10**40, 1e308]
    ),
    st.integers(-5, 300),
    st.floats(allow_nan=False, allow_infinity=False),
)


# What each field of each wire is given, one by one; and as the only item of a list, and under two keys.
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 1.5, -0.0, 1e308, 2**31, 2**63, -(2**63) - 1, 10**400),
    *("", " ", "hello", "auto", "none", "\0", "<|im_end|>", "1", "x" * 9000, [], {}, DEEP),
)


def nasty(value: Any) -> list[Any]:
    return [value, [value], {"type": value}, {"1": value, "hello": value}]


def to_bytes(body: Any, *, ensure_ascii: bool = True) -> bytes:
    """JSON, with what stands for the deep put in."""
    text = json.dumps(body, ensure_ascii=ensure_ascii).encode(errors="surrogatepass")
    return text.replace(json.dumps(DEEP).encode(), _DEEP)


def deep(depth: int, *, keyed: bool) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"x": value} if keyed else [value]
    return value


leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
junk = st.one_of(
    leaves,
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=6,
    ),
    st.builds(deep, st.sampled_from([5, 60, 300]), keyed=st.booleans()),
    st.just("x" * 9000),  # longer than the context
    st.just(DEEP),
)
schemas = st.one_of(
    st.just({"type": "object", "properties": {"tz": {"type": "string"}}}),
    st.dictionaries(
        st.sampled_from(["type", "properties", "required", "enum", "$ref", "anyOf", "x"]), junk, max_size=3
    ),
)
talks = st.builds(
    Talk,
    system=st.none() | texts,
    user=texts,
    assistant=st.none() | texts,
    reasoning=st.none() | texts,
    call_id=st.just("call00001") | texts,
    call_name=st.just("get_time") | texts,
    arguments=st.dictionaries(texts, leaves, max_size=2),
    result=texts,
    last=st.none() | texts,
    tool_name=st.just("get_time") | texts,
    tool_description=texts,
    parameters=schemas,
    template_arguments=st.dictionaries(
        st.sampled_from(["enable_thinking", "x", "messages"]), leaves, max_size=1
    ),
)
# Fields of any wire, with values that one of them would take: most of them good.
FIELDS: Mapping[str, Any] = {
    "model": texts,
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "max_tokens": st.integers(1, 60),
    "max_completion_tokens": st.integers(1, 60),
    "max_output_tokens": st.integers(1, 60),
    "temperature": st.floats(0, 1),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 50),
    "min_p": st.floats(0, 1),
    "stop": texts | st.lists(texts, max_size=3),
    "stop_sequences": st.lists(texts, max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 400), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 4),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str) | texts, st.floats(-100, 100), max_size=3),
    "response_format": st.sampled_from(
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        ]
    ),
    "text": st.sampled_from(
        [{"format": {"type": "json_schema", "name": "x", "schema": {}}}, {"verbosity": "low"}]
    ),
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", {"type": "any"}, {"type": "auto", "disable_parallel_tool_use": True}]
    ),
    "parallel_tool_calls": st.booleans(),
    "reasoning_effort": st.sampled_from(["none", "low", "high", "x"]),
    "reasoning": st.sampled_from([{"effort": "low"}, {"effort": "none", "summary": "auto"}]),
    "thinking": st.sampled_from([{"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}]),
    "previous_response_id": texts | st.just("resp_" + "0" * 24),
    "store": st.booleans(),
    "truncation": st.sampled_from(["auto", "disabled"]),
    "include": st.just(["reasoning.encrypted_content"]),
    "return_token_ids": st.booleans(),
    "metadata": st.dictionaries(texts, texts, max_size=2),
    "user": texts,
    "chat_template_kwargs": st.dictionaries(texts, junk, max_size=2),
}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key in it."""
    if isinstance(value, dict):
        for key in list(value):
            yield value, key
            yield from places(value[key])
    elif isinstance(value, list):
        for index in range(len(value)):
            yield value, index
            yield from places(value[index])


@st.composite
def bodies(draw: st.DrawFn, wire: WireUnderTest) -> Json:
    """A body with some fields, and up to three things wrong with it."""
    body = copy.deepcopy(wire.body(draw(talks)))
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=6, unique=True)):
        body[name] = copy.deepcopy(draw(FIELDS[name]))  # it is changed below
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3]))):
        container, key = draw(st.sampled_from(list(places(body)) or [({}, "x")]))
        kind = draw(st.sampled_from(["replace", "delete", "twice", "swap", "rename"]))
        if kind == "delete" or (kind != "replace" and not isinstance(container, list | dict)):
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
        elif kind == "twice" and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == "swap" and isinstance(container, dict) and "role" in container:
            container["role"] = draw(
                st.sampled_from(["user", "assistant", "tool", "system", "developer", "x"])
            )
        elif kind == "rename" and isinstance(container, dict):
            container[draw(texts)] = container.pop(key)
        else:
            container[key] = copy.deepcopy(draw(junk))
    return body


@st.composite
def raw_bodies(draw: st.DrawFn, wire: WireUnderTest) -> bytes:
    """The bytes of a body: most of the time JSON."""
    text = to_bytes(draw(bodies(wire)), ensure_ascii=draw(st.booleans()))
    kind = draw(st.sampled_from(["good"] * 30 + ["cut", "spoilt", "doubled", "garbage"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if kind == "spoilt":
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.binary(min_size=1, max_size=3)) + text[at:]
    if kind == "doubled":
        return text + text
    return draw(st.binary(max_size=60)) if kind == "garbage" else text


@dataclass(frozen=True)
class Ask:
    """One request."""

    wire: WireUnderTest
    body: bytes
    headers: Mapping[str, str]


_header_texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30)
headers = st.fixed_dictionaries(
    {},
    optional={
        "Idempotency-Key": st.sampled_from(["a", "b"]) | _header_texts,
        "x-stainless-retry-count": st.sampled_from(["0", "1", "-1", "x", ""]),
        "X-Tokentape-Label": st.sampled_from(["main", "sub/agent", "no good"]) | _header_texts,
        "X-Session-Id": _header_texts,
        "anthropic-version": st.just("2023-06-01"),
        "anthropic-beta": _header_texts,
        "Content-Type": st.sampled_from(["application/json", "text/plain", "x"]),
        "Accept": st.sampled_from(["text/event-stream", "*/*", "x"]),
        "Authorization": _header_texts,
    },
)


def asks(wire: WireUnderTest) -> st.SearchStrategy[Ask]:
    return st.builds(Ask, st.just(wire), raw_bodies(wire), headers)
