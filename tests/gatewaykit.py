"""What tests of gateway, contract and live servers share: a gateway, an agent, and the checker."""

import contextlib
import json
import random
from array import array
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from openai import AsyncOpenAI

from tokentape.engines.sglang import SGLangConfig
from tokentape.gateway.parts import GatewayConfig
from tokentape.gateway.service import ServiceConfig, running
from tokentape.testing import FakeSGLang, Reply, byte_level_tokenizer, pseudo_logprob

Json = dict[str, Any]

TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>")
_NUM_PLAIN = TOKENIZER.get_vocab_size(with_added_tokens=False)

WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: Json = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
USER: Json = {"role": "user", "content": "hello world"}


# -- what the model samples


def split(text: str, seed: int = 0) -> list[int]:
    """Ids of a text as a model might sample them: about half of the tokens fall apart into single bytes."""
    rng = random.Random(seed)
    ids: list[int] = []
    for token_id in TOKENIZER.encode(text).ids:
        if token_id >= _NUM_PLAIN or rng.random() < 0.5:
            ids.append(token_id)
        else:
            ids += [TOKENIZER.token_to_id(symbol) for symbol in TOKENIZER.id_to_token(token_id)]
    return ids


def drifts(ids: Sequence[int]) -> bool:
    """Whether a completion is not what its text encodes to."""
    return TOKENIZER.encode(TOKENIZER.decode(list(ids), skip_special_tokens=False)).ids != list(ids)


def sampled(text: str, *, seed: int = 0, delay_s: float = 0.0) -> Reply:
    """A completion that ends its turn."""
    return Reply([*split(text, seed), END], delay_s=delay_s)


def cut(text: str, *, seed: int = 0) -> Reply:
    """A completion that the length limit cut: no stop token."""
    return Reply(split(text, seed), finish="length")


def call(name: str, arguments: Mapping[str, Any] | str) -> str:
    """The text of a tool call."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'


# -- a gateway to talk to


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; `body` is decoded where it is JSON."""

    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def error(self) -> Json:
        assert set(self.body) == {"error"}, self.body
        assert set(self.body["error"]) == {"message", "type", "param", "code"}, self.body
        return self.body["error"]


@dataclass
class Gateway:
    """A gateway under test: `url`, and a few lines over aiohttp."""

    url: str
    http: aiohttp.ClientSession

    async def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        async with self.http.request(method, self.url + path, data=data, headers=headers) as response:
            raw = await response.read()
            is_json = response.content_type == "application/json"
            return Answer(response.status, json.loads(raw) if is_json else raw, response.headers)

    async def ok(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self.request(method, path, body)
        assert answer.status == 200, answer
        return answer.body

    async def create(self, **body: Any) -> str:
        return (await self.ok("POST", "/sessions", body))["session_id"]

    async def show(self, session_id: str) -> Json:
        return await self.ok("GET", f"/sessions/{session_id}")

    async def samples(self, session_id: str) -> list[Json]:
        return (await self.ok("GET", f"/sessions/{session_id}/samples"))["samples"]

    async def post(self, session_id: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        return await self.request("POST", f"/sessions/{session_id}/v1/chat/completions", body, headers)

    async def chat(self, session_id: str, messages: Sequence[Json], **fields: Any) -> Json:
        """A reply, streamed or not: the chunks of a stream are put together as an SDK does it."""
        body = {"model": "policy", "messages": messages, **fields}
        if not fields.get("stream"):
            answer = await self.post(session_id, body)
            assert answer.status == 200, answer
            return answer.body
        return joined([event async for event in self.events(session_id, body)])

    async def events(self, session_id: str, body: Json) -> AsyncGenerator[Json]:
        """The decoded events of a stream; its end must be [DONE], unless an error came."""
        path = f"{self.url}/sessions/{session_id}/v1/chat/completions"
        ended = failed = False
        async with self.http.post(path, data=json.dumps({**body, "stream": True})) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            async for line in response.content:
                if not line.strip():
                    continue
                assert line.startswith(b"data: ")
                assert not ended
                if line.strip() == b"data: [DONE]":
                    ended = True
                else:
                    event = json.loads(line[6:])
                    failed = "error" in event
                    yield event
        assert ended != failed

    @contextlib.asynccontextmanager
    async def openai(self, session_id: str, **options: Any) -> AsyncGenerator[AsyncOpenAI]:
        base_url = f"{self.url}/sessions/{session_id}/v1"
        async with AsyncOpenAI(
            **{"base_url": base_url, "api_key": "unused", "max_retries": 0, **options}
        ) as client:
            yield client


def joined(events: Sequence[Json]) -> Json:
    """The reply that the chunks of a stream make, in the shape of one that was not streamed."""
    message: Json = {"role": "assistant", "content": None, "refusal": None}
    choice: Json = {"index": 0, "message": message, "finish_reason": None, "logprobs": None}
    reply: Json = {k: events[0][k] for k in ("id", "created", "model")}
    reply |= {"object": "chat.completion", "choices": [choice]}
    for event in events:
        assert "error" not in event, event
        assert event["object"] == "chat.completion.chunk"
        assert (event["id"], event["model"]) == (reply["id"], reply["model"])
        reply |= {k: event[k] for k in ("usage", "tokentape") if k in event}
        for part in event["choices"]:
            assert choice["finish_reason"] is None, "a choice went on after its finish_reason"
            choice["finish_reason"] = part["finish_reason"]
            delta = part["delta"]
            for name in ("content", "reasoning_content"):
                if delta.get(name):
                    message[name] = (message.get(name) or "") + delta[name]
            for tool_call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                assert tool_call["index"] == len(calls)
                calls.append({k: v for k, v in tool_call.items() if k != "index"})
            if part["logprobs"] is not None:
                logprobs = choice["logprobs"] or {"content": [], "refusal": None}
                logprobs["content"] += part["logprobs"]["content"]
                choice["logprobs"] = logprobs
    assert choice["finish_reason"] is not None
    return reply


@contextlib.asynccontextmanager
async def gateway_for(
    engine_url: str,
    model: Path,
    store: Path | str,
    *,
    http: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    **service: Any,
) -> AsyncGenerator[Gateway]:
    """A gateway on a free port, with its real HTTP server, in this process."""
    limits = {"first_token_timeout_s": 10.0, "token_timeout_s": 10.0, "total_timeout_s": 20.0}
    config = ServiceConfig(
        model=str(model),
        engine=SGLangConfig(engine_url, **{**limits, **(engine or {})}),
        store=store,
        http=GatewayConfig(**{"model": "policy", **(http or {})}),
        **{"drain_s": 0.5, **service},
    )
    async with running(config) as url, aiohttp.ClientSession() as client:
        yield Gateway(url, client)


# -- the checker


@dataclass(frozen=True)
class Seen:
    """One generation as the engine saw it: what arrived there and what it sampled."""

    turn_id: str
    input_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]


def seen_by(fake: FakeSGLang) -> list[Seen]:
    return [
        Seen(
            turn_id_of(r.rid),
            r.input_ids,
            r.output_ids,
            [pseudo_logprob(i, at) for at, i in enumerate(r.output_ids)],
        )
        for r in fake.requests
    ]


def turn_id_of(rid: str) -> str:
    """The turn's name inside the engine's."""
    return rid.partition("-")[2]


def assert_samples_match(seen: Iterable[Seen], samples: Sequence[Json], *, num_turns: int) -> None:
    """Samples hold what the engine saw and sampled in `num_turns` committed turns, each trained once."""
    by_turn = {s.turn_id: s for s in seen}
    trained: list[str] = []
    for sample in samples:
        ids, mask, logprobs = sample["token_ids"], sample["loss_mask"], sample["logprobs"]
        assert len(ids) == len(mask) == len(logprobs)
        rest = [True] * len(ids)
        for before, turn in zip([None, *sample["turns"]], sample["turns"], strict=False):
            engine = by_turn[turn["turn_id"]]
            start, end = turn["start"], turn["end"]
            assert ids[:start] == engine.input_ids, f"{turn['turn_id']}: another prompt reached the engine"
            assert ids[start:end] == engine.output_ids, f"{turn['turn_id']}: the engine sampled other ids"
            if before is not None:
                parent = by_turn[before["turn_id"]]
                so_far = parent.input_ids + parent.output_ids
                assert engine.input_ids[: len(so_far)] == so_far, (
                    f"{turn['turn_id']} does not extend its parent"
                )
            assert mask[start:end] == [int(turn["trained"])] * (end - start)
            if turn["trained"]:
                trained.append(turn["turn_id"])
                assert logprobs[start:end] == array("f", engine.logprobs).tolist()
                rest[start:end] = [False] * (end - start)
        assert not any(mask[i] for i, untouched in enumerate(rest) if untouched), (
            "a token is trained that was not sampled"
        )
        assert all(logprobs[i] is None for i, untouched in enumerate(rest) if untouched)
        assert sample["num_prompt_tokens"] == sample["turns"][0]["start"]
        assert sample["sample_id"] == sample["turns"][-1]["turn_id"]
        covered = [i for span in sample["weight_versions"] for i in range(span["start"], span["end"])]
        assert covered == [i for i, one in enumerate(mask) if one]
    assert len(trained) == len(set(trained)), "a turn is trained twice"
    everything = {turn["turn_id"] for sample in samples for turn in sample["turns"]}
    assert set(trained) == everything, "a turn is never trained"
    assert len(everything) == num_turns


# -- an agent


@dataclass
class Agent:
    """Keeps a conversation and replays it as agents do: the reply's message goes back as it came."""

    gateway: Gateway
    session_id: str
    fields: Json = field(default_factory=dict[str, Any])
    messages: list[Json] = field(default_factory=list[Json])

    async def turn(self, *new: Json, **fields: Json | Any) -> Json:
        """Say something, or nothing, and take the reply into the history."""
        self.messages += new
        reply = await self.gateway.chat(self.session_id, self.messages, **{**self.fields, **fields})
        message = reply["choices"][0]["message"]
        self.messages.append({k: v for k, v in message.items() if v is not None or k == "content"})
        return reply

    def results(self, text: str = "sunny") -> list[Json]:
        """A result for every call of the last reply."""
        calls = self.messages[-1]["tool_calls"]
        return [
            {"role": "tool", "tool_call_id": c["id"], "content": f"{text} {i}"} for i, c in enumerate(calls)
        ]
