"""Turns → OpenAI Responses: one response, or a stream of events."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokentape.errors import ContextOverflow, Overloaded, TokentapeError
from tokentape.gateway.exchange import Done, Progress, Started
from tokentape.gateway.responses.items import item_id
from tokentape.gateway.responses.output import (
    ResponseFields,
    begun,
    ended,
    message_item,
    output_text,
    reasoning_item,
)
from tokentape.gateway.wire import event, openai_error
from tokentape.parse import CallDelta, ReasoningDelta, TextDelta
from tokentape.types import Json

_PARAMS = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}


@dataclass(slots=True)
class ResponsesWriter:
    """A `gateway.wire.Writer` for one request.

    A stream shows reasoning and text as they come. Calls are written with the rest of the turn's items: they
    come when it is durable anyway, and their places are known then.
    """

    asked: ResponseFields
    _response: Json = field(default_factory=dict[str, Any])
    _turn_id: str = ""
    _num_events: int = 0
    _thought: list[str] = field(default_factory=list[str])
    _text: list[str] = field(default_factory=list[str])

    def whole(self, dones: Sequence[Done]) -> bytes:
        """The response of a request without `stream`."""
        turn = dones[0].turn
        return msgspec.json.encode(
            ended(begun(turn.turn_id, turn.created_at, self.asked), dones[0], self.asked)
        )

    def start(self, started: Started) -> bytes:
        """The response begins."""
        self._turn_id = started.turn_ids[0]
        self._response = begun(self._turn_id, started.created_at, self.asked)
        return self._event("response.created", response=self._response) + self._in_progress()

    def progress(self, progress: Progress) -> bytes:
        """Events for new reasoning and text."""
        out: list[bytes] = []
        for item in progress.events:
            match item:
                case ReasoningDelta(text):
                    out.append(self._more_thought(text))
                case TextDelta(text):
                    out.append(self._more_text(text))
                case CallDelta():
                    pass
        return b"".join(out)

    def end(self, dones: Sequence[Done]) -> bytes:
        """The rest of every item, and the response; only for a committed turn."""
        response = ended(self._response, dones[0], self.asked)
        out: list[bytes] = []
        for index, item in enumerate(response["output"]):
            match item["type"]:
                case "reasoning":
                    out.append(b"" if self._text else self._end_thought(item))
                case "message":
                    out.append(self._end_message(index, item))
                case _:
                    out.append(self._call(index, item))
        kind = "incomplete" if response["status"] == "incomplete" else "completed"
        return b"".join(out) + self._event(f"response.{kind}", response=response)

    def error(self, error: TokentapeError) -> bytes:
        """The end of a stream that failed: a failed response, then an error, on which the SDK raises."""
        body = error_body(error)["error"]
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        if isinstance(error, ContextOverflow | Overloaded):
            code = body["code"]
        failed = {
            **self._response,
            "status": "failed",
            "error": {"code": code, "message": body["message"]},
        }
        out = self._event("response.failed", response=failed) if self._response else b""
        flat = {name: body[name] for name in ("code", "message", "param")}
        return out + self._event("error", **flat, error=body)

    def ping(self) -> bytes:
        """An event, not a comment: some clients count only events against their idle limit."""
        return self._in_progress() if self._response else b": ping\n\n"

    # -- events

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    def _in_progress(self) -> bytes:
        return self._event("response.in_progress", response=self._response)

    def _item(self, what: str, index: int, item: Json) -> bytes:
        return self._event(f"response.output_item.{what}", output_index=index, item=item)

    def _more_thought(self, text: str) -> bytes:
        id_ = item_id("rs", self._turn_id, 0)
        at: Json = {"item_id": id_, "output_index": 0}
        out: list[bytes] = []
        if not self._thought:
            item: Json = {**reasoning_item(id_, "", "in_progress", self.asked), "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
            out.append(self._item("added", 0, {**item, "encrypted_content": None}))
            if self.asked.summary:
                summary = {"type": "summary_text", "text": ""}
                out.append(
                    self._event("response.reasoning_summary_part.added", **at, summary_index=0, part=summary)
                )
            out.append(self._event("response.content_part.added", **at, content_index=0, part=part))
        self._thought.append(text)
        if self.asked.summary:
            out.append(
                self._event("response.reasoning_summary_text.delta", **at, summary_index=0, delta=text)
            )
        out.append(self._event("response.reasoning_text.delta", **at, content_index=0, delta=text))
        return b"".join(out)

    def _end_thought(self, item: Json) -> bytes:
        at: Json = {"item_id": item["id"], "output_index": 0}
        part = item["content"][0]
        out: list[bytes] = []
        for summary in item["summary"]:
            done = {**at, "summary_index": 0}
            out.append(self._event("response.reasoning_summary_text.done", **done, text=summary["text"]))
            out.append(self._event("response.reasoning_summary_part.done", **done, part=summary))
        out.append(self._event("response.reasoning_text.done", **at, content_index=0, text=part["text"]))
        out.append(self._event("response.content_part.done", **at, content_index=0, part=part))
        return b"".join(out) + self._item("done", 0, item)

    def _more_text(self, text: str) -> bytes:
        index = 1 if self._thought else 0
        id_ = item_id("msg", self._turn_id, index)
        at: Json = {"item_id": id_, "output_index": index, "content_index": 0}
        out = b""
        if not self._text:
            if self._thought:  # the text follows it: it is over
                thought = item_id("rs", self._turn_id, 0)
                out += self._end_thought(
                    reasoning_item(thought, "".join(self._thought), "completed", self.asked)
                )
            out += self._open_message(index, id_)
        self._text.append(text)
        return out + self._event("response.output_text.delta", **at, delta=text, logprobs=[])

    def _open_message(self, index: int, id_: str) -> bytes:
        at: Json = {"item_id": id_, "output_index": index, "content_index": 0}
        empty: Json = {**message_item(id_, "", "in_progress"), "content": []}
        return self._item("added", index, empty) + self._event(
            "response.content_part.added", **at, part=output_text("")
        )

    def _end_message(self, index: int, item: Json) -> bytes:
        at: Json = {"item_id": item["id"], "output_index": index, "content_index": 0}
        part = item["content"][0]
        out = b"" if self._text else self._open_message(index, item["id"])
        out += self._event("response.output_text.done", **at, text=part["text"], logprobs=[])
        return (
            out + self._event("response.content_part.done", **at, part=part) + self._item("done", index, item)
        )

    def _call(self, index: int, item: Json) -> bytes:
        name, kind = "arguments", "function_call_arguments"
        if item["type"] == "custom_tool_call":
            name, kind = "input", "custom_tool_call_input"
        at: Json = {"item_id": item["id"], "output_index": index}
        out = self._item("added", index, {**item, "status": "in_progress", name: ""})
        out += self._event(f"response.{kind}.delta", **at, delta=item[name])
        done = {**at, name: item[name]}
        if name == "arguments":
            done["name"] = item["name"]
        return out + self._event(f"response.{kind}.done", **done) + self._item("done", index, item)


def error_body(error: TokentapeError) -> Json:
    """An error in OpenAI's shape, in the words of its Responses API."""
    body = openai_error(error)
    fields = body["error"]
    fields["param"] = _PARAMS.get(fields["param"], fields["param"])
    if isinstance(error, ContextOverflow):
        words = "Your input exceeds the context window of this model. Please adjust your input and try again."
        fields["message"] = f"{words} ({error})"
    return body
