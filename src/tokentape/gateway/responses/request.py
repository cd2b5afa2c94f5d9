"""OpenAI Responses → a turn."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw

from tokentape.conversation import Conversation, Known
from tokentape.errors import RequestError
from tokentape.gateway.exchange import TurnRequest
from tokentape.gateway.fields import (
    SAMPLING,
    Fields,
    Keys,
    Positive,
    Unheard,
    check_calls,
    check_ignored,
    read_demand,
    read_fields,
    read_frame,
    read_sampling,
    template_arguments,
    thinking_arguments,
)
from tokentape.gateway.responses.items import find_response, read_input
from tokentape.gateway.responses.output import ResponseFields
from tokentape.gateway.responses.reply import ResponsesWriter
from tokentape.gateway.responses.tools import Choice, Tools, read_choice, read_tools
from tokentape.gateway.session import Session
from tokentape.gateway.wire import AgentRequest, Decoded, read_origin
from tokentape.tape import Turn
from tokentape.types import Json, Message


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
    # All but two are not OpenAI's here: as in Chat Completions.
    **{name: type_ for name, type_ in SAMPLING.items() if name != "max_tokens"},
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
# What is heard inside fields, or asks for nothing that is not kept to anyway.
_INSIDE: Mapping[str, Keys] = {
    "reasoning": dict.fromkeys(_Reasoning.__struct_fields__),
    "text": {
        "format": dict.fromkeys(("type", "name", "schema", "strict", "description")),
        "verbosity": None,
    },
    "tool_choice": {
        **dict.fromkeys(("type", "name", "mode")),
        "tools": dict.fromkeys(("type", "name")),
    },
}
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
    unheard = Unheard(config.strict)
    unheard.look_inside(fields, _INSIDE)
    tools = read_tools(values.get("tools", ()), unheard)
    told: list[tuple[str, Json]] = []
    if (effort := values.get("reasoning", _Reasoning()).effort) is not None:
        thinking = thinking_arguments(config.template_variables, effort=effort)
        told.append(("reasoning.effort", thinking))
    arguments, unused = template_arguments(
        values.get("chat_template_kwargs", {}), told, config.template_arguments
    )
    frame, frame_key = read_frame(session, tools.to_json(), arguments)
    choice = read_choice(values.get("tool_choice", "auto"), tools)
    parse_calls, demand, pointless = read_demand(choice, tools.names, ("text.format", _schema(values)))
    if "message.output_text.logprobs" in values.get("include", ()):
        raise RequestError(
            "`include`: log-probabilities of a text are not served; `return_token_ids: true` brings every "
            "sampled token with its own",
            param="include",
        )
    without = (*unused, *pointless, *_without_effect(values))
    check_ignored(without, strict=config.strict)
    conversation = _conversation(fields, session, unheard)
    ignored = (*fields.ignored, *without, *sorted(unheard.names))
    noted = _noted(fields, tools)
    turn = TurnRequest(
        conversation=conversation,
        frame=frame,
        frame_key=frame_key,
        sampling=read_sampling(
            values, max_tokens=values.get("max_output_tokens"), stop=values.get("stop", ())
        ),
        origin=read_origin("responses", request.headers, fields.parts(_VOLATILE), ignored, noted),
        stream=values.get("stream", False),
        parse_calls=parse_calls,
        single_call=bool(tools.names) and not values.get("parallel_tool_calls", True),
        demand=demand,
        clamp=True,
    )
    asked = ResponseFields(
        session_id=session.session_id,
        model=values.get("model", config.model),
        tokenizer=config.tokenizer,
        noted=noted,
        tools=fields.raw["tools"] if values.get("tools") else (),
        instructions=values.get("instructions"),
        with_ids=values.get("return_token_ids", False),
    )
    return Decoded(turn, ResponsesWriter(asked))


def _schema(values: Mapping[str, Any]) -> Json | None:
    """The JSON schema that the reply's text must follow."""
    output = values.get("text", _Text()).format
    if output is None or output.type == "text":
        return None
    schema = {"type": "object"} if output.type == "json_object" else output.schema
    if schema is None:
        raise RequestError("`text.format.schema` is missing", param="text.format.schema")
    return schema


def _without_effect(values: Mapping[str, Any]) -> list[str]:
    """What was asked for inside honoured fields and changes nothing."""
    reasoning = values.get("reasoning", _Reasoning())
    asked = {
        "truncation": values.get("truncation") == "auto",  # nothing is dropped: too long is an error
        "text.verbosity": values.get("text", _Text()).verbosity is not None,
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


def _conversation(fields: Fields, session: Session, unheard: Unheard) -> Conversation:
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
    before = Conversation.of(known)
    said: list[Known] = []
    call_ids: set[str] = set()
    for place, item in read_input(fields.raw["input"], values["input"], session, unheard):
        check_calls(item.message, call_ids, before, f"input[{place}]", "call_id")
        said.append(item)
    return before.followed_by(said)


def _recorded(turn: Turn, session: Session) -> Sequence[Known]:
    """The conversation up to a turn and with it; not the instructions, which hold for one response."""
    known = [
        item
        for one in session.tree.path(turn.turn_id)
        for item in session.known(
            "resp.turn", Raw(one.turn_id.encode()), lambda one=one: [*one.messages, one.reply]
        )
    ]
    known[-1] = dataclasses.replace(known[-1], turn_id=turn.turn_id)  # not another that says the same
    return known[1:] if turn.origin.noted.get("instructions") else known
