import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tokenizers import Tokenizer

from tokentape import errors
from tokentape.engines.base import Engine, GenerateRequest, GenerateResult, TokenChunk
from tokentape.testing import (
    FakeEngine,
    FakeSGLang,
    Fault,
    Reply,
    byte_level_tokenizer,
    pseudo_logprob,
    write_model_dir,
)
from tokentape.types import Prompt, Sampling


@pytest.fixture
async def fake() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang(byte_level_tokenizer(), context_length=50) as fake:
        yield fake


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as http:
        yield http


async def post(
    http: aiohttp.ClientSession, fake: FakeSGLang, body: Any, path: str = "/generate"
) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body)
    async with http.post(fake.url + path, data=data) as response:
        return response.status, await response.text()


def body(**fields: Any) -> dict[str, Any]:
    return {
        "input_ids": [1, 2, 3],
        "return_logprob": True,
        "sampling_params": {"max_new_tokens": 8},
        **fields,
    }


def events(text: str) -> list[Any]:
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


async def test_answer(fake: FakeSGLang, http: aiohttp.ClientSession) -> None:
    ids = byte_level_tokenizer().encode("hello").ids
    fake.script(Reply(ids))
    status, text = await post(http, fake, body(rid="x"))
    answer = json.loads(text)
    assert (status, answer["text"], answer["output_ids"]) == (200, "hello", ids)
    assert answer["meta_info"]["id"] == "x"
    assert answer["meta_info"]["output_token_logprobs"] == [[pseudo_logprob(ids[0], 0), ids[0], None]]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[-1]}
    received = fake.requests[0]
    assert (received.input_ids, received.output_ids, received.rid) == ([1, 2, 3], ids, "x")
    assert json.loads(received.raw) == received.body
    assert not received.disconnected


@pytest.mark.parametrize("incremental", [False, True])
async def test_stream(fake: FakeSGLang, http: aiohttp.ClientSession, incremental: bool) -> None:
    fake.incremental = incremental
    fake.script(Reply([4, 5, 6]))
    _, text = await post(http, fake, body(stream=True))
    *middle, last, done = events(text)
    assert done == "[DONE]"
    assert [e["output_ids"] for e in middle] == ([[4], [5]] if incremental else [[4], [4, 5]])
    assert all(e["meta_info"]["finish_reason"] is None for e in middle)
    assert all("weight_versions" not in e["meta_info"] for e in middle)
    assert last["output_ids"] == ([6] if incremental else [4, 5, 6])
    assert last["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]


@pytest.mark.parametrize(
    ("reply", "params", "ids", "finish"),
    [
        (Reply([4, 5, 6]), {"max_new_tokens": 2}, [4, 5], {"type": "length", "length": 2}),
        (Reply([4, 5]), {"max_new_tokens": 2}, [4, 5], {"type": "length", "length": 2}),
        (Reply([4, 5], finish="stop"), {"max_new_tokens": 2}, [4, 5], {"type": "stop", "matched": 5}),
        (Reply([4, 5, 6]), {"stop_token_ids": [5]}, [4, 5], {"type": "stop", "matched": 5}),
        (Reply([4, 5, 6], matched="x"), {}, [4, 5, 6], {"type": "stop", "matched": "x"}),
        (Reply([4, 5], finish="length"), {}, [4, 5], {"type": "length", "length": 2}),
    ],
)
async def test_limits(
    fake: FakeSGLang, http: aiohttp.ClientSession, reply: Reply, params: Any, ids: list[int], finish: Any
) -> None:
    fake.script(reply)
    answer = json.loads((await post(http, fake, body(sampling_params=params)))[1])
    assert (answer["output_ids"], answer["meta_info"]["finish_reason"]) == (ids, finish)


async def test_cache_is_a_real_prefix(fake: FakeSGLang, http: aiohttp.ClientSession) -> None:
    async def cached(ids: list[int]) -> int:
        fake.script(Reply([9, 9, 9]))
        return json.loads((await post(http, fake, body(input_ids=ids)))[1])["meta_info"]["cached_tokens"]

    assert await cached([1, 2, 3]) == 0
    assert await cached([1, 2, 3]) == 2  # the last token is always computed
    assert await cached([1, 2, 4, 5]) == 2
    assert (
        await cached([1, 2, 3, 9, 9, 9, 7]) == 5
    )  # prompt and output but its last, which was never computed
    assert await cached([8]) == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "says", "early"),
    [
        ({"input_ids": []}, "input_ids cannot be empty.", False),
        (
            {"input_ids": [1] * 50},
            "The input (50 tokens) is longer than the model's context length (50",
            False,
        ),
        ({"input_ids": [1] * 43}, "You requested a total of 51 tokens: 43 tokens from the input", False),
        ({"sampling_params": {"temperature": -1}}, "temperature must be a non-negative", False),
        ({"sampling_params": {"max_new_tokens": -1}}, "max_new_tokens", False),
        ({"sampling_params": {"foo": 1}}, "unknown field `foo`, expected one of `max_new_tokens`", True),
        ({"input_ids": "abc"}, "1 validation error", True),
    ],
)
async def test_refusals(
    fake: FakeSGLang, http: aiohttp.ClientSession, stream: bool, wrong: Any, says: str, early: bool
) -> None:
    status, text = await post(http, fake, body(stream=stream, **wrong))
    assert says in text
    assert status == (200 if stream and not early else 400)
    assert text.endswith("data: [DONE]\n\n") == (stream and not early)


async def test_other_refusals(fake: FakeSGLang, http: aiohttp.ClientSession) -> None:
    assert (await post(http, fake, b"{not json"))[0] == 400
    assert "should be provided" in (await post(http, fake, {}))[1]
    assert fake.requests[0].input_ids == []


@pytest.mark.parametrize("bad", [-1, 10_000])
async def test_an_id_outside_the_vocabulary_kills_it(
    fake: FakeSGLang, http: aiohttp.ClientSession, bad: int
) -> None:
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(http, fake, body(input_ids=[1, bad]))
    await fake.until(lambda: not fake.alive)
    with pytest.raises(aiohttp.ClientConnectorError):
        await post(http, fake, body())
    url = fake.url
    await fake.start()
    assert fake.url == url
    assert (await post(http, fake, body()))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_abort_keeps_partial_ids(fake: FakeSGLang, http: aiohttp.ClientSession, stream: bool) -> None:
    fake.script(Reply([4] * 8, delay_s=0.05), Reply([4] * 8, delay_s=0.05))
    running = [asyncio.create_task(post(http, fake, body(rid=rid, stream=stream))) for rid in ("a", "ab")]
    await fake.until(lambda: len(fake.requests) == 2)
    assert (await post(http, fake, {"rid": "unknown"}, "/abort_request"))[0] == 200
    await asyncio.sleep(0.12)
    await post(http, fake, {"rid": "a"}, "/abort_request")
    for task in running:  # both: the real one compares the beginning of the rid
        text = (await task)[1]
        last = events(text)[-2] if stream else json.loads(text)
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
        assert 0 < len(last["output_ids"]) < 8
    assert fake.aborts == ["unknown", "a"]


async def test_a_client_that_leaves(fake: FakeSGLang, http: aiohttp.ClientSession) -> None:
    fake.script(Reply([4] * 8, delay_s=0.05))
    task = asyncio.create_task(post(http, fake, body(stream=True)))
    await fake.until(lambda: bool(fake.requests) and len(fake.requests[0].output_ids) == 2)
    task.cancel()
    await fake.until(lambda: fake.requests[0].disconnected)
    assert len(fake.requests[0].output_ids) < 8


async def test_responder_and_the_script_before_it(fake: FakeSGLang, http: aiohttp.ClientSession) -> None:
    fake.responder = lambda received: Reply([received.input_ids[0]] * 2)
    fake.script(Reply([7]), Fault("status", status=418, message="teapot"))
    assert json.loads((await post(http, fake, body()))[1])["output_ids"] == [7]
    assert await post(http, fake, body()) == (418, '{"error":{"message":"teapot"}}')
    assert json.loads((await post(http, fake, body(input_ids=[5])))[1])["output_ids"] == [5, 5]
    fake.responder = None
    assert json.loads((await post(http, fake, body()))[1])["output_ids"] == [1, 2, 3]


async def test_routes(fake: FakeSGLang, http: aiohttp.ClientSession) -> None:
    for path in (
        "/health",
        "/health_generate",
        "/model_info",
        "/get_model_info",
        "/get_server_info",
        "/v1/models",
    ):
        async with http.get(fake.url + path) as response:
            assert response.status == 200


# --- FakeEngine ---


def ask(**sampling: Any) -> GenerateRequest:
    return GenerateRequest("r", Prompt.of([1]), Sampling(**{"max_tokens": 8, **sampling}), stream=True)


async def read(engine: Engine, request: GenerateRequest) -> list[TokenChunk | GenerateResult]:
    return [item async for item in engine.generate(request)]


async def test_fake_engine() -> None:
    engine = FakeEngine(Reply([4, 5]), errors.EngineFailed("once"), responder=lambda _: Reply([6, 7, 8]))
    *chunks, result = await read(engine, ask())
    assert [c.ids for c in chunks if isinstance(c, TokenChunk)] == [[4], [5]]
    assert isinstance(result, GenerateResult)
    assert (result.completion_ids, result.finish_reason, result.matched) == ([4, 5], "stop", 5)
    with pytest.raises(errors.EngineFailed, match="once"):
        await read(engine, ask())
    result = (await read(engine, ask(max_tokens=2)))[-1]
    assert isinstance(result, GenerateResult)
    assert (result.completion_ids, result.finish_reason) == ([6, 7], "length")
    assert len(engine.requests) == 3
    assert engine.aborted == []


async def test_fake_engine_fails_after_tokens_and_notes_who_leaves() -> None:
    engine = FakeEngine(errors.EngineDisconnected("gone", num_tokens=2), responder=lambda _: Reply([6, 7, 8]))
    seen: list[Any] = []
    with pytest.raises(errors.EngineDisconnected):
        seen.extend([item async for item in engine.generate(ask())])
    items = engine.generate(ask())
    await anext(items)
    await items.aclose()
    assert engine.aborted == ["r"]
    with contextlib.suppress(errors.InternalError):
        await read(FakeEngine(), ask())


# --- the tokenizer and the model directory ---


def test_tokenizer_has_other_splits() -> None:
    tokenizer = byte_level_tokenizer()
    canonical = tokenizer.encode("hello world").ids
    other = [i for piece in ("he", "llo", " ", "wor", "ld") for i in tokenizer.encode(piece).ids]
    assert tokenizer.decode(other) == tokenizer.decode(canonical) == "hello world"
    assert other != canonical
    assert len(tokenizer.encode("<|im_start|>").ids) == len(tokenizer.encode("<think>").ids) == 1
    assert tokenizer.decode(tokenizer.encode("<|im_end|>").ids) == ""
    assert tokenizer.decode(tokenizer.encode("<think>").ids) == "<think>"


@pytest.mark.parametrize("text", ["", "naïve 日本語 🧪\r\n\t\x00", "the weather tool's arguments"])
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = byte_level_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_model_dir(tmp_path: Path) -> None:
    model = write_model_dir(tmp_path / "model", context_length=1234)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.get_vocab() == byte_level_tokenizer().get_vocab()
    config = json.loads((model / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["max_position_embeddings"] == 1234
    assert config["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert json.loads((model / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_chat_template(tmp_path: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    source = (write_model_dir(tmp_path) / "chat_template.jinja").read_text()
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A", "reasoning_content": "R", "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    one = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nR\n</think>\n\nA\n{one}\n{one}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages.append({"role": "user", "content": "again"})
    assert "<think>" not in template.render(messages=messages, tools=[{"name": "f"}])
