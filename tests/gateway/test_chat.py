"""Chat Completions: what a request's fields do, and what a reply looks like."""

import contextlib
import json
import sqlite3
from array import array
from pathlib import Path
from typing import Any

import pytest

from gatewaykit import END, USER, WEATHER, Gateway, Json, call, cut, sampled, split
from tokentape.gateway.chat.request import HONOURED, REFUSED
from tokentape.testing import FakeSGLang, Reply, pseudo_logprob

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


# -- honoured: field, value, what the engine must be sent

TO_ENGINE: list[tuple[Json, Json]] = [
    ({}, {"max_new_tokens": 8192}),
    ({"max_tokens": 7}, {"max_new_tokens": 7}),
    ({"max_completion_tokens": 9}, {"max_new_tokens": 9}),
    ({"max_completion_tokens": 9, "max_tokens": 9}, {"max_new_tokens": 9}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 20}, {"top_k": 20}),
    ({"top_k": -1}, {"top_k": -1}),
    ({"min_p": 0.05}, {"min_p": 0.05}),
    ({"stop": "x"}, {"stop": ["x"]}),
    ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
    ({"stop_token_ids": [5, 6]}, {"stop_token_ids": [5, 6]}),
    ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
    ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"seed": 42}, {"sampling_seed": 42}),
    ({"logit_bias": {"7": 1.5, "5": -100}}, {"logit_bias": {"5": -100.0, "7": 1.5}}),
    ({"logit_bias": {}}, {}),
    (
        dict.fromkeys(
            ("temperature", "top_p", "stop", "tools", "tool_choice", "max_tokens", "stream", "seed")
        ),
        {},
    ),
]


@both_ways
@pytest.mark.parametrize(("fields", "params"), TO_ENGINE, ids=lambda v: json.dumps(v)[:40])
async def test_honoured(fake: FakeSGLang, gateway: Gateway, fields: Json, params: Json, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(sampled("hello"))
    await gateway.chat(session_id, [USER], **{**fields, "stream": stream})
    [request] = fake.requests
    max_new_tokens = params.get("max_new_tokens", 8192)
    room = fake.context_length - len(request.input_ids)
    assert request.sampling_params == {**params, "max_new_tokens": min(max_new_tokens, room)}
    assert request.body["return_logprob"] is True
    assert request.stream is stream
    [sample] = await gateway.samples(session_id)
    [recorded] = json.loads(sample["sampling"])
    assert recorded["max_tokens"] == min(max_new_tokens, room)
    for name, value in fields.items():
        if value and name in recorded and name != "max_tokens":
            pairs = [[5, -100.0], [7, 1.5]]
            assert recorded[name] == (
                pairs if name == "logit_bias" else [value] if isinstance(value, str) else value
            )


async def test_every_honoured_field_has_a_test() -> None:
    sampling = {name for fields, _ in TO_ENGINE for name in fields}
    elsewhere = {
        *("messages", "model", "stream_options", "logprobs", "chat_template_kwargs", "return_token_ids"),
        *("n", "top_logprobs", "response_format", "parallel_tool_calls", "reasoning_effort"),
    }
    assert set(HONOURED) == sampling | elsewhere


async def test_session_defaults_and_requests(fake: FakeSGLang, gateway: Gateway) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "stop": ["x"], "max_tokens": 50}
    session_id = await gateway.create(sampling=sampling)
    await gateway.chat(session_id, [USER])
    await gateway.chat(session_id, [USER], temperature=1, max_tokens=5)
    first, second = (r.sampling_params for r in fake.requests)
    assert first == {"temperature": 0.5, "top_p": 0.9, "stop": ["x"], "max_new_tokens": 50}
    assert second == {**first, "temperature": 1, "max_new_tokens": 5}


# -- refused

REFUSED_VALUES: list[tuple[str, Any]] = [
    ("best_of", 2),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("function_call", "none"),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "x"}),
    ("prediction", {"type": "content", "content": "x"}),
    ("web_search_options", {}),
    ("echo", True),
    ("continue_final_message", True),
    ("add_generation_prompt", False),
]


@pytest.mark.parametrize(("name", "value"), REFUSED_VALUES)
async def test_refused(fake: FakeSGLang, gateway: Gateway, name: str, value: Any) -> None:
    session_id = await gateway.create()
    before = await gateway.show(session_id)
    answer = await gateway.post(session_id, {"messages": [USER], name: value})
    assert answer.status == 400
    assert answer.error["param"] == name
    assert name in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"
    assert not fake.requests
    assert await gateway.show(session_id) == before


async def test_every_refused_field_has_a_test_and_a_harmless_value(
    fake: FakeSGLang, gateway: Gateway
) -> None:
    assert {name for name, _ in REFUSED_VALUES} == set(REFUSED)
    session_id = await gateway.create()
    await gateway.chat(session_id, [USER], **{name: harmless for name, (harmless, _) in REFUSED.items()})
    await gateway.chat(session_id, [USER], **dict.fromkeys(REFUSED))
    assert len(fake.requests) == 2


# -- ignored

IGNORED: Json = {
    "user": "someone",
    "store": False,
    "metadata": {"a": 1},
    "service_tier": "auto",
}


@both_ways
async def test_ignored_and_recorded(fake: FakeSGLang, gateway: Gateway, store: Path, stream: bool) -> None:
    session_id = await gateway.create()
    reply = await gateway.chat(session_id, [USER], **IGNORED, stream=stream)
    assert reply["tokentape"]["ignored_fields"] == sorted(IGNORED)
    with contextlib.closing(sqlite3.connect(store)) as connection:
        [[recorded]] = connection.execute("SELECT origin FROM turns").fetchall()
    origin = json.loads(recorded)
    assert origin["ignored"] == sorted(IGNORED)
    assert (origin["wire"], origin["request_id"]) == ("chat", reply["id"])
    assert set(fake.requests[0].body) == {"input_ids", "rid", "sampling_params", "return_logprob", "stream"}
    plain = await gateway.chat(session_id, [USER])
    assert "ignored_fields" not in plain["tokentape"]


@pytest.mark.parametrize("name", sorted(IGNORED))
async def test_strict_refuses(fake: FakeSGLang, strict: Gateway, name: str) -> None:
    session_id = await strict.create()
    answer = await strict.post(session_id, {"messages": [USER], name: IGNORED[name]})
    assert (answer.status, answer.error["param"]) == (400, name)
    assert not fake.requests
    await strict.chat(session_id, [USER], temperature=1)


# -- replies


async def test_reply(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    text = "<think>\nthe user\n</think>\n\nhello " + call("weather", {"city": "world"})
    fake.script(sampled(text, seed=3))
    reply = await gateway.chat(session_id, [USER], tools=[WEATHER], model="mine")
    [request] = fake.requests
    num_prompt, num_sampled = len(request.input_ids), len(request.output_ids)
    tape = reply.pop("tokentape")
    [tool_call] = reply["choices"][0]["message"]["tool_calls"]
    assert reply == {
        "id": tape["turn_id"],
        "object": "chat.completion",
        "created": reply["created"],
        "model": "mine",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "hello",
                    "refusal": None,
                    "reasoning_content": "the user",
                    "tool_calls": [
                        {
                            "id": tool_call["id"],
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "world"}'},
                        }
                    ],
                },
                "finish_reason": "tool_calls",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_sampled,
            "total_tokens": num_prompt + num_sampled,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    attempts = tape.pop("parse")["attempts"]
    assert [a["status"] for a in attempts] == ["ok"]
    assert text[attempts[0]["start"] : attempts[0]["end"]] == call("weather", {"city": "world"})
    assert tape == {
        "session_id": session_id,
        "turn_id": reply["id"],
        "parent_turn_id": None,
        "branch_reason": "root",
        "prompt_tokens": num_prompt,
        "completion_tokens": num_sampled,
        "weight_version": "default",
    }


@both_ways
async def test_token_ids_on_request(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    reply = await gateway.chat(session_id, [USER], return_token_ids=True, stream=stream)
    tape, [request] = reply["tokentape"], fake.requests
    assert (tape["prompt_ids"], tape["completion_ids"]) == (request.input_ids, request.output_ids)
    expected = array("f", (pseudo_logprob(i, at) for at, i in enumerate(request.output_ids)))
    assert tape["logprobs"] == expected.tolist()


@both_ways
async def test_logprobs(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    """One entry a sampled token, half characters with their exact bytes."""
    session_id = await gateway.create()
    fake.script(sampled("é hello", seed=5))
    reply = await gateway.chat(session_id, [USER], logprobs=True, stream=stream)
    content = reply["choices"][0]["logprobs"]["content"]
    ids = fake.requests[0].output_ids
    assert [e["logprob"] for e in content] == pytest.approx(
        [pseudo_logprob(i, at) for at, i in enumerate(ids)]
    )
    assert bytes(b for e in content for b in e["bytes"]) == "é hello<|im_end|>".encode()
    assert all(e["top_logprobs"] == [] for e in content)
    assert content[-1]["token"] == "<|im_end|>"


async def test_cached_tokens(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(sampled("hello"), sampled("world"))
    first = await gateway.chat(session_id, [USER])
    message = first["choices"][0]["message"]
    second = await gateway.chat(session_id, [USER, message, USER])
    usage = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert usage == len(fake.requests[0].input_ids + fake.requests[0].output_ids) - 1


@both_ways
async def test_tool_choice_none(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    text = call("weather", {"city": "hello"})
    fake.script(sampled(text, seed=1), sampled(text, seed=2))
    fields: Json = {"tools": [WEATHER], "stream": stream}
    reply = await gateway.chat(session_id, [USER], **fields, tool_choice="none")
    assert reply["choices"][0]["message"]["content"] == text
    assert "tool_calls" not in reply["choices"][0]["message"]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["tokentape"]["parse"]["status"] == "not_offered"
    reply = await gateway.chat(session_id, [USER], **fields, tool_choice="auto")
    assert len(reply["choices"][0]["message"]["tool_calls"]) == 1


@both_ways
async def test_finish_reasons(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    a_call = call("weather", {"city": "hello"})
    fake.script(sampled("hello"), cut("hello"), sampled(a_call), cut(a_call))
    reasons = [
        (await gateway.chat(session_id, [USER], tools=[WEATHER], stream=stream))["choices"][0][
            "finish_reason"
        ]
        for _ in range(4)
    ]
    assert reasons == ["stop", "length", "tool_calls", "length"]


@both_ways
@pytest.mark.parametrize("text", ["", "<think>\n\n</think>\n\n", "<think>\nhello"])
async def test_no_content(fake: FakeSGLang, gateway: Gateway, text: str, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(sampled(text), sampled("hello"))
    reply = await gateway.chat(session_id, [USER], stream=stream)
    message = reply["choices"][0]["message"]
    assert not message["content"]
    await gateway.chat(session_id, [USER, message, USER], stream=stream)


async def test_models(gateway: Gateway) -> None:
    session_id = await gateway.create()
    for path in ("/v1/models", f"/sessions/{session_id}/v1/models"):
        models = await gateway.ok("GET", path)
        assert [m["id"] for m in models["data"]] == ["policy"]


@both_ways
async def test_a_token_without_text(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    """Control tokens in the middle of a completion are text; the stop token at its end never is."""
    session_id = await gateway.create()
    fake.script(Reply([*split("hello"), END, *split("world"), END]))
    reply = await gateway.chat(session_id, [USER], stream=stream)
    assert reply["choices"][0]["message"]["content"] == "hello<|im_end|>world"
