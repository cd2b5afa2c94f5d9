"""The embedded engine's native protocol on a real socket, held to what SGLang 0.5.23 answered."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tiny_model import CONTEXT, END, VOCAB, make, save_model

from tokentape.engines.local import LocalEngine, run_engine
from tokentape.engines.server import app as server
from tokentape.engines.server.answer import Answer
from tokentape.engines.server.requests import GenerateBody, Generation, SamplingParams
from tokentape.errors import ConfigError, RequestError

PROMPT = [10, 20, 30, 40]
FOREVER = {"max_new_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(model_dir)
    yield engine
    engine.close()


class Client:
    """A few lines over aiohttp: JSON in, status and JSON out."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        async with self.session.request(method, self.url + path, data=data) as response:
            raw = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(raw) if is_json else raw

    async def post(self, path: str, body: Any = None) -> Any:
        status, answer = await self.request("POST", path, body)
        assert status == 200, answer
        return answer

    async def generate(self, params: dict[str, Any], **fields: Any) -> Any:
        body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, **fields}
        return await self.post("/generate", body)

    async def stream(self, params: dict[str, Any], **fields: Any) -> AsyncIterator[dict[str, Any]]:
        body = {
            "input_ids": PROMPT,
            "sampling_params": params,
            "return_logprob": True,
            "stream": True,
            **fields,
        }
        async with self.session.post(self.url + "/generate", data=json.dumps(body)) as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            ended = False
            async for line in response.content:
                if line.strip() == b"data: [DONE]":
                    ended = True
                elif line.strip():
                    assert line.startswith(b"data: ")
                    yield json.loads(line[6:])
            assert ended


@pytest.fixture
async def client(engine: LocalEngine) -> AsyncIterator[Client]:
    async with server.serve(server.make_app(engine)) as url, aiohttp.ClientSession() as session:
        yield Client(session, url)


# -- the same answers for the same mistakes


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


TOO_LONG = f"The input ({CONTEXT + 9} tokens) is longer than the model's context length ({CONTEXT} tokens)."
OVER = (
    f"Requested token count exceeds the model's maximum context length of {CONTEXT} tokens. "
    f"You requested a total of {CONTEXT + 98} tokens: {CONTEXT - 2} tokens from the input messages and 100 "
    "tokens for the completion. Please reduce the number of tokens in the input messages or the completion "
    "to fit within the limit."
)
UNKNOWN = (
    "unknown field `foo`, expected one of `max_new_tokens`, `stop`, `stop_token_ids`, `stop_regex`, "
    "`temperature`, `top_p`, `top_k`, `min_p`, `frequency_penalty`, `presence_penalty`, "
    "`repetition_penalty`, `min_new_tokens`, `n`, `json_schema`, `regex`, `ebnf`, `structural_tag`, "
    "`ignore_eos`, `skip_special_tokens`, `spaces_between_special_tokens`, `no_stop_trim`, "
    "`stream_interval`, `logit_bias`, `sampling_seed`, `custom_params`, `beam_width`, `watermark`, `choice`"
)
MIN_OVER_MAX = "min_new_tokens must be in [0, max_new_tokens(2)], got 9."
REAL_ONE_DIES = f"outside the vocabulary (0 to {VOCAB - 1}). A real SGLang server dies of this."

# Recorded from SGLang 0.5.23 (vocabulary and context are this model's), but for the last block.
REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("empty_input_ids", {"input_ids": []}, error("input_ids cannot be empty.")),
    ("no_input", {"input_ids": None}, error("Either text, input_ids or input_embeds should be provided.")),
    ("context_too_long", {"input_ids": [33] * (CONTEXT + 9)}, error(TOO_LONG)),
    (
        "context_plus_new",
        {"input_ids": [33] * (CONTEXT - 2), "sampling_params": {"max_new_tokens": 100}},
        error(OVER),
    ),
    ("unknown_sampling_param", {"sampling_params": {"foo": 1, "max_new_tokens": 2}}, {"error": UNKNOWN}),
    (
        "negative_max",
        {"sampling_params": {"max_new_tokens": -1}},
        error("max_new_tokens must be at least 0, got -1."),
    ),
    (
        "bad_temperature",
        {"sampling_params": {"temperature": -1}},
        error("temperature must be a non-negative finite number, got -1."),
    ),
    ("min_gt_max", {"sampling_params": {"max_new_tokens": 2, "min_new_tokens": 9}}, error(MIN_OVER_MAX)),
    # Here a real server dies (id_*) or can do more.
    ("id_over", {"input_ids": [1, 2, 999999]}, error(f"input_ids[2] is 999999, {REAL_ONE_DIES}")),
    ("id_negative", {"input_ids": [1, -5]}, error(f"input_ids[1] is -5, {REAL_ONE_DIES}")),
    (
        "start_len",
        {"logprob_start_len": 5},
        error("logprob_start_len=5 is higher than the number of input tokens 4."),
    ),
    (
        "n",
        {"sampling_params": {"n": 2}},
        error("n must be 1: the embedded engine samples one completion per request."),
    ),
    (
        "regex",
        {"sampling_params": {"regex": "[0-9]"}},
        error("regex is not supported by the embedded engine."),
    ),
    ("image", {"image_data": "x"}, error("image_data is not supported by the embedded engine.")),
    (
        "batch",
        {"input_ids": [[1], [2]]},
        error("The embedded engine takes one prompt per request: input_ids must be a list of ints."),
    ),
]


@pytest.mark.parametrize(("body", "answer"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
async def test_refusals(client: Client, body: dict[str, Any], answer: dict[str, Any]):
    assert await client.request("POST", "/generate", {"input_ids": PROMPT, **body}) == (400, answer)


async def test_a_refusal_of_a_stream_is_an_event_after_200(client: Client):
    events = [event async for event in client.stream({}, input_ids=[33] * (CONTEXT + 9))]
    expected = {"message": TOO_LONG, "type": "invalid_request_error", "code": 400, "retryable": False}
    assert events == [{"error": expected}]
    body = {"input_ids": PROMPT, "sampling_params": {"foo": 1}, "stream": True}
    assert await client.request("POST", "/generate", body) == (400, {"error": UNKNOWN})


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"{not json", "{'type': 'json_invalid', 'loc': ('body', "),
        (
            b'{"input_ids": "abc"}',
            "{'type': 'value_error', 'loc': ('body', 'input_ids'), 'msg': 'Value error, must be",
        ),
        (b'{"input_ids": [1, "a"]}', "{'type': 'value_error', 'loc': ('body', 'input_ids')"),
        (b'{"input_ids": [1], "stream": "maybe"}', "{'type': 'value_error', 'loc': ('body',)"),
        (b"[]", "{'type': 'dict_type'"),
    ],
)
async def test_bodies_that_are_not_what_was_asked_for(client: Client, body: bytes, detail: str):
    status, answer = await client.request("POST", "/generate", body)
    assert status == 400
    message = answer.pop("message")
    assert answer == {"object": "error", "type": "Bad Request", "param": None, "code": 400}
    assert message.startswith(f"1 validation error:\n  {detail}")


async def test_unknown_routes_and_methods(client: Client):
    assert await client.request("GET", "/nope") == (404, {"detail": "Not Found"})
    assert await client.request("GET", "/generate") == (405, {"detail": "Method Not Allowed"})
    async with client.session.get(client.url + "/generate") as response:
        assert response.headers["Allow"] == "POST, PUT"


async def test_what_a_real_server_takes_is_taken(client: Client):
    body = {"input_ids": PROMPT, "foo": 1, "text": "ignored", "sampling_params": {"max_new_tokens": 2}}
    for method in ("POST", "PUT"):
        status, answer = await client.request(method, "/generate", body)
        assert status == 200
        assert answer["meta_info"]["prompt_tokens"] == len(PROMPT)
    answer = await client.generate({"max_new_tokens": 1, "temperature": None}, input_ids=None, text="héllo")
    assert answer["meta_info"]["prompt_tokens"] == 6
    default = await client.post("/generate", {"input_ids": PROMPT, "sampling_params": {"ignore_eos": True}})
    assert default["meta_info"]["completion_tokens"] == 128


async def test_duplicate_rid(client: Client):
    stream = client.stream(FOREVER, rid="dup")
    await anext(stream)
    body = {"input_ids": PROMPT, "rid": "dup", "sampling_params": {"max_new_tokens": 2}}
    assert await client.request("POST", "/generate", body) == (
        400,
        error("Duplicate request ID detected: dup"),
    )
    await client.post("/abort_request", {"rid": "dup"})
    assert [event async for event in stream][-1]["meta_info"]["finish_reason"]["type"] == "abort"


# -- answers


async def test_the_fields_of_an_answer(client: Client):
    await client.post("/flush_cache")
    answer = await client.generate(
        {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True},
        rid="my-rid",
        top_logprobs_num=2,
        return_prompt_token_ids=True,
        logprob_start_len=1,
    )
    ids, meta = answer["output_ids"], answer["meta_info"]
    assert list(answer) == ["text", "output_ids", "meta_info", "prompt_token_ids"]
    assert answer["prompt_token_ids"] == PROMPT
    assert meta.pop("e2e_latency") > 0
    inputs, outputs = meta.pop("input_token_logprobs"), meta.pop("output_token_logprobs")
    assert inputs[0] == [None, 20, None]
    assert [pair[1] for pair in inputs] == PROMPT[1:]
    assert all(logprob < 0 for logprob, _, _ in inputs[1:])
    assert [[token, text] for _, token, text in outputs] == [[token, None] for token in ids]
    input_tops, output_tops = meta.pop("input_top_logprobs"), meta.pop("output_top_logprobs")
    assert input_tops[0] is None
    assert [len(top) for top in input_tops[1:]] == [2, 2]
    assert [top[0] for top in output_tops] == outputs  # greedy: the likeliest is the sampled one
    assert meta == {
        "id": "my-rid",
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": 4,
        "weight_version": "default",
        "num_retractions": 0,
        "output_token_logprobs_length": 3,
        "reasoning_tokens": 0,
        "completion_tokens": 3,
        "cached_tokens": 0,
        "weight_versions": [{"version": "default", "start": 0, "end": 3}],
        "cached_tokens_details": None,
        "dp_rank": None,
    }
    again = await client.generate({"max_new_tokens": 1}, return_text_in_logprobs=True, return_logprob=True)
    assert again["meta_info"]["cached_tokens"] == 3
    assert again["meta_info"]["cached_tokens_details"] == {"device": 3, "host": 0}
    assert isinstance(again["meta_info"]["output_token_logprobs"][0][2], str)
    plain = await client.generate({"max_new_tokens": 1}, return_logprob=False)
    assert "output_token_logprobs" not in plain["meta_info"]


async def test_no_new_tokens_scores_the_prompt(client: Client):
    answer = await client.generate({"max_new_tokens": 0, "temperature": 0}, logprob_start_len=0)
    meta = answer["meta_info"]
    assert (answer["text"], answer["output_ids"]) == ("", [])
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 0}]
    assert [token for _, token, _ in meta["input_token_logprobs"]] == PROMPT
    assert meta["output_token_logprobs"] == []
    bare = await client.generate({"max_new_tokens": 0})
    assert bare["meta_info"]["input_token_logprobs"] == []


async def test_a_stream_is_the_whole_step_by_step(client: Client):
    params = {"max_new_tokens": 40, "sampling_seed": 4, "ignore_eos": True}
    whole = await client.generate(params)
    events = [event async for event in client.stream(params)]
    assert len(events) > 1
    num = 0
    for event in events:
        ids, meta = event["output_ids"], event["meta_info"]
        assert ids == whole["output_ids"][: len(ids)]
        assert len(ids) > num
        assert meta["completion_tokens"] == len(meta["output_token_logprobs"]) == len(ids)
        assert whole["text"].startswith(event["text"]) or event is not events[-1]
        num = len(ids)
    for event in events[:-1]:
        assert event["meta_info"]["finish_reason"] is None
        assert "weight_versions" not in event["meta_info"]
    last = events[-1]
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
    assert last["meta_info"]["weight_versions"] == whole["meta_info"]["weight_versions"]
    pairs = zip(
        last["meta_info"]["output_token_logprobs"], whole["meta_info"]["output_token_logprobs"], strict=True
    )
    assert all(a[0] == pytest.approx(b[0], abs=1e-5) for a, b in pairs)


async def test_incremental_streams_add_up(engine: LocalEngine):
    params = {"max_new_tokens": 40, "sampling_seed": 4, "ignore_eos": True, "stream_interval": 3}
    app = server.make_app(engine, incremental_stream=True)
    async with server.serve(app) as url, aiohttp.ClientSession() as session:
        client = Client(session, url)
        whole = await client.generate(params)
        events = [event async for event in client.stream(params)]
        assert len(events) > 1
        assert [token for event in events for token in event["output_ids"]] == whole["output_ids"]
        assert all(len(event["output_ids"]) >= 3 for event in events[:-1])
        pairs = [pair for event in events for pair in event["meta_info"]["output_token_logprobs"]]
        assert [token for _, token, _ in pairs] == whole["output_ids"]
        assert events[-1]["meta_info"]["completion_tokens"] == 40
        _, info = await client.request("GET", "/get_server_info")
        assert info["incremental_streaming_output"] is True


async def test_sixteen_at_once(client: Client):
    jobs = [
        client.generate({"max_new_tokens": 30 + i, "sampling_seed": i, "ignore_eos": True}) for i in range(16)
    ]
    answers = await asyncio.gather(*jobs)
    assert [len(answer["output_ids"]) for answer in answers] == [30 + i for i in range(16)]
    alone = await client.generate({"max_new_tokens": 37, "sampling_seed": 7, "ignore_eos": True})
    assert alone["output_ids"] == answers[7]["output_ids"]


async def test_text_trims_the_stop_and_special_tokens(client: Client):
    bias = {str(END): 100.0}
    ended = await client.generate({"max_new_tokens": 4, "logit_bias": bias})
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": END}
    assert (ended["text"], ended["output_ids"]) == ("", [END])
    kept = await client.generate(
        {"max_new_tokens": 4, "logit_bias": bias, "skip_special_tokens": False, "no_stop_trim": True}
    )
    assert kept["text"] == "<|im_end|>"
    tokens = (await client.post("/tokenize", {"prompt": "ab"}))["tokens"]
    bias = {str(token): 50.0 for token in tokens}
    params = {"max_new_tokens": 300, "logit_bias": bias, "stop": "aab", "sampling_seed": 1}
    cut = await client.generate(params)
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": "aab"}
    assert "aab" not in cut["text"]
    assert len(cut["output_ids"]) == len(cut["text"]) + 3  # the ids keep the stop string's tokens
    whole = await client.generate({**params, "no_stop_trim": True})
    assert whole["text"] == cut["text"] + "aab"


# -- aborts and disconnects


async def test_abort_mid_stream(client: Client):
    stream = client.stream(FOREVER, rid="gone")
    await anext(stream)
    status, answer = await client.request("POST", "/abort_request", {"rid": "gone"})
    assert (status, answer) == (200, "")
    last = [event async for event in stream][-1]
    meta = last["meta_info"]
    assert meta["finish_reason"] == {
        "type": "abort",
        "message": "Aborted",
        "status_code": None,
        "err_type": None,
    }
    assert 0 < len(last["output_ids"]) == meta["completion_tokens"] < 500
    assert [token for _, token, _ in meta["output_token_logprobs"]] == last["output_ids"]
    assert meta["weight_versions"][-1]["end"] == len(last["output_ids"])
    assert (await client.request("POST", "/abort_request", {"rid": "nobody"}))[0] == 200


async def test_abort_all_answers_200_to_those_who_wait(client: Client):
    jobs = [asyncio.create_task(client.generate(FOREVER)) for _ in range(3)]
    await asyncio.sleep(0.1)
    await client.post("/abort_request", {"abort_all": True})
    for answer in await asyncio.gather(*jobs):
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_aborts_its_generation(
    client: Client, engine: LocalEngine, stream: bool
):
    before = set(engine._in_flight)
    if stream:
        events = client.stream(FOREVER)
        await anext(events)
        await events.aclose()  # type: ignore[attr-defined]
    else:
        await client.post("/pause_generation", {"mode": "in_place"})
        job = asyncio.create_task(client.generate(FOREVER))
        while set(engine._in_flight) == before:  # noqa: ASYNC110 - the engine has no event for this
            await asyncio.sleep(0.01)
        job.cancel()
    async with asyncio.timeout(5):
        while set(engine._in_flight) != before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await client.post("/continue_generation")
    await client.post("/flush_cache")


# -- control routes


async def test_pause_flush_and_continue(client: Client):
    job = asyncio.create_task(client.generate({"max_new_tokens": 400, "ignore_eos": True}))
    await asyncio.sleep(0.05)
    paused = await client.post("/pause_generation", {"mode": "in_place"})
    assert paused == {"message": "Generation paused successfully.", "status": "ok"}
    assert await client.request("POST", "/flush_cache") == (400, "Flush cache failed.\n")
    resumed = await client.post("/continue_generation", {})
    assert resumed == {"message": "Generation continued successfully.", "status": "ok"}
    assert (await job)["meta_info"]["finish_reason"] == {"type": "length", "length": 400}
    status, text = await client.request("POST", "/flush_cache")
    assert status == 200
    assert text.startswith("Cache flushed.\nPlease check backend logs")
    assert (await client.request("POST", "/pause_generation", {"mode": "sideways"}))[0] == 400


async def test_weights_change_under_a_running_generation(model_dir: Path, tmp_path: Path):
    save_model(tmp_path, seed=9)
    engine = LocalEngine(model_dir)
    try:
        async with server.serve(server.make_app(engine)) as url, aiohttp.ClientSession() as session:
            client = Client(session, url)
            stream = client.stream(FOREVER)
            await anext(stream)
            update = {"model_path": str(tmp_path), "weight_version": "v2"}
            assert await client.post("/update_weights_from_disk", update) == {
                "success": True,
                "message": "Succeeded to update model weights. Weight version updated to v2.",
                "num_paused_requests": 0,
            }
            last = [event async for event in stream][-1]
            spans = last["meta_info"]["weight_versions"]
            assert [span["version"] for span in spans] == ["default", "v2"]
            assert (spans[0]["start"], spans[0]["end"], spans[1]["end"]) == (0, spans[1]["start"], 500)
            assert last["meta_info"]["weight_version"] == "v2"
            renamed = await client.post("/update_weight_version", {"new_version": "v3"})
            assert renamed == {
                "success": True,
                "message": "Weight version updated to v3",
                "new_version": "v3",
            }
            assert (await client.generate({"max_new_tokens": 1}))["meta_info"]["weight_version"] == "v3"
            bad = {"model_path": str(tmp_path / "nowhere")}
            status, answer = await client.request("POST", "/update_weights_from_disk", bad)
            assert (status, answer["success"]) == (400, False)
            assert (await client.request("GET", "/model_info"))[1]["weight_version"] == "v3"
    finally:
        engine.close()


async def test_tokenize_and_detokenize(client: Client):
    answer = await client.post("/tokenize", {"model": "x", "prompt": "Hi"})
    assert answer["count"] == len(answer["tokens"]) == 2
    assert answer["max_model_len"] == CONTEXT
    tokens = [*answer["tokens"], END]
    assert await client.post("/detokenize", {"tokens": tokens}) == {"text": "Hi"}
    kept = await client.post("/detokenize", {"tokens": tokens, "skip_special_tokens": False})
    assert kept == {"text": "Hi<|im_end|>"}


async def test_who_it_is(client: Client, model_dir: Path):
    for path in ("/health", "/health_generate", "/ready"):
        assert await client.request("GET", path) == (200, "")
    for path in ("/get_model_info", "/model_info"):
        _, info = await client.request("GET", path)
        assert (info["model_path"], info["weight_version"]) == (str(model_dir), "default")
        assert info["architectures"] == ["Qwen3ForCausalLM"]
    for path in ("/get_server_info", "/server_info"):
        _, info = await client.request("GET", path)
        assert (info["context_length"], info["max_req_input_len"]) == (CONTEXT, CONTEXT - 1)
        assert info["vocab_size"] == VOCAB
    _, models = await client.request("GET", "/v1/models")
    assert models["data"][0]["max_model_len"] == CONTEXT


async def test_run_engine_serves_until_it_is_told_to_stop(model_dir: Path):
    stopped, urls = asyncio.Event(), asyncio.Queue[str]()
    task = asyncio.create_task(run_engine(model_dir, ready=urls.put_nowait, stopped=stopped))
    url = await asyncio.wait_for(urls.get(), 30)
    async with aiohttp.ClientSession() as session:
        job = asyncio.create_task(Client(session, url).generate({"max_new_tokens": 300, "ignore_eos": True}))
        await asyncio.sleep(0.05)
        stopped.set()
        assert len((await job)["output_ids"]) == 300  # drained
        await task
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(url + "/health")


# -- a fake engine behind the same server


class FakeEngine:
    """A `server.ServedEngine` that answers from a list of ids and then ends as it is told."""

    facts = server.EngineFacts("fake", "fake", (), 64, 64, "cpu", "float32", 1)
    weight_version = "f1"
    healthy = False

    def __init__(self, ids: list[int], reason: dict[str, Any]) -> None:
        self.ids = ids
        self.reason = reason

    def submit(self, generation: Generation) -> None:
        if generation.rid == "taken":
            raise RequestError("Duplicate request ID detected: taken")
        for token in self.ids:
            generation.append(token, -1.0, self.weight_version, [])
        generation.finish(self.reason, self.weight_version)
        generation.on_progress()

    def cancel(self, generation: Generation) -> None:
        raise AssertionError("it had ended")

    def abort(self, rid: str, *, everything: bool = False) -> None: ...

    def pause(self, mode: str) -> "Future[None]":
        return self._done(None)

    def resume(self) -> "Future[None]":
        return self._done(None)

    def update_weights(self, model_path: str, weight_version: str | None) -> "Future[None]":
        future: Future[None] = Future()
        future.set_exception(ConfigError("no"))
        return future

    def set_weight_version(self, weight_version: str) -> "Future[None]":
        return self._done(None)

    def flush_cache(self) -> "Future[bool]":
        return self._done(True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) - 64 for c in text]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i + 64) for i in ids)

    @staticmethod
    def _done(value: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(value)
        return future


async def test_a_failed_engine_is_a_500_or_an_error_event():
    reason = {"type": "abort", "message": "Boom: no", "status_code": 500, "err_type": "InternalServerError"}
    app = server.make_app(FakeEngine([1, 2], reason))
    async with server.serve(app) as url, aiohttp.ClientSession() as session:
        client = Client(session, url)
        body = {"input_ids": PROMPT}
        assert await client.request("POST", "/generate", body) == (500, error("Boom: no"))
        events = [event async for event in client.stream({"max_new_tokens": 5})]
        expected = {
            "message": "Boom: no",
            "type": "internal_server_error",
            "code": 500,
            "retryable": True,
        }
        assert events == [{"error": expected}]
        assert (await client.request("GET", "/health"))[0] == 503


def test_text_holds_back_half_a_character_and_skips_what_is_unsent():
    def decode(ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    generation = Generation([1], SamplingParams(stop=["END"]), GenerateBody())
    answer = Answer(generation, decode)
    seen: list[str] = []
    for byte in "aé€".encode():
        generation.append(byte, -1.0, "v", [])
        seen.append(answer.delta()["text"])
    assert seen == ["a", "", "é", "", "", "€"]
    for byte in b"END":
        generation.append(byte, -1.0, "v", [])
    generation.finish({"type": "stop", "matched": "END"}, "v")
    assert answer.delta()["text"] == ""
    assert answer.cumulative()["text"] == "aé€"
