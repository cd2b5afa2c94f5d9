"""The real agent loop of Letta, its real messages and its database, with the adapter installed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("letta", reason="needs Letta: make letta")

from letta import errors as letta_errors
from letta.agents.letta_agent_v3 import LettaAgentV3
from letta.orm.errors import NoResultFound
from letta.schemas.letta_message_content import TextContent
from letta.schemas.message import Message, MessageCreate
from letta.schemas.run import Run
from lettakit import LettaServer, extends, letta_server, llm_config, remember, tell

from gatewaykit import cut, sampled
from tokentape.adapters import letta as ours
from tokentape.testing import FakeSGLang, Fault

# Letta's warnings are Letta's; its background tasks leave database connections behind. What the adapter
# itself would leave behind fails in test_letta.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LettaServer]:
    monkeypatch.setenv("HOME", str(tmp_path))
    async with letta_server(tmp_path) as server:
        yield server


# What the model says in a step with calls, and why Letta's own history would lose it.
FIRST = {
    "a call": [tell("is 30"), "hello"],
    "text before a call, which Letta scrubs": ["Let me see.\n" + tell("is 30"), "hello"],
    "unusual JSON, not ASCII": [
        '<tool_call>\n{"name":"send_message","arguments": {"content":"Zürich ☀" ,"label":"human"}}\n'
        "</tool_call>",
        "hello",
    ],
    "two calls, of which Letta runs one": [tell("is 30") + "\n" + tell("lives"), "hello"],
    "braces that Letta cuts at": [tell("a}{b"), "hello"],
    "a malformed call": ['<tool_call>\n{"name": "send_message", "arguments": {]\n</tool_call>'],
    "a thought": ["<think>\nhm\n</think>\n\n" + tell("is 30"), "<think>\nwell\n</think>\n\nhello"],
    "cut inside a thought": [cut("<think>\nwell hello")],
    "nothing at all": [""],
}


@pytest.mark.parametrize("reasoning", [True, False], ids=["reasoning", "reasoning off"])
@pytest.mark.parametrize("name", FIRST)
async def test_steps_extend_what_the_model_saw_and_sampled(
    name: str, reasoning: bool, server: LettaServer, fake: FakeSGLang, model_dir: Path, tapes: ours.Tapes
) -> None:
    off = {} if reasoning else {"enable_reasoner": False, "max_reasoning_tokens": 0}
    agent_id = await server.agent(llm_config(fake.url, model_dir, put_inner_thoughts_in_kwargs=False, **off))
    replies = [r if not isinstance(r, str) else sampled(r, seed=n) for n, r in enumerate(FIRST[name])]
    fake.script(*replies, sampled(tell("asks"), seed=7), sampled("hello world", seed=8))
    first = await server.step(agent_id, "hello")
    second = await server.step(agent_id, "and the world?")
    assert len(fake.requests) == len(replies) + 2
    assert extends(fake) == [True] * (len(replies) + 1)
    (sample,) = await tapes.samples(agent_id)
    last = fake.requests[-1]
    assert sample["token_ids"] == [*last.input_ids, *last.output_ids]
    trained = [i for i, m in zip(sample["token_ids"], sample["loss_mask"], strict=True) if m]
    turns = [t for response in (first, second) for t in response.turns or () if t.role == "assistant"]
    assert [i for t in turns for i in t.output_ids] == trained
    assert trained == [i for r in fake.requests for i in r.output_ids]


async def test_an_edited_memory_is_a_branch_at_the_next_step(
    server: LettaServer, fake: FakeSGLang, model_dir: Path, tapes: ours.Tapes
) -> None:
    agent_id = await server.agent(llm_config(fake.url, model_dir))
    fake.script(sampled(remember("is 30"), seed=1), sampled("hello", seed=2), sampled("world", seed=3))
    for text in ("hello", "and?"):
        await server.step(agent_id, text)
    assert extends(fake) == [True, False]  # Letta writes the new memory into the system prompt
    before, after = await tapes.samples(agent_id)
    assert (before["branch_reason"], after["branch_reason"]) == ("root", "edited_history")
    assert [t["trained"] for s in (before, after) for t in s["turns"]] == [True, True, True]


async def test_turns_tell_tools_and_replies_apart(
    server: LettaServer, fake: FakeSGLang, model_dir: Path, tapes: ours.Tapes
) -> None:
    agent_id = await server.agent(llm_config(fake.url, model_dir))
    fake.script(sampled("Well.\n" + tell("is 30")), sampled("hello", seed=1))
    response = await server.step(agent_id, "hello")
    assert [(t.role, t.tool_name, bool(t.output_ids)) for t in response.turns] == [
        ("assistant", None, True),
        ("tool", "send_message", False),
        ("assistant", None, True),
    ]
    assert response.turns[0].content == "Well."
    assert response.stop_reason.stop_reason == "end_turn"
    kinds = [type(m).__name__ for m in response.messages]
    assert kinds[-3:] == ["ToolCallMessage", "ToolReturnMessage", "AssistantMessage"]
    assert fake.requests[0].body["sampling_params"] == {"max_new_tokens": 300, "temperature": 0.6}


async def test_the_trace_of_a_step_has_the_new_tokens(
    server: LettaServer, fake: FakeSGLang, model_dir: Path, tapes: ours.Tapes
) -> None:
    agent_id = await server.agent(llm_config(fake.url, model_dir))
    fake.script(sampled("hello"))
    response = await server.step(agent_id, "hello")
    actor = server.server.default_user
    traces = server.server.telemetry_manager
    trace = None
    for _ in range(100):  # Letta writes it in the background
        with contextlib.suppress(NoResultFound):
            trace = await traces.get_provider_trace_by_step_id_async(response.messages[0].step_id, actor)
            break
        await asyncio.sleep(0.02)
    new = trace.response_json["tokentape"]
    assert new["bridge_ids"] == fake.requests[0].input_ids
    assert new["completion_ids"] == fake.requests[0].output_ids
    assert new["session_id"] == agent_id


async def test_a_stream_of_steps_is_recorded_too(
    server: LettaServer, fake: FakeSGLang, model_dir: Path, tapes: ours.Tapes
) -> None:
    agent_id = await server.agent(llm_config(fake.url, model_dir))
    fake.script(sampled(tell("is 30")), sampled("hello", seed=1))
    actor = server.server.default_user
    run = await server.server.run_manager.create_run(Run(agent_id=agent_id, background=False), actor=actor)
    loop = await server.loop(agent_id)
    said = [MessageCreate(role="user", content="hello")]
    events = [event async for event in loop.stream(said, max_steps=4, run_id=run.id)]
    assert any("tool_call_message" in event for event in events)
    assert extends(fake) == [True]
    assert len((await tapes.samples(agent_id))[0]["turns"]) == 2


class Compacting(LettaAgentV3):
    """Letta's agent with a summary that needs no model."""

    compacted = 0

    async def compact(self, messages: list[Message], **_: Any) -> tuple[Message, list[Message], str]:
        type(self).compacted += 1
        summary = Message(
            role="user",
            content=[TextContent(text="hello so far")],
            agent_id=self.agent_state.id,
        )
        return summary, [messages[0], summary], "hello so far"


async def test_an_overflow_makes_letta_compact_and_go_on(
    server: LettaServer, fake: FakeSGLang, model_dir: Path, tapes: ours.Tapes
) -> None:
    agent_id = await server.agent(llm_config(fake.url, model_dir))
    fake.script(sampled("hello " * 5), sampled("world", seed=1))
    await server.step(agent_id, "hello")
    fake.context_length = len(fake.requests[0].input_ids) + 900
    response = await server.step(agent_id, "x" * 1500, Compacting)
    assert Compacting.compacted == 1
    assert response.stop_reason.stop_reason == "end_turn"
    assert [t.role for t in response.turns] == ["assistant"]
    reasons = {s["branch_reason"] for s in await tapes.samples(agent_id)}
    assert reasons == {"root", "new_conversation"}


async def test_a_failed_step_leaves_nothing_and_the_next_goes_on(
    server: LettaServer, fake: FakeSGLang, model_dir: Path, tapes: ours.Tapes
) -> None:
    agent_id = await server.agent(llm_config(fake.url, model_dir))
    fake.script(sampled("hello"), Fault("abort", after=1), sampled("world", seed=1))
    await server.step(agent_id, "hello")
    with pytest.raises(letta_errors.LLMServerError):
        await server.step(agent_id, "and?")
    response = await server.step(agent_id, "and again?")
    assert len(response.turns) == 1
    first, _failed, last = fake.requests
    saw = [*first.input_ids, *first.output_ids]
    assert last.input_ids[: len(saw)] == saw
    (sample,) = await tapes.samples(agent_id)
    assert len(sample["turns"]) == 2


async def test_letta_s_own_adapter_does_not_extend(
    server: LettaServer, fake: FakeSGLang, model_dir: Path
) -> None:
    agent_id = await server.agent(llm_config(fake.url, model_dir))
    fake.script(sampled("Well.\n" + tell("Zürich"), seed=1), sampled("hello", seed=2), sampled("world"))
    for text in ("hello", "and?"):
        await server.step(agent_id, text)
    assert not any(extends(fake))
