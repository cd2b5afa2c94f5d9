"""OpenAI Chat Completions → a turn."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw

from tokentape.errors import RequestError
from tokentape.gateway.chat.reply import ChatWriter
from tokentape.gateway.exchange import TurnRequest
from tokentape.gateway.sessions import Session
from tokentape.gateway.wire import (
    MAX_INT,
    AgentRequest,
    Decoded,
    Fields,
    Fraction,
    Positive,
    check_ignored,
    check_template_arguments,
    read_field,
    read_fields,
    read_origin,
    thinking_arguments,
)
from tokentape.render import Frame
from tokentape.tree import Known
from tokentape.types import CallOutput, Demand, Json, JsonOutput, Message, Sampling, ToolCall

_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


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
    "messages": list[Raw],
    "model": str,
    "stream": bool,
    "stream_options": _StreamOptions,
    "max_tokens": Positive,
    "max_completion_tokens": Positive,
    "temperature": Annotated[float, Meta(ge=0)],
    "top_p": Fraction,
    "top_k": Annotated[int, Meta(ge=-1, le=MAX_INT)],
    "min_p": Annotated[float, Meta(ge=0, le=1)],
    "stop": str | list[str],
    "stop_token_ids": list[Annotated[int, Meta(ge=0, le=MAX_INT)]],
    "frequency_penalty": _Penalty,
    "presence_penalty": _Penalty,
    "repetition_penalty": Annotated[float, Meta(gt=0, le=2)],
    "seed": Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    "logit_bias": dict[str, Annotated[float, Meta(ge=-100, le=100)]],
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


_SESSION_SAMPLING = frozenset(HONOURED) & frozenset(Sampling.__struct_fields__)


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
    arguments, unused = _template_arguments(values, request)
    check_ignored(unused, strict=config.strict)
    frame, frame_key = _frame(fields, session, arguments)
    has_tools = bool(frame.tools)
    parse_calls, demand = _demand(values, frame)
    num_top = values.get("top_logprobs", 0)
    if num_top and not values.get("logprobs"):
        raise RequestError("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    turn = TurnRequest(
        messages=_messages(values.get("messages"), session),
        frame=frame,
        frame_key=frame_key,
        sampling=_sampling(values),
        origin=read_origin("chat", request, tuple(sorted((*fields.ignored, *unused)))),
        stream=values.get("stream", False),
        parse_calls=parse_calls,
        single_call=has_tools and not values.get("parallel_tool_calls", True),
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


def session_sampling(fields: Mapping[str, Raw]) -> Sampling:
    """The sampling defaults of a session: fields of a request, under the same rules.

    Raises:
        RequestError: a field is none of `Sampling`'s, or its value cannot be used.
    """
    for name in fields:
        if name not in _SESSION_SAMPLING:
            raise RequestError(f"`sampling.{name}` is not a sampling parameter", param=f"sampling.{name}")
    values = {name: read_field(name, raw, HONOURED[name]) for name, raw in fields.items()}
    return _sampling({name: value for name, value in values.items() if value is not None})


def _template_arguments(values: Mapping[str, Any], request: AgentRequest) -> tuple[Json, tuple[str, ...]]:
    """The template's arguments, and the fields that asked for some without effect."""
    given = values.get("chat_template_kwargs", {})
    check_template_arguments(given, "chat_template_kwargs")
    if "reasoning_effort" not in values:
        return given, ()
    effort = thinking_arguments(request.config.template_variables, effort=values["reasoning_effort"])
    arguments = {**effort, **given}
    heard = bool(effort) and all(arguments[name] == value for name, value in effort.items())
    return arguments, () if heard else ("reasoning_effort",)


def _frame(fields: Fields, session: Session, arguments: Json) -> tuple[Frame, tuple[bytes, bytes]]:
    """Tools and template arguments, with their identity."""
    tools = bytes(fields.raw["tools"]) if fields.values.get("tools") else b"[]"
    try:
        return session.frame(tools, msgspec.json.encode(arguments))
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"`tools` or `chat_template_kwargs`: {error}", param="tools") from None


def _demand(values: Mapping[str, Any], frame: Frame) -> tuple[bool, Demand | None]:
    """Whether tool calls are wanted, and what the reply must be."""
    choice = values.get("tool_choice", "auto")
    names = tuple(tool["function"]["name"] for tool in frame.tools)
    calls = bool(names) and choice != "none"
    schema = _schema(values.get("response_format"))
    if choice in ("auto", "none"):
        return calls, None if schema is None else JsonOutput(schema, names if calls else ())
    wanted = names if choice == "required" else (choice.function.name,)
    if not wanted or not set(wanted) <= set(names):
        missing = f"{wanted[0]!r} is none of `tools`" if wanted else "there are no `tools`"
        raise RequestError(f"`tool_choice` asks for a call, and {missing}", param="tool_choice")
    return True, CallOutput(wanted)


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
    stop = values.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not text for text in stop):
        raise RequestError("`stop` must not contain an empty string", param="stop")
    if values.get("top_k") == 0:  # SGLang refuses it; elsewhere it means "all" as -1 does
        raise RequestError("`top_k` must be at least 1, or -1 for all tokens", param="top_k")
    return Sampling(
        temperature=values.get("temperature"),
        top_p=values.get("top_p"),
        top_k=values.get("top_k"),
        min_p=values.get("min_p"),
        max_tokens=next(iter(limits), None),
        stop=stop,
        stop_token_ids=tuple(values.get("stop_token_ids", ())),
        frequency_penalty=values.get("frequency_penalty"),
        presence_penalty=values.get("presence_penalty"),
        repetition_penalty=values.get("repetition_penalty"),
        seed=values.get("seed"),
        logit_bias=_logit_bias(values.get("logit_bias", {})),
    )


def _logit_bias(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for token_id in biases:
        if not _TOKEN_ID.fullmatch(token_id):
            raise RequestError("`logit_bias`: its keys must be token ids", param="logit_bias")
    return tuple(sorted((int(token_id), bias) for token_id, bias in biases.items()))


def _messages(raws: list[Raw] | None, session: Session) -> list[Known]:
    if not raws:
        raise RequestError("`messages` must have at least one message", param="messages")
    known: list[Known] = []
    call_ids: set[str] = set()
    for index, raw in enumerate(raws):
        where = f"messages[{index}]"
        [item] = session.known("chat", raw, lambda raw=raw, where=where: [_message(raw, where)])
        message = item.message
        call_ids.update(call.id for call in message.tool_calls)
        if message.role == "tool" and message.tool_call_id not in call_ids:
            raise RequestError(
                f"messages[{index}]: tool_call_id {message.tool_call_id!r} is no tool call's id before it",
                param=f"messages[{index}].tool_call_id",
            )
        known.append(item)
    return known


def _message(raw: Raw, where: str) -> Message:
    try:
        wire = msgspec.json.decode(raw, type=_WireMessage)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(str(error).replace("`$", f"`{where}"), param=where) from None
    role = _ROLES.get(wire.role)
    if role is None:
        raise RequestError(
            f"{where}.role is {wire.role!r}: it must be one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    content = _text(wire.content, where)
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
    return Message(
        role=role,
        content=content,
        reasoning=reasoning if role == "assistant" else None,
        tool_calls=tuple(_call(call, where) for call in wire.tool_calls or ()),
        tool_call_id=wire.tool_call_id if role == "tool" else None,
        name=wire.name,
    )


def _call(call: _WireCall, where: str) -> ToolCall:
    if call.function is None and call.type == "function":
        raise RequestError(f"{where}.tool_calls: `function` is missing", param=f"{where}.tool_calls")
    if call.function is None:
        raise RequestError(
            f"{where}.tool_calls: type {call.type!r} is not supported, only functions",
            param=f"{where}.tool_calls",
        )
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    return ToolCall(id=call.id, name=call.function.name, arguments=text)


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
