"""Turns → OpenAI Chat Completions: one completion, or a stream of chunks."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokentape.errors import TokentapeError
from tokentape.export.samples import chat_call
from tokentape.gateway.exchange import Done, Progress, Started
from tokentape.gateway.wire import event, extension, openai_error
from tokentape.parse import CallDelta, ReasoningDelta, SaidEvent, TextDelta
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json

_Top = Sequence[Sequence[tuple[int, float]]]


@dataclass(slots=True)
class ChatWriter:
    """A `gateway.wire.Writer` for one request; the fields are what it asked of the reply."""

    session_id: str
    model: str
    tokenizer: Tokenizer
    logprobs: bool
    include_usage: bool
    with_ids: bool
    _base: Json = field(default_factory=dict[str, Any])
    _begun: set[int] = field(default_factory=set[int])

    def whole(self, dones: Sequence[Done]) -> bytes:
        """The reply of a request without `stream`."""
        turn = dones[0].turn
        reply: Json = {
            "id": turn.turn_id,
            "object": "chat.completion",
            "created": int(turn.created_at),
            "model": self.model,
            "choices": [self._choice(index, done) for index, done in enumerate(dones)],
            "usage": _usage(dones),
            "tokentape": self._extension(dones[0]),
        }
        if len(dones) > 1:
            for choice, done in zip(reply["choices"], dones, strict=True):
                choice["tokentape"] = self._extension(done)
        return msgspec.json.encode(reply)

    def start(self, started: Started) -> bytes:
        """A stream begins with its first tokens."""
        self._base = {
            "id": started.turn_ids[0],
            "object": "chat.completion.chunk",
            "created": int(started.created_at),
            "model": self.model,
        }
        return b""

    def progress(self, progress: Progress) -> bytes:
        """Chunks for new tokens; b"" where they mean nothing yet."""
        deltas = [_delta(item) for item in progress.events]
        logprobs = None
        if self.logprobs and progress.ids:
            recorded = array("f", progress.logprobs)  # float32, as in the turn and in a reply without stream
            logprobs = self._logprobs(progress.ids, recorded, progress.top)
            deltas = deltas or [{}]
        if deltas:
            deltas[0] = self._opening(progress.choice, deltas[0])
        return b"".join(
            self._chunk(progress.choice, delta, logprobs=logprobs if index == 0 else None)
            for index, delta in enumerate(deltas)
        )

    def end(self, dones: Sequence[Done]) -> bytes:
        """The end of the stream; only for committed turns."""
        end = b"".join(
            self._chunk(
                index,
                self._opening(index, {}),
                finish_reason=_finish_reason(done),
                tokentape=self._extension(done),
            )
            for index, done in enumerate(dones)
        )
        if self.include_usage:
            end += event({**self._base, "choices": [], "usage": _usage(dones)})
        return end + b"data: [DONE]\n\n"

    def error(self, error: TokentapeError) -> bytes:
        """The end of a stream that failed: the SDK raises on it."""
        return event(openai_error(error))

    def ping(self) -> bytes:
        """A comment: every reader of server-sent events skips it."""
        return b": ping\n\n"

    def _choice(self, index: int, done: Done) -> Json:
        turn, reply = done.turn, done.turn.reply
        message: Json = {"role": "assistant", "content": reply.content, "refusal": None}
        if reply.reasoning is not None:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["tool_calls"] = [chat_call(call) for call in reply.tool_calls]
        logprobs = self._logprobs(turn.completion.ids, turn.logprobs, done.top) if self.logprobs else None
        return {
            "index": index,
            "message": message,
            "finish_reason": _finish_reason(done),
            "logprobs": logprobs,
        }

    def _opening(self, choice: int, delta: Json) -> Json:
        """A delta; the first of its choice says who speaks."""
        if choice in self._begun:
            return delta
        self._begun.add(choice)
        return {"role": "assistant", "content": None, **delta}

    def _chunk(
        self,
        index: int,
        delta: Json,
        *,
        finish_reason: str | None = None,
        logprobs: Json | None = None,
        **more: Any,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return event({**self._base, "choices": [choice], **more})

    def _extension(self, done: Done) -> Json:
        return extension(done, self.session_id, with_ids=self.with_ids)

    def _logprobs(self, ids: Sequence[int], logprobs: Sequence[float], top: _Top | None) -> Json:
        """OpenAI's log-probabilities. A token's `bytes` are exact also where they are half a character."""

        def entry(token_id: int, logprob: float) -> Json:
            token, raw = self.tokenizer.token_text(token_id), self.tokenizer.token_bytes(token_id)
            return {"token": token, "logprob": logprob, "bytes": list(raw)}

        def entries() -> Iterator[Json]:
            for at, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
                others = [entry(*other) for other in top[at]] if top else []
                yield {**entry(token_id, logprob), "top_logprobs": others}

        return {"content": list(entries()), "refusal": None}


def _finish_reason(done: Done) -> str:
    if done.turn.finish_reason == "stop" and done.turn.reply.tool_calls:
        return "tool_calls"
    return done.turn.finish_reason


def _usage(dones: Sequence[Done]) -> Json:
    """The prompt counts once, whatever the number of choices."""
    usage = dones[0].usage
    num_completion = sum(done.usage.num_completion for done in dones)
    out: Json = {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": usage.num_prompt + num_completion,
    }
    if usage.num_cached is not None:
        out["prompt_tokens_details"] = {"cached_tokens": usage.num_cached}
    return out


def _delta(item: SaidEvent) -> Json:
    match item:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case CallDelta(index, call):
            return {"tool_calls": [{"index": index, **chat_call(call)}]}
