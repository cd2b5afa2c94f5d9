"""A recording proxy between gateway and engine: what reached the engine, seen independently of both."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncGenerator, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from tokenizers import Tokenizer

from gatewaykit import Agent, Json, Seen, assert_samples_match, gateway_for, turn_id_of
from tokentape.engines.server import serve


@dataclass
class Recording:
    """`exchanges`: every `/generate` that passed, its body and the raw answer, in order of arrival."""

    url: str = ""
    exchanges: list[tuple[Json, bytearray]] = field(default_factory=list[tuple[Json, bytearray]])

    def seen(self, turn_ids: Container[str]) -> list[Seen]:
        """What passed for these turns; they must be over."""
        mine = [e for e in self.exchanges if turn_id_of(e[0]["rid"]) in turn_ids]
        return [_seen(request, bytes(answer)) for request, answer in mine]


def _seen(request: Json, raw: bytes) -> Seen:
    """The last answer of an exchange: streams are cumulative."""
    if request["stream"]:
        raw = [line for line in raw.splitlines() if line.startswith(b"data: {")][-1][6:]
    answer: Any = json.loads(raw)
    logprobs = answer["meta_info"]["output_token_logprobs"]
    ids = [token_id for _, token_id, _ in logprobs]
    assert ids == answer["output_ids"]
    return Seen(
        turn_id_of(request["rid"]), request["input_ids"], ids, [logprob for logprob, _, _ in logprobs]
    )


@contextlib.asynccontextmanager
async def recording(engine_url: str) -> AsyncGenerator[Recording]:
    """Everything goes through unchanged."""
    record = Recording()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as upstream:

        async def forward(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            answer = bytearray()
            if request.path == "/generate":
                record.exchanges.append((json.loads(body), answer))
            headers = {"Content-Type": request.content_type}
            async with upstream.request(
                request.method, engine_url + request.path, data=body, headers=headers
            ) as inner:
                outer = web.StreamResponse(status=inner.status, headers={"Content-Type": inner.content_type})
                await outer.prepare(request)
                async for piece in inner.content.iter_any():
                    answer += piece
                    await outer.write(piece)
                await outer.write_eof()
                return outer

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", forward)
        async with serve(app, drain_s=0.1) as record.url:
            yield record


async def converse(
    engine_url: str,
    model_dir: Path,
    store: Path,
    *,
    openings: Sequence[Json],
    num_turns: int,
    fields: Json,
    question: str = "What is 17 * {} + 5?",
    num_sessions: int = 3,
    history: str = "template",
) -> tuple[int, int]:
    """Sessions at temperature 1, side by side, every turn of them checked at the wire.

    The first session does not stream, the second does, the third alternates; and so on. Every turn that does
    not answer a tool call asks `question` about another number. Returns how many
    completions there were, and how many of them are not the canonical encoding of their text.
    """
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    limits = {"first_token_timeout_s": 300.0, "token_timeout_s": 120.0, "total_timeout_s": 600.0}
    completions: list[list[int]] = []
    async with (
        recording(engine_url) as record,
        gateway_for(record.url, model_dir, store, engine=limits, history=history) as gateway,
    ):
        await gateway.ok("GET", "/readyz")

        async def episode(number: int) -> None:
            agent = Agent(gateway, await gateway.create(), {"temperature": 1.0, **fields})
            new = [
                *openings,
                {"role": "user", "content": question.format(number + 3)},
            ]
            turn_ids: list[str] = []
            for turn in range(num_turns):
                reply = await agent.turn(*new, stream=(False, True, turn % 2 == 0)[number % 3])
                turn_ids.append(reply["tokentape"]["turn_id"])
                if agent.messages[-1].get("tool_calls"):
                    new = agent.results("4")
                else:
                    new = [{"role": "user", "content": question.format(turn + 20)}]
            by_turn = {s.turn_id: s for s in record.seen(turn_ids)}
            path = [by_turn[turn_id] for turn_id in turn_ids]
            for before, after in itertools.pairwise(path):
                so_far = before.input_ids + before.output_ids
                assert after.input_ids[: len(so_far)] == so_far, "a prompt does not extend the turn before"
                assert len(after.input_ids) > len(so_far)
            samples = await gateway.samples(agent.session_id)
            assert len(samples) == 1, [s["branch_reason"] for s in samples]
            assert_samples_match(by_turn.values(), samples, num_turns=num_turns)
            assert samples[0]["token_ids"] == path[-1].input_ids + path[-1].output_ids
            completions.extend(s.output_ids for s in path)

        await asyncio.gather(*map(episode, range(num_sessions)))
    odd = [c for c in completions if tokenizer.encode(_text(tokenizer, c), add_special_tokens=False).ids != c]
    return len(completions), len(odd)


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)
