"""Messages: every field of a request is honoured, refused, or ignored and recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
from messageskit import (
    CLOCK,
    TOOLS,
    USER,
    WEATHER,
    Agent,
    body_of,
    both_ways,
    error_of,
    origins,
    post,
    refused,
    say,
    text,
)

from gatewaykit import Gateway, Json, call, gateway_for, sampled
from tokentape.gateway.messages.request import HONOURED, REFUSED
from tokentape.testing import FakeSGLang, write_model_dir

SCHEMA: Json = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OUTPUT: Json = {"type": "json_schema", "schema": SCHEMA}

# -- honoured: field, value, what the engine must be sent

TO_ENGINE: list[tuple[Json, Json]] = [
    ({}, {}),
    ({"max_tokens": 7}, {"max_new_tokens": 7}),
    ({"max_tokens": 10**6}, {"max_new_tokens": 10**6}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 1.0}, {"temperature": 1.0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 20}, {"top_k": 20}),
    ({"stop_sequences": ["x", "y"]}, {"stop": ["x", "y"]}),
    ({"min_p": 0.05}, {"min_p": 0.05}),
    ({"stop_token_ids": [5, 6]}, {"stop_token_ids": [5, 6]}),
    ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
    ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"seed": 42}, {"sampling_seed": 42}),
    ({"logit_bias": {"7": 1.5}}, {"logit_bias": {"7": 1.5}}),
    (
        dict.fromkeys(("temperature", "top_p", "stop_sequences", "tools", "tool_choice", "stream", "system")),
        {},
    ),
]


@both_ways
@pytest.mark.parametrize(("fields", "params"), TO_ENGINE, ids=lambda v: json.dumps(v)[:40])
async def test_honoured(fake: FakeSGLang, gateway: Gateway, fields: Json, params: Json, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(sampled("hello"))
    await say(gateway, session_id, [USER], **{**fields, "stream": stream})
    [request] = fake.requests
    room = fake.context_length - len(request.input_ids)
    max_new_tokens = min(params.get("max_new_tokens", 500), room)
    assert request.sampling_params == {**params, "max_new_tokens": max_new_tokens}
    assert request.stream is stream


def test_every_honoured_field_has_a_test() -> None:
    sampling = {name for fields, _ in TO_ENGINE for name in fields}
    shown = {"messages", "model", "thinking", "output_config", "output_format", "chat_template_kwargs"}
    noted = {"metadata", "cache_control", "context_management", "return_token_ids"}
    assert set(HONOURED) == sampling | shown | noted


@pytest.mark.parametrize("name", ["max_tokens", "messages"])
async def test_required(gateway: Gateway, name: str) -> None:
    body = body_of([USER])
    del body[name]
    assert f"`{name}`" in await refused(gateway, await gateway.create(), body)


async def test_the_model_is_echoed(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(sampled("a"), sampled("b"))
    assert (await say(gateway, session_id, [USER], model="claude-sonnet-4-5"))["model"] == "claude-sonnet-4-5"
    body = body_of([USER])
    del body["model"]
    assert (await post(gateway, session_id, body)).body["model"] == "policy"


async def test_session_defaults(fake: FakeSGLang, gateway: Gateway) -> None:
    sampling = {"temperature": 0.5, "stop": ["x"], "max_tokens": 50}
    session_id = await gateway.create(sampling=sampling)
    await say(gateway, session_id, [USER])
    await say(gateway, session_id, [USER], stop_sequences=["y"], temperature=1)
    first, second = (r.sampling_params for r in fake.requests)
    assert first == {"temperature": 0.5, "stop": ["x"], "max_new_tokens": 500}
    assert second == {"temperature": 1.0, "stop": ["y"], "max_new_tokens": 500}


# -- tools


@pytest.mark.parametrize(
    ("choice", "offered", "demanded", "single"),
    [
        (None, True, (), False),
        ({"type": "auto"}, True, (), False),
        ({"type": "auto", "disable_parallel_tool_use": True}, True, (), True),
        ({"type": "none"}, False, (), False),
        ({"type": "any"}, True, ("weather", "clock"), False),
        ({"type": "tool", "name": "clock"}, True, ("clock",), False),
        ({"type": "tool", "name": "clock", "disable_parallel_tool_use": True}, True, ("clock",), True),
    ],
    ids=str,
)
@both_ways
async def test_tool_choice(
    fake: FakeSGLang,
    gateway: Gateway,
    choice: Json | None,
    offered: bool,
    demanded: tuple[str, ...],
    single: bool,
    stream: bool,
) -> None:
    session_id = await gateway.create()
    fake.script(sampled(call("clock", {})))
    reply = await say(gateway, session_id, [USER], tools=TOOLS, tool_choice=choice, stream=stream)
    assert reply["stop_reason"] == ("tool_use" if offered else "end_turn")
    params = fake.requests[0].sampling_params
    assert params.get("stop") == (["</tool_call>"] if single else None)
    constraint = params.get("structural_tag", "")
    assert tuple(name for name in ("weather", "clock") if name in constraint) == demanded
    assert bool(constraint) == bool(demanded)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": {"type": "any"}}, "there are no `tools`"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": TOOLS}, "'x' is none of `tools`"),
        ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "`tool_choice.name` is missing"),
        ({"tool_choice": {"type": "other"}, "tools": TOOLS}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name: tools must have names, each its own"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema is missing"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name is missing"),
        ({"tools": [{**CLOCK, "name": ""}]}, "tools[0].name"),
        ({"tools": [{**CLOCK, "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [{**CLOCK, "description": 1}]}, "tools[0].description"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tools": [CLOCK, {"type": "bash_20250124", "name": "bash"}]}, "tools[1]: tools of type"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools of type 'function'"),
        ({"tools": [{**CLOCK, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{**CLOCK, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers"),
        ({"tools": {}}, "`tools`"),
    ],
    ids=str,
)
async def test_tools_refused(gateway: Gateway, fields: Json, said: str) -> None:
    assert said in await refused(gateway, await gateway.create(), body_of([USER], **fields))


async def test_tools_reach_the_prompt(fake: FakeSGLang, gateway: Gateway) -> None:
    """As OpenAI's dicts, whatever the wire: the same tools are the same frame."""
    session_id = await gateway.create()
    openai = [
        {
            "type": "function",
            "function": {"parameters" if k == "input_schema" else k: v for k, v in tool.items()},
        }
        for tool in TOOLS
    ]
    fake.script(sampled("hello"), sampled("hello"))
    await say(gateway, session_id, [USER], tools=TOOLS)
    await gateway.chat(session_id, [USER], tools=openai)
    ours, theirs = fake.requests
    assert ours.input_ids == theirs.input_ids
    samples = await gateway.samples(session_id)
    assert [s["branch_reason"] for s in samples] == ["root", "resampled"]


# -- thinking, effort, output


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {}),
        ({"thinking": {"type": "enabled", "budget_tokens": 31999}}, {"enable_thinking": True}),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"output_config": {"effort": "high"}}, {}),
        (
            {"thinking": {"type": "adaptive"}, "chat_template_kwargs": {"enable_thinking": False, "x": 1}},
            {"enable_thinking": False, "x": 1},
        ),
    ],
    ids=str,
)
async def test_template_arguments(
    gateway: Gateway, fake: FakeSGLang, store: Path, fields: Json, arguments: Json
) -> None:
    fake.script(sampled("hello"))
    session_id = await gateway.create()
    reply = await say(gateway, session_id, [USER], **fields)
    closed = "<think>\n\n</think>" in fake.tokenizer.decode(  # pyright: ignore[reportOptionalMemberAccess]
        fake.requests[0].input_ids, skip_special_tokens=False
    )
    assert closed == (arguments.get("enable_thinking") is False)
    expected = ["thinking.budget_tokens"] if "budget_tokens" in fields.get("thinking", {}) else []
    expected += ["output_config.effort"] if "output_config" in fields else []
    expected += ["thinking"] if "chat_template_kwargs" in fields else []  # it says otherwise
    assert reply["tokentape"].get("ignored_fields", []) == expected
    await say(gateway, session_id, [USER], chat_template_kwargs=arguments)
    reasons = [s["branch_reason"] for s in await gateway.samples(session_id)]
    assert reasons == ["root", "resampled"]  # the same arguments, said otherwise


async def test_a_template_with_an_effort(fake: FakeSGLang, tmp_path: Path, store: Path) -> None:
    model = write_model_dir(tmp_path / "model")
    template = model / "chat_template.jinja"
    tail = "{%- if add_generation_prompt %}"
    shown = "{{- '<|im_start|>' + (reasoning_effort | default('none')) + '<|im_end|>\\n' }}"
    template.write_text(
        template.read_text().replace(tail, shown + tail).replace("enable_thinking", "nothing")
    )
    async with gateway_for(fake.url, model, store) as gateway:
        session_id = await gateway.create()
        fake.script(sampled("hello"))
        reply = await say(
            gateway,
            session_id,
            [USER],
            thinking={"type": "adaptive"},
            output_config={"effort": "xhigh", "task_budget": {"type": "tokens", "total": 5}},
        )
        assert fake.tokenizer is not None
        prompt = fake.tokenizer.decode(fake.requests[0].input_ids, skip_special_tokens=False)
        assert "<|im_start|>xhigh<|im_end|>" in prompt
        assert reply["tokentape"]["ignored_fields"] == ["output_config.task_budget", "thinking"]


@pytest.mark.parametrize(
    "fields",
    [
        {"output_config": {"format": OUTPUT}},
        {"output_format": OUTPUT},
        {"output_config": {"format": OUTPUT}, "output_format": OUTPUT},
    ],
    ids=["config", "format", "both"],
)
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["alone", "tools"])
async def test_structured_output(fake: FakeSGLang, gateway: Gateway, fields: Json, tools: list[Json]) -> None:
    session_id = await gateway.create()
    fake.script(sampled('{"a": 1}'))
    reply = await say(gateway, session_id, [USER], tools=tools, **fields)
    assert reply["content"] == [text('{"a": 1}')]
    constraint = fake.requests[0].sampling_params["structural_tag"]
    assert '"required": ["a"]' in constraint
    assert ("weather" in constraint) == bool(tools)


async def test_reserved_template_arguments(gateway: Gateway) -> None:
    body = body_of([USER], chat_template_kwargs={"messages": []})
    assert "chat_template_kwargs.messages" in await refused(gateway, await gateway.create(), body)


# -- refused

WRONG: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", "7"),
    ("temperature", 1.1),
    ("temperature", -0.1),
    ("top_p", 0),
    ("top_k", 0),
    ("stop_sequences", "x"),
    ("stop_sequences", [""]),
    ("stream", "yes"),
    ("system", 5),
    ("metadata", []),
    ("thinking", {"type": "between_tools"}),
    ("thinking", {"type": "enabled", "budget_tokens": 0}),
    ("output_config", {"effort": "extreme"}),
    ("output_config", {"format": {"type": "text"}}),
    ("output_config", {"format": {"type": "json_schema"}}),
    ("messages", []),
    ("messages", {}),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
async def test_wrong_values(gateway: Gateway, fake: FakeSGLang, name: str, value: Any) -> None:
    session_id = await gateway.create()
    assert f"`{name}" in await refused(gateway, session_id, {**body_of([USER]), name: value})
    assert not fake.requests
    assert (await gateway.show(session_id))["turns"] == 0


REFUSED_VALUES: dict[str, Any] = {
    "container": "container_1",
    "mcp_servers": [{"type": "url", "url": "x", "name": "x"}],
    "compaction": {"type": "auto"},
    "thread": {"type": "create"},
    "n": 2,
    "stop": ["x"],
    "response_format": {"type": "json_object"},
}


async def test_every_refused_field_has_a_test() -> None:
    assert set(REFUSED_VALUES) == set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
async def test_refused(fake: FakeSGLang, gateway: Gateway, name: str) -> None:
    session_id = await gateway.create()
    body = body_of([USER], **{name: REFUSED_VALUES[name]})
    assert f"`{name}` is not supported here" in await refused(gateway, session_id, body)
    fake.script(sampled("hello"))
    await say(gateway, session_id, [USER], **{name: REFUSED[name][0]})  # what asks for nothing is harmless


async def test_two_schemas(gateway: Gateway) -> None:
    body = body_of([USER], output_config={"format": OUTPUT}, output_format={**OUTPUT, "schema": {}})
    assert "differ" in await refused(gateway, await gateway.create(), body)


# -- ignored and recorded

IGNORED: dict[str, Any] = {
    "service_tier": "auto",
    "inference_geo": "us",
    "speed": "fast",
    "fallbacks": ["x"],
    "diagnostics": {},
    "user_profile_id": "x",
    "betas": ["x"],
    "logprobs": True,
    "unheard_of": None,
}
IGNORED_PARTS: list[tuple[Json, str]] = [
    ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ({"output_config": {"effort": "low"}}, "output_config.effort"),
    ({"output_config": {"task_budget": {"total": 5}}}, "output_config.task_budget"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
    ({"tools": [{**CLOCK, "strict": True}, {**WEATHER, "strict": True}]}, "tools[].strict"),
    ({"tools": [{**CLOCK, "input_examples": [{}]}]}, "tools[].input_examples"),
    ({"tools": [{**CLOCK, "eager_input_streaming": True}]}, "tools[].eager_input_streaming"),
    ({"thinking": {"type": "disabled", "x": 1}}, "thinking.x"),
    ({"tool_choice": {"type": "any"}, "tools": [CLOCK], "output_format": OUTPUT}, "output_format"),
    (
        {"tool_choice": {"type": "any"}, "tools": [CLOCK], "output_config": {"format": OUTPUT}},
        "output_config.format",
    ),
    ({"messages": [{**USER, "x": 1}]}, "messages[].x"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "citations": [{}]}]}]},
        "messages[].content[].citations",
    ),
    ({"system": [{"type": "text", "text": "a", "x": 1}]}, "system[].x"),
]


@both_ways
async def test_ignored(fake: FakeSGLang, gateway: Gateway, store: Path, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(sampled("hello"), sampled("hello"))
    reply = await say(gateway, session_id, [USER], **IGNORED, stream=stream)
    assert reply["tokentape"]["ignored_fields"] == sorted(IGNORED)
    assert origins(store)[0]["ignored"] == sorted(IGNORED)
    plain = await say(gateway, session_id, [USER])
    assert "ignored_fields" not in plain["tokentape"]


@pytest.mark.parametrize(("fields", "name"), IGNORED_PARTS, ids=lambda v: v if isinstance(v, str) else "")
async def test_ignored_parts(fake: FakeSGLang, gateway: Gateway, fields: Json, name: str) -> None:
    fake.script(sampled("hello"))
    fields = dict(fields)
    reply = await say(gateway, await gateway.create(), fields.pop("messages", [USER]), **fields)
    assert reply["tokentape"]["ignored_fields"] == [name]


@pytest.mark.parametrize(
    ("fields", "name"), [*(({k: v}, k) for k, v in IGNORED.items()), *IGNORED_PARTS], ids=str
)
async def test_strict_refuses_what_is_ignored(strict: Gateway, fields: Json, name: str) -> None:
    fields = dict(fields)
    said = await refused(strict, await strict.create(), body_of(fields.pop("messages", [USER]), **fields))
    assert said == f"`{name}` has no effect here, and --strict refuses it: leave it out"


# -- noted: kept with the turn, without effect


async def test_noted(fake: FakeSGLang, strict: Gateway, store: Path) -> None:
    mark = {"type": "ephemeral"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("sunny", cache_control=mark)]}
    messages = [
        {"role": "user", "content": [text("hello"), text("world", cache_control={**mark, "ttl": "1h"})]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {}}],
        },
        {"role": "user", "content": [{**result, "cache_control": mark}]},
    ]
    body = body_of(
        messages,
        system=[text("the tool"), text('a "cache_control" of', cache_control=mark)],
        tools=[WEATHER, {**CLOCK, "cache_control": mark, "type": "custom"}],
        metadata={"user_id": "me"},
        cache_control=mark,
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-1, b-2,"}
    session_id = await strict.create()
    fake.script(sampled("hello"))
    answer = await post(strict, session_id, body, headers)
    assert answer.status == 200, answer
    assert answer.body["context_management"] == {"applied_edits": []}
    [origin] = origins(store)
    assert origin["wire"] == "messages"
    assert origin["noted"] == {
        "anthropic_version": "2023-06-01",
        "anthropic_beta": ["a-1", "b-2"],
        "metadata": {"user_id": "me"},
        "cache_control": {
            "cache_control": mark,
            "system[1]": mark,
            "tools[1]": mark,
            "messages[0].content[1]": {**mark, "ttl": "1h"},
            "messages[2].content[0]": mark,
            "messages[2].content[0].content[0]": mark,
        },
    }


async def test_nothing_to_note(fake: FakeSGLang, gateway: Gateway, store: Path) -> None:
    fake.script(sampled("hello"))
    await say(
        gateway, await gateway.create(), [{"role": "user", "content": 'a "cache_control" that is text'}]
    )
    assert "noted" not in origins(store)[0]


async def test_ids_on_request(fake: FakeSGLang, gateway: Gateway) -> None:
    agent = Agent(gateway, await gateway.create(), {"return_token_ids": True})
    fake.script(sampled("hello", seed=1), sampled("world", seed=2))
    for stream in (False, True):
        tape = (await agent.turn("hello", stream=stream))["tokentape"]
        assert tape["prompt_ids"] == fake.requests[-1].input_ids
        assert tape["completion_ids"] == fake.requests[-1].output_ids
        assert len(tape["logprobs"]) == tape["completion_tokens"]


# -- bodies that are no request


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": [', b"\xff", b'{"max_tokens": 1e999}'])
async def test_broken_bodies(gateway: Gateway, body: bytes) -> None:
    answer = await post(gateway, await gateway.create(), body)
    assert answer.status == 400
    assert error_of(answer.body)["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["tools", "messages", "chat_template_kwargs", "system"])
async def test_nested_without_end(gateway: Gateway, name: str) -> None:
    deep = "[" * 5000 + "]" * 5000
    values = {
        "tools": '[{"name": "a", "input_schema": {"a": DEEP}}]',
        "messages": '[{"role": "user", "content": [{"type": "text", "text": "a", "x": DEEP}]}]',
        "chat_template_kwargs": '{"a": DEEP}',
        "system": '[{"type": "text", "text": "a", "cache_control": DEEP}]',
    }
    body = json.dumps({k: v for k, v in body_of([USER]).items() if k != name})
    answer = await post(
        gateway,
        await gateway.create(),
        f'{body[:-1]}, "{name}": {values[name].replace("DEEP", deep)}}}'.encode(),
    )
    assert answer.status == 400, answer
