"""Labels and branch reasons of whole sessions over HTTP, with the prompts that coding agents send."""

import asyncio
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gatewaykit import (
    CLOCK,
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
)
from serving import run
from tokentape.invariants import check_samples
from tokentape.testing import FakeSGLang

TITLE = {
    "role": "system",
    "content": "You are a title generator. You output ONLY a thread title. Nothing else.",
}
COMPACT = {
    "role": "user",
    "content": "You are performing a CONTEXT CHECKPOINT COMPACTION. Create a handoff summary.",
}
SUMMARY = "hello world is what the user said and the weather is what the tool said"


def trained(sample: Json) -> list[str]:
    return [t["turn_id"] for t in sample["turns"] if t["trained"]]


async def replied(gateway: Gateway, session_id: str, messages: list[Any], **fields: Any) -> str:
    return (await gateway.chat(session_id, messages, **fields))["tokentape"]["turn_id"]


async def test_a_coding_agents_session(
    fake: FakeSGLang, gateway: Gateway, store: Path, tmp_path: Path
) -> None:
    """A title beside the first turn, a sub-agent between two, a compaction, and the rest behind it."""
    fake.script(
        sampled("a title"),
        sampled(call("weather", {"task": "SUBTASK: look at the clock"})),
        sampled("it is late"),
        sampled("the weather is hello"),
        sampled(SUMMARY),
        sampled("we go on"),
    )
    session_id = await gateway.create()
    title = await replied(gateway, session_id, [TITLE, USER])
    agent = Agent(gateway, session_id, {"tools": [WEATHER]})
    first = (await agent.turn(USER))["tokentape"]["turn_id"]
    helper = await replied(
        gateway, session_id, [{"role": "user", "content": "SUBTASK: look at the clock"}], tools=[CLOCK]
    )
    second = (await agent.turn(*agent.results()))["tokentape"]["turn_id"]
    compaction = (await agent.turn(COMPACT))["tokentape"]
    assert compaction["branch_reason"] is None  # to the tree it is one more turn
    after = await gateway.chat(
        session_id, [USER, {"role": "user", "content": f"A model began. {SUMMARY}"}], tools=[WEATHER]
    )
    assert after["tokentape"]["branch_reason"] == "compacted"

    samples = await gateway.samples(session_id)
    assert check_samples(samples) == []
    assert_samples_match(seen_by(fake), samples, num_turns=6)
    assert [(s["label"], s["label_by"], s["branch_reason"], trained(s)) for s in samples] == [
        ("auxiliary", "rule:opencode-title", "root", [title]),
        ("subagent", "inferred", "new_conversation", [helper]),
        ("main", "inferred", "new_conversation", [first, second]),
        ("compaction", "rule:codex-compaction", "label_changed", [compaction["turn_id"]]),
        ("main", "inferred", "compacted", [after["tokentape"]["turn_id"]]),
    ]
    summary = await gateway.show(session_id)
    assert summary["labels"] == {"auxiliary": 1, "main": 3, "subagent": 1, "compaction": 1}
    assert (summary["turns"], summary["branches"]) == (6, 5)

    code, _, errors = await run("export", "--store", str(store), "--out", str(tmp_path / "a.parquet"))
    assert code == 0, errors
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert rows == samples
    main = [turn_id for row in rows if row["label"] == "main" for turn_id in trained(row)]
    assert main == [first, second, after["tokentape"]["turn_id"]]  # a trainer's filter loses nothing


async def test_the_callers_label(fake: FakeSGLang, gateway: Gateway, model_dir: Path, store: Path) -> None:
    fake.script(*(sampled(text) for text in ("one", "two", "three", "four")))
    session_id = await gateway.create()

    async def ask(messages: list[Any], label: str | None) -> Json:
        headers = {"X-Tokentape-Label": label} if label else {}
        answer = await gateway.post(session_id, {"messages": messages}, headers)
        assert answer.status == 200, answer
        return answer.body

    await ask([USER], "planner")
    history = [USER, {"role": "assistant", "content": "one"}, USER]
    await ask(history, None)
    await ask([*history, {"role": "assistant", "content": "two"}, USER], "critic")
    await ask([{"role": "user", "content": "quota"}], "main")
    samples = await gateway.samples(session_id)
    assert check_samples(samples) == []
    expected = [("planner", 2), ("critic", 1), ("main", 1)]
    assert [(s["label"], len(trained(s))) for s in samples] == expected
    assert {s["label_by"] for s in samples} == {"caller"}
    assert (await gateway.show(session_id))["labels"] == {"planner": 2, "critic": 1, "main": 1}
    answer = await gateway.post(session_id, {"messages": [USER]}, {"X-Tokentape-Label": "a b"})
    assert (answer.status, answer.error["param"]) == (400, "X-Tokentape-Label")


async def test_labels_after_a_restart(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    fake.script(sampled("one"), sampled(SUMMARY), sampled("three"))
    async with gateway_for(fake.url, model_dir, store) as gateway:
        session_id = await gateway.create()
        agent = Agent(gateway, session_id, {"tools": [WEATHER]})
        await agent.turn(USER)
        await agent.turn(COMPACT)
        samples, summary = await gateway.samples(session_id), await gateway.show(session_id)
    async with gateway_for(fake.url, model_dir, store) as gateway:
        assert await gateway.samples(session_id) == samples
        assert await gateway.show(session_id) == summary
        after = [{"role": "user", "content": f"{SUMMARY}: go on"}]
        reply = await gateway.chat(session_id, after, tools=[WEATHER])
        assert reply["tokentape"]["branch_reason"] == "compacted"
        assert [s["label"] for s in await gateway.samples(session_id)] == ["main", "compaction", "main"]


async def test_requests_side_by_side(fake: FakeSGLang, gateway: Gateway) -> None:
    """The title is asked for while the agent's first turn runs: the labels are right whoever is first."""
    for delays in ((0.05, 0.0), (0.0, 0.05)):
        fake.script(*(sampled("hello world", delay_s=delay) for delay in delays))
        session_id = await gateway.create()
        await asyncio.gather(
            gateway.chat(session_id, [TITLE, USER]), gateway.chat(session_id, [USER], tools=[WEATHER])
        )
        samples = await gateway.samples(session_id)
        assert sorted(s["label"] for s in samples) == ["auxiliary", "main"]
        assert sorted(s["branch_reason"] for s in samples) == ["new_conversation", "root"]
