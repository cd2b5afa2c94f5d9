"""Volatile text over HTTP: the line goes on, no token changes, and what was asked instead is on record."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gatewaykit import (
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
from serving import run, serving
from tokentape.invariants import check_samples
from tokentape.testing import FakeSGLang

KEPT = " cc_version=2.1.197.d49; cc_entrypoint=cli; cch={};"


def system(cch: str, rest: str = "You are an agent.", flag: str = "") -> Json:
    header = f"x-anthropic-billing-header:{KEPT.format(cch)}{flag}"
    return {"role": "system", "content": f"{header}\n\n{rest}"}


async def episode(gateway: Gateway, session_id: str, systems: list[Json]) -> list[Json]:
    """One turn for each system prompt: the agent replays its history under the next one."""
    agent = Agent(gateway, session_id, {"tools": [WEATHER]})
    extensions: list[Json] = []
    for index, prompt in enumerate(systems):
        agent.messages[:1] = [prompt]
        new = [USER] if index == 0 else agent.results()
        extensions.append((await agent.turn(*new))["tokentape"])
    return extensions


async def test_a_changing_header(fake: FakeSGLang, gateway: Gateway, model_dir: Path, store: Path) -> None:
    fake.script(*(sampled(call("weather", {"city": "hello"}), seed=i) for i in range(3)))
    session_id = await gateway.create()
    first, second, third = await episode(gateway, session_id, [system("a1"), system("a2"), system("a1")])
    assert (second["branch_reason"], second["parent_turn_id"]) == (None, first["turn_id"])
    assert (third["branch_reason"], third["parent_turn_id"]) == (None, second["turn_id"])
    change = {"rule": "billing-header", "recorded": KEPT.format("a1"), "asked": KEPT.format("a2")}
    assert "superseded" not in first
    assert second["superseded"] == [change]
    assert "superseded" not in third  # as it is recorded

    samples = await gateway.samples(session_id)
    [sample] = samples
    assert check_samples(samples) == []
    assert_samples_match(seen_by(fake), samples, num_turns=3)
    assert json.loads(sample["metadata"]) == {"tokentape": {"superseded": {second["turn_id"]: [change]}}}
    assert json.loads(sample["messages"])[0] == system("a1")
    for before, after in zip(fake.requests, fake.requests[1:], strict=False):
        so_far = before.input_ids + before.output_ids
        assert after.input_ids[: len(so_far)] == so_far
    await gateway.ok("POST", f"/sessions/{session_id}/finish", {})
    assert await gateway.samples(session_id) == samples


async def test_a_changing_header_after_a_restart(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    fake.script(sampled("one"), sampled("two"), sampled("three"))
    async with gateway_for(fake.url, model_dir, store) as gateway:
        agent = Agent(gateway, await gateway.create(), {})
    samples: list[Json] = []
    for index, cch in enumerate(("a1", "a2", "a3")):
        async with gateway_for(fake.url, model_dir, store) as agent.gateway:
            assert await agent.gateway.samples(agent.session_id) == samples
            agent.messages[:1] = [system(cch)]
            extension = (await agent.turn(USER))["tokentape"]
            assert [s["asked"] for s in extension.get("superseded", ())] == [KEPT.format(cch)] * bool(index)
            samples = await agent.gateway.samples(agent.session_id)
            assert len(samples) == 1
    noted = json.loads(samples[0]["metadata"])["tokentape"]["superseded"]
    assert [changes[0]["recorded"] for changes in noted.values()] == [KEPT.format("a1")] * 2


async def test_each_sample_of_a_request_says_what_it_superseded(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(*(sampled(text) for text in ("one", "two", "three")))
    session_id = await gateway.create()
    first = await gateway.chat(session_id, [system("a1"), USER])
    history = [system("a2"), USER, {"role": "assistant", "content": "one"}, USER]
    for reason in (None, "resampled"):
        extension = (await gateway.chat(session_id, history))["tokentape"]
        assert extension["branch_reason"] == reason
        assert extension["parent_turn_id"] == first["tokentape"]["turn_id"]
        assert [change["asked"] for change in extension["superseded"]] == [KEPT.format("a2")]


@pytest.mark.parametrize(
    "other",
    [system("a2", flag=" cc_is_subagent=true;"), system("a2", rest="You are another."), USER],
    ids=["a sub-agent", "another prompt", "no prompt"],
)
async def test_what_is_not_volatile_counts(other: Json, fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(sampled(call("weather", {"city": "hello"})), sampled("two"))
    session_id = await gateway.create()
    _, second = await episode(gateway, session_id, [system("a1"), other])
    assert (second["branch_reason"], second["parent_turn_id"]) == ("edited_history", None)
    assert "superseded" not in second


DATED = {"role": "system", "content": "Today's date is 2026-11-23. Be kind."}
NEXT = {"role": "system", "content": "Today's date is 2026-11-24. Be kind."}


@pytest.mark.parametrize(
    ("rules", "changes"),
    [
        ((), None),
        (("billing-header",), None),
        (("date",), {"rule": "date", "recorded": "2026-11-23", "asked": "2026-11-24"}),
        (
            (r"\d{4}-\d\d-\d\d",),
            {"rule": r"\d{4}-\d\d-\d\d", "recorded": "2026-11-23", "asked": "2026-11-24"},
        ),
    ],
)
async def test_a_dated_prompt(
    rules: tuple[str, ...], changes: Json | None, fake: FakeSGLang, model_dir: Path, store: Path
) -> None:
    fake.script(sampled(call("weather", {"city": "hello"})), sampled("two"))
    async with gateway_for(fake.url, model_dir, store, volatile=rules) as gateway:
        session_id = await gateway.create()
        first, second = await episode(gateway, session_id, [DATED, NEXT])
        samples = await gateway.samples(session_id)
    assert check_samples(samples) == []
    assert_samples_match(seen_by(fake), samples, num_turns=2)
    if changes is None:
        assert second["branch_reason"] == "edited_history"
        assert [s["label"] for s in samples] == ["main", "main"]
    else:
        assert second["parent_turn_id"] == first["turn_id"]
        assert second["superseded"] == [changes]


async def test_results_and_replies_are_never_masked(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    dates = ["Today's date is 2026-11-23.", "Today's date is 2026-11-24."]
    fake.script(sampled(call("weather", {"city": "hello"})), sampled(dates[0]), sampled("c"), sampled("d"))
    async with gateway_for(fake.url, model_dir, store, volatile=("date",)) as gateway:
        session_id = await gateway.create()
        agent = Agent(gateway, session_id, {"tools": [WEATHER]})
        await agent.turn(USER)
        [result] = agent.results(dates[0])
        await agent.turn(result)
        history = list(agent.messages)
        for at, what in ((2, "result"), (3, "reply")):
            changed: list[Any] = [dict(m) for m in history]
            changed[at]["content"] = changed[at]["content"].replace(dates[0], dates[1])
            assert changed != history, what
            reply = await gateway.chat(session_id, [*changed, USER], tools=[WEATHER])
            assert reply["tokentape"]["branch_reason"] == "edited_history", what


# -- the option


async def served(arguments: list[str], fake: FakeSGLang, model_dir: Path, tmp_path: Path) -> bool:
    """Whether a conversation goes on under a gateway with these options when its header changes."""
    fake.script(sampled(call("weather", {"city": "hello"})), sampled("two"))
    options = [
        "--model",
        str(model_dir),
        "--engine",
        fake.url,
        "--port",
        "0",
        "--store",
        str(tmp_path / "s.db"),
    ]
    log = tmp_path / "log"
    async with serving(log, "serve", *options, *arguments) as process, aiohttp.ClientSession() as http:
        gateway = Gateway(process.url, http)
        _, second = await episode(gateway, await gateway.create(), [system("a1"), system("a2")])
    return second["branch_reason"] is None


async def test_the_header_is_volatile_unless_told_otherwise(
    fake: FakeSGLang, model_dir: Path, tmp_path: Path
) -> None:
    assert await served([], fake, model_dir, tmp_path)
    assert not await served(["--volatile", "none"], fake, model_dir, tmp_path)
    assert not await served(["--volatile", "date"], fake, model_dir, tmp_path)
    assert await served(["--volatile", "date", "--volatile", r"cch=(\w+);"], fake, model_dir, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["billing_header"], "is no rule's name: billing-header, date"),
        (["("], "nor a regular expression"),
        (["none", "date"], "--volatile none goes with no other"),
    ],
)
async def test_a_wrong_option(arguments: list[str], words: str, model_dir: Path, tmp_path: Path) -> None:
    options = [x for rule in arguments for x in ("--volatile", rule)]
    model = ["--model", str(model_dir), "--engine", "http://127.0.0.1:9"]
    code, _, errors = await run("serve", *model, "--store", str(tmp_path / "s.db"), *options)
    assert code == 2
    assert words in errors
