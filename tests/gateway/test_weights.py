"""Weights that change under a gateway: turns go on, versions are the engine's, a pause holds everything."""

import asyncio
from pathlib import Path

import pytest

from gatewaykit import END, USER, Gateway, gateway_for, sampled, split
from tokentape.invariants import check_samples
from tokentape.testing import FakeSGLang, Fault, Reply


def spans(sample: dict[str, object]) -> list[tuple[str, int, int]]:
    versions: list[dict[str, object]] = sample["weight_versions"]  # type: ignore[assignment]
    start: int = sample["num_prompt_tokens"]  # type: ignore[assignment]
    return [(v["version"], v["start"] - start, v["end"] - start) for v in versions]  # type: ignore[operator,misc]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_aborted_turn_goes_on_inside(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    text = split("hello world", seed=1)
    fake.script(
        Fault("abort", after=3, reply=Reply(text, versions=[("1", 0, 3)])),
        Reply([*text[3:], END], versions=[("2", 0, len(text) - 2)]),
        sampled("world"),
    )
    session_id = await gateway.create()
    first = await gateway.chat(session_id, [USER], stream=stream)
    assert first["choices"][0]["message"]["content"] == "hello world"
    first_prompt = fake.requests[0].input_ids
    assert fake.requests[1].input_ids == first_prompt + text[:3]
    limits = [r.sampling_params["max_new_tokens"] for r in fake.requests]
    assert limits[1] == limits[0] - 3
    await gateway.chat(session_id, [USER, first["choices"][0]["message"], USER])
    assert fake.requests[2].input_ids[: len(first_prompt) + len(text) + 1] == [*first_prompt, *text, END]
    (sample,) = await gateway.samples(session_id)
    assert check_samples([sample]) == []
    assert spans(sample)[:2] == [("1", 0, 3), ("2", 3, len(text) + 1)]
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"], summary["oldest_version"]) == (2, {}, "1")
    rest = sample["loss_mask"].count(1) - len(text) - 1
    assert summary["weight_versions"] == {"1": 3, "2": len(text) - 2, "default": rest}
    metrics = (await gateway.request("GET", "/metrics")).body.decode()
    assert "tokentape_resumed_total 1.0" in metrics


async def test_a_pause_holds_the_gateway(fake: FakeSGLang, gateway: Gateway) -> None:
    text = split("hello world hello world", seed=1)
    fake.script(Reply([*text, END], delay_s=0.03))
    fake.responder = lambda r: Reply([*split("hello world", seed=2), END])
    one, two = await gateway.create(), await gateway.create()
    running = asyncio.create_task(gateway.chat(one, [USER], stream=True))
    await fake.until(lambda: bool(fake.requests and fake.requests[0].output_ids))
    assert await gateway.ok("POST", "/pause") == {"paused": True, "interrupted": 1}
    assert (await gateway.ok("GET", "/readyz"))["paused"] is True
    waiting = asyncio.create_task(gateway.chat(two, [USER]))
    await asyncio.sleep(0.1)
    assert (len(fake.requests), running.done(), waiting.done()) == (1, False, False)
    assert (await gateway.ok("POST", "/weights", {"version": "7"}))["version"] == "7"
    assert await gateway.ok("POST", "/resume") == {"paused": False}
    await asyncio.gather(running, waiting)
    cut = len(fake.requests[0].output_ids)
    assert 0 < cut < len(text)
    ((first,), (second,)) = [await gateway.samples(session_id) for session_id in (one, two)]
    total = first["loss_mask"].count(1)
    assert spans(first) == [("default", 0, cut), ("7", cut, total)]  # the engine has no name for its weights
    assert {v for v, _, _ in spans(second)} == {"7"}
    assert check_samples([first, second]) == []


async def test_weights_without_a_name_are_not_renamed_while_they_sample(
    fake: FakeSGLang, gateway: Gateway
) -> None:
    fake.script(Reply([*split("hello"), END], delay_s=0.1))
    session_id = await gateway.create()
    running = asyncio.create_task(gateway.chat(session_id, [USER]))
    await fake.until(lambda: bool(fake.requests))
    answer = await gateway.request("POST", "/weights", {"version": "7"})
    assert (answer.status, answer.error["code"]) == (409, "not_paused")
    assert "/pause" in answer.error["message"]
    await running
    (sample,) = await gateway.samples(session_id)
    assert {v for v, _, _ in spans(sample)} == {"default"}


async def test_the_engine_knows_better(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.weight_version = "step-3"
    fake.script(sampled("hello"))
    said = await gateway.ok("POST", "/weights", {"version": "step-4"})
    assert (said["version"], said["said_by"], said["versions"]) == ("step-3", "engine", ["step-3"])
    session_id = await gateway.create()
    await gateway.chat(session_id, [USER])
    assert {v for v, _, _ in spans((await gateway.samples(session_id))[0])} == {"step-3"}


@pytest.mark.parametrize(
    ("announced", "in_order"), [(["10", "9"], ["9", "10"]), (["b", "c", "a", "b"], ["c", "a", "b"])]
)
async def test_an_announced_name_outlives_the_gateway(
    fake: FakeSGLang, model_dir: Path, store: Path, announced: list[str], in_order: list[str]
) -> None:
    """Also one that comes again: the weights from before are loaded once more."""
    async with gateway_for(fake.url, model_dir, store) as gateway:
        for version in announced:
            await gateway.ok("POST", "/weights", {"version": version})
    async with gateway_for(fake.url, model_dir, store) as gateway:
        state = await gateway.ok("GET", "/weights")
        assert (state["version"], state["said_by"], state["versions"]) == (announced[-1], "caller", in_order)
        fake.script(sampled("hello"))
        session_id = await gateway.create()
        await gateway.chat(session_id, [USER])
        assert {v for v, _, _ in spans((await gateway.samples(session_id))[0])} == {announced[-1]}


@pytest.mark.parametrize("body", [{}, {"version": ""}, {"version": 7}, {"version": "7", "x": 1}])
async def test_what_is_no_announcement(gateway: Gateway, body: object) -> None:
    assert (await gateway.request("POST", "/weights", body)).status == 400


async def test_a_deadline_holds_in_a_pause(fake: FakeSGLang, gateway: Gateway) -> None:
    await gateway.ok("POST", "/pause")
    session_id = await gateway.create(deadline_s=0.1)
    answer = await gateway.post(session_id, {"messages": [USER]})
    assert (answer.status, answer.error["code"]) == (400, "limit_reached")
    assert not fake.requests
