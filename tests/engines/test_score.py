"""Scoring: what is sent, and that an answer that is not of exactly these ids is refused."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.engines.sglang_score import decode_scores, encode_score
from tokentape.errors import (
    ContextOverflow,
    EngineAborted,
    EngineProtocolError,
    EngineUnavailable,
    RequestError,
)
from tokentape.testing import FakeSGLang, Fault, pseudo_logprob

CAPTURES = Path(__file__).parents[3] / "shared" / "captures" / "sglang-0.5.23"


@pytest.fixture
async def fake() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang(vocab_size=100, context_length=16) as fake:
        yield fake


@pytest.fixture
async def engine(fake: FakeSGLang) -> AsyncIterator[SGLangEngine]:
    async with contextlib.aclosing(SGLangEngine(SGLangConfig(fake.url), vocab_size=100)) as engine:
        yield engine


async def test_the_tokens_behind_a_prefix_are_scored(fake: FakeSGLang, engine: SGLangEngine) -> None:
    ids = [3, 1, 4, 1, 5]
    scores = await engine.score(ids, 2)
    assert scores.logprobs == [pseudo_logprob(i, at) for at, i in enumerate(ids)][2:]
    assert (scores.temperature, scores.weight_version) == (1.0, "default")
    assert (await engine.score(ids, 4)).logprobs == [pseudo_logprob(5, 4)]
    assert fake.requests[0].body["logprob_start_len"] == 1
    assert fake.requests[0].sampling_params["max_new_tokens"] == 0
    assert len({request.rid for request in fake.requests}) == 2


async def test_a_temperature_that_the_engine_does_not_know_is_not_pretended(engine: SGLangEngine) -> None:
    assert (await engine.score([1, 2], 1, 0.7)).temperature == 1.0


@pytest.mark.parametrize(
    ("ids", "start", "temperature"),
    [
        ([1, 2, 100], 1, 1.0),
        ([100, 2, 3], 1, 1.0),
        ([-1, 2, 3], 1, 1.0),
        ([1, 2, 3], 0, 1.0),
        ([1, 2, 3], 3, 1.0),
        ([], 1, 1.0),
        ([1, 2, 3], 1, 0.0),
        ([1, 2, 3], 1, float("nan")),
    ],
)
async def test_what_must_not_be_sent_is_not(
    fake: FakeSGLang, engine: SGLangEngine, ids: list[int], start: int, temperature: float
) -> None:
    with pytest.raises(RequestError):
        await engine.score(ids, start, temperature)
    assert fake.requests == []


async def test_refusals_have_their_types(fake: FakeSGLang, engine: SGLangEngine) -> None:
    with pytest.raises(ContextOverflow) as caught:
        await engine.score(list(range(16)), 1)
    assert caught.value.context_length == 16
    fake.script(Fault("abort", after=0), Fault("disconnect"))
    with pytest.raises(EngineAborted):
        await engine.score([1, 2], 1)
    with pytest.raises(EngineUnavailable):
        await engine.score([1, 2], 1)
    assert (await engine.score([1, 2], 1)).logprobs  # nothing is stuck


def answer(entries: Any = None, **meta: Any) -> bytes:
    entries = [[None, 1, None], [-0.5, 2, None], [-1.5, 3, None]] if entries is None else entries
    return json.dumps({"meta_info": {"input_token_logprobs": entries, "prompt_tokens": 3, **meta}}).encode()


def test_a_good_answer_is_read() -> None:
    scores = decode_scores(answer(weight_version="7", input_logprob_temperature=0.5), [1, 2, 3], 1, 100)
    assert (scores.logprobs, scores.temperature, scores.weight_version) == ([-0.5, -1.5], 0.5, "7")


@pytest.mark.parametrize(
    "payload",
    {
        "no JSON": b"<html>",
        "no list": json.dumps({"meta_info": {"prompt_tokens": 3}}).encode(),
        "another length": answer(prompt_tokens=4),
        "an id too few": answer([[None, 1, None], [-0.5, 2, None]]),
        "another id": answer([[None, 1, None], [-0.5, 3, None], [-1.5, 3, None]]),
        "another first id": answer([[None, 9, None], [-0.5, 2, None], [-1.5, 3, None]]),
        "null": answer([[None, 1, None], [None, 2, None], [-1.5, 3, None]]),
        "above 0": answer([[None, 1, None], [0.5, 2, None], [-1.5, 3, None]]),
        "no value": answer([[None, 1, None], [-9999.0, 2, None], [-1.5, 3, None]]),
    }.items(),
    ids=lambda item: item[0],
)
def test_another_answer_is_refused(payload: tuple[str, bytes]) -> None:
    with pytest.raises(EngineProtocolError):
        decode_scores(payload[1], [1, 2, 3], 1, 100)


def test_the_last_id_of_the_vocabulary_is_called_0() -> None:
    """As SGLang 0.5.23 does; nothing else is."""
    payload = answer([[None, 1, None], [-0.5, 0, None], [-1.5, 3, None]])
    assert decode_scores(payload, [1, 99, 3], 1, 100).logprobs == [-0.5, -1.5]
    for ids, vocab_size in (([1, 99, 3], 101), ([1, 98, 3], 100)):
        with pytest.raises(EngineProtocolError, match="token 1 is"):
            decode_scores(payload, ids, 1, vocab_size)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "start"), [("gen_input_logprobs", 1), ("gen_max_new_tokens_0", 1), ("cache_turn2_lp0", 43)]
)
def test_a_real_servers_answer(name: str, start: int) -> None:
    if not CAPTURES.is_dir():
        pytest.skip("the captures are not beside the checkout")
    capture = json.loads((CAPTURES / f"{name}.json").read_text())
    ids = capture["request"]["body"]["input_ids"]
    assert capture["request"]["body"]["logprob_start_len"] == start - 1
    sent = msgspec.json.decode(encode_score(ids, start, "r", 50_000))
    assert sent["logprob_start_len"] == start - 1
    scores = decode_scores(capture["raw_body"].encode(), ids, start, 49_152)
    assert len(scores.logprobs) == len(ids) - start
    assert scores.weight_version == "default"
