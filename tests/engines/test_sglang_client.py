import asyncio
import base64
import contextlib
import json
import logging
import math
from array import array
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from tokentape import errors
from tokentape.engines.base import EngineInfo, GenerateRequest, GenerateResult, TokenChunk
from tokentape.engines.captured import read_experts
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.engines.sglang_protocol import Completion
from tokentape.engines.sse import SSEDecoder
from tokentape.testing import FakeSGLang, Fault, Reply, pseudo_logprob
from tokentape.types import Prompt, RoutedExperts, Sampling, TokenRun, VersionSpan

PROMPT = [5, 6, 7, 8]
IDS = [11, 12, 12, 13, 14]
VOCAB = 1000

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
both_streams = pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "incremental"])


@pytest.fixture
async def fake() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang(vocab_size=VOCAB, context_length=100) as fake:
        yield fake


@pytest.fixture
async def engine(fake: FakeSGLang) -> AsyncIterator[SGLangEngine]:
    async with contextlib.aclosing(engine_for(fake.url)) as engine:
        yield engine


def engine_for(url: str, **config: Any) -> SGLangEngine:
    limits = {"first_token_timeout_s": 5.0, "token_timeout_s": 5.0, "total_timeout_s": 10.0}
    return SGLangEngine(SGLangConfig(url, **{**limits, **config}), vocab_size=VOCAB)


def request(
    *, prompt: list[int] = PROMPT, stream: bool = True, rid: str = "r", **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(rid, Prompt.of(prompt), Sampling(**{"max_tokens": 16, **sampling}), stream)


async def run(engine: SGLangEngine, request: GenerateRequest) -> tuple[list[TokenChunk], GenerateResult]:
    """All chunks and the result; what the Engine protocol promises about them is checked here, every time."""
    chunks: list[TokenChunk] = []
    result = None
    async with contextlib.aclosing(engine.generate(request)) as items:
        async for item in items:
            assert result is None
            if isinstance(item, GenerateResult):
                result = item
            else:
                chunks.append(item)
    assert result is not None
    assert [i for c in chunks for i in c.ids] == result.completion_ids
    assert [v for c in chunks for v in c.logprobs] == result.logprobs
    assert all(c.ids for c in chunks)
    return chunks, result


# --- a healthy engine ---


@both_ways
@both_streams
async def test_completion(fake: FakeSGLang, engine: SGLangEngine, stream: bool, incremental: bool) -> None:
    fake.incremental = incremental
    fake.script(Reply(IDS))
    chunks, result = await run(engine, request(stream=stream))
    assert len(chunks) == (len(IDS) if stream else 1)
    assert result == GenerateResult(
        completion_ids=IDS,
        logprobs=[pseudo_logprob(i, at) for at, i in enumerate(IDS)],
        finish_reason="stop",
        matched=IDS[-1],
        versions=(VersionSpan("default", 0, 5),),
        num_cached_tokens=0,
    )


@both_ways
async def test_length_and_spans(fake: FakeSGLang, engine: SGLangEngine, stream: bool) -> None:
    fake.script(Reply(IDS, versions=[("a", 0, 1), ("b", 1, 3)]))
    _, result = await run(engine, request(stream=stream, max_tokens=3))
    assert (result.completion_ids, result.finish_reason, result.matched) == (IDS[:3], "length", None)
    assert result.versions == (VersionSpan("a", 0, 1), VersionSpan("b", 1, 3))


async def test_stop_string_is_kept_in_the_ids(fake: FakeSGLang, engine: SGLangEngine) -> None:
    fake.script(Reply(IDS, matched="END"))
    _, result = await run(engine, request(stop=("END",)))
    assert (result.completion_ids, result.matched) == (IDS, "END")


async def test_cached_tokens_of_the_next_turn(engine: SGLangEngine) -> None:
    _, first = await run(engine, request())
    _, second = await run(engine, request(prompt=PROMPT + first.completion_ids + [9, 9]))
    assert second.num_cached_tokens == len(PROMPT) + len(first.completion_ids) - 1


async def test_interval_between_events(fake: FakeSGLang) -> None:
    fake.script(Reply(list(range(1, 15))))
    async with contextlib.aclosing(engine_for(fake.url, stream_interval=4)) as engine:
        chunks, _ = await run(engine, request())
    assert [len(c.ids) for c in chunks] == [1, 3, 4, 4, 2]


@both_streams
async def test_incremental_log_probabilities_that_look_cumulative(
    fake: FakeSGLang, incremental: bool
) -> None:
    fake.incremental = incremental
    fake.script(Reply([7] * 8, logprobs=[0.0] * 8))  # every delta begins as the text seen before does
    async with contextlib.aclosing(engine_for(fake.url, stream_interval=3)) as engine:
        _, result = await run(engine, request())
    assert result.completion_ids == [7] * 8


# --- what is sent ---


async def test_every_id_arrives_and_the_body_is_minimal(fake: FakeSGLang, engine: SGLangEngine) -> None:
    prompt = Prompt.of([1, 2])
    for ids in ([], [999], [0]):
        prompt = prompt.followed_by(TokenRun(ids))
    await run(engine, GenerateRequest("abc", prompt, Sampling(max_tokens=3), stream=False))
    assert fake.requests[0].body == {
        "input_ids": [1, 2, 999, 0],
        "rid": "3-abc",
        "sampling_params": {"max_new_tokens": 3},
        "return_logprob": True,
        "stream": False,
    }


async def test_sampling_is_mapped(fake: FakeSGLang, engine: SGLangEngine) -> None:
    sampling = Sampling(0.0, 0.9, -1, 0.1, 7, ("a", "b"), (3, 4), 0.1, 0.2, 1.1, 42)
    await run(engine, GenerateRequest("abc", Prompt.of(PROMPT), sampling))
    assert fake.requests[0].sampling_params == {
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "max_new_tokens": 7,
        "stop": ["a", "b"],
        "stop_token_ids": [3, 4],
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.1,
        "sampling_seed": 42,
    }


async def test_large_body() -> None:
    prompt = [123_456] * 200_000  # beyond 1 MiB, where aiohttp warns about plain bytes
    async with FakeSGLang(vocab_size=200_000, context_length=300_000) as fake:
        async with contextlib.aclosing(SGLangEngine(SGLangConfig(fake.url), vocab_size=200_000)) as engine:
            await run(engine, request(prompt=prompt))
        assert fake.requests[0].input_ids == prompt


async def test_headers_and_one_connection(fake: FakeSGLang) -> None:
    config = SGLangConfig(fake.url, api_key="secret", headers={"X-Extra": "1"})
    async with contextlib.aclosing(SGLangEngine(config, vocab_size=VOCAB)) as engine:
        for i in range(4):
            await run(engine, request(stream=i % 2 == 0))
        client = engine._client
        assert client is not None
        assert client.connector is not None
        assert sum(map(len, client.connector._conns.values())) == 1
    assert fake.requests[0].headers["Authorization"] == "Bearer secret"
    assert fake.requests[0].headers["X-Extra"] == "1"
    assert "secret" not in repr(config)


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (request(prompt=[]), errors.InternalError, "no ids"),
        (
            request(prompt=[1, VOCAB]),
            errors.InternalError,
            "id 1000 is outside the engine's vocabulary of 1000",
        ),
        (request(max_tokens=None), errors.InternalError, "max_tokens"),
        (request(max_tokens=0), errors.InternalError, "max_tokens"),
        (request(stop_token_ids=(VOCAB,)), errors.RequestError, "stop token id 1000"),
        (request(stop_token_ids=(-1,)), errors.RequestError, "stop token id -1"),
        (request(temperature=math.nan), errors.RequestError, "temperature"),
        (request(top_p=math.inf), errors.RequestError, "top_p"),
    ],
)
async def test_never_sent(
    fake: FakeSGLang, engine: SGLangEngine, bad: GenerateRequest, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await run(engine, bad)
    assert fake.requests == []


@pytest.mark.parametrize("url", ["localhost:30000", "ftp://x", "http://", ""])
def test_url_is_checked(url: str) -> None:
    with pytest.raises(errors.ConfigError, match="http://HOST:PORT"):
        SGLangConfig(url)


# --- faults ---

DISAGREEMENTS = [
    (Fault("missing", field="output_ids"), "output_ids"),
    (Fault("missing", field="meta_info"), "meta_info"),
    (Fault("missing", field="meta_info.output_token_logprobs"), "output_token_logprobs"),
    (Fault("wrong_count"), "completion_tokens is 6, output_ids has 5"),
    (Fault("shifted_ids"), r"token \d is \d+ in output_ids, \d+ in output_token_logprobs"),
    (Fault("logprob", value=None), "log-probability of token 4 is null"),
    (Fault("logprob", value=math.nan), "not SGLang's"),
    (Fault("logprob", value=-math.inf), "not SGLang's"),
    (Fault("logprob", value=-9999.0), "-9999.0 of token 4"),
    (Fault("logprob", value=-3.4e38), "-3.4e.38 of token 4"),
    (Fault("logprob", value=0.5), "0.5 of token 4"),
]


@both_ways
@both_streams
@pytest.mark.parametrize(("fault", "says"), DISAGREEMENTS, ids=lambda v: v if isinstance(v, str) else "")
async def test_disagreement(
    fake: FakeSGLang, engine: SGLangEngine, stream: bool, incremental: bool, fault: Fault, says: str
) -> None:
    fake.incremental = incremental
    fake.responder = lambda _: Reply(IDS)
    fake.script(fault)
    if fault.kind == "shifted_ids" and stream and not incremental:
        says = "changed within the 4 tokens received before"
    if fault.kind == "wrong_count" and incremental and stream:
        says = "completion_tokens is 6, output_ids has 1 after 4 seen"
    with pytest.raises(errors.EngineProtocolError, match=says) as raised:
        await run(engine, request(stream=stream))
    assert raised.value.num_tokens == (4 if stream and fault.kind != "missing" else 0)
    await run(engine, request(stream=stream, rid="after"))  # the negative control: the same without the fault


@both_ways
@both_streams
@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens", "cached_tokens"])
async def test_counts_that_no_tape_depends_on_may_be_missing(
    fake: FakeSGLang, engine: SGLangEngine, stream: bool, incremental: bool, field: str
) -> None:
    fake.incremental = incremental
    fake.responder = lambda _: Reply(IDS)
    fake.script(Fault("missing", field=f"meta_info.{field}"))
    if stream and field == "completion_tokens":  # it tells cumulative events from incremental ones
        with pytest.raises(errors.EngineProtocolError, match="completion_tokens is missing"):
            await run(engine, request(stream=stream))
        return
    _, result = await run(engine, request(stream=stream))
    assert result.completion_ids == IDS
    assert (result.num_cached_tokens is None) == (field == "cached_tokens")


@both_ways
@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Reply([]), "no token"),
        (Reply([11, VOCAB]), "sampled id 1000 is outside the vocabulary"),
        (Reply([11, -1]), "outside the vocabulary"),
        (Reply(IDS, matched=12), "stopped by id 12, but the last id is 14"),
        (Reply(IDS, matched="NaN happened"), "NaN happened"),
        (Reply(IDS, cached=5), "cached_tokens is 5 for a prompt of 4"),
        (Reply(IDS, cached=-1), "cached_tokens is -1"),
        (Reply(IDS, versions=[("a", 0, 4)]), "cover 4 of 5"),
        (Reply(IDS, versions=[("a", 0, 6)]), "cover 6 of 5"),
        (Reply(IDS, versions=[("a", 0, 2), ("b", 3, 5)]), "3:5 follows :2"),
        (Reply(IDS, versions=[("a", 0, 3), ("b", 2, 5)]), "2:5 follows :3"),
        (Reply(IDS, versions=[("a", 0, 0), ("b", 0, 5)]), "0:0 follows :0"),
    ],
)
async def test_wrong_content(
    fake: FakeSGLang, engine: SGLangEngine, stream: bool, reply: Reply, says: str
) -> None:
    fake.script(reply)
    with pytest.raises(errors.EngineProtocolError, match=says):
        await run(engine, request(stream=stream))


async def test_float_noise_above_zero_is_kept(fake: FakeSGLang, engine: SGLangEngine) -> None:
    fake.script(Reply([1, 2], logprobs=[1e-5, -0.0], finish="stop"))
    _, result = await run(engine, request())
    assert result.logprobs == [1e-5, -0.0]


@both_ways
async def test_one_version_without_spans(fake: FakeSGLang, engine: SGLangEngine, stream: bool) -> None:
    fake.script(Fault("missing", field="meta_info.weight_versions"))
    _, result = await run(engine, request(stream=stream))
    assert result.versions == (VersionSpan("default", 0, 4),)


@pytest.mark.parametrize(
    ("fault", "num_tokens", "error", "says"),
    [
        (Fault("status", status=400), 0, errors.EngineRejected, "400: scripted fault"),
        (Fault("status", status=400, body=b'{"error":"flat"}'), 0, errors.EngineRejected, "400: flat"),
        (
            Fault("status", status=422, body=b'{"detail":"pydantic"}'),
            0,
            errors.EngineRejected,
            "422: pydantic",
        ),
        (Fault("status", status=400, body=b'{"message":"m"}'), 0, errors.EngineRejected, "400: m"),
        (Fault("status", status=400, body=b"not json"), 0, errors.EngineRejected, "400: not json"),
        (Fault("status", status=401), 0, errors.EngineRejected, "API key"),
        (Fault("status", status=404), 0, errors.EngineRejected, "URL"),
        (Fault("status", status=405), 0, errors.EngineRejected, "URL"),
        (Fault("status", status=307), 0, errors.EngineRejected, "URL"),
        (Fault("status", status=429), 0, errors.EngineUnavailable, "429"),
        (Fault("status", status=500), 0, errors.EngineFailed, "500"),
        (Fault("status", status=503, body=b""), 0, errors.EngineFailed, r"503: \(no text\)"),
        (Fault("not_json"), 0, errors.EngineProtocolError, "SGLang"),
        (Fault("error_event"), 0, errors.EngineFailed, "scripted fault"),
        (Fault("error_event", after=2), 2, errors.EngineFailed, "scripted fault"),
        (Fault("error_event", status=400), 0, errors.EngineRejected, "scripted fault"),
        (Fault("error_event", status=429), 0, errors.EngineUnavailable, "429"),
        (Fault("disconnect"), 0, errors.EngineUnavailable, "lost"),
        (Fault("disconnect", after=0), 0, errors.EngineUnavailable, "lost"),
        (Fault("disconnect", after=3), 3, errors.EngineDisconnected, "lost"),
        (Fault("cut", after=0), 0, errors.EngineUnavailable, "ended before|lost"),
        (Fault("cut", after=2), 2, errors.EngineDisconnected, "ended before|lost"),
        (Fault("die"), 0, errors.EngineUnavailable, "lost"),
        (Fault("abort", after=2, status=503), 2, errors.EngineFailed, "503: scripted fault"),
        (Fault("abort", after=0, status=400), 0, errors.EngineRejected, "400: scripted fault"),
    ],
)
@both_ways
@both_streams
async def test_failure(
    fake: FakeSGLang,
    engine: SGLangEngine,
    stream: bool,
    incremental: bool,
    fault: Fault,
    num_tokens: int,
    error: type[errors.EngineError],
    says: str,
) -> None:
    fake.incremental = incremental
    fake.script(fault)
    if not stream:
        num_tokens = 0
        error = errors.EngineUnavailable if error is errors.EngineDisconnected else error
    with pytest.raises(error, match=says) as raised:
        await run(engine, request(stream=stream))
    assert type(raised.value) is error
    assert raised.value.num_tokens == num_tokens


@both_ways
@both_streams
@pytest.mark.parametrize("after", [0, 2])
async def test_an_abort_keeps_what_was_sampled(
    fake: FakeSGLang, engine: SGLangEngine, stream: bool, incremental: bool, after: int
) -> None:
    fake.incremental = incremental
    fake.weight_version = "7"
    fake.script(Fault("abort", after=after, reply=Reply(IDS)))
    chunks, result = await run(engine, request(stream=stream))
    assert (result.finish_reason, result.matched) == ("abort", None)
    assert result.completion_ids == [i for chunk in chunks for i in chunk.ids] == IDS[:after]
    assert result.logprobs == [pseudo_logprob(i, at) for at, i in enumerate(IDS[:after])]
    assert result.versions == ((VersionSpan("7", 0, after),) if after else ())


async def test_no_done(fake: FakeSGLang, engine: SGLangEngine) -> None:
    fake.script(Fault("no_done"))
    with pytest.raises(errors.EngineDisconnected) as raised:
        await run(engine, request())
    assert raised.value.num_tokens == 4


@both_ways
@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "says"),
    [(100, 1, "longer than the model's context length"), (99, 2, "maximum context length of 100 tokens")],
)
async def test_context_overflow(
    engine: SGLangEngine, stream: bool, num_prompt: int, max_tokens: int, says: str
) -> None:
    with pytest.raises(errors.ContextOverflow, match=says) as raised:
        await run(engine, request(prompt=[1] * num_prompt, max_tokens=max_tokens, stream=stream))
    assert (raised.value.num_prompt_tokens, raised.value.context_length) == (num_prompt, 100)
    assert raised.value.param == "messages"


async def test_context_overflow_as_an_abort(fake: FakeSGLang, engine: SGLangEngine) -> None:
    message = "The input (120 tokens) is longer than the model's context length (100 tokens)."
    fake.script(Fault("abort", after=0, status=400, message=message))
    with pytest.raises(errors.ContextOverflow):
        await run(engine, request())


async def test_it_fits_exactly(engine: SGLangEngine) -> None:
    await run(engine, request(prompt=[1] * 99, max_tokens=1))


@both_ways
async def test_duplicate_rid(fake: FakeSGLang, engine: SGLangEngine, stream: bool) -> None:
    fake.script(Reply(IDS, delay_s=0.1))
    first = asyncio.create_task(run(engine, request()))
    await fake.until(lambda: len(fake.requests) == 1)
    with pytest.raises(errors.EngineRejected, match="Duplicate request ID"):
        await run(engine, request(stream=stream))
    await first


@both_ways
async def test_nobody_listens(fake: FakeSGLang, engine: SGLangEngine, stream: bool) -> None:
    await fake.kill()
    with pytest.raises(errors.EngineUnavailable, match="no connection"):
        await run(engine, request(stream=stream))
    with pytest.raises(errors.EngineUnavailable):
        await engine.info()
    await fake.start()
    await run(engine, request(stream=stream))


# --- time limits ---


async def test_first_token_timeout(fake: FakeSGLang) -> None:
    fake.script(Fault("stall", after=0))
    async with contextlib.aclosing(engine_for(fake.url, first_token_timeout_s=0.1)) as engine:
        with pytest.raises(errors.EngineTimeout, match="first_token_timeout_s") as raised:
            await run(engine, request())
        assert raised.value.num_tokens == 0
        await fake.until(lambda: fake.aborts == ["1-r"])


async def test_token_timeout(fake: FakeSGLang) -> None:
    fake.script(Fault("stall", after=3))
    async with contextlib.aclosing(engine_for(fake.url, token_timeout_s=0.1)) as engine:
        with pytest.raises(errors.EngineTimeout, match="token_timeout_s") as raised:
            await run(engine, request())
        assert raised.value.num_tokens == 3
        await fake.until(lambda: fake.aborts == ["1-r"])


@both_ways
async def test_total_timeout(fake: FakeSGLang, stream: bool) -> None:
    fake.script(Reply(list(range(1, 40)), delay_s=0.02))
    async with contextlib.aclosing(engine_for(fake.url, total_timeout_s=0.15)) as engine:
        with pytest.raises(errors.EngineTimeout, match="total_timeout_s"):
            await run(engine, request(stream=stream, max_tokens=40))
        await fake.until(lambda: fake.aborts == ["1-r"])


async def test_a_slow_consumer_is_no_timeout(fake: FakeSGLang) -> None:
    fake.script(Reply(IDS, delay_s=0.03))
    async with contextlib.aclosing(engine_for(fake.url, token_timeout_s=0.1)) as engine:
        async for item in engine.generate(request()):
            await asyncio.sleep(0.12 if isinstance(item, TokenChunk) and item.ids == [12] else 0)


async def test_the_limit_of_connections(fake: FakeSGLang) -> None:
    fake.responder = lambda _: Reply(IDS, delay_s=0.04)
    async with contextlib.aclosing(
        engine_for(fake.url, max_connections=1, first_token_timeout_s=0.1)
    ) as engine:
        first = asyncio.create_task(run(engine, request(rid="a")))
        await fake.until(lambda: len(fake.requests) == 1)
        assert (await engine.info()).context_length == 100  # questions do not wait
        with pytest.raises(errors.EngineTimeout):
            await run(engine, request(rid="b"))
        await first
        await run(engine, request(rid="c"))
    assert len(fake.requests) == 2


# --- leaving early ---


@both_ways
async def test_cancel_aborts(fake: FakeSGLang, engine: SGLangEngine, stream: bool) -> None:
    fake.script(Reply(list(range(1, 100)), delay_s=0.02))
    task = asyncio.create_task(run(engine, request(stream=stream)))
    await fake.until(lambda: len(fake.requests) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await fake.until(lambda: fake.aborts == ["1-r"] and fake.requests[0].disconnected)


async def test_closing_the_iterator_aborts(fake: FakeSGLang, engine: SGLangEngine) -> None:
    fake.script(Reply(list(range(1, 100)), delay_s=0.01))
    items = engine.generate(request())
    await anext(items)
    await items.aclose()
    await engine.aclose()  # waits for the abort
    assert fake.aborts == ["1-r"]


async def test_aclose_aborts_what_runs(fake: FakeSGLang, engine: SGLangEngine) -> None:
    fake.script(Reply(list(range(1, 100)), delay_s=0.02))
    task = asyncio.create_task(run(engine, request()))
    await fake.until(lambda: len(fake.requests) == 1)
    await engine.aclose()
    assert fake.aborts == ["1-r"]
    chunks, result = await task
    assert result.finish_reason == "abort"
    assert [i for chunk in chunks for i in chunk.ids] == result.completion_ids
    with pytest.raises(errors.InternalError, match="closed"):
        await run(engine, request())


@both_ways
@pytest.mark.parametrize("item", [Reply(IDS), Fault("status"), Fault("error_event"), Fault("abort", after=1)])
async def test_no_abort_when_the_engine_is_done(
    fake: FakeSGLang, engine: SGLangEngine, stream: bool, item: Reply | Fault
) -> None:
    fake.script(item)
    with contextlib.suppress(errors.EngineError):
        await run(engine, request(stream=stream))
    await engine.aclose()
    assert fake.aborts == []


async def test_an_abort_does_not_hit_a_longer_rid(fake: FakeSGLang, engine: SGLangEngine) -> None:
    fake.responder = lambda _: Reply(list(range(1, 9)), delay_s=0.03)
    doomed = asyncio.create_task(run(engine, request(rid="t1")))
    other = asyncio.create_task(run(engine, request(rid="t10")))
    await fake.until(lambda: len(fake.requests) == 2)
    doomed.cancel()
    assert len((await other)[1].completion_ids) == 8


async def test_a_failed_abort_is_logged(fake: FakeSGLang, caplog: pytest.LogCaptureFixture) -> None:
    fake.script(Fault("die"))
    engine = engine_for(fake.url)
    with caplog.at_level(logging.WARNING), pytest.raises(errors.EngineUnavailable):
        await run(engine, request())
    await engine.aclose()
    assert "abort of 1-r" in caplog.text


# --- info ---


async def test_info(fake: FakeSGLang, engine: SGLangEngine) -> None:
    fake.weight_version = "step-7"
    assert await engine.info() == EngineInfo("fake", 100, "step-7")


@contextlib.asynccontextmanager
async def serving(routes: dict[str, Any]) -> AsyncIterator[str]:
    """A server of fixed answers: a path to a JSON value, or to a web.Response."""

    async def answer(http: web.Request) -> web.Response:
        found = routes.get(http.path)
        if isinstance(found, web.Response):
            return found
        return web.json_response(found, status=200 if found is not None else 404)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("routes", "info"),
    [
        ({"/get_model_info": {"model_path": "m"}}, EngineInfo("m", None, None)),
        ({"/model_info": {}, "/get_server_info": {"context_length": 9}}, EngineInfo(None, 9, None)),
        ({"/model_info": {}, "/v1/models": {"data": [{"max_model_len": 5}]}}, EngineInfo(None, 5, None)),
    ],
)
async def test_info_of_other_servers(routes: dict[str, Any], info: EngineInfo) -> None:
    async with serving(routes) as url, contextlib.aclosing(engine_for(url)) as engine:
        assert await engine.info() == info


@pytest.mark.parametrize(
    ("routes", "error"),
    [
        ({}, errors.EngineRejected),
        ({"/model_info": web.Response(status=401)}, errors.EngineRejected),
        ({"/model_info": web.Response(body=b"<html>")}, errors.EngineProtocolError),
        ({"/model_info": web.Response(status=500)}, errors.EngineFailed),
    ],
)
async def test_info_refused(routes: dict[str, Any], error: type[Exception]) -> None:
    async with serving(routes) as url, contextlib.aclosing(engine_for(url)) as engine:
        with pytest.raises(error):
            await engine.info()


# --- answers that only a raw body can give ---


def answer(ids: list[int], **meta: Any) -> dict[str, Any]:
    complete = {
        "finish_reason": {"type": "stop", "matched": ids[-1] if ids else None},
        "prompt_tokens": 4,
        "completion_tokens": len(ids),
        "cached_tokens": 0,
        "weight_version": "a",
        "output_token_logprobs": [[-0.5, i, None] for i in ids],
    }
    return {"output_ids": ids, "meta_info": {**complete, **meta}}


async def run_raw(body: bytes, *, stream: bool = True, **sampling: Any) -> GenerateResult:
    content_type = "text/event-stream" if stream else "application/json"
    routes = {"/generate": web.Response(body=body, content_type=content_type), "/abort_request": {}}
    async with serving(routes) as url, contextlib.aclosing(engine_for(url)) as engine:
        return (await run(engine, request(stream=stream, **sampling)))[1]


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events) + b"data: [DONE]\n\n"


RUNNING: dict[str, Any] = {"finish_reason": None}


@pytest.mark.parametrize(
    ("events", "says", "num_tokens"),
    [
        ([answer([1], **RUNNING), answer([2, 3])], "do not begin with", 1),
        (
            [answer([1], **RUNNING), answer([1, 2], output_token_logprobs=[[-0.6, 1, None], [-1, 2, None]])],
            "changed",
            1,
        ),
        ([answer([1, 2], output_token_logprobs=[[-0.6, 1, None]])], "1 entries for 2 new tokens", 0),
        ([answer([1], output_token_logprobs=None)], "missing", 0),
        ([answer([1], **RUNNING), answer([2], completion_tokens=3)], "completion_tokens is 3", 1),
        ([answer([1]), answer([1, 2])], "followed the one with finish_reason", 1),
        ([answer([1], finish_reason={"type": "tool"})], "'tool' is unknown", 1),
        ([answer([1], finish_reason={"type": "length", "length": 2})], "length 2, 1 tokens", 1),
        ([answer([1], finish_reason={"type": "stop", "matched": [1]})], "finish_reason.matched", 0),
        ([answer([1], prompt_tokens=3)], "prompt_tokens is 3 but 4", 0),
        ([answer([1], weight_version=None)], "weight_version is missing", 1),
        ([answer([1], **RUNNING, weight_version="z"), answer([1, 2])], "missing or changed", 2),
        ([answer(list(range(1, 18)))], "17 tokens were sampled, 16 were asked for", 0),
        ([{"output_ids": ["1"], "meta_info": {}}], "output_ids", 0),
        ([[answer([1])]], "not SGLang's", 0),
    ],
)
async def test_contradicting_events(events: list[Any], says: str, num_tokens: int) -> None:
    with pytest.raises(errors.EngineProtocolError, match=says) as raised:
        await run_raw(sse(*events))
    assert raised.value.num_tokens == num_tokens


@pytest.mark.parametrize(
    "events",
    [
        [answer([1], **RUNNING), answer([1, 2])],
        # incremental ids with cumulative log-probabilities, and the other way round
        [
            answer([1], **RUNNING),
            answer([2], completion_tokens=2, output_token_logprobs=[[-0.5, 1, None], [-0.5, 2, None]]),
        ],
        [answer([1], **RUNNING), answer([1, 2], output_token_logprobs=[[-0.5, 2, None]])],
        # the same numbers, written otherwise
        [
            answer([1], **RUNNING, output_token_logprobs=[[-0.50, 1, None]]),
            answer([1, 2], output_token_logprobs=[[-5e-1, 1, None], [-0.5, 2, None]]),
        ],
        [answer([], **RUNNING), answer([1, 2], **RUNNING), answer([1, 2])],
        [answer([1, 2], **RUNNING), answer([], completion_tokens=2)],
    ],
)
async def test_agreeing_events(events: list[Any]) -> None:
    events[-1]["meta_info"]["finish_reason"] = {"type": "stop", "matched": 2}
    result = await run_raw(sse(*events))
    assert (result.completion_ids, result.logprobs) == ([1, 2], [-0.5, -0.5])
    assert result.versions == (VersionSpan("a", 0, 2),)


@given(st.data())
def test_any_cut_into_events_is_the_same_completion(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(5, 6), min_size=1, max_size=12))
    logprobs = [data.draw(st.sampled_from([0.0, -0.5])) for _ in ids]
    ends = [*sorted(data.draw(st.sets(st.integers(0, len(ids) - 1)))), len(ids)]
    cumulative_ids, cumulative_logprobs = data.draw(st.booleans()), data.draw(st.booleans())
    completion = Completion(request(), VOCAB)
    for start, end in pairwise([0, *ends]):
        triples = [[v, i, None] for v, i in zip(logprobs, ids, strict=True)]
        event = answer(ids[0 if cumulative_ids else start : end], completion_tokens=end)
        event["meta_info"]["output_token_logprobs"] = triples[0 if cumulative_logprobs else start : end]
        if end < len(ids):
            event["meta_info"]["finish_reason"] = None
        else:
            event["meta_info"]["finish_reason"] = {"type": "stop", "matched": ids[-1]}
        chunk = completion.feed(json.dumps(event).encode())
        assert (chunk.ids if chunk else []) == ids[start:end]
    completion.feed(b"[DONE]")
    assert (completion.result().completion_ids, completion.result().logprobs) == (ids, logprobs)


async def test_a_stream_answered_without_one() -> None:
    async with serving({"/generate": answer([1])}) as url, contextlib.aclosing(engine_for(url)) as engine:
        with pytest.raises(errors.EngineProtocolError, match="answered application/json"):
            await run(engine, request())


# --- server-sent events ---

BODY = (
    b": comment\r\n\r\n"
    b'data: {"a":1}\n\n'
    b"event: x\rid: 7\rdata:one\rdata:  two\r\r"
    b"data\r\n\r\n"
    b"retry: 1\n\n\n"
    b"data: [DONE]\r\n\r\n"
    b"data: cut short"
)
PAYLOADS = [b'{"a":1}', b"one\n two", b"", b"[DONE]"]


def test_sse_whole() -> None:
    assert SSEDecoder().feed(BODY) == PAYLOADS


@given(st.lists(st.integers(0, len(BODY)), max_size=40))
def test_sse_in_any_pieces(cuts: list[int]) -> None:
    decoder = SSEDecoder()
    edges = [0, *sorted(cuts), len(BODY)]
    pieces = [BODY[a:b] for a, b in pairwise(edges)]
    assert [payload for piece in pieces for payload in decoder.feed(piece)] == PAYLOADS


def test_sse_byte_by_byte() -> None:
    decoder = SSEDecoder()
    assert [p for i in range(len(BODY)) for p in decoder.feed(BODY[i : i + 1])] == PAYLOADS


def test_sse_huge_event() -> None:
    decoder = SSEDecoder()
    event = b"data: " + b"x" * 5_000_000 + b"\n\n"
    pieces = [event[i : i + 65536] for i in range(0, len(event), 65536)]
    assert [len(p) for piece in pieces for p in decoder.feed(piece)] == [5_000_000]


# --- what is captured beside the tokens ---


@pytest.mark.parametrize(
    ("top", "dtype", "item"), [(255, "uint8", 1), (256, "uint16", 2), (65_535, "uint16", 2)]
)
def test_experts_take_few_bytes(top: int, dtype: str, item: int) -> None:
    values = [0, 1, 2, top, 4, 5]
    text = base64.b64encode(array("i", values).tobytes()).decode()
    experts = read_experts(text, 3)
    assert (experts.dtype, experts.width, len(experts.data)) == (dtype, 2, 6 * item)
    assert array("B" if item == 1 else "H", experts.data).tolist() == values
    narrow = read_experts(base64.b64encode(array("i", [7, 8]).tobytes()).decode(), 1)
    joined = RoutedExperts.joined([narrow, experts])
    assert joined is not None
    assert array("B" if item == 1 else "H", joined.data).tolist() == [7, 8, *values]
    assert RoutedExperts.joined([experts, None]) is None


@pytest.mark.parametrize(
    "text", ["", "!", "AAAA", base64.b64encode(array("i", [1, 2, 3, 4]).tobytes()).decode(), "AACAgA=="]
)
def test_experts_that_are_none(text: str) -> None:
    with pytest.raises(errors.EngineProtocolError, match="routed_experts"):
        read_experts(text, 3)
    with pytest.raises(errors.EngineProtocolError, match="-1"):
        read_experts(base64.b64encode(array("i", [1, -1, 3]).tobytes()).decode(), 3)
