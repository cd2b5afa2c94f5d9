"""SGLang's native protocol, as far as tokentape relies on it: the same tests on every engine.

What an engine samples differs, so these tests ask for relations: counts, limits, statuses, and what two
answers have in common.
"""

import asyncio
import contextlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from contract import PROMPT, Contracted, body, both_ways, client_of, events
from recording import converse
from tokentape.engines.base import GenerateRequest, GenerateResult, TokenChunk
from tokentape.engines.sglang import SGLangEngine
from tokentape.errors import ContextOverflow, EngineAborted, EngineRejected, TokentapeError
from tokentape.types import Prompt, Sampling


def check(answer: Any, *, num_prompt: int, num_sampled: int) -> None:
    ids, meta = answer["output_ids"], answer["meta_info"]
    assert len(ids) == meta["completion_tokens"] == num_sampled
    assert meta["prompt_tokens"] == num_prompt
    assert [i for _, i, _ in meta["output_token_logprobs"]] == ids
    assert all(-9999 < logprob <= 1e-4 for logprob, _, _ in meta["output_token_logprobs"])
    assert 0 <= meta["cached_tokens"] <= num_prompt


# -- what is sampled


async def test_whole(engine: Contracted) -> None:
    status, answer = await engine.request("POST", "/generate", body(8) | {"rid": "whole"})
    assert status == 200
    check(answer, num_prompt=len(PROMPT), num_sampled=8)
    assert answer["meta_info"]["id"] == "whole"
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    [span] = answer["meta_info"]["weight_versions"]
    assert (span["start"], span["end"]) == (0, 8)
    assert span["version"] == answer["meta_info"]["weight_version"]


async def test_stream_is_cumulative(engine: Contracted) -> None:
    parts = await events(engine, body(8, stream=True))
    assert len(parts) > 1
    for part in parts:
        check(part, num_prompt=len(PROMPT), num_sampled=len(part["output_ids"]))
    for earlier, later in pairwise(parts):
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
    assert [p["meta_info"]["finish_reason"] for p in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    assert len(parts[-1]["output_ids"]) == 8


async def test_a_stop_token_is_among_the_ids(engine: Contracted) -> None:
    _, answer = await engine.request("POST", "/generate", body(24, temperature=0.0, ignore_eos=False))
    stop = answer["output_ids"][:4][-1]
    _, answer = await engine.request(
        "POST", "/generate", body(24, temperature=0.0, stop_token_ids=[stop], ignore_eos=False)
    )
    assert answer["output_ids"][-1] == stop
    assert answer["output_ids"].count(stop) == 1
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    check(answer, num_prompt=len(PROMPT), num_sampled=len(answer["output_ids"]))


async def test_a_prefix_is_cached(engine: Contracted) -> None:
    prompt = [50 + n for n in range(40)]
    _, first = await engine.request("POST", "/generate", body(8, prompt=prompt))
    longer = [*prompt, *first["output_ids"], *PROMPT]
    _, second = await engine.request("POST", "/generate", body(8, prompt=longer))
    assert 0 < second["meta_info"]["cached_tokens"] < len(longer)
    check(second, num_prompt=len(longer), num_sampled=8)


async def test_unknown_fields_are_ignored(engine: Contracted) -> None:
    status, _ = await engine.request("POST", "/generate", body(2) | {"nonsense": 1})
    assert status == 200


# -- what is refused

REFUSED: dict[str, Any] = {
    "no prompt": {"sampling_params": {"max_new_tokens": 2}},
    "empty prompt": body(2, prompt=[]),
    "negative max_new_tokens": body(-1),
    "unknown sampling parameter": body(2, nonsense=1),
    "negative temperature": body(2, temperature=-1.0),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused(engine: Contracted, name: str) -> None:
    status, answer = await engine.request("POST", "/generate", REFUSED[name])
    assert status == 400, answer
    assert "error" in answer or "message" in answer


async def test_not_json(engine: Contracted) -> None:
    async with engine.http.post(f"{engine.url}/generate", data=b"{") as response:
        assert response.status == 400


async def test_too_long(engine: Contracted) -> None:
    """A status when whole; an event inside a 200 when streaming."""
    context = engine.context_length
    for request in (
        body(2, prompt=[33] * (context + 9)),
        body(2, prompt=[33] * context),
        body(context, prompt=PROMPT),
    ):
        status, answer = await engine.request("POST", "/generate", request)
        assert status == 400
        assert "context length" in answer["error"]["message"]
        [event] = await events(engine, request | {"stream": True})
        assert event["error"]["code"] == 400
        assert "context length" in event["error"]["message"]
    status, _ = await engine.request("POST", "/generate", body(2))
    assert status == 200


async def test_a_rid_in_flight(engine: Contracted) -> None:
    request = body(engine.much) | {"rid": "twice"}
    first = asyncio.create_task(engine.request("POST", "/generate", request))
    await asyncio.sleep(0.3)
    status, answer = await engine.request("POST", "/generate", request)
    assert status == 400
    assert "Duplicate request ID" in answer["error"]["message"]
    await engine.request("POST", "/abort_request", {"rid": "twice"})
    assert (await first)[0] == 200


# -- aborts


@both_ways
async def test_abort(engine: Contracted, stream: bool) -> None:
    request = body(engine.much, stream=stream) | {"rid": f"gone-{stream}"}
    running = asyncio.create_task(
        events(engine, request) if stream else engine.request("POST", "/generate", request)
    )
    await asyncio.sleep(0.5)
    status, _ = await engine.request("POST", "/abort_request", {"rid": f"gone-{stream}"})
    assert status == 200
    result: Any = await running
    answer = result[-1] if stream else result[1]
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(answer["output_ids"]) < engine.much


async def test_abort_of_nothing(engine: Contracted) -> None:
    status, _ = await engine.request("POST", "/abort_request", {"rid": "nobody"})
    assert status == 200


async def test_a_client_that_leaves_frees_its_rid(engine: Contracted) -> None:
    """The generation ends with its client: the same rid can be used again soon."""
    request = body(engine.much, stream=True) | {"rid": "left"}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5), engine.http.post(f"{engine.url}/generate", json=request) as response:
            await response.content.readany()
    for _ in range(100):
        status, _ = await engine.request("POST", "/generate", body(1) | {"rid": "left"})
        if status == 200:
            return
        await asyncio.sleep(0.2)
    pytest.fail("the rid is still in flight")


# -- who it is


async def test_health_and_identity(engine: Contracted) -> None:
    assert (await engine.request("GET", "/health"))[0] == 200
    status, info = await engine.request("GET", "/model_info")
    assert status == 200
    assert isinstance(info["model_path"], str)
    assert isinstance(info["weight_version"], str)
    assert (await engine.request("GET", "/nothing"))[0] == 404


async def test_the_weight_version_shows(engine: Contracted) -> None:
    status, _ = await engine.request("POST", "/update_weight_version", {"new_version": "step-7"})
    if status == 404:
        pytest.skip("the fake's weight_version is set from the test")
    try:
        _, answer = await engine.request("POST", "/generate", body(4))
        assert answer["meta_info"]["weight_versions"] == [{"version": "step-7", "start": 0, "end": 4}]
        assert (await engine.request("GET", "/model_info"))[1]["weight_version"] == "step-7"
    finally:
        await engine.request("POST", "/update_weight_version", {"new_version": "default"})


# -- through the client


async def generate(client: SGLangEngine, request: GenerateRequest) -> tuple[list[int], GenerateResult]:
    ids: list[int] = []
    async with contextlib.aclosing(client.generate(request)) as parts:
        async for part in parts:
            if isinstance(part, TokenChunk):
                ids += part.ids
            else:
                return ids, part
    raise AssertionError("no result")


@both_ways
async def test_client(engine: Contracted, stream: bool) -> None:
    async with client_of(engine) as client:
        sampling = Sampling(max_tokens=12, temperature=1.0, top_p=0.95, seed=7)
        ids, result = await generate(client, GenerateRequest("a", Prompt.of(PROMPT), sampling, stream))
        assert ids == result.completion_ids
        assert len(result.logprobs) == len(ids) <= 12
        assert result.versions[-1].end == len(ids)
        info = await client.info()
        assert info.context_length == engine.context_length
        assert info.weight_version == result.versions[-1].version


@both_ways
async def test_client_errors(engine: Contracted, stream: bool) -> None:
    async with client_of(engine) as client:
        long = Prompt.of([33] * engine.context_length)
        for prompt, max_tokens in ((long, 2), (Prompt.of(PROMPT), engine.context_length)):
            with pytest.raises(ContextOverflow) as raised:
                await generate(client, GenerateRequest("b", prompt, Sampling(max_tokens=max_tokens), stream))
            assert raised.value.context_length == engine.context_length
            assert raised.value.num_prompt_tokens == len(prompt)
        with pytest.raises(TokentapeError) as refused:
            await generate(
                client,
                GenerateRequest("c", Prompt.of(PROMPT), Sampling(max_tokens=2, temperature=-1.0), stream),
            )
        assert isinstance(refused.value, EngineRejected)
        request = GenerateRequest(
            "d", Prompt.of(PROMPT), Sampling(max_tokens=engine.much, temperature=1.0, top_p=1.0), stream
        )
        running = asyncio.create_task(generate(client, request))
        await asyncio.sleep(0.3)
        assert (await engine.request("POST", "/abort_request", {"rid": "", "abort_all": True}))[0] == 200
        with contextlib.suppress(EngineAborted):  # or the model said its end of turn before
            await running


async def test_abort_by_leaving(engine: Contracted) -> None:
    """Cancelling the reader ends the generation on the engine: its rid is free again."""
    async with client_of(engine) as client:
        request = GenerateRequest(
            "e", Prompt.of(PROMPT), Sampling(max_tokens=engine.much, temperature=1.0), True
        )
        running = asyncio.create_task(generate(client, request))
        await asyncio.sleep(0.5)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        short = GenerateRequest("e", Prompt.of(PROMPT), Sampling(max_tokens=1), True)
        for _ in range(100):
            with contextlib.suppress(EngineRejected):  # a busy SGLang holds the rid for a moment
                await generate(client, short)
                return
            await asyncio.sleep(0.2)
        pytest.fail("the rid is still in flight")


async def test_negative_control(engine: Contracted) -> None:
    """The checker of answers can fail."""
    _, answer = await engine.request("POST", "/generate", body(4))
    check(answer, num_prompt=len(PROMPT), num_sampled=4)
    answer["output_ids"][0] += 1
    with pytest.raises(AssertionError):
        check(answer, num_prompt=len(PROMPT), num_sampled=4)


# -- through the gateway


async def test_a_session(engine: Contracted, tmp_path: Path) -> None:
    """Six turns at temperature 1 extend each other, id by id, at the engine's own door."""
    num_completions, num_odd = await converse(
        engine.url,
        engine.model_dir,
        tmp_path / "store.sqlite",
        openings=[],
        num_turns=6,
        fields={"max_tokens": 16},
        history="preserve",  # a random model may well open a thought
    )
    assert num_completions == 18
    assert num_odd > 0 or engine.model_dir.name == "tiny"
