"""Recorded turns → response objects and their items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import Raw

from tokentape.gateway.exchange import Done
from tokentape.gateway.responses.items import custom_input, item_id, pieces_of, response_id, seal
from tokentape.gateway.responses.tools import Offered, offered, wire_tools
from tokentape.gateway.wire import WireConfig, extension
from tokentape.tape import Turn
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json, Message

SEALED = "reasoning.encrypted_content"
"""The value of `include` that asks for reasoning which can be replayed without being read."""


@dataclass(frozen=True, slots=True)
class ResponseFields:
    """What a request asked of its response, and what the response repeats of it.

    `noted` is what the turn's record keeps: `echo` (fields as they came), `include`, whether there were
    `instructions`, `tools` that are no plain functions, `strict` ones. `tools` are the tools as a response
    shows them.
    """

    session_id: str
    model: str
    tokenizer: Tokenizer
    noted: Json
    tools: "Raw | Sequence[Json]"
    instructions: str | None
    with_ids: bool = False

    @property
    def echo(self) -> Mapping[str, Any]:
        """The fields that the response repeats."""
        return self.noted["echo"]

    @property
    def summary(self) -> bool:
        """Whether reasoning is shown as its summary, too."""
        return self.echo.get("reasoning", {}).get("summary") is not None

    @property
    def sealed(self) -> bool:
        """Whether reasoning leaves with what brings it back."""
        return SEALED in self.noted.get("include", ())

    def offered(self) -> dict[str, Offered]:
        """By the policy's names, the tools that are something else for the client."""
        return offered(self.noted.get("tools", ()))


def asked_of(
    turn: Turn, conversation: Sequence[Message], session_id: str, config: WireConfig, include: Sequence[str]
) -> ResponseFields:
    """What the request of a recorded turn had asked; `include` is asked for now.

    `conversation` begins as the turn's does.
    """
    noted: Json = {"echo": {}, **turn.origin.noted}
    return ResponseFields(
        session_id=session_id,
        model=noted["echo"].get("model", config.model),
        tokenizer=config.tokenizer,
        noted={**noted, "include": [*noted.get("include", ()), *include]},
        tools=wire_tools(turn.tools, noted.get("tools", ()), noted.get("strict", ())),
        instructions=conversation[0].content if noted.get("instructions") else None,
    )


def reasoning_item(id_: str, text: str, status: str, asked: ResponseFields) -> Json:
    """A thought, whole. Its summary, where asked for, is all of it."""
    return {
        "id": id_,
        "type": "reasoning",
        "status": status,
        "summary": [{"type": "summary_text", "text": text}] if asked.summary else [],
        "content": [{"type": "reasoning_text", "text": text}],
        "encrypted_content": seal(text) if asked.sealed else None,
    }


def output_text(text: str) -> Json:
    """The content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def message_item(id_: str, text: str, status: str) -> Json:
    """A text of the assistant."""
    return {
        "id": id_,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [output_text(text)],
    }


def call_item(id_: str, piece: Message, tools: Mapping[str, Offered]) -> Json:
    """One call, under the names that the client knows."""
    call = piece.tool_calls[0]
    tool = tools.get(call.name, Offered(call.name))
    item: Json = {"id": id_, "type": "function_call", "status": "completed", "call_id": call.id}
    item |= (
        {"name": tool.name} if tool.namespace is None else {"name": tool.name, "namespace": tool.namespace}
    )
    if tool.custom:
        return {**item, "type": "custom_tool_call", "input": custom_input(call.arguments)}
    return {**item, "arguments": call.arguments}


def piece_item(
    id_: str, prefix: str, piece: Message, status: str, asked: ResponseFields, tools: Mapping[str, Offered]
) -> Json:
    """One of `items.pieces_of` as an item."""
    if prefix == "rs":
        return reasoning_item(id_, piece.reasoning or "", status, asked)
    if prefix == "msg":
        return message_item(id_, piece.content or "", status)
    return call_item(id_, piece, tools)


def output_items(turn: Turn, asked: ResponseFields) -> list[Json]:
    """What a turn said: its reasoning, its text, its calls. What the length limit cut is incomplete."""
    tools = asked.offered()
    pieces = pieces_of(turn.reply, turn.origin.noted)
    out: list[Json] = []
    for index, (prefix, piece) in enumerate(pieces):
        cut = turn.finish_reason == "length" and index == len(pieces) - 1
        status = "incomplete" if cut else "completed"
        out.append(piece_item(item_id(prefix, turn.turn_id, index), prefix, piece, status, asked, tools))
    return out


def begun(turn_id: str, created_at: float, asked: ResponseFields) -> Json:
    """A response that has just begun."""
    echo = asked.echo
    text: Any = echo.get("text", {"format": {"type": "text"}})
    return {
        "id": response_id(turn_id),
        "object": "response",
        "created_at": int(created_at),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": echo.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": echo.get("metadata", {}),
        "model": asked.model,
        "output": [],
        "parallel_tool_calls": echo.get("parallel_tool_calls", True),
        "previous_response_id": echo.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None, **echo.get("reasoning", {})},
        "store": echo.get("store", True),
        "temperature": echo.get("temperature"),
        "text": text,
        "tool_choice": echo.get("tool_choice", "auto"),
        "tools": asked.tools,
        "top_logprobs": 0,
        "top_p": echo.get("top_p"),
        "truncation": echo.get("truncation", "disabled"),
        "usage": None,
        "user": None,
    }


def ended(response: Json, done: Done, asked: ResponseFields) -> Json:
    """The response of a committed turn."""
    turn = done.turn
    cut = turn.finish_reason == "length"
    return {
        **response,
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else int(turn.created_at),
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output_items(turn, asked),
        "usage": _usage(done, asked.tokenizer),
        "tokentape": extension(done, asked.session_id, with_ids=asked.with_ids),
    }


def _usage(done: Done, tokenizer: Tokenizer) -> Json:
    usage = done.usage
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached or 0, "cache_write_tokens": 0},
        "output_tokens": usage.num_completion,
        "output_tokens_details": {"reasoning_tokens": _num_reasoning(done.turn, tokenizer)},
        "total_tokens": usage.num_prompt + usage.num_completion,
    }


def _num_reasoning(turn: Turn, tokenizer: Tokenizer) -> int:
    """How many sampled tokens the thought has: all up to its last character."""
    if not turn.reply.reasoning:
        return 0
    if turn.in_reasoning:
        return len(turn.completion)
    texts = [tokenizer.token_bytes(token_id) for token_id in turn.completion.ids]
    thought = turn.reply.reasoning.encode()
    left = b"".join(texts).find(thought)
    if left < 0:  # half characters in the thought: count it as the tokenizer would write it
        return len(tokenizer.encode(turn.reply.reasoning))
    left += len(thought)
    for count, text in enumerate(texts):
        if left <= 0:
            return count
        left -= len(text)
    return len(texts)
