"""Every field of a request: what it does, or why it is refused, or that it was ignored."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from responseskit import CLOCK, PATCH, TEAM, WEATHER, Items, check, post, prompt_of, respond, results, user

from gatewaykit import Gateway, Json, call, gateway_for, sampled
from tokentape.gateway.responses.request import HONOURED, REFUSED
from tokentape.testing import FakeSGLang

TOOLS: Json = {"tools": [WEATHER, CLOCK]}

# field → (value, what must show of it: the engine's sampling parameter, or the response's field)
SHOWN: dict[str, tuple[Any, Json, Json]] = {
    "model": ("other", {}, {"model": "other"}),
    "stream": (False, {}, {}),
    "store": (False, {}, {"store": False}),
    "metadata": ({"a": "b"}, {}, {"metadata": {"a": "b"}}),
    "instructions": ("the tool", {}, {"instructions": "the tool"}),
    "max_output_tokens": (33, {"max_new_tokens": 33}, {"max_output_tokens": 33}),
    "tools": ([WEATHER], {}, {"tools": [WEATHER]}),
    "tool_choice": ("none", {}, {"tool_choice": "none"}),
    "parallel_tool_calls": (False, {}, {"parallel_tool_calls": False}),
    "text": ({"format": {"type": "text"}}, {}, {"text": {"format": {"type": "text"}}}),
    "reasoning": ({"summary": "auto"}, {}, {"reasoning": {"effort": None, "summary": "auto"}}),
    "truncation": ("disabled", {}, {"truncation": "disabled"}),
    "include": (["reasoning.encrypted_content", "code_interpreter_call.outputs"], {}, {}),
    "temperature": (0.5, {"temperature": 0.5}, {"temperature": 0.5}),
    "top_p": (0.5, {"top_p": 0.5}, {"top_p": 0.5}),
    "top_k": (5, {"top_k": 5}, {}),
    "min_p": (0.1, {"min_p": 0.1}, {}),
    "stop": (["x"], {"stop": ["x"]}, {}),
    "stop_token_ids": ([5], {"stop_token_ids": [5]}, {}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}, {}),
    "presence_penalty": (0.5, {"presence_penalty": 0.5}, {}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}, {}),
    "seed": (7, {"sampling_seed": 7}, {}),
    "logit_bias": ({"5": 1.0}, {"logit_bias": {"5": 1.0}}, {}),
    "chat_template_kwargs": ({"a": 1}, {}, {}),
    "return_token_ids": (True, {}, {}),
}


def test_every_honoured_field_is_tried() -> None:
    assert set(SHOWN) | {"input", "previous_response_id"} == set(HONOURED)


@pytest.mark.parametrize("name", SHOWN)
async def test_honoured(fake: FakeSGLang, gateway: Gateway, name: str) -> None:
    value, engine, shown = SHOWN[name]
    fake.script(sampled("hello"), sampled("hello"))
    session = await gateway.create()
    response = await respond(gateway, session, "hello", **{name: value})
    params = fake.requests[0].sampling_params
    assert {key: params.get(key) for key in engine} == engine
    assert {key: response[key] for key in shown} == shown
    assert "ignored_fields" not in response["tokentape"]
    await respond(gateway, session, "hello", **{name: None})  # null is "not given"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input", 5),
        ("input", []),
        ("input", ""),
        ("input", [5]),
        ("instructions", ["hello"]),
        ("max_output_tokens", 0),
        ("temperature", -1),
        ("tools", {}),
        ("tools", [{"type": "function"}]),
        ("tools", [WEATHER, WEATHER]),
        ("tools", [{**WEATHER, "defer_loading": True}]),
        ("tools", [{"type": "custom"}]),
        ("tools", [{"type": "namespace", "name": "a", "tools": [{"type": "web_search"}]}]),
        ("tools", [{"type": "namespace", "tools": []}]),
        ("tool_choice", "any"),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "name": "nothing"}),
        ("tool_choice", {"type": "web_search"}),
        ("tool_choice", {"type": "allowed_tools", "mode": "required", "tools": []}),
        ("text", {"format": {"type": "json_schema"}}),
        ("text", {"format": {"type": "xml"}}),
        ("reasoning", {"effort": "most"}),
        ("truncation", "left"),
        ("include", ["everything"]),
        ("include", ["message.output_text.logprobs"]),
        ("metadata", {"a": 1}),
        ("previous_response_id", "resp_000000000000000000000000"),
        ("chat_template_kwargs", {"messages": []}),
    ],
)
async def test_values_that_cannot_be_used(fake: FakeSGLang, gateway: Gateway, name: str, value: Any) -> None:
    answer = await post(gateway, await gateway.create(), {"input": "hello", name: value})
    assert answer.status == (404 if name == "previous_response_id" else 400)
    assert (answer.error["param"] or "").startswith(name), answer.error
    assert not fake.requests


@pytest.mark.parametrize(
    "kind",
    [
        *("web_search", "web_search_preview", "file_search", "computer_use_preview", "code_interpreter"),
        *("image_generation", "mcp", "local_shell", "shell", "apply_patch", "tool_search"),
    ],
)
async def test_hosted_tools_are_refused(gateway: Gateway, kind: str) -> None:
    tools = [WEATHER, {"type": kind, "server_label": "a"}]
    answer = await post(gateway, await gateway.create(), {"input": "hello", "tools": tools})
    assert answer.status == 400
    assert answer.error["param"] == "tools[1].type"
    assert kind in answer.error["message"]
    assert "Remove it" in answer.error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("background", True),
        ("conversation", "conv_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("context_management", [{"type": "compaction"}]),
        ("top_logprobs", 2),
        ("moderation", {"model": "a"}),
        ("n", 2),
    ],
)
async def test_refused(gateway: Gateway, name: str, value: Any) -> None:
    answer = await post(gateway, await gateway.create(), {"input": "hello", name: value})
    assert (answer.status, answer.error["param"]) == (400, name)


async def test_what_asks_for_nothing_is_not_refused(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(sampled("hello"), sampled("hello"))
    session = await gateway.create()
    harmless = {name: value for name, (value, _) in REFUSED.items()}
    assert set(harmless) == {
        *("background", "conversation", "prompt", "context_management", "top_logprobs", "moderation", "n")
    }
    response = await respond(gateway, session, "hello", **harmless)
    assert "ignored_fields" not in response["tokentape"]
    await respond(gateway, session, "hello", **dict.fromkeys(REFUSED))


def _renamed(fields: Json) -> Json:
    return {"input_" if name == "input" else name: value for name, value in fields.items()}


IGNORED: list[tuple[str, Json]] = [
    ("prompt_cache_key", {"prompt_cache_key": "a"}),
    ("safety_identifier", {"safety_identifier": "a"}),
    ("user", {"user": "a"}),
    ("service_tier", {"service_tier": "flex"}),
    ("client_metadata", {"client_metadata": {"a": "b"}}),
    ("max_tool_calls", {"max_tool_calls": 3}),
    ("stream_options", {"stream_options": {"include_obfuscation": True}}),
    ("truncation", {"truncation": "auto"}),
    ("text.verbosity", {"text": {"verbosity": "low"}}),
    ("reasoning.context", {"reasoning": {"context": "all_turns"}}),
    ("reasoning.mode", {"reasoning": {"mode": "pro"}}),
    ("anything", {"anything": 1}),
    ("reasoning.x", {"reasoning": {"x": 1}}),
    ("text.format.x", {"text": {"format": {"type": "text", "x": 1}}}),
    ("tools[].x", {"tools": [{**WEATHER, "x": 1}]}),
    ("input[].x", {"input": [{**user("hello"), "x": 1}]}),
    (
        "input[].content[].annotations",
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "annotations": [1]}]}]},
    ),
    (
        "text.format",
        {**TOOLS, "tool_choice": "required", "text": {"format": {"type": "json_object"}}},
    ),
    (
        "reasoning.effort",
        {"reasoning": {"effort": "low"}, "chat_template_kwargs": {"enable_thinking": False}},
    ),
]


@pytest.mark.parametrize(("name", "fields"), IGNORED, ids=[name for name, _ in IGNORED])
async def test_ignored_and_recorded(fake: FakeSGLang, gateway: Gateway, name: str, fields: Json) -> None:
    fake.script(sampled("hello"))
    response = await respond(gateway, await gateway.create(), **{"input_": "hello"} | _renamed(fields))
    assert response["tokentape"]["ignored_fields"] == [name]


@pytest.mark.parametrize(("name", "fields"), IGNORED, ids=[name for name, _ in IGNORED])
async def test_strict_refuses_what_it_would_ignore(strict: Gateway, name: str, fields: Json) -> None:
    answer = await post(strict, await strict.create(), {"input": "hello", **fields})
    assert (answer.status, answer.error["param"]) == (400, name)


async def test_a_demanded_call(fake: FakeSGLang, gateway: Gateway) -> None:
    session = await gateway.create()
    tools = [WEATHER, CLOCK, PATCH, TEAM]
    choices: list[tuple[Any, set[str]]] = [
        ("required", {"weather", "clock", "apply_patch", "team__ask"}),
        ({"type": "function", "name": "clock"}, {"clock"}),
        ({"type": "custom", "name": "apply_patch"}, {"apply_patch"}),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "clock"}, {"type": "custom", "name": "apply_patch"}],
            },
            {"clock", "apply_patch"},
        ),
    ]
    for choice, names in choices:
        fake.script(sampled(call("clock", {})))
        response = await respond(gateway, session, "hello", tools=tools, tool_choice=choice)
        assert response["tool_choice"] == choice
        tag = fake.requests[-1].sampling_params["structural_tag"]
        offered = {name for name in ("weather", "clock", "apply_patch", "team__ask") if f'"{name}\\"' in tag}
        offered |= {
            name for name in ("weather", "clock", "apply_patch", "team__ask") if f'\\"{name}\\"' in tag
        }
        assert offered == names


async def test_allowed_tools_in_mode_auto_must_be_all(fake: FakeSGLang, gateway: Gateway) -> None:
    session = await gateway.create()
    named = [{"type": "function", "name": name} for name in ("weather", "clock")]
    some = {"type": "allowed_tools", "mode": "auto", "tools": named[:1]}
    answer = await post(gateway, session, {"input": "hello", **TOOLS, "tool_choice": some})
    assert (answer.status, answer.error["param"]) == (400, "tool_choice")
    fake.script(sampled("hello"))
    await respond(gateway, session, "hello", **TOOLS, tool_choice={**some, "tools": named})


async def test_no_calls_where_none_are_wanted(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(sampled(call("clock", {})))
    response = await respond(gateway, await gateway.create(), "hello", **TOOLS, tool_choice="none")
    assert [item["type"] for item in response["output"]] == ["message"]


async def test_one_call_at_a_time(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(sampled(call("clock", {})))
    await respond(gateway, await gateway.create(), "hello", **TOOLS, parallel_tool_calls=False)
    assert fake.requests[0].sampling_params["stop"] == ["</tool_call>"]


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
async def test_json(fake: FakeSGLang, gateway: Gateway, kind: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    format_: Json = {"type": kind}
    if kind == "json_schema":
        format_ |= {"name": "a", "schema": schema, "strict": True}
    fake.script(sampled('{"a": "hello"}'))
    response = await respond(gateway, await gateway.create(), "hello", text={"format": format_})
    params = json.dumps(fake.requests[0].sampling_params)
    assert ("properties" in params) == (kind == "json_schema")
    assert "json_schema" in params
    assert response["text"]["format"] == format_


@pytest.mark.parametrize(
    "item",
    [
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "computer_call_output", "call_id": "c", "output": {"type": "x"}},
        {"type": "compaction", "id": "c", "encrypted_content": "x"},
        {"type": "tool_search_call"},
    ],
)
async def test_other_items_are_refused(gateway: Gateway, item: Json) -> None:
    answer = await post(gateway, await gateway.create(), {"input": [user("hello"), item]})
    assert answer.status == 400
    assert answer.error["param"].startswith("input[1]")


@pytest.mark.parametrize(
    ("item", "param"),
    [
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            "input[0].content[0].type",
        ),
        ({"role": "user", "content": [{"type": "input_file"}]}, "input[0].content[0].type"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0]"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "tool", "content": "a"}, "input[0].role"),
        ({"type": "function_call", "name": "a", "arguments": "{}"}, "input[0].call_id"),
        ({"type": "function_call", "call_id": "a", "arguments": "{}"}, "input[0].name"),
        ({"type": "function_call", "call_id": "a", "name": "a", "arguments": {}}, "input[0]"),
        (
            {"type": "function_call", "call_id": "a", "name": "a", "arguments": '{"a": "\\uD800"}'},
            "input[0]",
        ),
        ({"type": "custom_tool_call", "call_id": "a", "name": "a"}, "input[0].input"),
        ({"type": "function_call_output", "call_id": "a"}, "input[0].output"),
        ({"type": "function_call_output", "call_id": "a", "output": "b"}, "input[0].call_id"),
        ({"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}, "input[0].encrypted_content"),
        ({"type": "reasoning", "summary": [], "encrypted_content": "tt1.?"}, "input[0].encrypted_content"),
        ({"type": "item_reference", "id": "msg_000000000000000000000000_0"}, "input[0].id"),
        ({"id": "nothing"}, "input[0].id"),
    ],
)
async def test_items_that_cannot_be_used(gateway: Gateway, item: Json, param: str) -> None:
    answer = await post(gateway, await gateway.create(), {"input": [item]})
    assert answer.status == (404 if param.endswith(".id") else 400)
    assert answer.error["param"] == param


async def test_effort_reaches_the_template(fake: FakeSGLang, gateway: Gateway) -> None:
    agent = Items(gateway, await gateway.create())
    fake.script(sampled("hello"), sampled("hello"))
    await agent.turn(user("hello"))
    response = await agent.turn(user("hello"), reasoning={"effort": "none"})
    assert "ignored_fields" not in response["tokentape"]
    samples = await check(fake, gateway, agent.session_id, num_turns=2, num_samples=2)
    assert samples[1]["branch_reason"] == "template_arguments_changed"


async def test_effort_that_a_template_cannot_be_told(
    fake: FakeSGLang, model_dir: Path, tmp_path: Path, store: Path
) -> None:
    plain = shutil.copytree(model_dir, tmp_path / "plain")
    template = plain / "chat_template.jinja"
    template.write_text(template.read_text().replace("enable_thinking", "nothing_of_the_sort"))
    fields: Json = {"reasoning": {"effort": "low"}}
    fake.script(sampled("hello"))
    async with gateway_for(fake.url, plain, store) as gateway:
        response = await respond(gateway, await gateway.create(), "hello", **fields)
        assert response["tokentape"]["ignored_fields"] == ["reasoning.effort"]
    async with gateway_for(fake.url, plain, store, http={"strict": True}) as gateway:
        answer = await post(gateway, await gateway.create(), {"input": "hello", **fields})
        assert (answer.status, answer.error["param"]) == (400, "reasoning.effort")


async def test_return_token_ids(fake: FakeSGLang, gateway: Gateway) -> None:
    for stream in (False, True):
        fake.script(sampled("hello", seed=3))
        session = await gateway.create()
        response = await respond(gateway, session, "hello", return_token_ids=True, stream=stream)
        tape = response["tokentape"]
        assert tape["prompt_ids"] == fake.requests[-1].input_ids
        assert tape["completion_ids"] == fake.requests[-1].output_ids
        assert len(tape["logprobs"]) == len(tape["completion_ids"])
        assert response["id"] == "resp_" + tape["turn_id"].removeprefix("t-")


async def test_usage(fake: FakeSGLang, gateway: Gateway) -> None:
    """Reasoning is counted in sampled tokens, to the last of its characters."""
    fake.script(sampled("<think>\nthe user\n</think>\n\nhello", seed=1), sampled("hello"))
    session = await gateway.create()
    response = await respond(gateway, session, "hello")
    usage = response["usage"]
    assert usage["input_tokens"] == len(fake.requests[0].input_ids)
    assert usage["output_tokens"] == len(fake.requests[0].output_ids)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert fake.tokenizer is not None
    count = usage["output_tokens_details"]["reasoning_tokens"]
    said = fake.tokenizer.decode(fake.requests[0].output_ids[:count], skip_special_tokens=False)
    assert said == "<think>\nthe user"
    response = await respond(gateway, session, "hello")
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
    assert response["usage"]["input_tokens_details"]["cached_tokens"] > 0


async def test_results_of_calls_under_other_ids(fake: FakeSGLang, gateway: Gateway) -> None:
    agent = Items(gateway, await gateway.create(), TOOLS)
    fake.script(sampled(call("clock", {}) + call("weather", {"city": "hello"})), sampled("the end"))
    response = await agent.turn(user("hello"))
    said = json.dumps([*agent.items, *results(response["output"])])
    renamed = json.loads(re.sub(r"call_(?=[0-9a-f]{24})", "renamed_", said))
    agent.items = [{k: v for k, v in item.items() if k != "id"} for item in renamed]
    await agent.turn()
    await check(fake, gateway, agent.session_id, num_turns=2)
    assert "sunny 1" in prompt_of(fake)
