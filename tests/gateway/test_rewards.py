"""What episodes, turns and branches earn: set while running or at the end, exported with the samples."""

from pathlib import Path
from typing import Any

import pytest

import tokentape
from gatewaykit import USER, Gateway, gateway_for, sampled
from tokentape.errors import RequestError
from tokentape.testing import FakeSGLang

Json = dict[str, Any]


async def two_branches(fake: FakeSGLang, gateway: Gateway, **create: Any) -> tuple[str, list[str]]:
    """A session of t1 → (t2, t3), and the turns' ids."""
    fake.script(sampled("hello"), sampled("world"), sampled("hello world"))
    session_id = await gateway.create(**create)
    first = await gateway.chat(session_id, [USER])
    message = first["choices"][0]["message"]
    more = {"role": "user", "content": "world"}
    second = await gateway.chat(session_id, [USER, message, USER])
    third = await gateway.chat(session_id, [USER, message, more])
    return session_id, [reply["tokentape"]["turn_id"] for reply in (first, second, third)]


async def reward(gateway: Gateway, session_id: str, end: str = "rewards", **body: Any) -> Json:
    return await gateway.ok("POST", f"/sessions/{session_id}/{end}", body)


async def test_rewards_of_all_kinds(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    async with gateway_for(fake.url, model_dir, store) as gateway:
        session_id, (t1, t2, t3) = await two_branches(fake, gateway, group_id="q1")
        await reward(gateway, session_id, turn_rewards={t1: 0.25, t2: -1}, metadata={"judge": "a"})
        await reward(gateway, session_id, turn_rewards={t2: None}, branch_rewards={t2: 0.5}, reward=0.1)
    async with gateway_for(fake.url, model_dir, store) as gateway:  # all of it is durable
        summary = await reward(gateway, session_id, "finish", reward=1.0, turn_rewards={t3: 2.0})
        assert summary["turn_rewards"] == {t1: 0.25, t3: 2.0}
        assert (summary["branch_rewards"], summary["reward"]) == ({t2: 0.5}, 1.0)
        assert (summary["group_id"], summary["metadata"]) == ("q1", {"judge": "a"})
        again = await reward(gateway, session_id, "finish", reward=1.0, turn_rewards={t3: 2.0})
        assert again == summary
        rows = {row["sample_id"]: row for row in await gateway.samples(session_id)}
    assert {sample_id: row["reward"] for sample_id, row in rows.items()} == {t2: 0.5, t3: 1.0}
    assert {row["group_id"] for row in rows.values()} == {"q1"}
    of_turns = {t["turn_id"]: t["reward"] for row in rows.values() for t in row["turns"]}
    assert of_turns == {t1: 0.25, t2: None, t3: 2.0}


async def test_what_cannot_be_rewarded(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id, (t1, t2, _) = await two_branches(fake, gateway)
    path = f"/sessions/{session_id}/rewards"
    for body, param in (
        ({"turn_rewards": {"t-none": 1}}, "turn_rewards"),
        ({"branch_rewards": {t1: 1}}, "branch_rewards"),  # no branch ends there
        ({"reward": "high"}, None),
        ({"rewards": 1}, None),
        ({"metadata": {"tokentape": 1}}, "metadata.tokentape"),
    ):
        answer = await gateway.request("POST", path, body)
        assert (answer.status, answer.error["param"]) == (400, param), body
    assert t2 in (await gateway.request("POST", path, {"branch_rewards": {t1: 1}})).error["message"]
    assert (await gateway.show(session_id))["turn_rewards"] == {}
    await reward(gateway, session_id, "finish", reward=1)
    for end, body in (
        ("rewards", {"reward": 1}),
        ("finish", {"reward": 2}),
        ("finish", {"turn_rewards": {t1: 1}}),
        ("finish", {"branch_rewards": {t2: 1}}),
    ):
        assert (await gateway.request("POST", f"/sessions/{session_id}/{end}", body)).status == 409
    assert (await gateway.show(session_id))["turn_rewards"] == {}


async def test_a_branch_that_has_gone_on(fake: FakeSGLang, gateway: Gateway) -> None:
    """Its reward would be nobody's: finishing says so, and the session stays open."""
    fake.script(sampled("hello"), sampled("world"))
    session_id = await gateway.create()
    first = await gateway.chat(session_id, [USER])
    end = first["tokentape"]["turn_id"]
    await reward(gateway, session_id, branch_rewards={end: 1})
    second = await gateway.chat(session_id, [USER, first["choices"][0]["message"], USER])
    answer = await gateway.request("POST", f"/sessions/{session_id}/finish", {})
    assert (answer.status, answer.error["param"]) == (400, "branch_rewards")
    assert second["tokentape"]["turn_id"] in answer.error["message"]
    assert (await gateway.show(session_id))["state"] == "open"
    await reward(gateway, session_id, "finish", branch_rewards={end: None})
    assert (await gateway.samples(session_id))[0]["reward"] is None


async def test_rewards_in_process(fake: FakeSGLang, model_dir: Path) -> None:
    fake.script(sampled("hello"))
    async with tokentape.open(model=model_dir, engine=fake.url) as tape:
        session = tape.session(group_id="q")
        reply = await session.chat([USER])
        turn_id = reply.turn.turn_id
        await session.reward(0.5, turns={turn_id: 0.25}, branches={turn_id: 2})
        for bad in (float("nan"), float("inf")):
            with pytest.raises(RequestError, match="finite"):
                await session.reward(bad)
            with pytest.raises(RequestError, match="finite"):
                await session.finish(turns={turn_id: bad})
        await session.finish()
        (row,) = await session.samples()
    assert (row["reward"], row["turns"][0]["reward"], row["group_id"]) == (2.0, 0.25, "q")
