"""What a request asks beside tokens (likeliest tokens, biases, constraints), and the fakes that answer it."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest

from tokentape import errors
from tokentape.engines.base import GenerateRequest, TokenChunk
from tokentape.engines.growing import GrowingList
from tokentape.engines.server.requests import BadBodyError, check_top, decode_body, parse_input_ids
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.engines.sglang_protocol import Completion, encode_request
from tokentape.testing import FakeEngine, FakeSGLang, Fault, Reply, pseudo_logprob, pseudo_top
from tokentape.types import Prompt, Sampling

PROMPT = [5, 6, 7, 8]
IDS = [11, 12, 13]
VOCAB = 1000
FLOAT_MIN = -3.4028234663852886e38

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
both_streams = pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "incremental"])


@pytest.fixture
async def fake() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang(vocab_size=VOCAB, context_length=100) as fake:
        yield fake


@pytest.fixture
async def engine(fake: FakeSGLang) -> AsyncIterator[SGLangEngine]:
    async with contextlib.aclosing(SGLangEngine(SGLangConfig(fake.url), vocab_size=VOCAB)) as engine:
        yield engine


def ask(*, stream: bool = False, num_top: int = 0, **sampling: Any) -> GenerateRequest:
    return GenerateRequest("r", Prompt.of(PROMPT), Sampling(**{"max_tokens": 9, **sampling}), stream, num_top)


async def chunks_of(engine: SGLangEngine | FakeEngine, request: GenerateRequest) -> list[TokenChunk]:
    async with contextlib.aclosing(engine.generate(request)) as parts:
        return [part async for part in parts if isinstance(part, TokenChunk)]


def sent(**choices: Any) -> dict[str, Any]:
    return json.loads(encode_request(ask(**choices), "1-r", VOCAB, None))


# -- what is sent


def test_the_fields_that_are_sent() -> None:
    plain = sent()
    assert plain["sampling_params"] == {"max_new_tokens": 9}
    assert "top_logprobs_num" not in plain
    full = sent(num_top=5, logit_bias=((7, 2.5), (0, -100)), json_schema='{"type":"object"}')
    assert full["top_logprobs_num"] == 5
    assert full["sampling_params"]["logit_bias"] == {"7": 2.5, "0": -100}
    assert full["sampling_params"]["json_schema"] == '{"type":"object"}'
    assert sent(structural_tag="{}")["sampling_params"]["structural_tag"] == "{}"


@pytest.mark.parametrize(
    "pairs",
    [((VOCAB, 1.0),), ((-1, 1.0),), ((3, math.nan),), ((3, math.inf),), ((3, 1e39),), ((3, 1.0), (3, 2.0))],
    ids=str,
)
async def test_a_bias_that_is_never_sent(
    fake: FakeSGLang, engine: SGLangEngine, pairs: tuple[tuple[int, float], ...]
) -> None:
    with pytest.raises(errors.RequestError, match="logit_bias") as refused:
        await chunks_of(engine, ask(logit_bias=pairs))
    assert refused.value.param == "logit_bias"
    assert fake.requests == []


@pytest.mark.parametrize("num", [-1, VOCAB + 1])
async def test_a_number_of_likeliest_tokens_that_is_never_sent(engine: SGLangEngine, num: int) -> None:
    with pytest.raises(errors.RequestError) as refused:
        await chunks_of(engine, ask(num_top=num))
    assert refused.value.param == "top_logprobs"


@pytest.mark.parametrize("constraints", [{"json_schema": "{}", "structural_tag": "{}"}, {"json_schema": ""}])
def test_constraints_that_are_our_bug(constraints: dict[str, str]) -> None:
    with pytest.raises(errors.InternalError):
        sent(**constraints)


# -- likeliest tokens


@both_ways
@both_streams
async def test_top(fake: FakeSGLang, engine: SGLangEngine, stream: bool, incremental: bool) -> None:
    fake.incremental = incremental
    fake.script(Reply(IDS))
    chunks = await chunks_of(engine, ask(stream=stream, num_top=4))
    assert [len(chunk.top or []) for chunk in chunks] == [len(chunk.ids) for chunk in chunks]
    top = [place for chunk in chunks for place in chunk.top or []]
    assert top == [pseudo_top(i, at, 4, VOCAB) for at, i in enumerate(IDS)]
    assert [dict(place)[i] for place, i in zip(top, IDS, strict=True)] == [
        pseudo_logprob(i, at) for at, i in enumerate(IDS)
    ]


async def test_the_fake_engine_answers_top() -> None:
    [first, *_] = await chunks_of(FakeEngine(Reply(IDS)), ask(stream=True, num_top=2))
    assert first.top == [pseudo_top(IDS[0], 0, 2, 32_000)]
    [whole] = await chunks_of(FakeEngine(Reply(IDS)), ask())
    assert whole.top is None


def answer(tops: Any, *, ids: list[int] = IDS, finish: bool = True) -> bytes:
    meta = {
        "finish_reason": {"type": "stop", "matched": ids[-1]} if finish else None,
        "completion_tokens": len(ids),
        "weight_version": "v",
        "output_token_logprobs": [[-0.5, i, None] for i in ids],
    }
    if tops is not None:
        meta["output_top_logprobs"] = tops
    return msgspec.json.encode({"output_ids": ids, "meta_info": meta})


def tops_of(*entries: Any) -> list[Any]:
    return [[[value, i, None] for value, i in entry] for entry in entries]


GOOD = [[(-0.5, i), (-1.5, 20)] for i in IDS]


def test_impossible_tokens_are_left_out() -> None:
    tops = tops_of([(-0.5, 11), (FLOAT_MIN, 0)], *GOOD[1:])
    chunk = Completion(ask(num_top=2), VOCAB).feed(answer(tops))
    assert chunk is not None
    assert chunk.top == [[(11, -0.5)], [(12, -0.5), (20, -1.5)], [(13, -0.5), (20, -1.5)]]


def test_the_sampled_token_need_not_be_among_them() -> None:
    tops = tops_of([(-0.4, 30), (-0.45, 31)], *GOOD[1:])
    chunk = Completion(ask(num_top=2), VOCAB).feed(answer(tops))
    assert chunk is not None
    assert chunk.top is not None
    assert chunk.top[0] == [(30, -0.4), (31, -0.45)]


BAD: dict[str, Any] = {
    "missing": None,
    "null": [None, *tops_of(*GOOD[1:])],
    "one place too few": tops_of(*GOOD[1:]),
    "one place too many": tops_of(*GOOD, GOOD[0]),
    "one entry too few": tops_of([(-0.5, 11)], *GOOD[1:]),
    "one entry too many": tops_of([(-0.5, 11), (-1.0, 1), (-1.5, 20)], *GOOD[1:]),
    "none possible": tops_of([(FLOAT_MIN, 11), (FLOAT_MIN, 20)], *GOOD[1:]),
    "the same id twice": tops_of([(-0.5, 11), (-1.5, 11)], *GOOD[1:]),
    "outside the vocabulary": tops_of([(-0.5, 11), (-1.5, VOCAB)], *GOOD[1:]),
    "negative id": tops_of([(-0.5, 11), (-1.5, -1)], *GOOD[1:]),
    "worst first": tops_of([(-1.5, 20), (-0.5, 11)], *GOOD[1:]),
    "no number": tops_of([(None, 11), (-1.5, 20)], *GOOD[1:]),
    "above zero": tops_of([(0.5, 20), (-0.5, 11)], *GOOD[1:]),
    "another log-probability than the sampled one": tops_of([(-0.4, 11), (-1.5, 20)], *GOOD[1:]),
    "not a list": {"0": 1},
}


@pytest.mark.parametrize("name", BAD)
def test_top_that_contradicts_itself(name: str) -> None:
    with pytest.raises(errors.EngineProtocolError):
        Completion(ask(num_top=2), VOCAB).feed(answer(BAD[name]))


def test_top_that_does_not() -> None:
    """The control for the test above."""
    assert Completion(ask(num_top=2), VOCAB).feed(answer(tops_of(*GOOD))) is not None
    assert Completion(ask(), VOCAB).feed(answer(None)) is not None


def test_top_that_changes_within_a_stream() -> None:
    completion = Completion(ask(stream=True, num_top=2), VOCAB)
    completion.feed(answer(tops_of(*GOOD[:2]), ids=IDS[:2], finish=False))
    with pytest.raises(errors.EngineProtocolError, match="changed within the 2 tokens"):
        completion.feed(answer(tops_of([(-0.5, 11), (-1.4, 20)], *GOOD[1:])))


def test_only_what_is_new_is_decoded() -> None:
    """A text that begins as the one before is never read again: here, its beginning could not be."""
    grown = GrowingList("x", msgspec.json.Decoder(list[int]))
    assert grown.feed(b"[1,2]", 2) == [1, 2]
    grown._text = b"[this is no JSON]"
    assert grown.feed(b"[this is no JSON,3]", 1) == [3]


# -- constraints that are refused


@both_ways
async def test_a_constraint_that_the_engine_refuses(
    fake: FakeSGLang, engine: SGLangEngine, stream: bool
) -> None:
    fake.script(Fault("grammar", message="Failed to compile json grammar: no"))
    with pytest.raises(errors.RequestError, match="Failed to compile json grammar: no") as refused:
        await chunks_of(engine, ask(stream=stream, json_schema="{}"))
    assert (refused.value.status, refused.value.param) == (400, "response_format")
    assert fake.aborts == []


@pytest.mark.parametrize(
    "message",
    [
        "Grammar-based generation (json_schema, …) is not supported when the server is launched with …",
        "Grammar preprocessing timed out: req.grammar_key=('json', '{}')",
        "structural_tag is not supported by the embedded engine.",
    ],
)
@both_ways
async def test_other_words_for_it(fake: FakeSGLang, engine: SGLangEngine, stream: bool, message: str) -> None:
    fake.script(Fault("grammar", message=message))
    with pytest.raises(errors.RequestError):
        await chunks_of(engine, ask(stream=stream, structural_tag='{"format":{}}'))


@both_ways
async def test_a_grammar_that_allows_no_token(fake: FakeSGLang, engine: SGLangEngine, stream: bool) -> None:
    """Whole, SGLang answers 500; streamed, its first event has a token without a log-probability."""
    said = "Grammar accept_token failed: Tokens not accepted: 0"
    fake.script(Fault("logprob", value=None, reply=Reply([0])) if stream else Fault("status", message=said))
    with pytest.raises(errors.RequestError) as refused:
        await chunks_of(engine, ask(stream=stream, json_schema='{"$ref":"#"}'))
    assert refused.value.param == "response_format"


@both_ways
async def test_other_refusals_stay_the_engines(fake: FakeSGLang, engine: SGLangEngine, stream: bool) -> None:
    fake.script(Fault("grammar", message="something else"))
    with pytest.raises(errors.EngineRejected):
        await chunks_of(engine, ask(stream=stream, json_schema="{}"))
    fake.script(Fault("grammar", message="Failed to compile json grammar"))
    with pytest.raises(errors.EngineRejected):  # nothing was asked of the reply
        await chunks_of(engine, ask(stream=stream))
    fake.script(Fault("logprob", value=None, reply=Reply([0])))
    with pytest.raises(errors.EngineProtocolError):
        await chunks_of(engine, ask(stream=stream))


# -- the fake server


async def test_constraints_are_recorded(fake: FakeSGLang, engine: SGLangEngine) -> None:
    await chunks_of(engine, ask(json_schema="{}", logit_bias=((3, 1.0),), num_top=2))
    [received] = fake.requests
    assert received.sampling_params["json_schema"] == "{}"
    assert received.sampling_params["logit_bias"] == {"3": 1.0}
    assert received.num_top_logprobs == 2


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"logit_bias": {str(VOCAB): 1.0}}, "logit_bias must has keys in [0, 999], got 1000."),
        ({"logit_bias": {"5": None}}, "invalid type: null, expected f64"),
        ({"logit_bias": [1]}, "invalid type: sequence, expected a map"),
        ({"json_schema": {}}, "invalid type: map, expected a string"),
        ({"json_schema": "{}", "structural_tag": "{}"}, "Only one of json_schema, regex"),
        ({"json_schema": "{"}, "Failed to compile json grammar: "),
        ({"json_schema": "5"}, "Schema should be an object or bool, but got 5"),
        ({"structural_tag": "{}"}, "Failed to compile structural_tag grammar: "),
    ],
    ids=str,
)
async def test_what_the_fake_refuses(fake: FakeSGLang, params: dict[str, Any], words: str) -> None:
    body = {"input_ids": PROMPT, "sampling_params": params}
    async with aiohttp.ClientSession() as http, http.post(f"{fake.url}/generate", json=body) as response:
        assert response.status == 400
        assert words in json.dumps(await response.json())


@both_streams
async def test_the_fakes_events(fake: FakeSGLang, incremental: bool) -> None:
    """As the real server's: cumulative, or with its flag only what is new."""
    fake.incremental = incremental
    fake.script(Reply(IDS))
    body = {"input_ids": PROMPT, "stream": True, "return_logprob": True, "top_logprobs_num": 2}
    async with aiohttp.ClientSession() as http, http.post(f"{fake.url}/generate", json=body) as response:
        events = [json.loads(line[6:]) for line in (await response.read()).split(b"\n\n")[: len(IDS)]]
    counts = [len(event["meta_info"]["output_top_logprobs"]) for event in events]
    assert counts == ([1, 1, 1] if incremental else [1, 2, 3])


async def test_too_many_likeliest_tokens_kill_it(fake: FakeSGLang) -> None:
    body = {"input_ids": PROMPT, "top_logprobs_num": VOCAB + 1}
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            await http.post(f"{fake.url}/generate", json=body)
    await fake.until(lambda: not fake.alive)


async def test_a_killed_fake_keeps_no_idle_connection(fake: FakeSGLang) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(fake.url.rsplit(":", 1)[1]))
    with contextlib.closing(writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        await reader.readuntil(b"\r\n\r\n")
        await fake.kill()
        async with asyncio.timeout(1):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""


# -- the embedded engine's server


@pytest.mark.parametrize(
    "raw", [b'{"a":"\xff"}', b'{"a":' + b"[" * 100_000, b"[]"], ids=["utf-8", "deep", "list"]
)
def test_a_body_that_is_no_json(raw: bytes) -> None:
    with pytest.raises(BadBodyError):
        decode_body(raw)


def test_input_ids_that_nest() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(BadBodyError):
        parse_input_ids(deep)


def test_too_many_likeliest_tokens_are_refused() -> None:
    check_top(VOCAB, VOCAB)
    with pytest.raises(errors.RequestError, match="dies of this"):
        check_top(VOCAB + 1, VOCAB)
