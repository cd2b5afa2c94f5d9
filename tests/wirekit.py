"""The agents' protocols as tests of all of them need them: one row each."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokentape.gateway import chat, messages, responses
from tokentape.gateway.chat import request as chat_request
from tokentape.gateway.messages import request as messages_request
from tokentape.gateway.responses import request as responses_request
from tokentape.gateway.wire import Wire

Json = dict[str, Any]


@dataclass(frozen=True)
class Talk:
    """What a conversation says, whatever the protocol. A place that is None is left out.

    It is: system, user, assistant (its thought, its text, a call), the call's result, user.
    """

    system: str | None = "S"
    user: str = "U"
    assistant: str | None = "A"
    reasoning: str | None = None
    call_id: str = "call00001"
    call_name: str = "get_time"
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"tz": "CET"})
    result: str = "R"
    result_name: str | None = None
    last: str | None = "L"
    tool_name: str = "get_time"
    tool_description: str = "D"
    parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {"tz": {"type": "string"}}}
    )
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])


def _chat(talk: Talk) -> Json:
    function = {"name": talk.call_name, "arguments": json.dumps(talk.arguments)}
    said: Json = {
        "role": "assistant",
        "content": talk.assistant,
        "tool_calls": [{"id": talk.call_id, "type": "function", "function": function}],
    }
    if talk.reasoning is not None:
        said["reasoning_content"] = talk.reasoning
    result: Json = {"role": "tool", "tool_call_id": talk.call_id, "content": talk.result}
    if talk.result_name is not None:
        result["name"] = talk.result_name
    tool = {"name": talk.tool_name, "description": talk.tool_description, "parameters": talk.parameters}
    return {
        "messages": [
            *([] if talk.system is None else [{"role": "system", "content": talk.system}]),
            {"role": "user", "content": talk.user},
            said,
            result,
            *([] if talk.last is None else [{"role": "user", "content": talk.last}]),
        ],
        "tools": [{"type": "function", "function": tool}],
        "chat_template_kwargs": talk.template_arguments,
        "max_tokens": 100,
    }


def _messages(talk: Talk) -> Json:
    said: list[Json] = []
    if talk.reasoning is not None:
        said.append({"type": "thinking", "thinking": talk.reasoning, "signature": ""})
    if talk.assistant is not None:
        said.append({"type": "text", "text": talk.assistant})
    said.append({"type": "tool_use", "id": talk.call_id, "name": talk.call_name, "input": talk.arguments})
    answer: list[Json] = [{"type": "tool_result", "tool_use_id": talk.call_id, "content": talk.result}]
    if talk.last is not None:
        answer.append({"type": "text", "text": talk.last})
    tool = {"name": talk.tool_name, "description": talk.tool_description, "input_schema": talk.parameters}
    return {
        **({} if talk.system is None else {"system": talk.system}),
        "messages": [
            {"role": "user", "content": talk.user},
            {"role": "assistant", "content": said},
            {"role": "user", "content": answer},
        ],
        "tools": [tool],
        "chat_template_kwargs": talk.template_arguments,
        "max_tokens": 100,
    }


def _responses(talk: Talk) -> Json:
    items: list[Json] = [{"role": "user", "content": talk.user}]
    if talk.reasoning is not None:
        content = [{"type": "reasoning_text", "text": talk.reasoning}]
        items.append({"type": "reasoning", "id": "rs_1", "summary": [], "content": content})
    if talk.assistant is not None:
        content = [{"type": "output_text", "text": talk.assistant, "annotations": []}]
        items.append({"type": "message", "role": "assistant", "id": "msg_1", "content": content})
    items += [
        {
            "type": "function_call",
            "call_id": talk.call_id,
            "name": talk.call_name,
            "arguments": json.dumps(talk.arguments),
        },
        {"type": "function_call_output", "call_id": talk.call_id, "output": talk.result},
    ]
    if talk.last is not None:
        items.append({"role": "user", "content": talk.last})
    tool = {"name": talk.tool_name, "description": talk.tool_description, "parameters": talk.parameters}
    return {
        **({} if talk.system is None else {"instructions": talk.system}),
        "input": items,
        "tools": [{"type": "function", **tool}],
        "chat_template_kwargs": talk.template_arguments,
        "max_output_tokens": 100,
    }


def _openai_error(body: Any) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


def _anthropic_error(body: Any) -> bool:
    return body.get("type") == "error" and {"type", "message"} <= set(body["error"])


@dataclass(frozen=True)
class WireUnderTest:
    """One protocol.

    `body` writes a conversation down; `is_error` knows the provider's shape of an error. `fields` are those
    that a request's list of honoured and of refused ones name.
    """

    name: str
    path: str
    wire: Wire
    body: Callable[[Talk], Json]
    is_error: Callable[[Any], bool]
    fields: tuple[str, ...]


def _fields(module: Any) -> tuple[str, ...]:
    return tuple(sorted({*module.HONOURED, *module.REFUSED}))


WIRES = (
    WireUnderTest("chat", "/v1/chat/completions", chat.WIRE, _chat, _openai_error, _fields(chat_request)),
    WireUnderTest(
        "messages", "/v1/messages", messages.WIRE, _messages, _anthropic_error, _fields(messages_request)
    ),
    WireUnderTest(
        "responses", "/v1/responses", responses.WIRE, _responses, _openai_error, _fields(responses_request)
    ),
)
