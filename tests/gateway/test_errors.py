"""What bad input gets: a status, OpenAI's shape, the SDK's own exception, and a session left as it was."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from gatewaykit import (
    CLOCK,
    USER,
    WEATHER,
    Answer,
    Gateway,
    Json,
    assert_samples_match,
    call,
    gateway_for,
    sampled,
    seen_by,
    split,
)
from tokentape.testing import FakeSGLang, Fault, Reply

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def chat(*messages: Any, **fields: Any) -> Json:
    return {"model": "policy", "messages": list(messages or [USER]), **fields}


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def assistant(arguments: str, call_id: Any = "c1") -> Json:
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def tool(call_id: Any = "c1", content: Any = "sunny") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def part(**fields: Any) -> Json:
    return {"role": "user", "content": [{"type": "text", "text": "look:"}, fields]}


IMAGE = part(type="image_url", image_url={"url": "data:image/png;base64,AAAA"})
DEEP = 5000

# body, param (None: not checked)
BAD_BODIES: dict[str, tuple[Any, str | None]] = {
    "empty": (b"", None),
    "no json": (b"{", None),
    "trailing": (b'{"messages": []} x', None),
    "array": (b"[]", None),
    "string": (b'"messages"', None),
    "null": (b"null", None),
    "not utf-8": (b'{"messages": [{"role": "user", "content": "\xff"}]}', None),
    "not utf-8 elsewhere": (b'{"model": "\xff", "messages": [{"role": "user", "content": "x"}]}', None),
    "not utf-8 in a key": (b'{"\xff": 1, "messages": [{"role": "user", "content": "x"}]}', None),
    "lone surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
    "lone surrogate in a tool": (
        b'{"messages": [{"role":"user","content":"x"}],'
        b'"tools": [{"type":"function","function":{"name":"\\udc00"}}]}',
        None,
    ),
    "lone surrogate behind the name": (
        b'{"messages": [{"role":"user","content":"x"}],'
        b'"tools": [{"type":"function","function":{"name":"f", "description":"\\udc00"}}]}',
        None,
    ),
    "lone surrogate in arguments": (
        chat(USER, assistant('{"a": "\\ud800"}'), tool()),
        "messages[1].tool_calls[0]",
    ),
    "lone surrogate in the names of arguments": (
        chat(USER, assistant('{"\\uDC00": 1}'), tool()),
        "messages[1].tool_calls[0]",
    ),
    "half a pair in broken arguments": (chat(USER, assistant('{"x": "\\ud83d'), tool()), None),
    "content and a refusal": (
        chat(USER, {"role": "assistant", "content": "a", "refusal": "b"}),
        "messages[1].refusal",
    ),
    "NaN": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', None),
    "Infinity": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}', None),
    "1e999": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
    "1e999 in a tool": (
        b'{"messages": [{"role":"user","content":"x"}],'
        b'"tools": [{"type":"function","function":{"name":"f", "parameters":{"x": 1e999}}}]}',
        None,
    ),
    "huge seed": (chat(seed=2**70), "seed"),
    "huge negative seed": (chat(seed=-(2**70)), "seed"),
    "seed with 5000 digits": (
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        None,
    ),
    "huge top_k": (chat(top_k=2**70), "top_k"),
    "huge max_tokens": (chat(max_tokens=2**70), None),
    "huge stop id": (chat(stop_token_ids=[2**70]), "stop_token_ids"),
    "huge n": (chat(n=2**70), "n"),
    "deep messages": (b'{"messages": ' + nested(DEEP) + b"}", None),
    "deep content": (b'{"messages": [{"role": "user", "content": ' + nested(DEEP) + b"}]}", None),
    "deep unknown": (b'{"x": ' + nested(DEEP) + b', "messages": [{"role": "user", "content": "x"}]}', None),
    "deep tools": (
        b'{"messages": [{"role":"user","content":"x"}],'
        b'"tools": [{"type":"function","function":{"name":"f", "parameters":' + nested(DEEP) + b"}}]}",
        None,
    ),
    "deep arguments": (
        b'{"messages": [{"role":"user","content":"x"}], "chat_template_kwargs": {"x": '
        + nested(DEEP)
        + b"}}",
        None,
    ),
    "deep tool_choice": (
        b'{"messages": [{"role":"user","content":"x"}], "tool_choice": {"x": ' + nested(DEEP) + b"}}",
        None,
    ),
    **{
        f"{depth} deep {name}": (body.replace(b"NESTED", nested(depth)), None)
        for depth in (900, 1100)
        for name, body in {
            "tools": b'{"messages": [{"role":"user","content":"x"}], "tools":'
            b'[{"type":"function","function":{"name":"f", "parameters":NESTED}}]}',
            "template arguments": b'{"messages": [{"role":"user","content":"x"}],'
            b'"chat_template_kwargs": {"x":NESTED}}',
        }.items()
    },
    "no messages": ({"model": "policy"}, "messages"),
    "null messages": ({"messages": None}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "messages: object": ({"messages": {}}, "messages"),
    "messages: string": ({"messages": "hello"}, "messages"),
    "message: string": (chat("hello"), "messages[0]"),
    "message: null": (chat(USER, None), "messages[1]"),
    "no role": (chat({"content": "x"}), "messages[0]"),
    "role: number": (chat({"role": 1, "content": "x"}), "messages[0]"),
    "unknown role": (chat({"role": "wizard", "content": "x"}), "messages[0].role"),
    "function role": (chat({"role": "function", "name": "f", "content": "x"}), "messages[0].role"),
    "no content": (chat({"role": "user"}), "messages[0].content"),
    "null content": (chat({"role": "system", "content": None}), "messages[0].content"),
    "content: number": (chat({"role": "user", "content": 1}), "messages[0]"),
    "content: object": (chat({"role": "user", "content": {"text": "x"}}), "messages[0]"),
    "image": (chat(IMAGE), "messages[0].content[1].type"),
    "audio": (chat(part(type="input_audio", input_audio={"data": ""})), "messages[0].content[1].type"),
    "file": (chat(part(type="file", file={})), "messages[0].content[1].type"),
    "unknown part": (chat(part(type="nonsense")), "messages[0].content[1].type"),
    "text part without text": (chat(part(type="text")), None),
    "part: string": (chat({"role": "user", "content": ["x"]}), "messages[0]"),
    "tool without id": (
        chat(USER, assistant("{}"), {"role": "tool", "content": "x"}),
        "messages[2].tool_call_id",
    ),
    "unknown tool id": (chat(USER, assistant("{}"), tool("c2")), "messages[2].tool_call_id"),
    "tool first": (chat(tool()), "messages[0].tool_call_id"),
    "tool id: number": (chat(USER, assistant("{}"), tool(7)), "messages[2]"),
    "tool without content": (chat(USER, assistant("{}"), tool(content=None)), "messages[2].content"),
    "user calls": (chat({**assistant("{}"), "role": "user", "content": "x"}), "messages[0].tool_calls"),
    "function_call of a message": (
        chat(USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}),
        "messages[1].function_call",
    ),
    "audio of a message": (chat(USER, {"role": "assistant", "audio": {"id": "a"}}), "messages[1].audio"),
    "call without function": (
        chat(USER, {"role": "assistant", "tool_calls": [{"id": "c1", "type": "custom", "custom": {}}]}),
        "messages[1].tool_calls[0]",
    ),
    "call id: null": (chat(USER, assistant("{}", None)), "messages[1]"),
    "call arguments: no json": (chat(USER, assistant("{"), tool()), None),
    "call arguments: list": (chat(USER, assistant("[]"), tool()), None),
    "max_tokens -1": (chat(max_tokens=-1), "max_tokens"),
    "max_tokens 0": (chat(max_tokens=0), "max_tokens"),
    "max_tokens 1.5": (chat(max_tokens=1.5), "max_tokens"),
    "max_tokens: string": (chat(max_tokens="7"), "max_tokens"),
    "template argument messages": (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
    "template argument bos_token": (chat(chat_template_kwargs={"bos_token": "x"}), "chat_template_kwargs"),
    "max_completion_tokens -1": (chat(max_completion_tokens=-1), "max_completion_tokens"),
    "temperature -1": (chat(temperature=-1), "temperature"),
    "temperature: string": (chat(temperature="1"), "temperature"),
    "temperature: true": (chat(temperature=True), "temperature"),
    "top_p 0": (chat(top_p=0), "top_p"),
    "top_p 2": (chat(top_p=2), "top_p"),
    "top_k 0": (chat(top_k=0), "top_k"),
    "top_k -2": (chat(top_k=-2), "top_k"),
    "min_p 2": (chat(min_p=2), "min_p"),
    "frequency_penalty 3": (chat(frequency_penalty=3), "frequency_penalty"),
    "presence_penalty -3": (chat(presence_penalty=-3), "presence_penalty"),
    "repetition_penalty 0": (chat(repetition_penalty=0), "repetition_penalty"),
    "seed: string": (chat(seed="x"), "seed"),
    "stop: empty": (chat(stop=""), "stop"),
    "stop: empties": (chat(stop=["x", ""]), "stop"),
    "stop: number": (chat(stop=7), "stop"),
    "stop_token_ids: negative": (chat(stop_token_ids=[-1]), "stop_token_ids"),
    "stop_token_ids: too large": (chat(stop_token_ids=[100_000]), "stop_token_ids"),
    "stream: string": (chat(stream="yes"), "stream"),
    "stream_options: list": (chat(stream_options=[]), "stream_options"),
    "logprobs: number": (chat(logprobs=5), "logprobs"),
    "n: 0": (chat(n=0), "n"),
    "n: 129": (chat(n=129), "n"),
    "n: float": (chat(n=1.0), "n"),
    "n: string": (chat(n="1"), "n"),
    "top_logprobs alone": (chat(top_logprobs=5), "top_logprobs"),
    "top_logprobs without logprobs": (chat(top_logprobs=5, logprobs=False), "top_logprobs"),
    "top_logprobs 21": (chat(top_logprobs=21, logprobs=True), "top_logprobs"),
    "top_logprobs -1": (chat(top_logprobs=-1, logprobs=True), "top_logprobs"),
    "json_schema without one": (chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    "json_schema without schema": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
        "response_format.json_schema",
    ),
    "json_schema: list": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": []}}),
        "response_format",
    ),
    "json_schema too deep": (
        b'{"messages": [{"role":"user","content":"x"}], "response_format": {"type": "json_schema",'
        b'"json_schema": {"name": "x", "schema": {"x": ' + nested(DEEP) + b"}}}}",
        None,
    ),
    "json_schema that cannot be kept": (
        chat(
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "integer", "multipleOf": 7}},
            }
        ),
        "response_format",
    ),
    "response_format nonsense": (chat(response_format={"type": "yaml"}), "response_format"),
    "response_format: string": (chat(response_format="json_object"), "response_format"),
    "logit_bias: list": (chat(logit_bias=[1]), "logit_bias"),
    "logit_bias: words": (chat(logit_bias={"hello": 1}), "logit_bias"),
    "logit_bias: too strong": (chat(logit_bias={"1": 101}), "logit_bias"),
    "logit_bias: null": (chat(logit_bias={"1": None}), "logit_bias"),
    "logit_bias: negative id": (chat(logit_bias={"-1": 1}), "logit_bias"),
    "logit_bias: no such id": (chat(logit_bias={"100000": 1}), "logit_bias"),
    "logit_bias: huge id": (chat(logit_bias={"9" * 5000: 1}), "logit_bias"),
    "logit_bias: an id twice": (chat(logit_bias={"1": 1, "01": 2}), "logit_bias"),
    "logit_bias: an id with blanks": (chat(logit_bias={" 1_0 ": 1}), "logit_bias"),
    "tool_choice required without tools": (chat(tool_choice="required"), "tool_choice"),
    "tool_choice required of no tools": (chat(tools=[], tool_choice="required"), "tool_choice"),
    "tool_choice of an unknown tool": (
        chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "clock"}}),
        "tool_choice",
    ),
    "tool_choice of a tool without tools": (
        chat(tool_choice={"type": "function", "function": {"name": "clock"}}),
        "tool_choice",
    ),
    "tool_choice of no name": (
        chat(tools=[WEATHER], tool_choice={"type": "function", "function": {}}),
        "tool_choice",
    ),
    "tool_choice of another type": (
        chat(tools=[WEATHER], tool_choice={"type": "custom", "custom": {"name": "weather"}}),
        "tool_choice",
    ),
    "tool_choice nonsense": (chat(tool_choice=7), "tool_choice"),
    "tool_choice a name": (chat(tools=[WEATHER], tool_choice="weather"), "tool_choice"),
    "parallel_tool_calls: string": (chat(parallel_tool_calls="no"), "parallel_tool_calls"),
    "reasoning_effort nonsense": (chat(reasoning_effort="a lot"), "reasoning_effort"),
    "tools: object": (chat(tools={}), "tools"),
    "tool: string": (chat(tools=["weather"]), "tools"),
    "tool without function": (chat(tools=[{"type": "function"}]), "tools"),
    "tool without name": (chat(tools=[{"type": "function", "function": {}}]), "tools"),
    "tool: empty name": (chat(tools=[{"type": "function", "function": {"name": ""}}]), "tools"),
    "tool: other type": (chat(tools=[{**CLOCK, "type": "web_search"}]), "tools"),
    "model: number": (chat(model=7), "model"),
    "chat_template_kwargs: list": (chat(chat_template_kwargs=[]), "chat_template_kwargs"),
}


@both_ways
@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_bodies(fake: FakeSGLang, gateway: Gateway, name: str, stream: bool) -> None:
    body, param = BAD_BODIES[name]
    if stream and isinstance(body, dict):
        body = {"stream": True, **body}
    session_id = await gateway.create()
    fake.script(sampled("hello"), sampled("world"))
    first = await gateway.chat(session_id, [USER])
    before = await gateway.show(session_id)
    answer = await gateway.post(session_id, body)
    assert answer.status == 400, answer
    assert answer.error["type"] == "invalid_request_error"
    assert isinstance(answer.error["message"], str)
    assert answer.headers["x-should-retry"] == "false"
    if param is not None:
        assert answer.error["param"] == param, answer.error
    assert await gateway.show(session_id) == before
    await gateway.chat(session_id, [USER, first["choices"][0]["message"], USER])  # and it goes on
    samples = await gateway.samples(session_id)
    assert len(samples) == 1
    assert_samples_match(seen_by(fake), samples, num_turns=2)


ODD_BODIES: dict[str, Any] = {
    "big numbers in arguments": chat(USER, assistant('{"x": 123456789012345678901234567890}'), tool()),
    "arguments as an object": chat(USER, assistant({"x": 2**70, "y": [1.5, None]}), tool()),  # pyright: ignore
    "surrogate pair in arguments": chat(USER, assistant('{"x": "\\ud83d\\ude00"}'), tool()),
    "empty arguments": chat(USER, assistant(""), tool()),
    "numbers in a tool": chat(
        tools=[
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"maximum": 2**70, "minimum": -1e300}},
            }
        ]
    ),
    "big numbers in template arguments": chat(chat_template_kwargs={"x": 2**70}),
    "NUL": chat({"role": "user", "content": "a\0b\x7f"}),
    "noncharacters": chat({"role": "user", "content": "\ufdd0\uffff <|im_end|>"}),
    "astral": chat({"role": "user", "content": "👩‍👩‍👧"}),
    "empty text": chat({"role": "user", "content": ""}),
    "no parts": chat({"role": "user", "content": []}),
    "assistant without anything": chat(USER, {"role": "assistant"}, USER),
    "developer": chat({"role": "developer", "content": "x"}, USER),
    "keys of a model dump": chat({**USER, "name": None, "refusal": None, "audio": None}),
    "nested template arguments": chat(chat_template_kwargs={"x": json.loads(nested(200))}),
    "nested tool": chat(
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"x": json.loads(nested(200))}}}]
    ),
    "nested arguments": chat(USER, assistant('{"x": ' + nested(200).decode() + "}"), tool()),
    "most template arguments": chat(chat_template_kwargs={"x": [[1, {"y": None}], "z", 1.5, True]}),
    "long": chat({"role": "user", "content": "x" * 5000}),
}


@pytest.mark.parametrize("name", ODD_BODIES)
async def test_odd_but_good_bodies(fake: FakeSGLang, gateway: Gateway, name: str) -> None:
    session_id = await gateway.create()
    fake.script(sampled("hello"), sampled("world"))
    body = ODD_BODIES[name]
    answer = await gateway.post(session_id, body)
    assert answer.status == 200, answer
    message = answer.body["choices"][0]["message"]
    await gateway.chat(session_id, **{**body, "messages": [*body["messages"], message, USER]})
    samples = await gateway.samples(session_id)
    assert len(samples) == 1
    assert_samples_match(seen_by(fake), samples, num_turns=2)


async def test_the_same_in_the_sdk(gateway: Gateway) -> None:
    session_id = await gateway.create()
    async with gateway.openai(session_id) as client:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.chat.completions.create(model="policy", messages=[USER], n=200)
        assert (raised.value.param, raised.value.code) == ("n", "request_error")
        assert raised.value.type == "invalid_request_error"


# -- too large, unknown, forbidden


async def test_a_body_too_large(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    async with gateway_for(fake.url, model_dir, store, http={"max_body_bytes": 2000}) as gateway:
        session_id = await gateway.create()
        answer = await gateway.post(session_id, chat({"role": "user", "content": "x" * 3000}))
        assert (answer.status, answer.error["code"]) == (413, "too_large")
        async with gateway.openai(session_id) as client:
            with pytest.raises(openai.APIStatusError) as raised:
                await client.chat.completions.create(
                    model="policy", messages=[{**USER, "content": "x" * 3000}]
                )
            assert raised.value.status_code == 413
        await gateway.chat(session_id, [USER])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/completions", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/sessions/x/y", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/sessions", 405),
        ("DELETE", "/sessions", 405),
        ("POST", "/healthz", 405),
        ("POST", "//sessions", 404),
        ("GET", "/sessions/%2e%2e/samples", 404),
        ("GET", "/sessions/%ff", 404),
        ("GET", "/sessions/%00", 404),
    ],
)
async def test_unknown_routes(gateway: Gateway, method: str, path: str, status: int) -> None:
    answer = await gateway.request(method, path)
    assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")


async def test_unknown_session(gateway: Gateway) -> None:
    for method, path in (
        ("GET", "/sessions/none"),
        ("GET", "/sessions/none/samples"),
        ("POST", "/sessions/none/finish"),
        ("DELETE", "/sessions/none"),
    ):
        answer = await gateway.request(method, path)
        assert (answer.status, answer.error["code"]) == (404, "not_found")
    async with gateway.openai("none") as client:
        with pytest.raises(openai.NotFoundError, match="POST /sessions"):
            await client.chat.completions.create(model="policy", messages=[USER])
        with pytest.raises(openai.NotFoundError):
            await client.models.list()
    for headers in ({}, {"X-Session-Id": "none"}, {"Authorization": "Bearer none"}, {"x-api-key": "none"}):
        answer = await gateway.request("POST", "/v1/chat/completions", chat(), headers)
        assert (answer.status, answer.error["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    "header",
    [b"Authorization: Bearer \xff\xfe", b"X-Session-Id: \xff", b"x-api-key: \xc3\xa9", b"X-Session-Id: a b"],
)
@pytest.mark.parametrize("key", [None, "sk-\u00e9"], ids=["open", "key"])
async def test_odd_bytes_in_headers(
    fake: FakeSGLang, model_dir: Path, store: Path, header: bytes, key: str | None
) -> None:
    async with gateway_for(fake.url, model_dir, store, http={"api_key": key}) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n"
        writer.write(head + header + b"\r\n\r\n{}")
        answer = await reader.read()
        writer.close()
        assert answer.split()[1] == (b"404" if key is None else b"401"), answer


async def test_finished_and_deleted(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    await gateway.chat(session_id, [USER])
    await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1.0})
    before = await gateway.show(session_id)
    async with gateway.openai(session_id, max_retries=2) as client:
        with pytest.raises(openai.ConflictError, match="finished"):
            await client.chat.completions.create(model="policy", messages=[USER])
        with pytest.raises(openai.ConflictError):
            await client.chat.completions.create(model="policy", messages=[USER], stream=True)
    assert await gateway.show(session_id) == before
    assert len(fake.requests) == 1
    await gateway.ok("DELETE", f"/sessions/{session_id}")
    assert (await gateway.post(session_id, chat())).status == 404


async def test_api_key(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    async with gateway_for(fake.url, model_dir, store, http={"api_key": "sk-right"}) as gateway:
        for path in ("/healthz", "/readyz"):
            assert (await gateway.request("GET", path)).status == 200
        for headers in (
            {},
            {"Authorization": "Bearer sk-wrong"},
            {"Authorization": "Basic sk-right"},
            {"x-api-key": ""},
        ):
            for method, path in (
                ("POST", "/sessions"),
                ("GET", "/metrics"),
                ("GET", "/nowhere"),
                ("GET", "/v1/models"),
            ):
                answer = await gateway.request(method, path, headers=headers)
                assert (answer.status, answer.error["code"]) == (401, "unauthorized")
        for headers in (
            {"Authorization": "Bearer sk-right"},
            {"authorization": "bearer sk-right"},
            {"x-api-key": "sk-right"},
        ):
            answer = await gateway.request("POST", "/sessions", {}, headers)
            assert answer.status == 200
        session_id = answer.body["session_id"]
        async with gateway.openai(session_id, api_key="sk-wrong", max_retries=2) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="policy", messages=[USER])
        async with gateway.openai(session_id, api_key="sk-right") as client:
            await client.chat.completions.create(model="policy", messages=[USER])
        headers = {"X-Session-Id": session_id, "Authorization": "Bearer sk-right"}
        assert (await gateway.request("POST", "/v1/chat/completions", chat(), headers)).status == 200


# -- context overflow, in each of its forms


async def overflows(gateway: Gateway, fake: FakeSGLang, body: Json) -> Answer:
    session_id = await gateway.create()
    fake.script(sampled("hello"))
    await gateway.chat(session_id, [{"role": "user", "content": "x"}])
    before = await gateway.show(session_id)
    answer = await gateway.post(session_id, body)
    assert answer.status == 400, answer
    assert answer.error["code"] == "context_length_exceeded"
    assert answer.error["type"] == "invalid_request_error"
    assert "maximum context length" in answer.error["message"] or "context length" in answer.error["message"]
    assert await gateway.show(session_id) == before
    await gateway.chat(session_id, [{"role": "user", "content": "y"}])
    return answer


@both_ways
async def test_overflow_of_a_known_context(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    long = {"role": "user", "content": "x" * 9000}
    answer = await overflows(gateway, fake, chat(long, stream=stream))
    assert answer.error["param"] == "messages"
    assert "This model's maximum context length is 8192 tokens" in answer.error["message"]
    await overflows(gateway, fake, chat(max_tokens=8190, stream=stream))
    assert len(fake.requests) == 4  # none of the two was sent


@pytest.fixture
async def blind(model_dir: Path, store: Path, tmp_path: Path) -> AsyncIterator[tuple[Gateway, FakeSGLang]]:
    """The gateway believes in a context of 8192, the engine has 512."""
    async with (
        FakeSGLang(context_length=512, vocab_size=2000) as fake,
        gateway_for(fake.url, model_dir, store, http={"context_length": 8192}) as gateway,
    ):
        yield gateway, fake


@both_ways
async def test_overflow_that_the_engine_finds(blind: tuple[Gateway, FakeSGLang], stream: bool) -> None:
    """400 when whole; an error event inside a 200 when streaming. The agent sees the same."""
    gateway, fake = blind
    session_id = await gateway.create()
    for body in (chat({"role": "user", "content": "x" * 600}), chat(max_tokens=510)):
        answer = await gateway.post(
            session_id, {**body, "stream": stream, "max_tokens": body.get("max_tokens", 5)}
        )
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded"), answer
    assert len(fake.requests) == 2
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (0, {})
    await gateway.chat(session_id, [USER], max_tokens=5)
    async with gateway.openai(session_id) as client:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.chat.completions.create(model="p", messages=[USER], max_tokens=510, stream=stream)
        assert raised.value.code == "context_length_exceeded"


async def test_the_context_length_is_asked_of_the_engine(
    fake: FakeSGLang, model_dir: Path, store: Path
) -> None:
    fake.context_length = 300
    async with gateway_for(fake.url, model_dir, store) as gateway:
        session_id = await gateway.create()
        await gateway.ok("GET", "/readyz")
        await asyncio.sleep(0.1)
        await overflows(gateway, fake, chat({"role": "user", "content": "x" * 400}))
        reply = await gateway.chat(session_id, [USER])
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert fake.requests[-1].sampling_params["max_new_tokens"] == 300 - reply["usage"]["prompt_tokens"]


# -- the engine fails before the first token

FAILURES: list[tuple[Fault, int, str, type[openai.APIStatusError]]] = [
    (Fault("status", status=500), 502, "engine_failed", openai.InternalServerError),
    (Fault("status", status=503), 502, "engine_failed", openai.InternalServerError),
    (Fault("status", status=400), 502, "engine_rejected", openai.InternalServerError),
    (Fault("status", status=404, body=b"nothing here"), 502, "engine_rejected", openai.InternalServerError),
    (Fault("status", status=429), 503, "engine_unavailable", openai.InternalServerError),
    (Fault("error_event"), 502, "engine_failed", openai.InternalServerError),
    (Fault("disconnect"), 503, "engine_unavailable", openai.InternalServerError),
    (Fault("stall"), 504, "engine_timeout", openai.InternalServerError),
    (Fault("abort", status=500), 502, "engine_failed", openai.InternalServerError),
    (Fault("not_json"), 502, "engine_protocol_error", openai.InternalServerError),
]
# Lies that a stream tells too late for a status of its own; whole answers only.
LIES: list[Fault] = [
    Fault("wrong_count"),
    Fault("shifted_ids"),
    *(Fault("logprob", value=value) for value in (None, float("nan"), -9999.0, 0.5, float("-inf"))),
    *(
        Fault("missing", field=name)
        for name in (
            "output_ids",
            "meta_info",
            "meta_info.finish_reason",
            "meta_info.output_token_logprobs",
        )
    ),
]


async def fails(
    gateway: Gateway, fake: FakeSGLang, fault: Fault, *, stream: bool, status: int, code: str
) -> None:
    session_id = await gateway.create()
    fake.script(sampled("hello", seed=1))
    first = await gateway.chat(session_id, [USER])
    messages = [USER, first["choices"][0]["message"], USER]
    before = await gateway.show(session_id)
    fault = Fault(
        fault.kind,
        fault.after,
        fault.status,
        fault.message,
        fault.body,
        fault.field,
        fault.value,
        Reply(split("hello")),
    )
    fake.script(fault, fault, sampled("world"))
    answer = await gateway.post(session_id, {"messages": messages, "stream": stream})
    assert (answer.status, answer.error["code"]) == (status, code), answer
    assert answer.error["type"] == "server_error"
    assert answer.headers["x-should-retry"] in ("true", "false")
    async with gateway.openai(session_id) as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model="policy", messages=messages, stream=stream)
        assert (raised.value.status_code, raised.value.code) == (status, code)
    after = await gateway.show(session_id)
    assert after == {**before, "failures": {code: 2}}
    await gateway.chat(session_id, messages, stream=stream)
    samples = await gateway.samples(session_id)
    assert len(samples) == 1
    assert_samples_match(seen_by(fake), samples, num_turns=2)


@pytest.fixture
async def impatient(fake: FakeSGLang, model_dir: Path, store: Path) -> AsyncIterator[Gateway]:
    limits = {"first_token_timeout_s": 0.5, "total_timeout_s": 0.5}
    async with gateway_for(fake.url, model_dir, store, engine=limits) as gateway:
        yield gateway


@both_ways
@pytest.mark.parametrize(
    ("fault", "status", "code", "_raised"), FAILURES, ids=lambda v: getattr(v, "kind", "")
)
async def test_the_engine_fails(
    fake: FakeSGLang, impatient: Gateway, fault: Fault, status: int, code: str, stream: bool, _raised: type
) -> None:
    await fails(impatient, fake, fault, stream=stream, status=status, code=code)


@pytest.mark.parametrize("fault", LIES, ids=lambda f: f"{f.kind} {f.field or f.value}")
async def test_the_engine_lies(fake: FakeSGLang, gateway: Gateway, fault: Fault) -> None:
    await fails(gateway, fake, fault, stream=False, status=502, code="engine_protocol_error")


@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "cached_tokens", "weight_versions"])
async def test_an_engine_that_says_less(fake: FakeSGLang, gateway: Gateway, name: str) -> None:
    """What only repeats what is known anyway may be missing; nothing is made up in its place."""
    session_id = await gateway.create()
    fake.script(Fault("missing", field=f"meta_info.{name}", reply=sampled("hello")))
    reply = await gateway.chat(session_id, [USER])
    assert ("prompt_tokens_details" in reply["usage"]) == (name != "cached_tokens")
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=1)


async def test_an_engine_that_is_down(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    await gateway.chat(session_id, [USER])
    before = await gateway.show(session_id)
    await fake.aclose()
    for stream in (False, True):
        answer = await gateway.post(session_id, chat(stream=stream))
        assert (answer.status, answer.error["code"]) == (503, "engine_unavailable")
        assert answer.headers["x-should-retry"] == "true"
    assert await gateway.show(session_id) == {**before, "failures": {"engine_unavailable": 2}}
    assert (await gateway.request("GET", "/readyz")).status == 503
    assert (await gateway.request("GET", "/healthz")).status == 200
    retrying = asyncio.create_task(retry(gateway, session_id))
    await asyncio.sleep(0.05)
    await fake.start()
    await retrying
    assert (await gateway.show(session_id))["turns"] == 2


async def retry(gateway: Gateway, session_id: str) -> None:
    """The SDK retries by itself, because the answer says that it is worth it."""
    async with gateway.openai(session_id, max_retries=4) as client:
        await client.chat.completions.create(model="policy", messages=[USER])


async def test_the_engine_dies_in_the_middle(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(Fault("die"))
    answer = await gateway.post(session_id, chat())
    assert (answer.status, answer.error["code"]) == (503, "engine_unavailable")
    await fake.start()
    await gateway.chat(session_id, [USER])


async def test_an_engine_that_is_never_there(model_dir: Path, store: Path, unused_tcp_port: int) -> None:
    async with gateway_for(f"http://127.0.0.1:{unused_tcp_port}", model_dir, store) as gateway:
        session_id = await gateway.create()
        answer = await gateway.post(session_id, chat())
        assert answer.status == 503
        assert (await gateway.request("GET", "/readyz")).status == 503


async def test_half_a_body(gateway: Gateway) -> None:
    """A client that leaves in the middle of its own request leaves no trace."""
    session_id = await gateway.create()
    host, port = gateway.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /sessions/{session_id}/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    )
    writer.write(head.encode() + b'{"mess')
    await writer.drain()
    writer.close()
    with contextlib.suppress(aiohttp.ClientError):
        await writer.wait_closed()
    assert (await gateway.show(session_id))["failures"] == {}
    await gateway.chat(session_id, [USER])


async def test_malformed_calls_in_a_reply_are_no_error(fake: FakeSGLang, gateway: Gateway) -> None:
    """Negative control: the model's mistakes are data, never a status."""
    session_id = await gateway.create()
    fake.script(sampled(call("weather", "{")))
    await gateway.chat(session_id, [USER], tools=[WEATHER])
    assert (await gateway.show(session_id))["parse_statuses"] == {"invalid_json": 1}
