"""Anthropic Messages → a turn."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Raw

from tokentape.errors import RequestError
from tokentape.gateway.exchange import TurnRequest
from tokentape.gateway.fields import (
    SAMPLING,
    Fields,
    Keys,
    Positive,
    Unheard,
    check_ignored,
    read_demand,
    read_fields,
    read_frame,
    read_sampling,
    template_arguments,
    thinking_arguments,
)
from tokentape.gateway.messages.blocks import read_cache_control, read_conversation, read_system
from tokentape.gateway.messages.reply import MessagesWriter
from tokentape.gateway.messages.tools import read_tools
from tokentape.gateway.wire import AgentRequest, Decoded, read_origin
from tokentape.types import Json


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
    "messages": Raw,
    "model": str,
    "max_tokens": Positive,
    "system": str | list[Raw],
    "stream": bool,
    "stop_sequences": list[Annotated[str, Meta(min_length=1)]],
    "temperature": Annotated[float, Meta(ge=0, le=1)],
    "top_p": SAMPLING["top_p"],
    "top_k": SAMPLING["top_k"],
    "tools": list[dict[str, Raw]],
    "tool_choice": _ToolChoice,
    "thinking": _Thinking,
    "output_config": _OutputConfig,
    "output_format": _OutputFormat,
    "context_management": _ContextManagement,  # the reply says that nothing was edited
    # Kept with the turn; they change nothing.
    "metadata": Json,
    "cache_control": Json,
    # Not Anthropic's.
    **{
        name: SAMPLING[name]
        for name in (
            *("min_p", "stop_token_ids", "frequency_penalty", "presence_penalty", "repetition_penalty"),
            *("seed", "logit_bias"),
        )
    },
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
# What is heard inside fields; of `output_config.format` the SDK's helpers also send a name.
_FORMAT: Keys = dict.fromkeys(("type", "schema", "name"))
_INSIDE: Mapping[str, Keys] = {
    "tool_choice": dict.fromkeys(("type", "name", "disable_parallel_tool_use")),
    "thinking": dict.fromkeys(("type", "budget_tokens", "display")),
    "output_config": {"effort": None, "format": _FORMAT, "task_budget": None},
    "output_format": _FORMAT,
    "context_management": {"edits": None},
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
    unheard = Unheard(config.strict)
    unheard.look_inside(fields, _INSIDE)
    arguments, unused = template_arguments(
        values.get("chat_template_kwargs", {}),
        _asked(values, config.template_variables),
        config.template_arguments,
    )
    frame, frame_key = read_frame(session, tools, arguments)
    choice = values.get("tool_choice") or _ToolChoice("auto")
    names = [cast("str", tool["function"]["name"]) for tool in frame.tools]
    parse_calls, demand, pointless = read_demand(_choice(choice, names), names, _schema(values))
    without = (*sorted(tools_ignored), *unused, *pointless, *_ignored(values))
    check_ignored(without, strict=config.strict)
    sampling = read_sampling(
        values, max_tokens=values.get("max_tokens"), stop=values.get("stop_sequences", ())
    )
    system = read_system(fields.raw.get("system"), session, unheard)
    read = read_conversation(values.get("messages"), session, system, unheard)
    ignored = tuple(sorted({*fields.ignored, *without, *unheard.names}))
    turn = TurnRequest(
        conversation=read.conversation,
        frame=frame,
        frame_key=frame_key,
        sampling=sampling,
        origin=read_origin(
            "messages",
            request.headers,
            (*fields.parts({"messages"}), read.digest),
            ignored,
            _noted(fields, request),
        ),
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


def _asked(values: Mapping[str, Any], variables: frozenset[str]) -> list[tuple[str, Json]]:
    """The fields that ask for template arguments, and which."""
    asked: list[tuple[str, Json]] = []
    if (thinking := values.get("thinking")) is not None:
        asked.append(("thinking", thinking_arguments(variables, enabled=thinking.type != "disabled")))
    if (effort := values.get("output_config", _OutputConfig()).effort) is not None:
        # It says how much to think, not whether to: a switch is not meant.
        heard = thinking_arguments(variables & {"reasoning_effort"}, effort=effort)
        asked.append(("output_config.effort", heard))
    return asked


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


def _choice(choice: _ToolChoice, names: Sequence[str]) -> Literal["auto", "none"] | Sequence[str]:
    """`tool_choice`, or the names of the tools of which one must be called."""
    match choice.type:
        case "auto" | "none":
            return choice.type
        case "any":
            return names
        case "tool":
            if choice.name is None:
                raise RequestError("`tool_choice.name` is missing", param="tool_choice.name")
            return (choice.name,)


def _schema(values: Mapping[str, Any]) -> tuple[str, Json | None]:
    """The field for the JSON schema that the reply's text must follow, and the schema."""
    output, older = values.get("output_config", _OutputConfig()).format, values.get("output_format")
    if output is not None and older is not None and output.schema != older.schema:
        raise RequestError(
            "`output_config.format` and `output_format` differ: send one", param="output_format"
        )
    if output is None and older is not None:
        return "output_format", older.schema
    return "output_config.format", None if output is None else output.schema


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
