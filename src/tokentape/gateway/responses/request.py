"""OpenAI Responses → a turn."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from tokentape.errors import RequestError
from tokentape.gateway.chat import request as chat
from tokentape.gateway.exchange import TurnRequest
from tokentape.gateway.responses.items import find_response, read_input
from tokentape.gateway.responses.output import Asked
from tokentape.gateway.responses.reply import ResponsesWriter
from tokentape.gateway.responses.tools import Choice, Tools, read_choice, read_tools
from tokentape.gateway.sessions import Session
from tokentape.gateway.wire import (
    AgentRequest,
    Decoded,
    Fields,
    Positive,
    check_ignored,
    check_template_arguments,
    read_fields,
    read_origin,
    thinking_arguments,
)
from tokentape.render import Frame
from tokentape.tape import Turn
from tokentape.tree import Known
from tokentape.types import CallOutput, Demand, Json, JsonOutput, Message, Sampling


class _Reasoning(msgspec.Struct, omit_defaults=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: str | None = None
    mode: str | None = None


class _Format(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    schema: Json | None = None


class _Text(msgspec.Struct):
    format: _Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


# Honoured: field → the type that its JSON must have. null means "not given" for all of them.
HONOURED: Mapping[str, Any] = {
    "input": str | list[Raw],
    "instructions": str,
    "previous_response_id": str,
    "model": str,
    "stream": bool,
    "store": bool,
    "metadata": dict[str, str],
    "max_output_tokens": Positive,
    "tools": list[Raw],
    "tool_choice": Literal["none", "auto", "required"] | Choice,
    "parallel_tool_calls": bool,
    "text": _Text,
    "reasoning": _Reasoning,
    "truncation": Literal["auto", "disabled"],
    "include": list[
        Literal[
            "reasoning.encrypted_content",
            "file_search_call.results",
            "web_search_call.results",
            "web_search_call.action.sources",
            "message.input_image.image_url",
            "computer_call_output.output.image_url",
            "code_interpreter_call.outputs",
            "message.output_text.logprobs",
        ]
    ],
    "temperature": chat.HONOURED["temperature"],
    "top_p": chat.HONOURED["top_p"],
    # Not OpenAI's: as in Chat Completions.
    "top_k": chat.HONOURED["top_k"],
    "min_p": chat.HONOURED["min_p"],
    "stop": chat.HONOURED["stop"],
    "stop_token_ids": chat.HONOURED["stop_token_ids"],
    "frequency_penalty": chat.HONOURED["frequency_penalty"],
    "presence_penalty": chat.HONOURED["presence_penalty"],
    "repetition_penalty": chat.HONOURED["repetition_penalty"],
    "seed": chat.HONOURED["seed"],
    "logit_bias": chat.HONOURED["logit_bias"],
    "chat_template_kwargs": dict[str, Any],
    "return_token_ids": bool,
}
# Refused unless the value is the one that asks for nothing: field → that value, and what to say.
REFUSED: Mapping[str, tuple[Any, str]] = {
    "background": (False, "a response is made while the caller waits"),
    "conversation": (None, "use `previous_response_id`, or send the items again"),
    "prompt": (None, "there are no prompt templates here; use `instructions` and `input`"),
    "context_management": ([], "a recorded conversation is never shortened here; the agent may do it"),
    "top_logprobs": (0, "use `return_token_ids: true`: it brings every token's log-probability"),
    "moderation": (None, "nothing is moderated here"),
    "n": (1, "one response a request"),
}
_SAMPLING = frozenset(HONOURED) & frozenset(Sampling.__struct_fields__)
_ECHOED = (
    *("model", "metadata", "max_output_tokens", "parallel_tool_calls", "previous_response_id", "store"),
    *("temperature", "top_p", "truncation", "tool_choice", "reasoning"),
)
# What differs between an SDK's tries of one request: no part of what it asks for.
_VOLATILE = ("client_metadata",)


def decode(request: AgentRequest) -> Decoded:
    """Read a request.

    Raises:
        RequestError: the body cannot be served; `param` names the field.
    """
    session, config = request.session, request.config
    fields = read_fields(request.body, HONOURED, REFUSED, strict=config.strict)
    values = fields.values
    tools = read_tools(values.get("tools", ()))
    frame, frame_key, thinking = _frame(fields, tools, request)
    parse_calls, demand = _demand(values, tools)
    if "message.output_text.logprobs" in values.get("include", ()):
        raise RequestError(
            "`include`: log-probabilities of a text are not served; `return_token_ids: true` brings every "
            "sampled token with its own",
            param="include",
        )
    ignored = (*fields.ignored, *_without_effect(values, thinking))
    check_ignored(ignored, strict=config.strict)
    noted = _noted(fields, tools)
    parts = [b"%s\0%s" % (name.encode(), fields.raw[name]) for name in sorted(fields.raw.keys() - _VOLATILE)]
    turn = TurnRequest(
        messages=_conversation(fields, session),
        frame=frame,
        frame_key=frame_key,
        sampling=_sampling(fields),
        origin=read_origin("responses", dataclasses.replace(request, body=b"\0".join(parts)), ignored, noted),
        stream=values.get("stream", False),
        parse_calls=parse_calls,
        single_call=bool(tools.names) and not values.get("parallel_tool_calls", True),
        demand=demand,
        clamp=True,
    )
    asked = Asked(
        session_id=session.session_id,
        model=values.get("model", config.model),
        tokenizer=config.tokenizer,
        noted=noted,
        tools=fields.raw["tools"] if values.get("tools") else (),
        instructions=values.get("instructions"),
        with_ids=values.get("return_token_ids", False),
    )
    return Decoded(turn, ResponsesWriter(asked))


def _frame(
    fields: Fields, tools: Tools, request: AgentRequest
) -> tuple[Frame, tuple[bytes, bytes], Mapping[str, Any]]:
    """Tools and template arguments, with their identity; and what tells the template how much to think."""
    arguments = dict(fields.values.get("chat_template_kwargs", {}))
    check_template_arguments(arguments, "chat_template_kwargs")
    effort = fields.values.get("reasoning", _Reasoning()).effort
    thinking = thinking_arguments(request.config.template_variables, effort=effort)
    try:
        frame = request.session.frame(tools.to_json(), msgspec.json.encode({**thinking, **arguments}))
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"`tools` or `chat_template_kwargs`: {error}", param="tools") from None
    return *frame, thinking


def _demand(values: Mapping[str, Any], tools: Tools) -> tuple[bool, Demand | None]:
    """Whether tool calls are wanted, and what the reply must be."""
    calls, wanted = read_choice(values.get("tool_choice", "auto"), tools)
    if wanted:
        return True, CallOutput(wanted)
    output = values.get("text", _Text()).format
    if output is None or output.type == "text":
        return calls, None
    schema = {"type": "object"} if output.type == "json_object" else output.schema
    if schema is None:
        raise RequestError("`text.format.schema` is missing", param="text.format.schema")
    return calls, JsonOutput(schema, tuple(tools.names) if calls else ())


def _without_effect(values: Mapping[str, Any], thinking: Mapping[str, Any]) -> list[str]:
    """What was asked for inside honoured fields and changes nothing."""
    reasoning = values.get("reasoning", _Reasoning())
    asked = {
        "truncation": values.get("truncation") == "auto",  # nothing is dropped: too long is an error
        "text.verbosity": values.get("text", _Text()).verbosity is not None,
        "reasoning.effort": reasoning.effort is not None and not thinking,
        "reasoning.context": reasoning.context not in (None, "auto"),
        "reasoning.mode": reasoning.mode not in (None, "standard"),
    }
    return [name for name, is_asked in asked.items() if is_asked]


def _noted(fields: Fields, tools: Tools) -> Json:
    """What the turn's record keeps, for the response and for requests that go on from it."""
    values = fields.values
    echo = {name: msgspec.to_builtins(values[name]) for name in _ECHOED if name in values}
    reasoning = values.get("reasoning", _Reasoning())
    if reasoning.generate_summary and not reasoning.summary:  # its old name
        echo["reasoning"]["summary"] = reasoning.generate_summary
    if reasoning.summary == "none":
        del echo["reasoning"]["summary"]
    if "text" in values:  # a copy: the body that it is a view of need not stay
        echo["text"] = Raw(bytes(fields.raw["text"]))
    noted: Json = {
        "echo": echo,
        "instructions": "instructions" in values,
        "include": values.get("include"),
        "tools": tools.special,
        "strict": tools.strict,
    }
    return {name: value for name, value in noted.items() if value or name == "echo"}


def _sampling(fields: Fields) -> Sampling:
    sampling = chat.session_sampling({name: fields.raw[name] for name in _SAMPLING if name in fields.raw})
    return replace(sampling, max_tokens=fields.values.get("max_output_tokens"))


def _conversation(fields: Fields, session: Session) -> list[Known]:
    """Instructions, what the previous response had before it and said, and the input."""
    values = fields.values
    known: list[Known] = []
    if (text := values.get("instructions")) is not None:
        known += session.known(
            "resp.system",
            fields.raw["instructions"],
            lambda: [Message(role="system", content=text)],
        )
    if (previous := values.get("previous_response_id")) is not None:
        known += _recorded(find_response(session, previous, "previous_response_id"), session)
    if not values.get("input"):
        raise RequestError("`input` must have at least one item", param="input")
    call_ids = {call.id for item in known for call in item.message.tool_calls}
    for place, item in read_input(fields.raw["input"], values["input"], session):
        message = item.message
        call_ids.update(call.id for call in message.tool_calls)
        if message.role == "tool" and message.tool_call_id not in call_ids:
            raise RequestError(
                f"No tool call found for function call output with call_id {message.tool_call_id}.",
                param=f"input[{place}].call_id",
            )
        known.append(item)
    return known


def _recorded(turn: Turn, session: Session) -> Sequence[Known]:
    """The conversation up to a turn and with it; not the instructions, which hold for one response."""
    known = [
        item
        for one in session.tree.path(turn.turn_id)
        for item in session.known(
            "resp.turn", Raw(one.turn_id.encode()), lambda one=one: [*one.messages, one.reply]
        )
    ]
    return known[1:] if turn.origin.noted.get("instructions") else known
