"""What a request says beyond its prompt: likeliest tokens, biases, constraints. The same on every engine.

The embedded engine keeps no constraint and must say so; the fake keeps none and answers as told.
"""

import contextlib
import json
import math
import uuid
from itertools import pairwise
from typing import Any

import pytest

from contract import PROMPT, Contracted, body, both_ways, client_of, events
from tokentape.engines.base import GenerateRequest, TokenChunk
from tokentape.engines.sglang import SGLangEngine
from tokentape.errors import RequestError
from tokentape.model import model_sizes
from tokentape.types import Prompt, Sampling

SCHEMA = '{"enum":["yes","no"]}'  # no object: a small model fills those with blanks for ever
NO_JSON = "{"


def name_of(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["engine"]


def vocab_size(engine: Contracted) -> int:
    size = model_sizes(engine.model_dir).vocab_size
    assert size is not None
    return size


def check_top(answer: Any, num: int) -> None:
    meta = answer["meta_info"]
    assert len(meta["output_top_logprobs"]) == len(answer["output_ids"])
    for (logprob, token, _), tops in zip(
        meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True
    ):
        assert len(tops) == len({i for _, i, _ in tops}) == num
        assert all(a[0] >= b[0] for a, b in pairwise(tops))
        assert all(math.isfinite(value) and value <= 1e-4 for value, _, _ in tops)
        assert {i: value for value, i, _ in tops}.get(token, logprob) == logprob


async def distribution(engine: Contracted, **params: Any) -> tuple[dict[int, float], tuple[float, int]]:
    """Log-probabilities of the whole vocabulary for the first token, and what was sampled of it."""
    asked = body(1, **params) | {"top_logprobs_num": vocab_size(engine)}
    status, answer = await engine.request("POST", "/generate", asked)
    assert status == 200, answer
    [top] = answer["meta_info"]["output_top_logprobs"]
    [(logprob, token, _)] = answer["meta_info"]["output_token_logprobs"]
    return {i: value for value, i, _ in top}, (logprob, token)


# -- likeliest tokens


async def test_top_logprobs(engine: Contracted) -> None:
    status, answer = await engine.request("POST", "/generate", body(6) | {"top_logprobs_num": 5})
    assert status == 200
    check_top(answer, 5)
    _, answer = await engine.request("POST", "/generate", body(6))
    assert "output_top_logprobs" not in answer["meta_info"]


async def test_top_logprobs_of_a_stream_are_cumulative(engine: Contracted) -> None:
    parts = await events(engine, body(6, stream=True) | {"top_logprobs_num": 3})
    for part in parts:
        check_top(part, 3)
    for earlier, later in pairwise(parts):
        seen = earlier["meta_info"]["output_top_logprobs"]
        assert later["meta_info"]["output_top_logprobs"][: len(seen)] == seen


async def chunks_of(client: SGLangEngine, request: GenerateRequest) -> list[TokenChunk]:
    async with contextlib.aclosing(client.generate(request)) as parts:
        return [part async for part in parts if isinstance(part, TokenChunk)]


@both_ways
@pytest.mark.parametrize("num", [0, 4])
async def test_top_through_the_client(engine: Contracted, stream: bool, num: int) -> None:
    async with client_of(engine) as client:
        sampling = Sampling(max_tokens=6, temperature=1.0)
        chunks = await chunks_of(
            client, GenerateRequest(uuid.uuid4().hex, Prompt.of(PROMPT), sampling, stream, num)
        )
        assert chunks
        for chunk in chunks:
            if not num:
                assert chunk.top is None
                continue
            assert chunk.top is not None
            assert [len(top) for top in chunk.top] == [num] * len(chunk.ids)
            for top, token, logprob in zip(chunk.top, chunk.ids, chunk.logprobs, strict=True):
                assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
                assert dict(top).get(token, logprob) == logprob


# -- biases


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
async def test_a_bias_is_part_of_the_log_probabilities(
    engine: Contracted, temperature: float, request: pytest.FixtureRequest
) -> None:
    """It is added to the logits before the temperature divides them; what is reported follows from both."""
    if name_of(request) == "fake":
        pytest.skip("a fake has no distribution")
    biases = {100: 3.0, 200: -2.0}
    free, _ = await distribution(engine, temperature=temperature)
    sent = {str(i): bias for i, bias in biases.items()}
    biased, (logprob, token) = await distribution(engine, temperature=temperature, logit_bias=sent)
    scale = temperature or 1.0
    raw = {i: value + biases.get(i, 0.0) / scale for i, value in free.items() if value > -60}
    norm = math.log(sum(map(math.exp, raw.values())))
    assert all(abs(biased[i] - (value - norm)) < 1e-4 for i, value in raw.items())
    assert biased[token] == logprob
    assert biased != free


@both_ways
async def test_a_bias_outside_the_vocabulary(engine: Contracted, stream: bool) -> None:
    request = body(2, logit_bias={str(vocab_size(engine)): 1.0}, stream=stream)
    if stream:
        [event] = await events(engine, request)
        assert event["error"]["code"] == 400
    else:
        status, answer = await engine.request("POST", "/generate", request)
        assert (status, "logit_bias" in answer["error"]["message"]) == (400, True)


async def test_the_client_refuses_what_an_engine_would_not_survive(engine: Contracted) -> None:
    size = vocab_size(engine)
    async with client_of(engine) as client:
        for sampling, num, param in (
            (Sampling(max_tokens=1, logit_bias=((size, 1.0),)), 0, "logit_bias"),
            (Sampling(max_tokens=1, logit_bias=((3, math.nan),)), 0, "logit_bias"),
            (Sampling(max_tokens=1), size + 1, "top_logprobs"),
        ):
            with pytest.raises(RequestError) as refused:
                await chunks_of(
                    client, GenerateRequest(uuid.uuid4().hex, Prompt.of(PROMPT), sampling, False, num)
                )
            assert refused.value.param == param
    assert (await engine.request("GET", "/health"))[0] == 200


# -- constraints


@both_ways
@pytest.mark.parametrize("field", ["json_schema", "structural_tag"])
async def test_a_constraint_is_kept_or_refused(
    engine: Contracted, field: str, stream: bool, request: pytest.FixtureRequest
) -> None:
    text = SCHEMA
    if field == "structural_tag":
        rule = {"type": "json_schema", "json_schema": json.loads(SCHEMA)}
        text = json.dumps({"type": "structural_tag", "format": rule})
    sampling = Sampling(max_tokens=200, temperature=0.0, **{field: text})
    asked = GenerateRequest(uuid.uuid4().hex, Prompt.of(PROMPT), sampling, stream)
    async with client_of(engine) as client:
        if name_of(request) == "embedded":
            with pytest.raises(RequestError, match=f"{field} is not supported") as refused:
                await chunks_of(client, asked)
            assert (refused.value.status, refused.value.param) == (400, "response_format")
            return
        ids = [i for chunk in await chunks_of(client, asked) for i in chunk.ids]
    if name_of(request) == "sglang":
        _, said = await engine.request("POST", "/detokenize", {"tokens": ids, "skip_special_tokens": True})
        assert json.loads(said["text"]) in ("yes", "no")


@both_ways
@pytest.mark.parametrize("field", ["json_schema", "structural_tag"])
async def test_a_bad_constraint_is_the_callers_fault(engine: Contracted, field: str, stream: bool) -> None:
    sampling = Sampling(max_tokens=8, temperature=1.0, **{field: NO_JSON})
    async with client_of(engine) as client:
        for _ in range(2):  # a real engine remembers, and refuses the second time at once
            with pytest.raises(RequestError) as refused:
                await chunks_of(
                    client, GenerateRequest(uuid.uuid4().hex, Prompt.of(PROMPT), sampling, stream)
                )
            assert (refused.value.status, refused.value.param) == (400, "response_format")
        good = GenerateRequest(
            uuid.uuid4().hex, Prompt.of(PROMPT), Sampling(max_tokens=2, temperature=1.0), stream
        )
        assert await chunks_of(client, good)


# -- bodies that are no JSON


@pytest.mark.parametrize("raw", [b'{"text":"\xff\xfe"}', b'{"a":' + b"[" * 100_000], ids=["utf-8", "nested"])
async def test_a_body_that_is_no_json(engine: Contracted, raw: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    async with engine.http.post(f"{engine.url}/generate", data=raw, headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["object"] == "error"


async def test_negative_control(engine: Contracted) -> None:
    """The checker of likeliest tokens can fail."""
    _, answer = await engine.request("POST", "/generate", body(3) | {"top_logprobs_num": 2})
    check_top(answer, 2)
    answer["meta_info"]["output_top_logprobs"][1].reverse()
    with pytest.raises(AssertionError):
        check_top(answer, 2)
