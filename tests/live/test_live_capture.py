"""`make live`: the kept support of a real SGLang, against the log-probabilities that it reports itself."""

import math
from collections.abc import Callable
from typing import Any

import pytest

import tokentape
from tokentape.errors import EngineError
from tokentape.invariants import check_samples

pytestmark = pytest.mark.live


async def test_the_support_of_truncated_turns(sglang_server: Callable[[str], Any]) -> None:
    server = sglang_server("tiny")
    user = {"role": "user", "content": "Tell a long story."}
    async with tokentape.open(model=server.model_dir, engine=server.url, capture=["support"]) as tape:
        session = tape.session()
        async with session.openai() as client:
            stream = await client.chat.completions.create(
                model="m",
                messages=[user],  # type: ignore[list-item]
                max_tokens=40,
                temperature=1.5,
                top_p=0.9,
                stream=True,
                extra_body={"top_k": 5},
            )
            async for _ in stream:
                pass
        await session.chat([user], top_k=3, temperature=1.5, max_tokens=40)
        rows = await session.samples()
    assert check_samples(rows) == []
    for row in rows:
        sizes = set[int]()
        for at, masked in enumerate(row["loss_mask"]):
            if masked:
                sizes.add(len(row["support"][at]))
                assert row["logprobs"][at] <= row["sampling_logprobs"][at] + 1e-3
                if len(row["support"][at]) == 1:
                    assert math.isclose(row["sampling_logprobs"][at], 0.0, abs_tol=1e-3)
        assert max(sizes) in (3, 5)


async def test_a_model_without_experts_says_so(sglang_server: Callable[[str], Any]) -> None:
    server = sglang_server("tiny")
    async with tokentape.open(model=server.model_dir, engine=server.url, capture=["routed-experts"]) as tape:
        with pytest.raises(EngineError, match="routed"):
            await tape.session().chat([{"role": "user", "content": "hello"}], max_tokens=4)
