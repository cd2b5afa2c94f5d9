"""Replays what a real SGLang 0.5.23 answered through the client, byte by byte as it was recorded."""

import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tokentape import errors
from tokentape.engines.base import GenerateRequest, GenerateResult
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.testing import FakeSGLang, Reply, byte_level_tokenizer
from tokentape.types import Prompt, Sampling, VersionSpan

SHARED = Path(os.environ.get("TOKENTAPE_SHARED", Path(__file__).parents[3] / "shared"))
CAPTURES = SHARED / "captures" / "sglang-0.5.23"
VOCAB = 49_152

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not CAPTURES.is_dir(), reason=f"no captures at {CAPTURES}; set TOKENTAPE_SHARED"),
]


def load(name: str) -> dict[str, Any]:
    return json.loads((CAPTURES / f"{name}.json").read_text())


def is_completion(capture: dict[str, Any]) -> bool:
    """One prompt of ids, log-probabilities asked for, answered with 200: what the client sends."""
    body = capture["request"].get("body") if isinstance(capture["request"], dict) else None
    return (
        isinstance(body, dict)
        and capture["request"]["path"] == "/generate"
        and capture["status"] == 200
        and bool(body.get("return_logprob"))
        and isinstance(body.get("input_ids"), list)
        and isinstance(body["input_ids"][0], int)
        and "n" not in body["sampling_params"]
        and not body.get("return_text_in_logprobs")
    )


def names(wanted: bool) -> list[str]:
    """The captures of completions that ended well (or did not), found by their content."""
    if not CAPTURES.is_dir():
        return []
    found = []
    for path in sorted(CAPTURES.glob("*.json")):
        capture = json.loads(path.read_text())
        if is_completion(capture) and ('"type":"abort"' in capture["raw_body"]) != wanted:
            found.append(path.stem)
    return found


@contextlib.asynccontextmanager
async def replaying(capture: dict[str, Any]) -> AsyncIterator[SGLangEngine]:
    """A server that answers every request with the capture's status, type and raw body."""

    async def answer(_http: web.Request) -> web.Response:
        headers = {k: v for k, v in capture["headers"] if k.lower() == "content-type"}
        return web.Response(status=capture["status"], body=capture["raw_body"].encode(), headers=headers)

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    engine = SGLangEngine(SGLangConfig(f"http://127.0.0.1:{runner.addresses[0][1]}"), vocab_size=VOCAB)
    try:
        yield engine
    finally:
        await engine.aclose()
        await runner.cleanup()


def request_of(capture: dict[str, Any]) -> GenerateRequest:
    body = capture["request"]["body"]
    params, ids = body["sampling_params"], body["input_ids"]
    if isinstance(ids, str):  # "<9000 ids, all 33>"
        ids = [33] * int(ids[1:].split()[0])
    sampling = Sampling(max_tokens=params.get("max_new_tokens", 128), stop=tuple(params.get("stop") or ()))
    return GenerateRequest("r", Prompt.of(ids), sampling, bool(body.get("stream")))


async def replay(capture: dict[str, Any]) -> GenerateResult:
    async with replaying(capture) as engine:
        items = [item async for item in engine.generate(request_of(capture))]
    assert isinstance(items[-1], GenerateResult)
    return items[-1]


def last_answer(capture: dict[str, Any]) -> dict[str, Any]:
    body = capture["raw_body"]
    if body.startswith("data: "):
        body = body.split("\n\n")[-3].removeprefix("data: ")
    return json.loads(body)


def test_there_are_enough() -> None:
    assert len(names(wanted=True)) >= 20
    assert len(names(wanted=False)) >= 3


@pytest.mark.parametrize("name", names(wanted=True))
async def test_completion(name: str) -> None:
    capture = load(name)
    answer = last_answer(capture)
    if not answer["output_ids"]:  # max_new_tokens 0, which the client never sends
        with pytest.raises(errors.InternalError):
            await replay(capture)
        return
    result = await replay(capture)
    meta = answer["meta_info"]
    assert result.completion_ids == answer["output_ids"]
    assert result.logprobs == [value for value, _, _ in meta["output_token_logprobs"]]
    assert result.finish_reason == meta["finish_reason"]["type"]
    assert result.matched == meta["finish_reason"].get("matched")
    assert result.num_cached_tokens == meta["cached_tokens"]
    assert result.versions == tuple(VersionSpan(**span) for span in meta["weight_versions"])


@pytest.mark.parametrize("name", names(wanted=False))
async def test_abort(name: str) -> None:
    capture = load(name)
    result, answer = await replay(capture), json.loads(capture["raw_body"])
    assert (result.finish_reason, result.completion_ids) == ("abort", answer["output_ids"])
    assert result.logprobs == [value for value, _, _ in answer["meta_info"]["output_token_logprobs"]]
    assert [v.end for v in result.versions][-1:] == [len(result.completion_ids)][: len(result.versions)]


@pytest.mark.parametrize(
    "name", ["err_context_too_long", "err_context_too_long_stream", "err_context_plus_new_too_long"]
)
async def test_context_overflow(name: str) -> None:
    capture = load(name)
    with pytest.raises(errors.ContextOverflow) as raised:
        await replay(capture)
    assert raised.value.num_prompt_tokens == len(request_of(capture).prompt)
    assert raised.value.context_length == 8192


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("err_dup_rid", "Duplicate request ID"),
        ("err_unknown_sampling_param", "unknown field `foo`"),
        ("err_bad_temperature", "temperature must be"),
        ("err_bad_json", "1 validation error"),
        ("err_empty_input_ids", "cannot be empty"),
        ("err_404", "404: Not Found; the URL"),
        ("err_405", "405: Method Not Allowed; the URL"),
    ],
)
async def test_refusal(name: str, says: str) -> None:
    capture = load(name)
    capture["request"] = load("gen_length")["request"]  # only the answer matters
    with pytest.raises(errors.EngineRejected, match=says):
        await replay(capture)


async def test_truncated_capture() -> None:
    """The negative control: the same stream with one byte of an id changed is not accepted."""
    capture = load("gen_stream")
    capture["raw_body"] = capture["raw_body"].replace("[2122,436", "[2122,437", 1)
    with pytest.raises(errors.EngineProtocolError):
        await replay(capture)


async def test_the_fake_answers_in_the_same_shape() -> None:
    capture = load("gen_stream")
    real = last_answer(capture)
    timings = {
        name
        for name in real["meta_info"]
        if name.endswith(("_time", "_ts", "_latency", "_wait", "throughput"))
    }
    async with FakeSGLang(byte_level_tokenizer()) as fake:
        fake.script(Reply([40, 41]))
        engine = SGLangEngine(SGLangConfig(fake.url), vocab_size=fake.vocab_size)
        client = engine._session()
        body = {**capture["request"]["body"], "input_ids": [1, 2]}
        async with client.post(f"{fake.url}/generate", data=json.dumps(body)) as response:
            text = await response.text()
        await engine.aclose()
    assert set(real["meta_info"]) - timings - {"cached_tokens_details"} == set(
        last_answer({"raw_body": text})["meta_info"]
    )
