"""OpenAI Chat Completions → a turn."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw

from tokentape.errors import RequestError
from tokentape.gateway.chat.reply import ChatWriter
from tokentape.gateway.exchange import TurnRequest
from tokentape.gateway.fields import (
    SAMPLING,
    Keys,
    Positive,
    Unheard,
    check_arguments,
    check_ignored,
    misread,
    read_demand,
    read_fields,
    read_frame,
    read_messages,
    read_sampling,
    template_arguments,
    thinking_arguments,
)
from tokentape.gateway.wire import AgentRequest, Decoded, read_origin
from tokentape.types import Json, Message, Sampling, ToolCall


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Function(msgspec.Struct):
    name: Annotated[str, Meta(min_length=1)]


class _Tool(msgspec.Struct):
    type: Literal["function"]
    function: _Function


class _Choice(msgspec.Struct):
    type: Literal["function"]
    function: _Function


class _JsonSchema(msgspec.Struct):
    schema: Json | None = None


class _ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


# Honoured: field → the type that its JSON must have. null means "not given" for all of them.
HONOURED: Mapping[str, Any] = {
    "messages": Raw,
    "model": str,
    "stream": bool,
    "stream_options": _StreamOptions,
    **SAMPLING,
    "max_completion_tokens": Positive,
    "n": Annotated[int, Meta(ge=1, le=128)],
    "logprobs": bool,
    "top_logprobs": Annotated[int, Meta(ge=0, le=20)],
    "response_format": _ResponseFormat,
    "tools": list[_Tool],
    "tool_choice": Literal["none", "auto", "required"] | _Choice,
    "parallel_tool_calls": bool,
    "reasoning_effort": Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    "chat_template_kwargs": dict[str, Any],
    "return_token_ids": bool,
}
# Refused unless the value is the one that asks for nothing: field → that value, and what to say.
REFUSED: Mapping[str, tuple[Any, str]] = {
    "best_of": (1, "use `n`"),
    "functions": ([], "use `tools`"),
    "function_call": ("auto", "use `tool_choice`"),
    "modalities": (["text"], "text only"),
    "audio": (None, "text only"),
    "prediction": (None, "predicted outputs are not supported"),
    "web_search_options": (None, "this gateway has no tools of its own"),
    "echo": (False, "the prompt is not repeated"),
    "continue_final_message": (False, "an assistant turn cannot be continued"),
    "add_generation_prompt": (True, "the generation prompt is always added"),
}


# What is heard inside fields and messages, or asks for nothing that is not kept to anyway. `tools` are not
# among them: the chat template is given all of each.
_INSIDE: Mapping[str, Keys] = {
    "stream_options": {"include_usage": None},
    "response_format": {
        "type": None,
        "json_schema": dict.fromkeys(("name", "schema", "strict", "description")),
    },
}
_PARTS: Keys = dict.fromkeys(("type", "text", "refusal"))
_SAID: Keys = {"role": None, "content": _PARTS, "name": None}
_CALL: Keys = {"id": None, "type": None, "index": None, "function": dict.fromkeys(("name", "arguments"))}
_MESSAGE: Mapping[str, Keys] = {
    "system": _SAID,
    "user": _SAID,
    "assistant": {
        **_SAID,
        **dict.fromkeys(("refusal", "reasoning_content", "reasoning", "function_call", "audio")),
        "tool_calls": _CALL,
    },
    "tool": {**_SAID, "tool_call_id": None},
}


class _Part(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class _WireFunction(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"


class _WireCall(msgspec.Struct):
    id: str
    function: _WireFunction | None = None
    type: str = "function"


class _WireMessage(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[_WireCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: Any = None
    audio: Any = None


_ROLES: Mapping[str, Any] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def decode(request: AgentRequest) -> Decoded:
    """Read a request.

    Messages that this session has seen before, byte for byte, are not decoded again.

    Raises:
        RequestError: the body cannot be served; `param` names the field.
    """
    session, config = request.session, request.config
    fields = read_fields(request.body, HONOURED, REFUSED, strict=config.strict)
    values = fields.values
    unheard = Unheard(config.strict)
    unheard.look_inside(fields, _INSIDE)
    asked: list[tuple[str, Json]] = []
    if (effort := values.get("reasoning_effort")) is not None:
        wanted = thinking_arguments(config.template_variables, effort=effort)
        asked.append(("reasoning_effort", wanted))
    arguments, unused = template_arguments(
        values.get("chat_template_kwargs", {}), asked, config.template_arguments
    )
    tools = bytes(fields.raw["tools"]) if values.get("tools") else b"[]"
    frame, frame_key = read_frame(session, tools, arguments)
    names = [tool["function"]["name"] for tool in frame.tools]
    schema = "response_format", _schema(values.get("response_format"))
    parse_calls, demand, pointless = read_demand(_choice(values, names), names, schema)
    check_ignored((*unused, *pointless), strict=config.strict)
    num_top = values.get("top_logprobs", 0)
    if num_top and not values.get("logprobs"):
        raise RequestError("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    read = read_messages(
        values.get("messages"),
        session,
        ("chat", ()),
        lambda raw, where: session.known("chat", raw, lambda: [_message(raw, where, unheard)]),
        answers="tool_call_id",
    )
    ignored = tuple(sorted({*fields.ignored, *unused, *pointless, *unheard.names}))
    turn = TurnRequest(
        conversation=read.conversation,
        frame=frame,
        frame_key=frame_key,
        sampling=_sampling(values),
        origin=read_origin("chat", request.headers, (*fields.parts({"messages"}), read.digest), ignored),
        stream=values.get("stream", False),
        parse_calls=parse_calls,
        single_call=bool(names) and not values.get("parallel_tool_calls", True),
        demand=demand,
        num_choices=values.get("n", 1),
        num_top_logprobs=num_top,
    )
    writer = ChatWriter(
        session_id=session.session_id,
        model=values.get("model", config.model),
        tokenizer=config.tokenizer,
        logprobs=values.get("logprobs", False),
        include_usage=values.get("stream_options", _StreamOptions()).include_usage,
        with_ids=values.get("return_token_ids", False),
    )
    return Decoded(turn, writer)


def _choice(values: Mapping[str, Any], names: Sequence[str]) -> Literal["auto", "none"] | Sequence[str]:
    """`tool_choice`, or the names of the tools of which one must be called."""
    choice = values.get("tool_choice", "auto")
    if choice == "required":
        return names
    return (choice.function.name,) if isinstance(choice, _Choice) else choice


def _schema(output: _ResponseFormat | None) -> Json | None:
    """The JSON schema that the reply's content must follow, None for text."""
    if output is None or output.type == "text":
        return None
    if output.type == "json_object":
        return {"type": "object"}
    if output.json_schema is None or output.json_schema.schema is None:
        raise RequestError(
            "`response_format.json_schema.schema` is missing", param="response_format.json_schema"
        )
    return output.json_schema.schema


def _sampling(values: Mapping[str, Any]) -> Sampling:
    limits = {values[name] for name in ("max_completion_tokens", "max_tokens") if name in values}
    if len(limits) > 1:
        raise RequestError("`max_tokens` and `max_completion_tokens` differ: send one", param="max_tokens")
    return read_sampling(values, max_tokens=next(iter(limits), None), stop=values.get("stop", ()))


def _message(raw: Raw, where: str, unheard: Unheard) -> Message:
    try:
        wire = msgspec.json.decode(raw, type=_WireMessage)
    except (msgspec.DecodeError, RecursionError) as error:
        raise misread(error, where) from None
    role = _ROLES.get(wire.role)
    if role is None:
        raise RequestError(
            f"{where}.role is {wire.role!r}: it must be one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    unheard.look(raw, _MESSAGE[role], where)
    content = _content(wire, role, where)
    if content is None and role != "assistant":
        raise RequestError(f"{where}.content is missing", param=f"{where}.content")
    if role == "tool" and wire.tool_call_id is None:
        raise RequestError(f"{where}.tool_call_id is missing", param=f"{where}.tool_call_id")
    if wire.tool_calls and role != "assistant":
        raise RequestError(f"{where}.tool_calls: only the assistant calls tools", param=f"{where}.tool_calls")
    for name, value in (("function_call", wire.function_call), ("audio", wire.audio)):
        if value is not None:  # part of what was said: to drop it would change the conversation
            raise RequestError(f"{where}.{name} is not supported here", param=f"{where}.{name}")
    reasoning = wire.reasoning_content if wire.reasoning_content is not None else wire.reasoning
    if role == "assistant" and wire.reasoning not in (None, reasoning):
        unheard.add("messages[].reasoning")
    calls = wire.tool_calls or ()
    return Message(
        role=role,
        content=content,
        reasoning=reasoning if role == "assistant" else None,
        tool_calls=tuple(_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)),
        tool_call_id=wire.tool_call_id if role == "tool" else None,
        name=wire.name,
    )


def _call(call: _WireCall, where: str) -> ToolCall:
    if call.type != "function":
        raise RequestError(f"{where}: type {call.type!r} is not supported, only functions", param=where)
    if call.function is None:
        raise RequestError(f"{where}.function is missing", param=where)
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    return ToolCall(call.id, call.function.name, check_arguments(text, where))


def _content(wire: _WireMessage, role: str, where: str) -> str | None:
    """A message's content; the assistant's refusal is its content where there is no other."""
    content = _text(wire.content, where)
    if role != "assistant" or not wire.refusal or wire.refusal == content:
        return content
    if content:
        raise RequestError(f"{where} has both content and a refusal", param=f"{where}.refusal")
    return wire.refusal


def _text(content: str | list[_Part] | None, where: str) -> str | None:
    """A message's content as text: parts are joined as they stand."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        text = part.text if part.type == "text" else part.refusal if part.type == "refusal" else None
        if text is None and part.type in ("text", "refusal"):
            raise RequestError(
                f"{where}.content[{index}].{part.type} is missing", param=f"{where}.content[{index}]"
            )
        if text is None:
            raise RequestError(
                f"{where}.content[{index}]: parts of type {part.type!r} are not supported, only text",
                param=f"{where}.content[{index}].type",
            )
        texts.append(text)
    return "".join(texts)
