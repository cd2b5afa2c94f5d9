"""OpenAI Chat Completions ↔ turns: one request in, one completion or a stream of chunks out.

Every field of a request is in one of three lists: honoured, refused with a 400 that names it, or ignored and
recorded with the turn (refused too under `--strict`). Nothing is dropped in silence.
"""

import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw

from tokentape.errors import ContextOverflow, RequestError, TokentapeError
from tokentape.export import chat_call
from tokentape.gateway.sessions import Session
from tokentape.gateway.turn import Done, Progress, TurnRequest, new_turn_id
from tokentape.parse import CallDelta, ParseEvent, ReasoningDelta, TextDelta
from tokentape.template import RESERVED
from tokentape.tokenizer import Tokenizer
from tokentape.tree import Known, know
from tokentape.types import Json, Message, Sampling, ToolCall

_MAX_INT = 2**31 - 1  # what every engine can take
_Positive = Annotated[int, Meta(ge=1, le=_MAX_INT)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Function(msgspec.Struct):
    name: Annotated[str, Meta(min_length=1)]


class _Tool(msgspec.Struct):
    type: Literal["function"]
    function: _Function


# Honoured: field → the type that its JSON must have. null means "not given" for all of them.
HONOURED: Mapping[str, Any] = {
    "messages": list[Raw],
    "model": str,
    "stream": bool,
    "stream_options": _StreamOptions,
    "max_tokens": _Positive,
    "max_completion_tokens": _Positive,
    "temperature": Annotated[float, Meta(ge=0)],
    "top_p": Annotated[float, Meta(gt=0, le=1)],
    "top_k": Annotated[int, Meta(ge=-1, le=_MAX_INT)],
    "min_p": Annotated[float, Meta(ge=0, le=1)],
    "stop": str | list[str],
    "stop_token_ids": list[Annotated[int, Meta(ge=0, le=_MAX_INT)]],
    "frequency_penalty": _Penalty,
    "presence_penalty": _Penalty,
    "repetition_penalty": Annotated[float, Meta(gt=0, le=2)],
    "seed": Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    "logprobs": bool,
    "tools": list[_Tool],
    "tool_choice": Any,
    "chat_template_kwargs": dict[str, Any],
    "return_token_ids": bool,
}
# Refused unless the value is the one that asks for nothing: field → that value, and what to say.
REFUSED: Mapping[str, tuple[Any, str]] = {
    "n": (1, "one choice per request; send the request again for another branch"),
    "best_of": (1, "one choice per request"),
    "top_logprobs": (0, "only the sampled token's log-probability is known: set `logprobs` alone"),
    "logit_bias": ({}, "the sampling distribution must be the policy's own"),
    "response_format": ({"type": "text"}, "constrained output is not supported"),
    "parallel_tool_calls": (True, "calls cannot be forbidden to come in parallel"),
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


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A decoded request: the turn it asks for, and how the reply is to look."""

    request: TurnRequest
    model: str
    logprobs: bool
    include_usage: bool
    return_token_ids: bool


def decode(body: bytes, session: Session, *, default_model: str, strict: bool = False) -> ChatCall:
    """Read a request.

    Messages that this session has seen before, byte for byte, are not decoded again.

    Raises:
        RequestError: the body cannot be served; `param` names the field.
    """
    try:
        body.decode()  # msgspec does not look into what it leaves as `Raw`
        fields = msgspec.json.decode(body, type=dict[str, Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not a JSON object: {error}") from None
    values = {name: _value(name, fields[name]) for name in HONOURED if name in fields}
    values = {name: value for name, value in values.items() if value is not None}
    for name in fields.keys() & REFUSED.keys():
        harmless, hint = REFUSED[name]
        if (value := _value(name, fields[name])) is not None and value != harmless:
            raise RequestError(f"`{name}` is not supported here: {hint}", param=name)
    ignored = tuple(sorted(fields.keys() - HONOURED.keys() - REFUSED.keys()))
    if ignored and strict:
        raise RequestError(f"`{ignored[0]}` has no effect here, and --strict refuses it", param=ignored[0])
    for name in values.get("chat_template_kwargs", {}):
        if name in RESERVED:
            raise RequestError(
                f"`chat_template_kwargs.{name}` is the gateway's own", param="chat_template_kwargs"
            )
    tools = bytes(fields["tools"]) if values.get("tools") else b"[]"
    arguments = bytes(fields["chat_template_kwargs"]) if "chat_template_kwargs" in values else b"{}"
    try:
        frame, frame_key = session.frame(tools, arguments)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"`tools` or `chat_template_kwargs`: {error}", param="tools") from None
    request = TurnRequest(
        turn_id=new_turn_id(),
        messages=_messages(values.get("messages"), session),
        frame=frame,
        frame_key=frame_key,
        sampling=_sampling(values),
        parse_calls=_parse_calls(values.get("tool_choice"), bool(values.get("tools"))),
        stream=values.get("stream", False),
        ignored=ignored,
    )
    return ChatCall(
        request=request,
        model=values.get("model", default_model),
        logprobs=values.get("logprobs", False),
        include_usage=values.get("stream_options", _StreamOptions()).include_usage,
        return_token_ids=values.get("return_token_ids", False),
    )


def session_sampling(fields: Mapping[str, Raw]) -> Sampling:
    """The sampling defaults of a session: fields of a request, under the same rules.

    Raises:
        RequestError: a field is none of `Sampling`'s, or its value cannot be used.
    """
    for name in fields:
        if name not in Sampling.__struct_fields__:
            raise RequestError(f"`sampling.{name}` is not a sampling parameter", param=f"sampling.{name}")
    values = {name: _value(name, raw) for name, raw in fields.items()}
    return _sampling({name: value for name, value in values.items() if value is not None})


def _value(name: str, raw: Raw) -> Any:
    try:
        return msgspec.json.decode(raw, type=HONOURED[name] | None if name in HONOURED else Any)
    except msgspec.DecodeError as error:
        where = str(error).replace("`$", f"`{name}")
        raise RequestError(f"`{name}`: {where}", param=name) from None
    except RecursionError:
        raise RequestError(f"`{name}` is nested too deep", param=name) from None


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
    )


def _parse_calls(choice: Any, has_tools: bool) -> bool:
    """Whether calls are wanted. Forcing a call needs constrained decoding, which is refused for now."""
    if choice is None or choice == "auto":
        return has_tools
    if choice == "none":
        return False
    raise RequestError(
        '`tool_choice` can be "auto" or "none" here: forcing a call would change the distribution that is '
        "sampled from",
        param="tool_choice",
    )


def _messages(raws: list[Raw] | None, session: Session) -> list[Known]:
    if not raws:
        raise RequestError("`messages` must have at least one message", param="messages")
    known: list[Known] = []
    call_ids: set[str] = set()
    for index, raw in enumerate(raws):
        key = blake2b(raw, digest_size=16).digest()
        item = session.known.get(key)
        if item is None:
            item = session.known[key] = know(_message(raw, f"messages[{index}]"))
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


# -- replies


def completion(call: ChatCall, done: Done, tokenizer: Tokenizer, session_id: str) -> bytes:
    """The reply of a request without `stream`."""
    reply = done.turn.reply
    message: Json = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.reasoning is not None:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [chat_call(c) for c in reply.tool_calls]
    choice: Json = {
        "index": 0,
        "message": message,
        "finish_reason": _finish_reason(done),
        "logprobs": None,
    }
    if call.logprobs:
        choice["logprobs"] = _logprobs(done.turn.completion.ids, done.turn.logprobs, tokenizer)
    return msgspec.json.encode(
        {
            "id": done.turn.turn_id,
            "object": "chat.completion",
            "created": int(done.turn.created_at),
            "model": call.model,
            "choices": [choice],
            "usage": _usage(done),
            "tokentape": extension(call, done, session_id),
        }
    )


class ChunkWriter:
    """The events of a streamed reply: `chunks` for progress, `last` after the commit, or `error`."""

    def __init__(self, call: ChatCall, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._started = False
        self._base: Json = {
            "id": call.request.turn_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": call.model,
        }

    def chunks(self, progress: Progress) -> bytes:
        """Server-sent events for new tokens; b"" where they mean nothing yet."""
        deltas = [_delta(event) for event in progress.events]
        logprobs = None
        if self._call.logprobs and progress.ids:
            recorded = array("f", progress.logprobs)  # float32, as in the turn and in a reply without stream
            logprobs = _logprobs(progress.ids, recorded, self._tokenizer)
            deltas = deltas or [{}]
        if deltas and not self._started:
            self._started = True
            deltas[0] = {"role": "assistant", "content": None, **deltas[0]}
        return b"".join(
            self._event(delta, logprobs=logprobs if index == 0 else None)
            for index, delta in enumerate(deltas)
        )

    def last(self, done: Done, session_id: str) -> bytes:
        """The end of the stream; only for a committed turn."""
        delta = {} if self._started else {"role": "assistant", "content": None}
        end = self._event(
            delta, finish_reason=_finish_reason(done), tokentape=extension(self._call, done, session_id)
        )
        if self._call.include_usage:
            end += _sse({**self._base, "choices": [], "usage": _usage(done)})
        return end + b"data: [DONE]\n\n"

    def error(self, error: TokentapeError) -> bytes:
        """The end of a stream that failed: the SDK raises on it."""
        return _sse(error_body(error))

    def _event(
        self, delta: Json, *, finish_reason: str | None = None, logprobs: Json | None = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return _sse({**self._base, "choices": [choice], **more})


def error_body(error: TokentapeError) -> Json:
    """An error in OpenAI's shape."""
    code = "context_length_exceeded" if isinstance(error, ContextOverflow) else error.kind
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    param = error.param if isinstance(error, RequestError) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def extension(call: ChatCall, done: Done, session_id: str) -> Json:
    """What tokentape adds to a reply."""
    turn = done.turn
    out: Json = {
        "session_id": session_id,
        "turn_id": turn.turn_id,
        "parent_turn_id": turn.parent_id,
        "branch_reason": turn.branch_reason,
        "prompt_tokens": done.usage.num_prompt,
        "completion_tokens": done.usage.num_completion,
        "weight_version": turn.versions[-1].version,
        "parse": {"status": turn.parse_status, "attempts": turn.attempts},
    }
    if turn.neutralised:
        out["neutralised"] = turn.neutralised
    if turn.ignored:
        out["ignored_fields"] = turn.ignored
    if call.return_token_ids:
        out["prompt_ids"] = Raw(done.prompt.to_json())
        out["completion_ids"] = Raw(b"[" + turn.completion.json + b"]")
        out["logprobs"] = turn.logprobs.tolist()
    return out


def _finish_reason(done: Done) -> str:
    if done.turn.finish_reason == "stop" and done.turn.reply.tool_calls:
        return "tool_calls"
    return done.turn.finish_reason


def _usage(done: Done) -> Json:
    usage = done.usage
    out: Json = {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_completion,
        "total_tokens": usage.num_prompt + usage.num_completion,
    }
    if usage.num_cached is not None:
        out["prompt_tokens_details"] = {"cached_tokens": usage.num_cached}
    return out


def _delta(event: ParseEvent) -> Json:
    match event:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case CallDelta(index, call):
            return {"tool_calls": [{"index": index, **chat_call(call)}]}


def _logprobs(ids: Sequence[int], logprobs: Sequence[float], tokenizer: Tokenizer) -> Json:
    """OpenAI's log-probabilities. A token's `bytes` are exact also where they are half a character."""

    def entries() -> Iterator[Json]:
        for token_id, logprob in zip(ids, logprobs, strict=True):
            token = tokenizer.token_text(token_id)
            raw = tokenizer.token_bytes(token_id)
            yield {"token": token, "logprob": logprob, "bytes": list(raw), "top_logprobs": []}

    return {"content": list(entries()), "refusal": None}


def _sse(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
