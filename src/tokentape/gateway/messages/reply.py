"""Turns → Anthropic Messages: one message, or a stream of events."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw

from tokentape.errors import ContextOverflow, RequestError, TokentapeError
from tokentape.gateway.exchange import Done, Progress, Started
from tokentape.gateway.session import Session
from tokentape.gateway.wire import event, extension
from tokentape.parse import CallDelta, ReasoningDelta, SaidEvent, TextDelta
from tokentape.tape import Turn
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json, ToolCall

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}


@dataclass(slots=True)
class MessagesWriter:
    """A `gateway.wire.Writer` for one request; the fields are what it asked of the reply.

    `max_tokens` is the request's own limit, `stop` the caller's stop strings. With `omit_thinking` thoughts
    leave as their signature only.
    """

    session: Session
    model: str
    tokenizer: Tokenizer
    max_tokens: int
    stop: Sequence[str]
    omit_thinking: bool
    manages_context: bool
    with_ids: bool
    _turn_id: str = ""
    _num_blocks: int = 0
    _open: str | None = None

    def whole(self, dones: Sequence[Done]) -> bytes:
        """The reply of a request without `stream`."""
        [done] = dones
        turn, reply = done.turn, done.turn.reply
        content: list[Json] = []
        if reply.reasoning:
            thought = "" if self.omit_thinking else reply.reasoning
            content.append({"type": "thinking", "thinking": thought, "signature": turn.turn_id})
        if reply.content:
            content.append({"type": "text", "text": reply.content})
        content += [_tool_use(call, Raw(call.arguments.encode())) for call in reply.tool_calls]
        message = self._message(turn.turn_id, content, _usage(done))
        message |= {**self._stopped(turn), **self._context(), "tokentape": self._extension(done)}
        return msgspec.json.encode(message)

    def start(self, started: Started) -> bytes:
        """`message_start`: the turn's id is known before its first token."""
        [self._turn_id] = started.turn_ids
        usage = _usage_of(started.num_prompt, None, 0)
        message = self._message(self._turn_id, [], usage)
        message["tokentape"] = {"session_id": self.session.session_id, "turn_id": self._turn_id}
        return _event("message_start", message=message)

    def progress(self, progress: Progress) -> bytes:
        """Blocks and their deltas for new tokens; b"" where they mean nothing yet."""
        return b"".join(map(self._deltas, progress.events))

    def end(self, dones: Sequence[Done]) -> bytes:
        """The end of the stream; only for committed turns."""
        [done] = dones
        delta = _event(
            "message_delta",
            delta=self._stopped(done.turn),
            usage=_usage(done),
            **self._context(),
            tokentape=self._extension(done),
        )
        return self._close() + delta + _event("message_stop")

    def error(self, error: TokentapeError) -> bytes:
        """The end of a stream that failed: the SDK raises on it."""
        return event(error_body(error), "error")

    def ping(self) -> bytes:
        """What keeps an idle stream alive."""
        return _event("ping")

    # -- a stream's blocks: one is open at a time, until something of another kind comes

    def _deltas(self, item: SaidEvent) -> bytes:
        match item:
            case ReasoningDelta(text):
                opened = self._opened("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return opened if self.omit_thinking else opened + self._delta("thinking_delta", thinking=text)
            case TextDelta(text):
                opened = self._opened("text", {"type": "text", "text": ""})
                return opened + self._delta("text_delta", text=text)
            case CallDelta(_, call):  # each is complete
                opened = self._opened(call.id, _tool_use(call, {}))
                return opened + self._delta("input_json_delta", partial_json=call.arguments)

    def _opened(self, kind: str, block: Json) -> bytes:
        """The events that open a block, unless one of its kind is open."""
        if self._open == kind:
            return b""
        closed = self._close()
        self._open = kind
        return closed + _event("content_block_start", index=self._num_blocks, content_block=block)

    def _close(self) -> bytes:
        """The events that close the open block."""
        if self._open is None:
            return b""
        signed = self._delta("signature_delta", signature=self._turn_id) if self._open == "thinking" else b""
        stop = _event("content_block_stop", index=self._num_blocks)
        self._open = None
        self._num_blocks += 1
        return signed + stop

    def _delta(self, kind: str, **fields: Any) -> bytes:
        return _event("content_block_delta", index=self._num_blocks, delta={"type": kind, **fields})

    # -- what both forms have

    def _message(self, turn_id: str, content: list[Json], usage: Json) -> Json:
        return {
            "id": f"msg_{turn_id.rpartition('-')[2]}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _context(self) -> Json:
        return {"context_management": {"applied_edits": []}} if self.manages_context else {}

    def _extension(self, done: Done) -> Json:
        return extension(done, self.session.session_id, with_ids=self.with_ids)

    def _stopped(self, turn: Turn) -> Json:
        """Why the turn ended. Calls come first: the agent has to answer them."""
        matched = None
        if turn.finish_reason == "length":
            reason = "max_tokens" if self._is_cut(turn) else "model_context_window_exceeded"
        elif turn.reply.tool_calls:
            reason = "tool_use"
        else:
            matched = self._matched(turn)
            reason = "end_turn" if matched is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": matched}

    def _is_cut(self, turn: Turn) -> bool:
        """Whether a limit of the request or the session ended the turn, not the context."""
        limit = self.session.record.max_tokens
        used_up = limit is not None and self.session.num_sampled_tokens >= limit
        return used_up or len(turn.completion) >= self.max_tokens

    def _matched(self, turn: Turn) -> str | None:
        """The stop string that ended the turn: the one whose last character comes first."""
        if not any(self.stop):
            return None
        ids = turn.completion.ids if turn.stop_id is None else turn.completion.ids[:-1]
        text = self.tokenizer.decode(ids)
        found = [(at + len(stop), at, stop) for stop in self.stop if stop and (at := text.find(stop)) >= 0]
        return min(found)[2] if found else None


def error_body(error: TokentapeError) -> Json:
    """An error in Anthropic's shape. There is no id of the request to tell."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    if error.status == 503 and error.retryable:
        kind = "overloaded_error"
    message = str(error)
    if isinstance(error, ContextOverflow):
        message = f"prompt is too long: {_too_long(error)}"
    body: Json = {"type": kind, "message": message}
    if isinstance(error, RequestError) and error.param == "thread":
        # The SDK's tool runner asks for a thread first; on this it goes on by itself, without one (2.12.0).
        body["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": body, "request_id": None}


def _too_long(error: ContextOverflow) -> str:
    """Anthropic's own words: agents look for them, and for the numbers, and compact."""
    num, maximum = error.num_prompt_tokens, error.context_length
    if num is None or maximum is None:
        return str(error)
    return f"{num} tokens > {min(maximum, num - 1)} maximum"  # one token at least must be left to sample


def _usage(done: Done) -> Json:
    return _usage_of(done.usage.num_prompt, done.usage.num_cached, done.usage.num_completion)


def _usage_of(num_prompt: int, num_cached: int | None, num_completion: int) -> Json:
    """The prompt counts as read from the cache, or as new; null: the engine did not say."""
    return {
        "input_tokens": num_prompt - (num_cached or 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_completion,
    }


def _tool_use(call: ToolCall, input_: Any) -> Json:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": input_}


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
