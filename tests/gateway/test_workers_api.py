"""Several engines behind one gateway: listed, added, taken away; and a client that notices nothing."""

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from gatewaykit import END, USER, Gateway, gateway_for, sampled, split
from tokentape.engines.pool import PoolConfig
from tokentape.invariants import check_samples
from tokentape.testing import FakeSGLang, Fault, Reply


@contextlib.asynccontextmanager
async def two(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> AsyncGenerator[tuple[Gateway, FakeSGLang]]:
    async with FakeSGLang(fake.tokenizer, vocab_size=fake.vocab_size) as other:
        pool = PoolConfig(more=(other.url,), health_interval_s=0.05)
        async with gateway_for(fake.url, model_dir, tmp_path / "two.sqlite", pool=pool) as gateway:
            yield gateway, other


async def test_a_client_notices_nothing_of_a_worker_that_dies(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> None:
    text = split("hello world", seed=1)
    async with two(tmp_path, fake, model_dir) as (gateway, other):
        fake.weight_version, other.weight_version = "1", "2"
        fake.script(Fault("cut", after=3, reply=Reply([*text, END])))
        other.script(Reply([*text[3:], END]), sampled("world"))
        session_id = await gateway.create()
        first = await gateway.chat(session_id, [USER], stream=True)
        assert first["choices"][0]["message"]["content"] == "hello world"
        await gateway.chat(session_id, [USER, first["choices"][0]["message"], USER])
        assert other.requests[0].input_ids == [*fake.requests[0].input_ids, *text[:3]]
        assert other.requests[1].input_ids[: len(fake.requests[0].input_ids) + len(text) + 1] == [
            *fake.requests[0].input_ids,
            *text,
            END,
        ]
        (sample,) = await gateway.samples(session_id)
        assert check_samples([sample]) == []
        start = sample["num_prompt_tokens"]
        spans = [(v["version"], v["start"] - start, v["end"] - start) for v in sample["weight_versions"]]
        assert spans[:2] == [("1", 0, 3), ("2", 3, len(text) + 1)]
        summary = await gateway.show(session_id)
        assert (summary["turns"], summary["failures"]) == (2, {})
        metrics = (await gateway.request("GET", "/metrics")).body.decode()
        assert 'tokentape_generations_moved_total{kind="engine_disconnected"} 1.0' in metrics
        assert f'tokentape_worker_generations_total{{outcome="ok",worker="{other.url}"}} 2.0' in metrics


async def test_workers_are_listed_added_and_taken_away(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> None:
    async with two(tmp_path, fake, model_dir) as (gateway, other), FakeSGLang(fake.tokenizer) as third:
        session_id = await gateway.create()
        await gateway.chat(session_id, [USER])
        listed = (await gateway.ok("GET", "/workers"))["workers"]
        assert [(w["url"], w["state"], w["running"], w["sessions"]) for w in listed] == [
            (fake.url, "healthy", 0, 1),
            (other.url, "healthy", 0, 0),
        ]
        assert listed[0]["generations"] == {"ok": 1}
        assert listed[0]["weight_version"] == "default"
        added = await gateway.ok("POST", "/workers", {"url": f"{third.url}/"})
        assert [w["url"] for w in added["workers"]] == [fake.url, other.url, third.url]
        await gateway.ok("POST", "/workers", {"url": third.url})  # again: nothing changes
        left = await gateway.ok("DELETE", f"/workers?url={fake.url}")
        assert [w["url"] for w in left["workers"]] == [other.url, third.url]
        await gateway.chat(session_id, [USER])
        assert len(fake.requests) == 1
        await gateway.ok("DELETE", "/workers", {"url": third.url, "abort": True})
        assert (await gateway.request("DELETE", f"/workers?url={other.url}")).status == 409
        assert (await gateway.request("DELETE", "/workers?url=http://nobody")).status == 404
        assert (await gateway.request("DELETE", "/workers")).status == 404


@pytest.mark.parametrize("body", [{}, {"url": "no url"}, {"url": 3}, {"url": "http://x", "more": 1}])
async def test_what_is_no_worker(gateway: Gateway, body: object) -> None:
    assert (await gateway.request("POST", "/workers", body)).status == 400


async def test_a_worker_that_does_not_answer_is_not_taken_in(gateway: Gateway) -> None:
    answer = await gateway.request("POST", "/workers", {"url": "http://127.0.0.1:1"})
    assert answer.status == 503
    assert len((await gateway.ok("GET", "/workers"))["workers"]) == 1
