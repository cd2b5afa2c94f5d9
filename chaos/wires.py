"""The two protocols that the agents speak, as an SDK does: request bodies out, replies in."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Json = dict[str, Any]

_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}
_SYSTEM = "hello, user: name the weather with the tool"


class StreamFailed(Exception):
    """An error event ended the stream."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete reply: the message that goes back, the ids of its calls, what tokentape says of the turn."""

    message: Json
    calls: list[str]
    tokentape: Json


class Wire(Protocol):
    """One protocol."""

    path: str

    def body(self, messages: Sequence[Json], max_tokens: int, *, stream: bool) -> bytes:
        """A request."""
        ...

    def whole(self, body: Json) -> Reply:
        """A reply that was not streamed."""
        ...

    def stream(self) -> "Stream":
        """What puts a streamed reply together."""
        ...

    def results(self, calls: Sequence[str], text: str) -> list[Json]:
        """The messages that answer calls."""
        ...


class Stream(Protocol):
    """A reply that is being streamed."""

    def feed(self, event: str) -> bool:
        """Take the data of one event; whether it was the last. Raises `StreamFailed`."""
        ...

    def reply(self) -> Reply:
        """The reply, behind the last event."""
        ...


class Chat:
    """OpenAI Chat Completions."""

    path = "chat/completions"

    def body(self, messages: Sequence[Json], max_tokens: int, *, stream: bool) -> bytes:
        """A request."""
        tool = {"name": "weather", "description": "the weather", "parameters": _PARAMETERS}
        body = {"model": "policy", "tools": [{"type": "function", "function": tool}], "stream": stream}
        body |= {"messages": [{"role": "system", "content": _SYSTEM}, *messages]}
        return json.dumps(body | {"max_tokens": max_tokens, "return_token_ids": True}).encode()

    def whole(self, body: Json) -> Reply:
        """A reply that was not streamed."""
        message = body["choices"][0]["message"]
        message = {k: v for k, v in message.items() if v is not None or k == "content"}
        return Reply(message, [call["id"] for call in message.get("tool_calls", ())], body["tokentape"])

    def stream(self) -> "ChatStream":
        """What puts a streamed reply together."""
        return ChatStream()

    def results(self, calls: Sequence[str], text: str) -> list[Json]:
        """The messages that answer calls."""
        return [{"role": "tool", "tool_call_id": call, "content": f"{text} {call[-4:]}"} for call in calls]


@dataclass(slots=True)
class ChatStream:
    """A streamed chat completion."""

    message: Json = field(default_factory=lambda: {"role": "assistant", "content": None})
    tokentape: Json | None = None

    def feed(self, event: str) -> bool:
        """Take the data of one event; whether it was the last."""
        if event == "[DONE]":
            return True
        chunk = json.loads(event)
        if "error" in chunk:
            raise StreamFailed(chunk["error"]["code"])
        self.tokentape = chunk.get("tokentape", self.tokentape)
        for delta in (choice["delta"] for choice in chunk["choices"]):
            for name in ("content", "reasoning_content"):
                if delta.get(name):
                    self.message[name] = (self.message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls", ()):
                calls = self.message.setdefault("tool_calls", [])
                calls.append({k: v for k, v in call.items() if k != "index"})
        return False

    def reply(self) -> Reply:
        """The reply, behind the last event."""
        if self.tokentape is None:
            raise ValueError("a stream was complete, and no event of it said which turn it is")
        return Reply(
            self.message, [call["id"] for call in self.message.get("tool_calls", ())], self.tokentape
        )


class Messages:
    """Anthropic Messages."""

    path = "messages"

    def body(self, messages: Sequence[Json], max_tokens: int, *, stream: bool) -> bytes:
        """A request."""
        tool = {"name": "weather", "description": "the weather", "input_schema": _PARAMETERS}
        body = {"model": "policy", "system": _SYSTEM, "tools": [tool], "stream": stream}
        body |= {"messages": messages, "max_tokens": max_tokens, "return_token_ids": True}
        return json.dumps(body).encode()

    def whole(self, body: Json) -> Reply:
        """A reply that was not streamed."""
        return _of_blocks(body["content"], body["tokentape"])

    def stream(self) -> "MessagesStream":
        """What puts a streamed reply together."""
        return MessagesStream()

    def results(self, calls: Sequence[str], text: str) -> list[Json]:
        """The messages that answer calls."""
        blocks = [
            {"type": "tool_result", "tool_use_id": call, "content": f"{text} {call[-4:]}"} for call in calls
        ]
        return [{"role": "user", "content": blocks}]


@dataclass(slots=True)
class MessagesStream:
    """A streamed message."""

    blocks: list[Json] = field(default_factory=list[Json])
    arguments: str = ""
    tokentape: Json | None = None

    def feed(self, event: str) -> bool:
        """Take the data of one event; whether it was the last."""
        said = json.loads(event)
        match said["type"]:
            case "error":
                raise StreamFailed(said["error"]["type"])
            case "content_block_start":
                self.blocks.append(dict(said["content_block"]))
                self.arguments = ""
            case "content_block_delta":
                self._grow(said["delta"])
            case "content_block_stop":
                if self.blocks[-1]["type"] == "tool_use":
                    self.blocks[-1]["input"] = json.loads(self.arguments or "{}")
            case "message_delta":
                self.tokentape = said["tokentape"]
            case "message_stop":
                return True
        return False

    def _grow(self, delta: Mapping[str, str]) -> None:
        for name in ("text", "thinking", "signature"):
            if name in delta:
                self.blocks[-1][name] = self.blocks[-1].get(name, "") + delta[name]
        self.arguments += delta.get("partial_json", "")

    def reply(self) -> Reply:
        """The reply, behind the last event."""
        if self.tokentape is None:
            raise ValueError("a stream was complete, and no event of it said which turn it is")
        return _of_blocks(self.blocks, self.tokentape)


def _of_blocks(blocks: list[Json], tokentape: Json) -> Reply:
    calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
    return Reply({"role": "assistant", "content": blocks}, calls, tokentape)
