"""A short stand-in for a long conversation, for asking a template how it treats what comes next.

Templates rewrite history by the kinds of messages that follow each other (a user message after reasoning),
not by how many there are. An outline holds every kind of transition of its conversation, with stand-in texts;
its length is bounded by the number of kinds, so asking the template costs the same at turn 3 and at turn 300.
(A template that numbers what it renders, as Cohere's numbers the calls, needs every message to be counted.)
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from tokentape.types import Message, ToolCall

_KEPT_CHARS = 48
STAND_IN = "…stand-in…"
"""No text that anyone sends: Mistral's template compares messages, and repeats earlier ones."""
_ARGUMENTS = json.dumps({"a": STAND_IN}, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Outline:
    """`messages` are stand-ins; `kinds` are parallel to them.

    So are `originals`: the system's messages as they are (templates repeat them), of all others the stand-in.
    `whole` leaves no message out, for a template that numbers them: what was `added` to the `earlier` one.
    """

    messages: tuple[Message, ...] = ()
    kinds: tuple[object, ...] = ()
    originals: tuple[Message, ...] = ()
    earlier: "Outline | None" = field(default=None, repr=False, compare=False)
    added: tuple[tuple[Message, Message], ...] = field(default=(), repr=False, compare=False)

    def followed_by(self, new: Iterable[Message], content_tests: tuple[str, ...]) -> "Outline":
        """The outline of the conversation that goes on with `new`.

        `content_tests` are the texts that the template looks for in messages: they make a kind of their own,
        and survive in the stand-in.
        """
        messages, kinds, originals = list(self.messages), list(self.kinds), list(self.originals)
        added: list[tuple[Message, Message]] = []
        for message in new:
            stand_in, kind = _stand_in(message, content_tests)
            open_calls = _open_calls(messages) if message.role == "tool" else 0
            if message.role == "tool":
                kind = (kind, open_calls == 1)
            original = message if message.role == "system" else stand_in
            messages.append(stand_in)
            kinds.append(kind)
            originals.append(original)
            added.append((stand_in, original))
            # A round trip without a new transition is cut out; never between a turn and its results, which a
            # template looks up (Gemma 4) or counts (DeepSeek V3.2).
            for i in range(-1 if open_calls > 0 else len(kinds) - 2, -1, -1):
                if kinds[i] == kind and _transitions(kinds[: i + 1]) == _transitions(kinds):
                    messages[i:], kinds[i:], originals[i:] = messages[-1:], kinds[-1:], originals[-1:]
                    break
        return Outline(tuple(messages), tuple(kinds), tuple(originals), self, tuple(added))

    @property
    def whole(self) -> "Outline":
        """Every message's stand-in; takes time in proportion to their number."""
        parts: list[tuple[tuple[Message, Message], ...]] = []
        outline = self
        while outline.earlier is not None:
            parts.append(outline.added)
            outline = outline.earlier
        pairs = [*zip(outline.messages, outline.originals, strict=True)]
        pairs += [pair for added in reversed(parts) for pair in added]
        messages, originals = tuple(m for m, _ in pairs), tuple(o for _, o in pairs)
        return Outline(messages, tuple(range(len(pairs))), originals)


def _open_calls(messages: list[Message]) -> int:
    """How many of the last turn's calls wait for a result; none or fewer: a result answers none of them."""
    turn = next((i for i in range(len(messages) - 1, -1, -1) if messages[i].role != "tool"), -1)
    num_calls = len(messages[turn].tool_calls) if turn >= 0 else 0
    return num_calls - (len(messages) - 1 - turn)


def _transitions(kinds: list[object]) -> set[tuple[object, object]]:
    return set(pairwise(kinds))


def _stand_in(message: Message, content_tests: tuple[str, ...]) -> tuple[Message, object]:
    """A message with its texts shortened, and what kind of message it is."""
    content = message.content or ""
    marks = tuple(test for test in content_tests if test in content)
    edges = tuple(content.startswith(test) * 1 + content.endswith(test) * 2 for test in marks)
    if marks and len(content) > 2 * _KEPT_CHARS:
        content = f"{content[:_KEPT_CHARS]} {STAND_IN} {' '.join(marks)} {content[-_KEPT_CHARS:]}"
    elif content and not marks:
        content = STAND_IN
    stand_in = Message(
        role=message.role,
        content=content if message.content is not None else None,
        reasoning=STAND_IN if message.reasoning else message.reasoning,
        tool_calls=tuple(  # all of them: a template looks up each result's call
            ToolCall(id=c.id, name=c.name, arguments=_ARGUMENTS) for c in message.tool_calls
        ),
        tool_call_id=message.tool_call_id,
        name=message.name,
    )
    thought = None if message.reasoning is None else bool(message.reasoning)
    kind = (
        message.role,
        bool(message.content),
        marks,
        edges,
        thought,
        min(len(message.tool_calls), 2),
        bool(message.name),
    )
    return stand_in, kind
