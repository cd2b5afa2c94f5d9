"""What the engine captured beside the tokens arrives in the samples, aligned across turns and resumptions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tokentape
from gatewaykit import END, USER, Gateway, sampled, split
from tokentape.engines.local import LocalEngine
from tokentape.engines.server import make_app, serve
from tokentape.invariants import check_samples
from tokentape.model import TINY_MODEL
from tokentape.testing import FakeSGLang, Fault, Reply, pseudo_experts, pseudo_support


async def test_routed_experts_of_a_branch(fake: FakeSGLang, model_dir: Path) -> None:
    text = split("hello world", seed=1)
    fake.script(sampled("hello"), Fault("abort", after=3, reply=Reply(text)), Reply([*text[3:], END]))
    async with tokentape.open(model=model_dir, engine=fake.url, capture=["routed-experts"]) as tape:
        session = tape.session()
        first = await session.chat([USER])
        await session.chat([USER, first.message, USER])
        (row,) = await session.samples()
    assert check_samples([row]) == []
    ids, routed = row["token_ids"], row["routed_experts"]
    assert (routed["dtype"], routed["width"]) == ("uint8", 6)
    expected = [n for at, i in enumerate(ids[:-1]) for n in pseudo_experts(i, at)]
    assert list(routed["data"]) == expected
    starts = [r.body["routed_experts_start_len"] for r in fake.requests]
    assert starts == [
        0,
        len(first.prompt_ids) + len(first.completion_ids) - 1,
        len(fake.requests[2].input_ids) - 1,
    ]


async def test_support_of_truncated_turns(fake: FakeSGLang, model_dir: Path) -> None:
    fake.script(sampled("hello"), sampled("world", seed=3))
    async with tokentape.open(model=model_dir, engine=fake.url, capture=["support"]) as tape:
        session = tape.session()
        first = await session.chat([USER], top_k=20, top_p=0.9)
        await session.chat([USER, first.message, USER], top_p=0.9)  # SGLang tells it of top_k alone
        (row,) = await session.samples()
    assert check_samples([row]) == []
    assert [r.body.get("return_sampling_mask") for r in fake.requests] == [True, None]
    one, two = row["turns"]
    assert [t["logprob_basis"] for t in (one, two)] == ["untruncated"] * 2
    for at in range(one["start"], one["end"]):
        assert row["support"][at] == pseudo_support(row["token_ids"][at], fake.vocab_size)
        assert math.isclose(row["sampling_logprobs"][at], row["logprobs"][at] / 2, rel_tol=1e-6)
    rest = [at for at in range(len(row["token_ids"])) if not one["start"] <= at < one["end"]]
    assert all(row["support"][at] is row["sampling_logprobs"][at] is None for at in rest)


async def test_the_support_of_a_real_distribution() -> None:
    """The embedded engine: what is left of a token's probability when top-k has cut the rest."""
    engine = LocalEngine(TINY_MODEL)
    try:
        async with (
            serve(make_app(engine)) as url,
            tokentape.open(model=TINY_MODEL, engine=url, capture=["support"]) as tape,
        ):
            session = tape.session()
            await session.chat([USER], top_k=3, top_p=0.95, temperature=1.5, max_tokens=40, seed=1)
            await session.chat([USER], temperature=0, top_k=3, max_tokens=4)
            rows = await session.samples()
    finally:
        engine.close()
    assert check_samples(rows) == []
    row = next(row for row in rows if row["support"] is not None)
    places = [at for at, masked in enumerate(row["loss_mask"]) if masked]
    sizes = {len(row["support"][at]) for at in places}
    assert sizes <= {1, 2, 3}
    assert len(sizes) > 1
    for at in places:
        logprob, among = row["logprobs"][at], row["sampling_logprobs"][at]
        assert logprob <= among + 1e-6
        if len(row["support"][at]) == 1:
            assert among == 0.0
    assert any(row["sampling_logprobs"][at] > row["logprobs"][at] + 1e-3 for at in places)
    assert [r["turns"][0]["logprob_basis"] for r in rows if r["support"] is None] == ["greedy"]


@pytest.mark.parametrize(
    ("sampling", "basis"),
    [
        ({}, "sampled"),
        ({"temperature": 0.7, "frequency_penalty": 0.5}, "sampled"),
        ({"top_p": 1.0, "top_k": -1, "min_p": 0.0}, "sampled"),
        ({"top_p": 0.99}, "untruncated"),
        ({"top_k": 50}, "untruncated"),
        ({"min_p": 0.1}, "untruncated"),
        ({"temperature": 0}, "greedy"),
        ({"top_k": 1}, "greedy"),
    ],
)
async def test_the_basis_of_log_probabilities(
    fake: FakeSGLang, model_dir: Path, sampling: dict[str, Any], basis: str
) -> None:
    fake.script(sampled("hello"))
    async with tokentape.open(model=model_dir, engine=fake.url) as tape:
        session = tape.session(sampling=sampling)
        await session.chat([USER])
        assert (await session.samples())[0]["turns"][0]["logprob_basis"] == basis


@pytest.mark.parametrize("field", ["output_token_sampling_mask", "output_token_sampling_logprobs"])
async def test_an_engine_that_does_not_tell(fake: FakeSGLang, model_dir: Path, field: str) -> None:
    fake.script(Fault("missing", field=f"meta_info.{field}", reply=sampled("hello")))
    async with tokentape.open(model=model_dir, engine=fake.url, capture=["support"]) as tape:
        with pytest.raises(tokentape.errors.EngineProtocolError, match=field):
            await tape.session().chat([USER], top_k=5)


async def test_a_model_without_experts(fake: FakeSGLang, model_dir: Path) -> None:
    fake.script(Fault("missing", field="meta_info.routed_experts", reply=sampled("hello")))
    async with tokentape.open(model=model_dir, engine=fake.url, capture=["routed-experts"]) as tape:
        with pytest.raises(tokentape.errors.EngineProtocolError, match="--enable-return-routed-experts"):
            await tape.session().chat([USER])


async def test_the_engine_has_defaults_of_its_own(fake: FakeSGLang, gateway: Gateway) -> None:
    """`--preferred-sampling-params`: they are part of what the turn was sampled with."""
    fake.preferred_sampling_params = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "regex": None}
    fake.script(sampled("hello"), sampled("hello"))
    session_id = await gateway.create(sampling={"top_p": 0.5})
    await gateway.chat(session_id, [USER], temperature=1.5)
    params = fake.requests[0].sampling_params
    assert (params["temperature"], params["top_p"], params["top_k"]) == (1.5, 0.5, 20)
    (sample,) = await gateway.samples(session_id)
    assert sample["turns"][0]["logprob_basis"] == "untruncated"
    assert json.loads(sample["sampling"])[0]["top_k"] == 20
