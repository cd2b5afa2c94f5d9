"""Anthropic Messages → a turn."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Raw

from tokentape.errors import RequestError
from tokentape.gateway.exchange import TurnRequest
from tokentape.gateway.messages.blocks import read_cache_control, read_messages, read_system
from tokentape.gateway.messages.reply import MessagesWriter
from tokentape.gateway.messages.tools import read_tools
from tokentape.gateway.wire import (
    MAX_INT,
    AgentRequest,
    Decoded,
    Fields,
    Fraction,
    Positive,
    check_ignored,
    check_template_arguments,
    read_fields,
    read_origin,
    thinking_arguments,
)
from tokentape.render import Frame
from tokentape.types import CallOutput, Demand, Json, JsonOutput, Sampling

_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class _Thinking(msgspec.Struct):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None
    display: Literal["summarized", "omitted"] | None = None


class _OutputFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: Json


class _OutputConfig(msgspec.Struct):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: _OutputFormat | None = None
    task_budget: Any = None


class _ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _ContextManagement(msgspec.Struct):
    edits: list[Json] | None = None


# Honoured: field → the type that its JSON must have. null means "not given" for all of them.
HONOURED: Mapping[str, Any] = {
    "messages": list[Raw],
    "model": str,
    "max_tokens": Positive,
    "system": str | list[Raw],
    "stream": bool,
    "stop_sequences": list[Annotated[str, Meta(min_length=1)]],
    "temperature": Annotated[float, Meta(ge=0, le=1)],
    "top_p": Fraction,
    "top_k": Annotated[int, Meta(ge=-1, le=MAX_INT)],
    "tools": list[dict[str, Raw]],
    "tool_choice": _ToolChoice,
    "thinking": _Thinking,
    "output_config": _OutputConfig,
    "output_format": _OutputFormat,
    # Kept with the turn; it changes nothing else.
    "metadata": Json,
    "cache_control": Json,
    "context_management": _ContextManagement,
    # Not Anthropic's.
    "min_p": Annotated[float, Meta(ge=0, le=1)],
    "stop_token_ids": list[Annotated[int, Meta(ge=0, le=MAX_INT)]],
    "frequency_penalty": _Penalty,
    "presence_penalty": _Penalty,
    "repetition_penalty": Annotated[float, Meta(gt=0, le=2)],
    "seed": Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    "chat_template_kwargs": Json,
    "return_token_ids": bool,
}
# Refused unless the value is the one that asks for nothing: field → that value, and what to say.
REFUSED: Mapping[str, tuple[Any, str]] = {
    "container": (None, "this gateway runs no code"),
    "mcp_servers": ([], "this gateway has no tools of its own"),
    "compaction": (None, "this gateway summarises nothing: ask the model"),
    "thread": (None, "send the whole conversation"),
    "n": (1, "one reply a request"),
    "stop": (None, "use `stop_sequences`"),
    "response_format": (None, "use `output_config.format`"),
}
_KEEPS_ALL: Json = {"type": "clear_thinking_20251015", "keep": "all"}


def decode(request: AgentRequest) -> Decoded:
    """Read a request.

    Messages that this session has seen before, byte for byte, are not decoded again.

    Raises:
        RequestError: the body cannot be served; `param` names the field.
    """
    decoded = _decode(request)
    if decoded.request.sampling.max_tokens is None:
        raise RequestError("`max_tokens` is required", param="max_tokens")
    return decoded


def decode_count(request: AgentRequest) -> Decoded:
    """Read a request whose prompt is only to be counted.

    Raises:
        RequestError: as `decode`; `max_tokens` is not needed.
    """
    return _decode(request)


def _decode(request: AgentRequest) -> Decoded:
    session, config = request.session, request.config
    fields = read_fields(request.body, HONOURED, REFUSED, strict=config.strict)
    values = fields.values
    tools, tools_ignored = read_tools(values.get("tools", []))
    arguments, arguments_ignored = _arguments(values, config.template_variables)
    try:
        frame, frame_key = session.frame(tools, arguments)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"`tools` or `chat_template_kwargs`: {error}", param="tools") from None
    ignored = tuple(sorted({*fields.ignored, *tools_ignored, *arguments_ignored, *_ignored(values)}))
    check_ignored(ignored, strict=config.strict)
    choice = values.get("tool_choice") or _ToolChoice("auto")
    parse_calls, demand = _demand(values, choice, frame)
    sampling = _sampling(values)
    turn = TurnRequest(
        messages=[
            *read_system(fields.raw.get("system"), session),
            *read_messages(values.get("messages"), session),
        ],
        frame=frame,
        frame_key=frame_key,
        sampling=sampling,
        origin=read_origin("messages", request, ignored, _noted(fields, request)),
        stream=values.get("stream", False),
        parse_calls=parse_calls,
        single_call=bool(frame.tools) and bool(choice.disable_parallel_tool_use),
        demand=demand,
        clamp=True,
    )
    thinking = values.get("thinking")
    writer = MessagesWriter(
        session=session,
        model=values.get("model", config.model),
        tokenizer=config.tokenizer,
        max_tokens=sampling.max_tokens or 0,
        stop=sampling.stop or session.record.sampling.stop,
        omit_thinking=thinking is not None and thinking.display == "omitted",
        manages_context="context_management" in values,
        with_ids=values.get("return_token_ids", False),
    )
    return Decoded(turn, writer)


def _arguments(values: Mapping[str, Any], variables: frozenset[str]) -> tuple[bytes, list[str]]:
    """Template arguments as JSON, and the fields that asked for some without effect."""
    given: Json = values.get("chat_template_kwargs", {})
    check_template_arguments(given, "chat_template_kwargs")
    asked: list[tuple[str, Json]] = []
    if (thinking := values.get("thinking")) is not None:
        asked.append(("thinking", thinking_arguments(variables, enabled=thinking.type != "disabled")))
    if (effort := values.get("output_config", _OutputConfig()).effort) is not None:
        # It says how much to think, not whether to: a switch is not meant.
        heard = thinking_arguments(variables & {"reasoning_effort"}, effort=effort)
        asked.append(("output_config.effort", heard))
    arguments = {name: value for _, wanted in asked for name, value in wanted.items()} | given
    return msgspec.json.encode(arguments), [
        field for field, wanted in asked if not wanted or not wanted.items() <= arguments.items()
    ]


def _ignored(values: Mapping[str, Any]) -> list[str]:
    """Parts of honoured fields that have no effect."""
    ignored: list[str] = []
    thinking, output = values.get("thinking"), values.get("output_config")
    if thinking is not None and thinking.budget_tokens is not None:
        ignored.append("thinking.budget_tokens")
    if output is not None and output.task_budget is not None:
        ignored.append("output_config.task_budget")
    edits: list[Json] = values.get("context_management", _ContextManagement()).edits or []
    if any(edit != _KEEPS_ALL for edit in edits):
        ignored.append("context_management")
    return ignored


def _demand(values: Mapping[str, Any], choice: _ToolChoice, frame: Frame) -> tuple[bool, Demand | None]:
    """Whether tool calls are wanted, and what the reply must be."""
    names = tuple(cast("str", tool["function"]["name"]) for tool in frame.tools)
    calls = bool(names) and choice.type != "none"
    schema = _schema(values)
    if choice.type in ("auto", "none"):
        return calls, None if schema is None else JsonOutput(schema, names if calls else ())
    if choice.type == "tool" and choice.name is None:
        raise RequestError("`tool_choice.name` is missing", param="tool_choice.name")
    wanted = names if choice.name is None or choice.type == "any" else (choice.name,)
    if not wanted or not set(wanted) <= set(names):
        missing = f"{wanted[0]!r} is none of `tools`" if wanted else "there are no `tools`"
        raise RequestError(f"`tool_choice` asks for a call, and {missing}", param="tool_choice")
    return True, CallOutput(wanted)


def _schema(values: Mapping[str, Any]) -> Json | None:
    """The JSON schema that the reply's text must follow; the field has an older name."""
    output, older = values.get("output_config", _OutputConfig()).format, values.get("output_format")
    if output is not None and older is not None and output.schema != older.schema:
        raise RequestError(
            "`output_config.format` and `output_format` differ: send one", param="output_format"
        )
    wanted = output or older
    return None if wanted is None else wanted.schema


def _sampling(values: Mapping[str, Any]) -> Sampling:
    if values.get("top_k") == 0:  # SGLang refuses it; elsewhere it means "all" as -1 does
        raise RequestError("`top_k` must be at least 1, or -1 for all tokens", param="top_k")
    return Sampling(
        temperature=values.get("temperature"),
        top_p=values.get("top_p"),
        top_k=values.get("top_k"),
        min_p=values.get("min_p"),
        max_tokens=values.get("max_tokens"),
        stop=tuple(values.get("stop_sequences", ())),
        stop_token_ids=tuple(values.get("stop_token_ids", ())),
        frequency_penalty=values.get("frequency_penalty"),
        presence_penalty=values.get("presence_penalty"),
        repetition_penalty=values.get("repetition_penalty"),
        seed=values.get("seed"),
    )


def _noted(fields: Fields, request: AgentRequest) -> Json:
    """What is kept of the request for later: it changed nothing."""
    headers = request.headers
    beta = headers.get("anthropic-beta", "")
    noted = {
        "anthropic_version": headers.get("anthropic-version"),
        "anthropic_beta": [name.strip() for name in beta.split(",") if name.strip()],
        "cache_control": read_cache_control(fields.raw),
        "metadata": fields.values.get("metadata"),
    }
    return {name: value for name, value in noted.items() if value}
