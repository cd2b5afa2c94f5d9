"""One generation of the fake server: the events that the real one would send, and what spoils them."""

import asyncio
import base64
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from tokenizers import Tokenizer

from tokentape.testing.script import (
    Fault,
    Reply,
    Sampled,
    pseudo_experts,
    pseudo_logprob,
    pseudo_support,
)

_STOPPING = ("stall", "disconnect", "cut", "error_event", "abort")  # kinds that end behind `after` tokens


@dataclass(slots=True)
class ReceivedRequest:
    """One `/generate` as it arrived, and what became of it.

    `raw` is the body as sent, `body` the same decoded. `output_ids` are those sent back so far.
    `disconnected`: the client left before the end.
    """

    raw: bytes
    body: dict[str, Any]
    headers: Mapping[str, str]
    output_ids: list[int] = field(default_factory=list[int])
    disconnected: bool = False
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def rid(self) -> str:
        """The request's id; "" where none was sent."""
        return self.body.get("rid") or ""

    @property
    def input_ids(self) -> list[int]:
        """The prompt's ids, int[P]."""
        return self.body.get("input_ids") or []

    @property
    def sampling_params(self) -> dict[str, Any]:
        """The sampling parameters as sent."""
        return self.body.get("sampling_params") or {}

    @property
    def stream(self) -> bool:
        """Whether a stream was asked for."""
        return bool(self.body.get("stream"))

    @property
    def num_top_logprobs(self) -> int:
        """How many likeliest tokens were asked for beside each sampled one."""
        return self.body.get("top_logprobs_num") or 0


class Generation:
    """One running generation: the events that the real server would send, and the fault that spoils them."""

    def __init__(
        self,
        received: ReceivedRequest,
        reply: Reply,
        fault: Fault | None,
        sampled: Sampled,
        *,
        num_cached: int,
        version: str,
        incremental: bool,
        tokenizer: Tokenizer | None,
        vocab_size: int,
    ) -> None:
        self._received = received
        self._reply = reply
        self._fault = fault
        self._sampled = sampled
        self._num_cached = num_cached
        self._version = version
        self._incremental = incremental and received.stream
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    @property
    def _fault_at(self) -> int:
        return (self._fault.after or 0) if self._fault else 0

    async def whole(self, http: web.Request) -> web.StreamResponse:
        """The answer to a request without `stream`."""
        kind = self._fault.kind if self._fault else None
        num_sampled = 0
        for _ in self._sampled.ids:
            if (kind in _STOPPING and num_sampled >= self._fault_at) or await self._aborted_while_waiting():
                break
            num_sampled += 1
        if kind == "stall":
            await asyncio.sleep(3600)
        if kind in ("disconnect", "cut"):
            return reset(http)
        if self._fault and kind == "error_event":
            return json_answer(self._fault.status or 500, {"error": {"message": self._fault.message}})
        if kind == "abort" and self._fault and self._fault.status is not None:
            return json_answer(self._fault.status, {"detail": self._fault.message})
        self._received.output_ids = self._sampled.ids[:num_sampled]
        return json_answer(200, self._event_of(0, num_sampled, self._finish_of(num_sampled)))

    async def stream(self, http: web.Request) -> web.StreamResponse:
        """The answer to a request with `stream`."""
        response = await open_stream(http)
        kind, total = self._fault.kind if self._fault else None, len(self._sampled.ids)
        interval = int(self._received.sampling_params.get("stream_interval") or 1)
        sent = 0
        for end in range(1, total + 1):
            if kind in _STOPPING and end > self._fault_at:
                break
            if await self._aborted_while_waiting():
                break
            if end == total or end == 1 or end % interval == 0:
                finish = self._finish_of(total) if end == total else None
                self._received.output_ids = self._sampled.ids[:end]
                await response.write(to_event(self._event_of(sent, end, finish)))
                sent = end
        if kind == "stall":
            await asyncio.sleep(3600)
        if kind == "disconnect":
            await asyncio.sleep(0.02)  # a reset would also discard what the client has not read yet
            return reset(http, response)
        if kind == "error_event" and self._fault:
            error = {"message": self._fault.message, "code": self._fault.status or 500, "retryable": False}
            await response.write(to_event({"error": error}))
        elif (sent < total or not total) and kind != "cut":
            await response.write(to_event(self._event_of(sent, sent, self._finish_of(sent))))
        if kind not in ("cut", "no_done"):
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _aborted_while_waiting(self) -> bool:
        """Wait for the next token; whether `/abort_request` came first."""
        if self._reply.delay_s:
            try:
                async with asyncio.timeout(self._reply.delay_s):
                    await self._received.aborted.wait()
            except TimeoutError:
                pass
        return self._received.aborted.is_set()

    def _finish_of(self, num_sampled: int) -> dict[str, Any]:
        if num_sampled < len(self._sampled.ids) or (self._fault and self._fault.kind == "abort"):
            scripted = self._fault if self._fault and self._fault.kind == "abort" else None
            return {
                "type": "abort",
                "message": scripted.message if scripted else "Aborted",
                "status_code": scripted.status if scripted else None,
                "err_type": None,
            }
        if self._sampled.finish == "length":
            return {"type": "length", "length": num_sampled}
        return {"type": "stop", "matched": self._sampled.matched}

    def _event_of(self, sent: int, end: int, finish: dict[str, Any] | None) -> dict[str, Any]:
        """One event: all tokens up to `end`, or with incremental streams those since `sent`."""
        start = sent if self._incremental else 0
        ids = self._sampled.ids[start:end]
        meta: dict[str, Any] = {
            "id": self._received.rid,
            "finish_reason": finish,
            "prompt_tokens": len(self._received.input_ids),
            "weight_version": self._reply.versions[-1][0] if self._reply.versions else self._version,
            "num_retractions": 0,
        }
        if self._received.body.get("return_logprob"):
            logprobs = self._sampled.logprobs[start:end]
            triples = [[logprob, i, None] for logprob, i in zip(logprobs, ids, strict=True)]
            meta |= {
                "input_token_logprobs": self._scores(),
                "output_token_logprobs": triples,
                "output_token_logprobs_length": end,
            }
            if self._received.num_top_logprobs:
                num = self._received.num_top_logprobs
                places = [self._sampled.top(at, num, self._vocab_size) for at in range(start, end)]
                tops = [[[logprob, i, None] for i, logprob in place] for place in places]
                meta |= {"input_top_logprobs": [], "output_top_logprobs": tops}
        if self._received.body.get("return_sampling_mask"):
            meta |= {
                "output_token_sampling_mask": [pseudo_support(i, self._vocab_size) for i in ids],
                "output_token_sampling_logprobs": [(x or 0.0) / 2 for x in self._sampled.logprobs[start:end]],
            }
        if self._received.body.get("return_routed_experts") and finish is not None:
            meta["routed_experts"] = self._experts(end)
        meta |= {"reasoning_tokens": 0, "completion_tokens": end, "cached_tokens": self._num_cached}
        if finish is not None:
            spans = self._reply.versions or [(self._version, 0, end)]
            meta["weight_versions"] = [{"version": v, "start": s, "end": e} for v, s, e in spans]
        text = self._tokenizer.decode(ids) if self._tokenizer else ""
        answer = {"text": text, "output_ids": ids, "meta_info": meta | {"dp_rank": None}}
        if self._fault is not None:
            self._fault.spoil(answer, last=finish is not None)
        return answer

    def _scores(self) -> list[list[Any]]:
        """`pseudo_logprob` of the prompt's own tokens at their places, from the asked one on: it has none."""
        start, ids = self._received.body.get("logprob_start_len", -1), self._received.input_ids
        if start < 0:
            return []
        return [
            [pseudo_logprob(i, at) if at > start else None, i, None]
            for at, i in enumerate(ids)
            if at >= start
        ]

    def _experts(self, end: int) -> str:
        """Those of all tokens but the last, from the place that was asked for."""
        start = self._received.body.get("routed_experts_start_len") or 0
        sequence = [*self._received.input_ids, *self._sampled.ids[:end]]
        rows = [pseudo_experts(i, at) for at, i in enumerate(sequence[:-1]) if at >= start]
        return base64.b64encode(array("i", [n for row in rows for n in row]).tobytes()).decode()


async def refuse_constraint(http: web.Request, received: ReceivedRequest, message: str) -> web.StreamResponse:
    """How SGLang refuses a grammar: it has taken the request in, and ends it as an abort with a status.

    When streaming, that event has a token which was sampled for nobody, without a log-probability (observed).
    """
    if not received.stream:
        return json_answer(400, {"error": {"message": message}})
    finish = {"type": "abort", "message": message, "status_code": 400, "err_type": "BadRequestError"}
    meta = {"id": received.rid, "finish_reason": finish, "prompt_tokens": 1, "completion_tokens": 1}
    meta |= {"input_token_logprobs": [], "output_token_logprobs": [], "output_token_logprobs_length": 0}
    response = await open_stream(http)
    event = to_event({"text": "?", "output_ids": [0], "meta_info": meta})
    await response.write(event + b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def json_answer(status: int, body: object) -> web.Response:
    """A JSON answer, encoded as SGLang does: no blanks."""
    return web.Response(status=status, body=_dump(body), content_type="application/json")


def _dump(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def to_event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + _dump(body) + b"\n\n"


def scripted_answer(fault: Fault) -> web.Response:
    """The answer of a fault that has no generation."""
    if fault.kind == "not_json":
        return web.Response(body=fault.body or b"<html>Bad Gateway</html>", content_type="text/html")
    if fault.body is not None:
        return web.Response(status=fault.status or 500, body=fault.body, content_type="text/plain")
    return json_answer(fault.status or 500, {"error": {"message": fault.message}})


async def open_stream(http: web.Request) -> web.StreamResponse:
    """Send the headers of a stream."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    response.enable_chunked_encoding()
    await response.prepare(http)
    return response


def reset(http: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Reset the connection; what is returned goes nowhere."""
    if http.transport is not None:
        http.transport.abort()
    return response or web.Response()
