"""What the Letta adapter records: prompts that extend, sessions, tapes. Letta's own is the control."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("letta", reason="needs Letta: make letta")

from letta import errors as letta_errors
from lettakit import CONTEXT, adapter, as_before, extends, invoke, llm_config, results_of, said_by

from gatewaykit import TOKENIZER, WEATHER, call, sampled
from tokentape.adapters import letta as ours
from tokentape.testing import FakeSGLang

USER = {"role": "user", "content": "hello world"}
TOOLS = [WEATHER]

DRIFTING = {
    "unusual JSON": '<tool_call>\n{"name":"weather",  "arguments": {"city":"A" }}\n</tool_call>',
    "not ASCII": call("weather", '{"city": "Zürich ☀"}'),
    "two calls": call("weather", '{"city":"A"}') + "\n" + call("weather", '{"city":"B"}'),
    "text after a call": call("weather", {"city": "A"}) + "\nhello",
    "a malformed call": call("weather", '{"city": }') + call("weather", {"city": "A"}),
    "a thought": "<think>\nhello\n</think>\n\n" + call("weather", {"city": "A"}),
    "another split": call("weather", {"city": "hello"}),
}


async def talk(one: Any, first: str, fake: FakeSGLang) -> None:
    """Two steps: a call with its results and an answer, then another question."""
    fake.script(sampled(first, seed=3), sampled("hello the weather", seed=4), sampled("hello", seed=5))
    messages: list[Any] = [USER]
    await invoke(one, messages, TOOLS)
    messages += [said_by(one), *results_of(one)]
    await invoke(one, messages, TOOLS)
    messages += [said_by(one), {"role": "user", "content": "and the world?"}]
    await invoke(one, messages, TOOLS)


@pytest.mark.parametrize("name", DRIFTING)
async def test_each_prompt_extends_what_the_model_saw_and_sampled(
    name: str, one: Any, fake: FakeSGLang, tapes: ours.Tapes
) -> None:
    await talk(one, DRIFTING[name], fake)
    assert extends(fake) == [True, True]
    (sample,) = await tapes.samples("agent-1")
    last = fake.requests[-1]
    assert sample["token_ids"] == [*last.input_ids, *last.output_ids]
    assert sum(sample["loss_mask"]) == sum(len(r.output_ids) for r in fake.requests)
    assert one.reply.turn.branch_reason is None
    assert one.prompt_ids[-len(one.bridge_ids) :] == one.bridge_ids


@pytest.mark.parametrize("name", DRIFTING)
async def test_letta_s_own_adapter_does_not(name: str, fake: FakeSGLang, model_dir: Path) -> None:
    with as_before() as original:
        one = adapter(original, llm_config(fake.url, model_dir))
        await talk(one, DRIFTING[name], fake)
    assert not all(extends(fake))


async def test_a_new_adapter_for_the_same_agent_goes_on(
    one: Any, fake: FakeSGLang, model_dir: Path, tapes: ours.Tapes
) -> None:
    fake.script(sampled(DRIFTING["two calls"], seed=1), sampled("hello", seed=2))
    await invoke(one, [USER], TOOLS)
    messages = [USER, said_by(one), *results_of(one)]
    other = adapter(type(one), llm_config(fake.url, model_dir), run_id="run-2")
    await invoke(other, messages, TOOLS)
    assert extends(fake) == [True]
    assert other.session_id == "agent-1"


async def test_another_agent_and_none_have_sessions_of_their_own(
    one: Any, fake: FakeSGLang, model_dir: Path
) -> None:
    others = [
        adapter(type(one), llm_config(fake.url, model_dir), agent_id=name) for name in ("agent-2", None, None)
    ]
    for each in (one, *others):
        await invoke(each, [USER])
    assert len({each.session_id for each in (one, *others)}) == 4


async def test_changed_memory_is_a_branch_that_says_why(
    one: Any, fake: FakeSGLang, tapes: ours.Tapes
) -> None:
    before, after = ({"role": "system", "content": text} for text in ("Ann is 30.", "Ann is 31."))
    await invoke(one, [before, USER])
    await invoke(one, [after, USER])
    assert one.reply.turn.branch_reason == "new_conversation"
    assert len(await tapes.samples("agent-1")) == 2


async def test_one_connection_pool_and_one_tokenizer_for_all_adapters(
    fake: FakeSGLang, model_dir: Path, tapes: ours.Tapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = ours.Tapes._make

    async def counting(self: ours.Tapes, *args: Any) -> Any:
        opened.append(args)
        return await real(self, *args)

    monkeypatch.setattr(ours.Tapes, "_make", counting)
    many = [
        adapter(ours.SGLangNativeAdapter, llm_config(fake.url, model_dir), agent_id=f"a{n}") for n in range(5)
    ]
    for each in many:
        each.tapes = tapes
    await asyncio.gather(*(invoke(each, [USER]) for each in many))
    assert len(opened) == 1


async def test_a_finished_session_takes_no_more_calls(one: Any, tapes: ours.Tapes) -> None:
    await invoke(one, [USER])
    summary = await tapes.finish("agent-1", reward=1.0)
    assert (summary["state"], summary["reward"]) == ("finished", 1.0)
    (sample,) = await tapes.samples("agent-1")
    assert sample["reward"] == 1.0
    assert json.loads(sample["metadata"])["letta"]["agent_id"] == "agent-1"
    with pytest.raises(letta_errors.LLMBadRequestError, match="finished"):
        await invoke(one, [USER])


async def test_a_store_outlives_the_process(fake: FakeSGLang, model_dir: Path, tmp_path: Path) -> None:
    config = ours.LettaConfig(store=tmp_path / "rollouts.sqlite")
    fake.script(sampled(DRIFTING["unusual JSON"], seed=1), sampled("hello", seed=2))
    messages: list[Any] = [USER]
    for _ in range(2):
        one = adapter(ours.SGLangNativeAdapter, llm_config(fake.url, model_dir))
        one.tapes = ours.Tapes(config)
        await invoke(one, messages, TOOLS)
        messages += [said_by(one), *results_of(one)]
        await one.tapes.aclose()
    assert extends(fake) == [True]


def test_it_works_without_install_and_cleans_up_with_its_loop(model_dir: Path) -> None:
    async def main() -> None:
        async with FakeSGLang(TOKENIZER, context_length=CONTEXT) as fake:
            one = adapter(ours.SGLangNativeAdapter, llm_config(fake.url, model_dir))
            await invoke(one, [USER])
            assert one.output_ids

    for _ in range(2):  # each loop has connections of its own
        asyncio.run(main())
