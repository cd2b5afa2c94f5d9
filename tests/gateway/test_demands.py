"""What a request may demand of a reply: JSON, a call, one call at most, more or less thought."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gatewaykit import (
    CLOCK,
    END,
    TOKENIZER,
    USER,
    WEATHER,
    Agent,
    Gateway,
    Json,
    assert_samples_match,
    call,
    gateway_for,
    sampled,
    seen_by,
    split,
)
from tokentape.testing import FakeSGLang, Reply, pseudo_top, write_model_dir

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
SCHEMA: Json = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
JSON_SCHEMA: Json = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": SCHEMA}}
ONLY_WEATHER: Json = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
async def strict(fake: FakeSGLang, model_dir: Path, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with gateway_for(fake.url, model_dir, tmp_path / "strict.sqlite", http={"strict": True}) as gateway:
        yield gateway


def sent(fake: FakeSGLang) -> tuple[Any, str]:
    """The constraint of the last request, decoded, and its text."""
    params = fake.requests[-1].sampling_params
    [text] = [params[name] for name in ("json_schema", "structural_tag") if name in params]
    return json.loads(text), text


async def recorded(gateway: Gateway, session_id: str) -> Json:
    return json.loads((await gateway.samples(session_id))[-1]["sampling"])[-1]


# -- response_format


@both_ways
@pytest.mark.parametrize(
    ("wanted", "schema"),
    [(JSON_SCHEMA, SCHEMA), ({"type": "json_object"}, {"type": "object"})],
    ids=["schema", "object"],
)
async def test_json(fake: FakeSGLang, gateway: Gateway, wanted: Json, schema: Json, stream: bool) -> None:
    """The engine gets the schema, the turn's record too; the reply is text like any other."""
    agent = Agent(gateway, await gateway.create())
    fake.script(sampled('<think>\nthe\n</think>\n\n{"city": "hello"}', seed=4), sampled("hello"))
    reply = await agent.turn(USER, response_format=wanted, stream=stream)
    assert json.loads(reply["choices"][0]["message"]["content"]) == {"city": "hello"}
    constraint, text = sent(fake)
    assert constraint["type"] == "structural_tag"  # a plain schema would forbid the thought
    rule = constraint["format"]["elements"][-1]
    assert (rule["type"], rule["json_schema"]) == ("json_schema", schema)
    assert (await recorded(gateway, agent.session_id))["structural_tag"] == text
    del agent.messages[-1]["reasoning_content"]
    await agent.turn(USER, stream=stream)
    assert "structural_tag" not in fake.requests[-1].sampling_params
    assert_samples_match(seen_by(fake), await gateway.samples(agent.session_id), num_turns=2)


async def test_json_of_a_model_without_thoughts(fake: FakeSGLang, tmp_path: Path, store: Path) -> None:
    model = write_model_dir(tmp_path / "model", tokenizer=TOKENIZER)
    async with gateway_for(fake.url, model, store, reasoning_format="plain") as gateway:
        session_id = await gateway.create()
        await gateway.chat(session_id, [USER], response_format=JSON_SCHEMA)
        assert fake.requests[-1].sampling_params["json_schema"] == json.dumps(SCHEMA)
        assert (await recorded(gateway, session_id))["json_schema"] == json.dumps(SCHEMA)


@pytest.mark.parametrize("wanted", [{"type": "text"}, None])
async def test_text(fake: FakeSGLang, gateway: Gateway, wanted: Json | None) -> None:
    session_id = await gateway.create()
    await gateway.chat(session_id, [USER], response_format=wanted)
    assert not fake.requests[-1].sampling_params.keys() & {"json_schema", "structural_tag"}


@pytest.mark.parametrize("choice", ["auto", "none"])
async def test_json_or_calls(fake: FakeSGLang, gateway: Gateway, choice: str) -> None:
    """Offered tools may still be called; with "none" they may not."""
    session_id = await gateway.create()
    fields: Json = {"tools": [WEATHER, CLOCK], "response_format": JSON_SCHEMA, "tool_choice": choice}
    fake.script(sampled(call("weather", {"city": "x"})))
    reply = await gateway.chat(session_id, [USER], **fields)
    last = sent(fake)[0]["format"]["elements"][-1]
    assert last["type"] == ("or" if choice == "auto" else "json_schema")
    assert ("tool_calls" in reply["choices"][0]["message"]) == (choice == "auto")
    if choice == "auto":
        assert [tag["begin"] for tag in last["elements"][1]["tags"]] == [
            '<tool_call>\n{"name": "weather", "arguments": ',
            '<tool_call>\n{"name": "clock", "arguments": ',
        ]


# -- tool_choice


@both_ways
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["weather", "clock"]), (ONLY_WEATHER, ["weather"])],
    ids=["required", "named"],
)
async def test_a_call_is_demanded(
    fake: FakeSGLang, gateway: Gateway, choice: Any, names: list[str], stream: bool
) -> None:
    agent = Agent(gateway, await gateway.create(), {"tools": [WEATHER, CLOCK], "stream": stream})
    fake.script(sampled(call("weather", {"city": "x"}), seed=2), sampled("hello", seed=1))
    reply = await agent.turn(USER, tool_choice=choice)
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    calls = sent(fake)[0]["format"]["elements"][-1]
    assert [json.loads(f"{tag['begin'].split(chr(10))[1]} 0}}")["name"] for tag in calls["tags"]] == names
    assert calls["at_least_one"] is True
    assert calls["tags"][0]["content"]["json_schema"] == WEATHER["function"]["parameters"]
    await agent.turn(*agent.results())
    assert "structural_tag" not in fake.requests[-1].sampling_params
    samples = await gateway.samples(agent.session_id)
    assert len(samples) == 1
    assert_samples_match(seen_by(fake), samples, num_turns=2)


@pytest.mark.parametrize("choice", ["auto", "none", None])
async def test_no_call_is_demanded(fake: FakeSGLang, gateway: Gateway, choice: str | None) -> None:
    session_id = await gateway.create()
    for tools in ([WEATHER], [], None):
        await gateway.chat(session_id, [USER], tools=tools, tool_choice=choice)
        assert not fake.requests[-1].sampling_params.keys() & {"json_schema", "structural_tag"}


async def test_a_model_whose_calls_are_not_known(fake: FakeSGLang, tmp_path: Path, store: Path) -> None:
    """No grammar can be made: an honest 400, not a free reply."""
    model = write_model_dir(tmp_path / "model", tokenizer=TOKENIZER)
    async with gateway_for(fake.url, model, store, tool_format="plain") as gateway:
        session_id = await gateway.create()
        for choice in ("required", ONLY_WEATHER):
            body = {"messages": [USER], "tools": [WEATHER], "tool_choice": choice}
            answer = await gateway.post(session_id, body)
            assert (answer.status, answer.error["param"]) == (400, "tool_choice")
        assert not fake.requests


@pytest.mark.parametrize("wanted", [JSON_SCHEMA, {"type": "json_object"}])
async def test_a_schema_beside_a_demanded_call(
    fake: FakeSGLang, gateway: Gateway, strict: Gateway, wanted: Json
) -> None:
    """The reply is a call: the schema has no effect, and that is said."""
    fields: Json = {"tools": [WEATHER], "tool_choice": "required", "response_format": wanted}
    reply = await gateway.chat(await gateway.create(), [USER], **fields)
    assert reply["tokentape"]["ignored_fields"] == ["response_format"]
    answer = await strict.post(await strict.create(), {"messages": [USER], **fields})
    assert (answer.status, answer.error["param"]) == (400, "response_format")
    assert len(fake.requests) == 1


# -- parallel_tool_calls


@both_ways
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_one_call_at_most(fake: FakeSGLang, gateway: Gateway, choice: str, stream: bool) -> None:
    """The engine stops behind the first call; nothing that was sampled is hidden, and the turn goes on."""
    agent = Agent(gateway, await gateway.create(), {"tools": [WEATHER, CLOCK], "stream": stream})
    text = "hello\n" + call("weather", {"city": "</tool"})
    ids = split(text, seed=3)
    fake.script(Reply(ids, matched="</tool_call>"), sampled("the weather", seed=1))
    fields: Json = {"parallel_tool_calls": False, "tool_choice": choice, "stop": ["STOP"]}
    reply = await agent.turn(USER, **fields)
    assert fake.requests[0].sampling_params["stop"] == ["STOP", "</tool_call>"]
    [choice_made] = reply["choices"]
    assert choice_made["finish_reason"] == "tool_calls"
    assert choice_made["message"]["content"] == "hello"
    [made] = choice_made["message"]["tool_calls"]
    assert json.loads(made["function"]["arguments"]) == {"city": "</tool"}
    assert reply["tokentape"]["parse"]["status"] == "ok"
    await agent.turn(*agent.results())
    samples = await gateway.samples(agent.session_id)
    assert len(samples) == 1
    assert_samples_match(seen_by(fake), samples, num_turns=2)
    first, second = seen_by(fake)
    bridge = second.input_ids[len(first.input_ids + first.output_ids) :]
    decoded = TOKENIZER.decode(bridge, skip_special_tokens=False)
    assert decoded.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\nsunny 0")


@both_ways
async def test_own_stop_strings_beside_one_call(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    agent = Agent(gateway, await gateway.create(), {"tools": [WEATHER], "stream": stream})
    fields: Json = {"parallel_tool_calls": False, "stop": ["STOP"]}
    fake.script(Reply(split("hello STOP", seed=1), matched="STOP"), sampled("world"), sampled("the"))
    reply = await agent.turn(USER, **fields)
    assert reply["choices"][0]["message"]["content"] == "hello "
    reply = await agent.turn(USER, **fields)
    assert reply["choices"][0]["message"]["content"] == "world"
    await agent.turn(USER)
    assert "stop" not in fake.requests[-1].sampling_params
    assert_samples_match(seen_by(fake), await gateway.samples(agent.session_id), num_turns=3)


@pytest.mark.parametrize(
    "fields",
    [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [WEATHER], "parallel_tool_calls": True}],
)
async def test_nothing_to_stop_at(fake: FakeSGLang, gateway: Gateway, fields: Json) -> None:
    session_id = await gateway.create()
    await gateway.chat(session_id, [USER], **{"parallel_tool_calls": False, **fields})
    assert "stop" not in fake.requests[0].sampling_params


# -- top_logprobs


@both_ways
@pytest.mark.parametrize("num", [0, 1, 5, 20])
async def test_top_logprobs(fake: FakeSGLang, gateway: Gateway, num: int, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(sampled("é hello", seed=5))
    reply = await gateway.chat(session_id, [USER], logprobs=True, top_logprobs=num, stream=stream)
    [request] = fake.requests
    assert request.num_top_logprobs == num
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == len(request.output_ids)
    for at, (token_id, entry) in enumerate(zip(request.output_ids, content, strict=True)):
        expected = pseudo_top(token_id, at, num, TOKENIZER.get_vocab_size())
        top = entry["top_logprobs"]
        assert [e["logprob"] for e in top] == pytest.approx([logprob for _, logprob in expected])
        if num:
            own = {k: v for k, v in entry.items() if k != "top_logprobs"}
            [same] = [e for e in top if e["bytes"] == own["bytes"]]
            assert same["token"] == own["token"]
            assert same["logprob"] == pytest.approx(own["logprob"])
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=1)


# -- messages


async def test_content_parts_and_developer(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "world"}]
    await gateway.chat(session_id, [{"role": "system", "content": "the"}, USER])
    plain = fake.requests[-1].input_ids
    await gateway.chat(
        session_id,
        [
            {"role": "developer", "content": [{"type": "text", "text": "the"}]},
            {"role": "user", "content": parts},
        ],
    )
    assert fake.requests[-1].input_ids == plain
    assert (await gateway.show(session_id))["branch_reasons"] == {"root": 1, "resampled": 1}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_of_others(fake: FakeSGLang, gateway: Gateway, name: str) -> None:
    """A turn that this session never sampled: its thought reaches the template under either name."""
    session_id = await gateway.create()
    made = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, name: "the tool", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    reply = await gateway.chat(session_id, messages, tools=[WEATHER])
    text = TOKENIZER.decode(fake.requests[0].input_ids, skip_special_tokens=False)
    assert "<think>\nthe tool\n</think>\n\n<tool_call>" in text
    assert sum(json.dumps(s).count('"trained"') for s in await gateway.samples(session_id)) == 1
    assert reply["tokentape"]["branch_reason"] == "root"


MADE: Json = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
UNHEARD: list[tuple[Json, str]] = [
    ({"messages": [{**USER, "prefix": True}]}, "messages[].prefix"),
    ({"messages": [{**USER, "reasoning_content": "hm"}]}, "messages[].reasoning_content"),
    ({"messages": [{**USER, "tool_call_id": "c"}]}, "messages[].tool_call_id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
        "messages[].content[].x",
    ),
    (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{**MADE, "x": 1}]},
                {"role": "tool", "tool_call_id": "c1", "content": "a"},
            ]
        },
        "messages[].tool_calls[].x",
    ),
    (
        {"messages": [USER, {"role": "assistant", "reasoning_content": "a", "reasoning": "b"}, USER]},
        "messages[].reasoning",
    ),
    ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "x": 1}}},
        "response_format.json_schema.x",
    ),
]


@pytest.mark.parametrize(("fields", "name"), UNHEARD, ids=[name for _, name in UNHEARD])
async def test_keys_without_effect(
    fake: FakeSGLang, gateway: Gateway, strict: Gateway, fields: Json, name: str
) -> None:
    """Each is said in the turn that brings it, and refused every time where nothing may be ignored."""
    body = {"messages": [USER], **fields}
    answer = await gateway.post(await gateway.create(), body)
    assert answer.body["tokentape"]["ignored_fields"] == [name]
    session_id = await strict.create()
    for _ in range(2):
        answer = await strict.post(session_id, body)
        assert (answer.status, answer.error["param"]) == (400, name)
    assert len(fake.requests) == 1


async def test_keys_that_ask_for_nothing(fake: FakeSGLang, strict: Gateway) -> None:
    """What an SDK repeats of a reply."""
    said: Json = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None}
    messages = [USER, {**said, "function_call": None, "tool_calls": None, "prefix": False}, USER]
    reply = await strict.chat(await strict.create(), messages)
    assert "ignored_fields" not in reply["tokentape"]
    assert len(fake.requests) == 1


async def test_a_refusal_is_what_was_said(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    await gateway.chat(session_id, [USER, {"role": "assistant", "content": None, "refusal": "never"}, USER])
    text = TOKENIZER.decode(fake.requests[0].input_ids, skip_special_tokens=False)
    assert "never<|im_end|>" in text


# -- labels


async def test_one_body_under_two_labels(fake: FakeSGLang, gateway: Gateway) -> None:
    """Two agents that ask the same at once: each gets a turn of its own, with its label."""
    session_id = await gateway.create()
    path, body = f"/sessions/{session_id}/v1/chat/completions", {"messages": [USER]}
    answers = await asyncio.gather(
        *(gateway.request("POST", path, body, {"X-Tokentape-Label": label}) for label in ("main", "other"))
    )
    assert len({answer.body["tokentape"]["turn_id"] for answer in answers}) == 2
    assert (await gateway.show(session_id))["labels"] == {"main": 1, "other": 1}
    assert len(fake.requests) == 2


# -- how much to think


def model_with(tmp_path: Path, old: str, new: str) -> Path:
    """A model directory whose template has another text in one place."""
    model = write_model_dir(tmp_path / "other", tokenizer=TOKENIZER)
    template = model / "chat_template.jinja"
    source = template.read_text()
    assert old in source
    template.write_text(source.replace(old, new))
    return model


THINKING = "enable_thinking is defined and not enable_thinking"
GENERATION = "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable"


async def test_effort_of_a_template_that_knows_it(fake: FakeSGLang, tmp_path: Path, store: Path) -> None:
    new = "{{- '<|im_start|>assistant ' + reasoning_effort | default('any') + '\\n' }}\n    {%- if enable"
    model = model_with(tmp_path, GENERATION, new)
    async with gateway_for(fake.url, model, store, http={"strict": True}) as gateway:
        session_id = await gateway.create()
        for effort in ("none", "low", "xhigh", None):
            reply = await gateway.chat(session_id, [USER], reasoning_effort=effort)
            text = TOKENIZER.decode(fake.requests[-1].input_ids, skip_special_tokens=False)
            assert text.endswith(f"<|im_start|>assistant {effort or 'any'}\n")
            assert "ignored_fields" not in reply["tokentape"]
        assert "resampled" not in (await gateway.show(session_id))["branch_reasons"]


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
async def test_effort_of_a_template_with_a_switch(
    fake: FakeSGLang, tmp_path: Path, store: Path, name: str
) -> None:
    model = model_with(tmp_path, THINKING, f"{name} is defined and not {name}")
    async with gateway_for(fake.url, model, store, http={"strict": True}) as gateway:
        session_id = await gateway.create()
        for effort, closed in (("none", True), ("minimal", False), ("high", False)):
            reply = await gateway.chat(session_id, [USER], reasoning_effort=effort)
            text = TOKENIZER.decode(fake.requests[-1].input_ids, skip_special_tokens=False)
            assert text.endswith("<think>\n\n</think>\n\n") == closed
            assert "ignored_fields" not in reply["tokentape"]


async def test_effort_of_a_template_that_cannot_be_told(
    fake: FakeSGLang, tmp_path: Path, store: Path
) -> None:
    """Ignored and recorded; refused where nothing may be ignored."""
    model = model_with(tmp_path, THINKING, "false")
    async with gateway_for(fake.url, model, store) as gateway:
        session_id = await gateway.create()
        reply = await gateway.chat(session_id, [USER], reasoning_effort="low", user="me")
        assert reply["tokentape"]["ignored_fields"] == ["reasoning_effort", "user"]
        plain = await gateway.chat(session_id, [USER], reasoning_effort=None)
        assert "ignored_fields" not in plain["tokentape"]
        assert (await gateway.show(session_id))["branch_reasons"] == {"root": 1, "resampled": 1}
    strict = store.with_name("strict")
    async with gateway_for(fake.url, model, strict, http={"strict": True}) as gateway:
        session_id = await gateway.create()
        answer = await gateway.post(session_id, {"messages": [USER], "reasoning_effort": "low"})
        assert (answer.status, answer.error["param"]) == (400, "reasoning_effort")
        assert "--strict" in answer.error["message"]
        assert len(fake.requests) == 2


async def test_effort_and_template_arguments_that_disagree(fake: FakeSGLang, gateway: Gateway) -> None:
    """What is said to the template itself holds, and the other is recorded as without effect."""
    session_id = await gateway.create()
    kwargs = {"enable_thinking": False}
    reply = await gateway.chat(session_id, [USER], reasoning_effort="high", chat_template_kwargs=kwargs)
    assert reply["tokentape"]["ignored_fields"] == ["reasoning_effort"]
    text = TOKENIZER.decode(fake.requests[-1].input_ids, skip_special_tokens=False)
    assert text.endswith("<think>\n\n</think>\n\n")
    reply = await gateway.chat(session_id, [USER], reasoning_effort="none", chat_template_kwargs=kwargs)
    assert "ignored_fields" not in reply["tokentape"]


def test_the_stop_token_of_these_tests() -> None:
    assert TOKENIZER.id_to_token(END) == "<|im_end|>"
