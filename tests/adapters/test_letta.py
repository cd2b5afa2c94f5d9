"""The Letta adapter against a fake SGLang: what Letta's own does, and what that gets wrong."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace as Object
from typing import Any

import pytest

pytest.importorskip("letta", reason="needs Letta: make letta")

from letta import errors as letta_errors
from letta.adapters.simple_llm_request_adapter import SimpleLLMRequestAdapter
from letta.schemas.letta_message_content import ReasoningContent, TextContent
from letta.schemas.letta_response import TurnTokenData
from letta.schemas.message import Message, ToolReturn
from letta.schemas.model import SGLangModelSettings
from lettakit import CONTEXT, adapter, as_before, invoke, llm_config, results_of, said_by

from gatewaykit import END, TOKENIZER, WEATHER, call, cut, sampled, split
from tokentape.adapters import letta as ours
from tokentape.testing import FakeSGLang, Fault, Reply, pseudo_logprob, write_model_dir

USER = {"role": "user", "content": "hello world"}
TOOLS = [WEATHER]
WEATHER_CALL = {"name": "weather", "arguments": '{"city": "A"}'}


# -- the interface


async def test_it_is_letta_s_adapter_by_name_and_kind(one: Any) -> None:
    assert type(one).__name__ == "SGLangNativeAdapter"
    assert isinstance(one, ours.SGLangNativeAdapter)
    assert isinstance(one, SimpleLLMRequestAdapter)
    assert one.supports_token_streaming() is False


async def test_a_call_yields_none_once_and_leaves_what_the_agent_reads(one: Any, fake: FakeSGLang) -> None:
    reply = sampled("Let me look.\n" + call("weather", {"city": "Oslo"}), seed=1)
    fake.script(reply)
    assert await invoke(one, [USER], TOOLS, temperature=0.5) == [None]
    assert one.content == [TextContent(text="Let me look.")]
    assert one.reasoning_content is None
    (made,) = one.tool_calls
    assert one.tool_call is made
    assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "Oslo"})
    assert made.id.startswith("call_")
    assert one.output_ids == list(reply.ids)
    assert one.output_token_logprobs == [
        [pytest.approx(pseudo_logprob(i, at), rel=1e-6), i, None] for at, i in enumerate(reply.ids)
    ]
    assert [t.token for t in one.logprobs.content] == [str(i) for i in reply.ids]
    assert one.finish_reason == "tool_calls"
    assert one.usage.step_count == 1
    assert one.usage.completion_tokens == len(reply.ids)
    assert one.usage.prompt_tokens == len(fake.requests[0].input_ids)
    assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
    assert one.usage.cached_input_tokens == 0
    response = one.chat_completions_response
    assert response.choices[0].message.content == "Let me look."
    assert response.usage.prompt_tokens == one.usage.prompt_tokens
    assert one.llm_request_finish_timestamp_ns > 0
    turn = TurnTokenData(  # as Letta's agent does
        role="assistant",
        output_ids=one.output_ids,
        output_token_logprobs=one.output_token_logprobs,
        content=response.choices[0].message.content,
    )
    assert turn.output_ids == list(reply.ids)
    assert one.prompt_ids == fake.requests[0].input_ids == one.bridge_ids


async def test_the_provider_trace_carries_every_new_token(one: Any, fake: FakeSGLang) -> None:
    traced: list[Any] = []
    one.log_provider_trace = lambda step_id, actor: traced.append((step_id, actor, one.response_data))
    fake.weight_version = "v7"
    fake.script(sampled(call("weather", {}), seed=1), sampled("hello", seed=2))
    await invoke(one, [USER], TOOLS)
    await invoke(one, [USER, said_by(one), *results_of(one)], TOOLS)
    tape: list[int] = []
    for _step, _actor, data in traced:
        new = data["tokentape"]
        tape += new["bridge_ids"] + new["completion_ids"]
    last = fake.requests[-1]
    assert tape == [*last.input_ids, *last.output_ids]
    new = traced[1][2]["tokentape"]
    assert new["weight_versions"] == [["v7", 0, len(one.output_ids)]]
    assert new["parent_turn_id"] == traced[0][2]["tokentape"]["turn_id"]
    assert new["stop_id"] == END
    json.dumps(traced[1][2])


async def test_prompt_is_the_template_s_with_tools_and_generation_prompt(one: Any, fake: FakeSGLang) -> None:
    await invoke(one, [{"role": "system", "content": "You are a tool."}, USER], TOOLS)
    text = TOKENIZER.decode(fake.requests[0].input_ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nYou are a tool.\n\n# Tools")
    assert '"name": "weather"' in text
    assert text.endswith("<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n")
    assert fake.requests[0].body["return_logprob"] is True


async def test_a_model_without_a_template_is_rendered_as_chatml(
    fake: FakeSGLang, tmp_path: Path, tapes: ours.Tapes
) -> None:
    bare = write_model_dir(tmp_path / "bare", tokenizer=TOKENIZER, context_length=CONTEXT)
    (bare / "chat_template.jinja").unlink()
    one = adapter(ours.SGLangNativeAdapter, llm_config(fake.url, bare))
    one.tapes = tapes
    fake.script(sampled("<think>\nhm\n</think>\n\n" + call("weather", {"city": "Oslo"}), seed=1))
    await invoke(one, [USER], TOOLS)
    text = TOKENIZER.decode(fake.requests[0].input_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n")
    assert "within <tool_call></tool_call> XML tags" in text
    assert one.tool_call.function.name == "weather"
    assert one.reasoning_content == [ReasoningContent(reasoning="hm", is_native=True)]


async def test_letta_s_request_data_has_the_last_word_over_its_messages(one: Any, fake: FakeSGLang) -> None:
    written = {"messages": [USER], "tools": TOOLS, "model": "x", "user": "u", "temperature": 0.1}
    messages = [Object(role="user", content="something else")]
    async for _ in one.invoke_llm(written, messages, [], False):
        pass
    text = TOKENIZER.decode(fake.requests[0].input_ids)
    assert "hello world" in text
    assert "something else" not in text
    assert "weather" in text


SAMPLING = {
    "nothing": ({}, {}),
    "temperature, top_p": (
        {"temperature": 0.7, "top_p": 0.5, "max_tokens": 9},
        {"temperature": 0.7, "top_p": 0.5, "max_new_tokens": 9},
    ),
    "the agent's own name": ({"max_completion_tokens": 11}, {"max_new_tokens": 11}),
    "stop, seed, top_k": (
        {"stop": ["world"], "seed": 3, "top_k": 5},
        {"stop": ["world"], "sampling_seed": 3, "top_k": 5},
    ),
    "penalties": (
        {"frequency_penalty": 0.5, "presence_penalty": 0.25},
        {"frequency_penalty": 0.5, "presence_penalty": 0.25},
    ),
    "extra_body": ({"extra_body": {"min_p": 0.1}}, {"min_p": 0.1}),
    "none is not given": ({"temperature": None, "max_tokens": None}, {}),
}


@pytest.mark.parametrize("name", SAMPLING)
async def test_sampling_is_what_was_asked_for(name: str, one: Any, fake: FakeSGLang) -> None:
    request, expected = SAMPLING[name]
    await invoke(one, [USER], **request)
    sent = dict(fake.requests[0].body["sampling_params"])
    if "max_new_tokens" not in expected:
        assert sent.pop("max_new_tokens") > 4096  # what fits, not somebody's default
    assert sent == expected


async def test_json_and_forced_calls_reach_the_engine(one: Any, fake: FakeSGLang) -> None:
    await invoke(one, [USER], response_format={"type": "json_object"})
    assert {"json_schema", "structural_tag"} & set(fake.requests[0].body["sampling_params"])
    await invoke(one, [USER], TOOLS, tool_choice="required")
    assert {"json_schema", "structural_tag"} & set(fake.requests[1].body["sampling_params"])
    fake.script(sampled(call("weather", {}), seed=1))
    await invoke(one, [USER], TOOLS, tool_choice="none")
    assert one.tool_calls == []


async def test_top_logprobs_arrive(one: Any, fake: FakeSGLang) -> None:
    await invoke(one, [USER], logprobs=True, top_logprobs=2)
    assert all(len(token.top_logprobs) == 2 for token in one.logprobs.content)


async def test_session_defaults_hold_where_letta_says_nothing(fake: FakeSGLang, model_dir: Path) -> None:
    with as_before():
        tapes = ours.install(sampling={"top_p": 0.25, "temperature": 0.5})
        one = adapter(ours.SGLangNativeAdapter, llm_config(fake.url, model_dir))
        one.tapes = tapes
        await invoke(one, [USER], temperature=1.0)
        sent = fake.requests[0].body["sampling_params"]
        assert (sent["temperature"], sent["top_p"]) == (1.0, 0.25)
        await tapes.aclose()


# -- what was sampled is what was said: text, calls, thoughts

SAID: dict[str, tuple[str, str | None, list[tuple[str, Any]], str]] = {
    "text": ("hello world", "hello world", [], "stop"),
    "nothing": ("", None, [], "stop"),
    "a call": (call("weather", {"city": "A"}), None, [("weather", {"city": "A"})], "tool_calls"),
    "text around calls": (
        "one\n" + call("weather", {"city": "A"}) + "\n" + call("weather", {"city": "B"}) + "\ntwo",
        "one\n\n\ntwo",
        [("weather", {"city": "A"}), ("weather", {"city": "B"})],
        "tool_calls",
    ),
    "a tag inside a string": (
        call("weather", '{"city": "a</tool_call>b"}'),
        None,
        [("weather", {"city": "a</tool_call>b"})],
        "tool_calls",
    ),
    "not JSON": (call("weather", '{"city": }'), call("weather", '{"city": }'), [], "stop"),
    "a list": (call("weather", "[1]"), call("weather", "[1]"), [], "stop"),
    "null": (call("weather", "null"), call("weather", "null"), [], "stop"),
    "a call in a thought": (
        "<think>\n" + call("weather", {"city": "A"}) + "\n</think>\n\nhello",
        "hello",
        [],
        "stop",
    ),
}


@pytest.mark.parametrize("name", SAID)
async def test_what_was_sampled_is_what_was_said(name: str, one: Any, fake: FakeSGLang) -> None:
    text, content, calls, finish_reason = SAID[name]
    fake.script(sampled(text, seed=5))
    await invoke(one, [USER], TOOLS)
    message = one.chat_completions_response.choices[0].message
    assert message.content == content
    assert [(c.function.name, json.loads(c.function.arguments)) for c in one.tool_calls] == calls
    assert len({c.id for c in one.tool_calls}) == len(calls)
    assert one.finish_reason == finish_reason
    if name == "a call in a thought":
        assert one.content[0] == ReasoningContent(reasoning=call("weather", {"city": "A"}), is_native=True)
    if name in ("not JSON", "a list", "null"):
        (attempt,) = one.reply.turn.attempts
        assert attempt["status"] != "ok"
        assert one.response_data["tokentape"]["parse"]["attempts"] == [attempt]


async def test_a_cut_after_a_complete_call_is_a_cut(one: Any, fake: FakeSGLang) -> None:
    fake.script(cut(call("weather", {"city": "A"}) + "\nhel", seed=1))
    await invoke(one, [USER], TOOLS)
    assert one.finish_reason == "length"
    assert len(one.tool_calls) == 1


async def test_letta_s_own_messages_are_written_as_letta_writes_them(one: Any, fake: FakeSGLang) -> None:
    calls = [{"id": i, "function": WEATHER_CALL, "type": "function"} for i in "ab"]
    returns = [ToolReturn(tool_call_id=i, status="success", func_response=f"{i} is sunny") for i in "ab"]
    history = [
        Message(role="system", content=[TextContent(text="You are a tool.")]),
        Message(role="user", content=[TextContent(text="hello world")]),
        Message(role="assistant", content=[TextContent(text="one")], tool_calls=calls),
        Message(
            role="tool", content=[TextContent(text="a is sunny")], tool_call_id="a", tool_returns=returns
        ),
    ]
    await invoke(one, history, TOOLS)
    text = TOKENIZER.decode(fake.requests[0].input_ids, skip_special_tokens=False)
    assert text.count('<tool_call>\n{"name": "weather", "arguments": {"city": "A"}}') == 2
    assert "<tool_response>\na is sunny\n</tool_response>\n<tool_response>\nb is sunny" in text


async def test_the_counts_are_logged(one: Any, fake: FakeSGLang, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(ours.logger, "info", lambda line, *values: lines.append(line % values))
    fake.script(sampled(call("weather", {"city": "A"})))
    await invoke(one, [USER], TOOLS)
    (line,) = lines
    assert f"{len(one.output_ids)} sampled, 1 tool calls, tool_calls, branch: root" in line


# -- failures

FAULTS = {
    "500": (Fault("status", status=500), letta_errors.LLMServerError),
    "aborted": (Fault("abort", after=2), letta_errors.LLMServerError),
    "reset": (Fault("disconnect"), letta_errors.LLMConnectionError),
    "ids that disagree": (Fault("shifted_ids"), letta_errors.LLMServerError),
    "a null log-probability": (Fault("logprob", value=None), letta_errors.LLMServerError),
    "no finish reason": (Fault("missing", field="meta_info.finish_reason"), letta_errors.LLMServerError),
    "not JSON": (Fault("not_json"), letta_errors.LLMServerError),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_failure_is_letta_s_error_and_leaves_nothing_stale(
    name: str, one: Any, fake: FakeSGLang, tapes: ours.Tapes
) -> None:
    fault, expected = FAULTS[name]
    fake.script(sampled(call("weather", {}), seed=1))
    await invoke(one, [USER], TOOLS)
    fake.script(fault)
    with pytest.raises(expected) as raised:
        await invoke(one, [USER, said_by(one), *results_of(one)], TOOLS)
    assert raised.value.__cause__.kind == raised.value.details["type"]
    stale = (one.output_ids, one.output_token_logprobs, one.content, one.tool_call, one.logprobs, one.reply)
    assert stale == (None,) * 6
    assert (one.tool_calls, one.finish_reason, one.usage.total_tokens) == ([], None, 0)
    (sample,) = await tapes.samples("agent-1")
    assert len(sample["turns"]) == 1


@pytest.mark.parametrize("known_to", ["the engine", "the model's configuration"])
async def test_context_overflow_is_what_letta_compacts_on(
    known_to: str, fake: FakeSGLang, tmp_path: Path, tapes: ours.Tapes
) -> None:
    fake.context_length = 64
    model = write_model_dir(
        tmp_path / "model", tokenizer=TOKENIZER, context_length=64 if known_to != "the engine" else CONTEXT
    )
    one = adapter(ours.SGLangNativeAdapter, llm_config(fake.url, model))
    one.tapes = tapes
    with pytest.raises(letta_errors.ContextWindowExceededError) as raised:
        await invoke(one, [{"role": "user", "content": "x" * 200}])
    assert not isinstance(raised.value, letta_errors.LLMError)


async def test_a_request_that_cannot_be_served_is_a_bad_request(one: Any) -> None:
    with pytest.raises(letta_errors.LLMBadRequestError, match="image"):
        await invoke(one, [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


async def test_a_model_that_is_not_there_is_a_configuration_error(
    fake: FakeSGLang, tapes: ours.Tapes
) -> None:
    one = adapter(ours.SGLangNativeAdapter, llm_config(fake.url, "/no/such/model"))
    one.tapes = tapes
    with pytest.raises(letta_errors.LettaConfigurationError, match="no such directory"):
        await invoke(one, [USER])


async def test_an_unknown_tool_call_parser_is_said(one: Any) -> None:
    one.model_settings = SGLangModelSettings(tool_call_parser="nonsense")
    with pytest.raises(letta_errors.LettaConfigurationError, match="nonsense"):
        await invoke(one, [USER])


async def test_what_may_pass_is_tried_again(fake: FakeSGLang, model_dir: Path) -> None:
    with as_before():
        tapes = ours.install(max_retries=1)
        one = adapter(ours.SGLangNativeAdapter, llm_config(fake.url, model_dir))
        one.tapes = tapes
        fake.script(Fault("abort", after=1), sampled("hello"))
        await invoke(one, [USER])
        assert one.content == [TextContent(text="hello")]
        (sample,) = await tapes.samples("agent-1")
        assert len(sample["turns"]) == 1
        await tapes.aclose()


async def test_a_cancelled_step_is_aborted_and_leaves_no_turn(
    one: Any, fake: FakeSGLang, tapes: ours.Tapes
) -> None:
    fake.script(Reply([*split("hello world " * 20), END], delay_s=0.2))
    task = asyncio.create_task(invoke(one, [USER]))
    while not fake.requests:  # noqa: ASYNC110  # the fake has no event for it
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(100):
        if fake.aborts:
            break
        await asyncio.sleep(0.02)
    assert fake.aborts
    assert await tapes.samples("agent-1") == []
    assert one.output_ids is None
