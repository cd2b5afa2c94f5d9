"""What a chat template makes of a turn: a short stand-in conversation around it, rendered three times.

Two of these renders do not hang on what follows the turn. They are kept by all that the template is given,
but for the ids of calls, which differ in every turn: they are left out only where the template, shown ids
that notice it, has not looked at one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self, TypeAlias

import msgspec
from msgspec.structs import replace

from tokentape.errors import TemplateRefused
from tokentape.template import ChatTemplate
from tokentape.types import Json, Message, ToolCall

_MAX_KEPT = 4096
_Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """The stand-in renders: `prompt`, then the turn as `last`, and `followed` by the new messages.

    The sentinels stand for the turn's pieces of text; None or empty where it has no such piece.
    """

    prompt: str
    last: str
    followed: str
    reasoning: str | None
    content: str | None
    calls: tuple[str, ...]

    @property
    def sentinels(self) -> list[str]:
        """Those that the turn has."""
        return [s for s in (self.reasoning, self.content, *self.calls) if s]

    @property
    def is_woven(self) -> bool:
        """Whether new messages come between the turn's text and its calls."""
        content, calls = self.content, self.calls
        if not content or not calls or any(mark not in self.followed for mark in (content, *calls)):
            return False
        return self._between(self.last, content, calls) != self._between(self.followed, content, calls)

    @staticmethod
    def _between(text: str, content: str, calls: Sequence[str]) -> tuple[bool, str]:
        """Whether the text comes first, and what stands between it and the next call."""
        at, first, last = text.rfind(content), text.rfind(calls[0]), text.rfind(calls[-1])
        return (True, text[at:first]) if at < first else (False, text[last:at])


@dataclass(frozen=True, slots=True)
class Stage:
    """What stands around a turn: the messages `before` it, `tools` and `arguments` of the template.

    `key` stands for all three, the ids of calls left out; None where they are not to be remembered.
    """

    before: Sequence[Json]
    tools: Sequence[Json]
    arguments: Json
    key: _Key | None = None

    @classmethod
    def of(
        cls, template: ChatTemplate, before: Sequence[Message], tools: Sequence[Json], arguments: Json
    ) -> "Stage":
        """A stage of stand-ins."""
        key = tuple(map(_shape, before)), bool(tools), msgspec.json.encode(arguments) if arguments else b""
        return cls([template.to_json(m) for m in before], tools, arguments, key)


class Prober:
    """Probes one template. `sentinel` is a text that nobody can guess.

    Where turns are to be kept as they are (`preserve`), one that the template cannot show after a probe of it
    is asked for in a plainer form.
    """

    def __init__(self, template: ChatTemplate, sentinel: str, *, preserve: bool) -> None:
        self._template = template
        self._sentinel = sentinel
        self._preserve = preserve
        self._reads_clock = "strftime_now" in template.source
        self._kept: dict[_Key, tuple[str, str] | None] = {}

    def probe(self, stage: Stage, message: Message, new: Sequence[Json]) -> Probe:
        """Render the stand-in conversation, with a plainer turn where the template cannot show this one.

        Llama's template raises on parallel calls: what follows a turn with one call follows a turn with
        several. gpt-oss's raises on a thought, a text and a call: the text is left out. Gemma 4's writes a
        turn's text behind the results of its calls: what follows the calls alone follows them. SmolLM2's
        shows no calls at all: to keep such a turn, ask what follows a text.

        Raises:
            TemplateRefused: the template raised.
        """
        calls = message.tool_calls
        try:
            probe = self._render(stage, message, calls, new)
        except TemplateRefused:
            if len(calls) > 1:
                calls = calls[:1]
            elif calls and message.content and message.reasoning:
                message = replace(message, content=None)
            else:
                raise
            probe = self._render(stage, message, calls, new)
        if self._preserve and probe.is_woven:
            probe = self._render(stage, replace(message, content=None), calls, new)
        if self._preserve and not any(mark in probe.followed for mark in probe.sentinels):
            plain = Message(role="assistant", content="x", reasoning=message.reasoning)
            return self._render(stage, plain, (), new)
        return probe

    def _render(
        self, stage: Stage, message: Message, calls: tuple[ToolCall, ...], new: Sequence[Json]
    ) -> Probe:
        sentinel = self._sentinel
        reasoning = f"{sentinel}r" if message.reasoning else None
        content = f"{sentinel}c" if message.content or not (reasoning or calls) else None
        marks = tuple(f"{sentinel}a{i}z" for i in range(len(calls)))
        turn = self._template.to_json(
            Message(
                role="assistant",
                content=content or message.content,
                reasoning=reasoning or message.reasoning,
                tool_calls=tuple(
                    ToolCall(id=call.id, name=call.name, arguments=json.dumps({"a": mark}))
                    for call, mark in zip(calls, marks, strict=True)
                ),
            )
        )
        names = tuple(call.name for call in calls)
        shape = content or message.content, reasoning or message.reasoning, names
        prompt, last = self._as_last(stage, turn, shape)
        followed = self._template.render(
            [*stage.before, turn, *new], stage.tools, stage.arguments, add_generation_prompt=True
        )
        return Probe(prompt, last, followed, reasoning, content, marks)

    def _as_last(self, stage: Stage, turn: Json, shape: _Key) -> tuple[str, str]:
        """The prompt, and the turn as its last one; `shape` is all of the turn but the ids of its calls."""
        if stage.key is None or self._reads_clock:
            return self._render_last(stage, stage.before, turn)
        key: _Key = stage.key, shape
        kept = self._kept.get(key, ())
        if kept == ():
            kept = self._look(key, stage, turn)
        return kept or self._render_last(stage, stage.before, turn)

    def _look(self, key: _Key, stage: Stage, turn: Json) -> tuple[str, str] | None:
        """Keep what the template makes of these; None where it looks at the ids of calls."""
        try:
            shown = self._render_last(stage, *_with_noticing_ids(stage.before, turn))
        except (_IdSeenError, TemplateRefused):
            shown = None
        if shown != self._render_last(
            stage, stage.before, turn
        ):  # printed by C code it is not noticed: it is seen
            shown = None
        if len(self._kept) >= _MAX_KEPT:
            self._kept.clear()
        self._kept[key] = shown
        return shown

    def _render_last(self, stage: Stage, before: Sequence[Json], turn: Json) -> tuple[str, str]:
        render = self._template.render
        return (
            render(before, stage.tools, stage.arguments, add_generation_prompt=True),
            render([*before, turn], stage.tools, stage.arguments, add_generation_prompt=False),
        )


class _IdSeenError(BaseException):
    """A template has looked at the id of a call; no `Exception`, which a template's error could cover."""


class _Id(str):
    """The id of a call, which cannot be read without being noticed: by raising, or by its text."""

    __slots__ = ()

    def __new__(cls) -> Self:
        """The one id there is."""
        return super().__new__(cls, "tt0noticed0id")

    def __bool__(self) -> bool:
        """Every id is true: none is empty."""
        return True


def _seen(self: _Id, *_: Any, **__: Any) -> NoReturn:
    raise _IdSeenError


# Comparing, measuring, cutting, joining, printing: all that a string can do, but for being a Python object.
_COMPARED = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"}
_PRINTED = {"__str__", "__repr__", "__format__"}
for _name in _COMPARED | _PRINTED | {"__radd__"} | ({*dir(str)} - {*dir(object)}):
    setattr(_Id, _name, _seen)


def _with_noticing_ids(before: Sequence[Json], turn: Json) -> tuple[list[Json], Json]:
    *earlier, last = [_noticing(message) for message in (*before, turn)]
    return earlier, last


def _noticing(message: Json) -> Json:
    out = dict(message)
    if "tool_call_id" in message:
        out["tool_call_id"] = _Id()
    if "tool_calls" in message:
        out["tool_calls"] = [{**call, "id": _Id()} for call in message["tool_calls"]]
    return out


def _shape(message: Message) -> _Key:
    """All of a message that a template is given, but for the ids of calls."""
    calls = tuple([(call.name, call.arguments) for call in message.tool_calls])
    return (
        message.role, message.content, message.reasoning, calls, message.tool_call_id is None, message.name
    )  # fmt: skip
