"""A short stand-in for a long conversation, for asking a template how it treats what comes next.

Templates rewrite history by the kinds of messages that follow each other (a user message after reasoning),
not by how many there are. An outline holds every kind of transition of its conversation, with stand-in texts;
its length is bounded by the number of kinds, so asking the template costs the same at turn 3 and at turn 300.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from tokentape.types import Message, ToolCall

_KEPT_CHARS = 48
_STAND_IN = "…stand-in…"  # no text that anyone sends: Mistral's template compares messages


@dataclass(frozen=True, slots=True)
class Outline:
    """`messages` are stand-ins; `kinds` are parallel to them."""

    messages: tuple[Message, ...] = ()
    kinds: tuple[object, ...] = ()

    def followed_by(self, new: Iterable[Message], content_tests: tuple[str, ...]) -> "Outline":
        """The outline of the conversation that goes on with `new`.

        `content_tests` are the texts that the template looks for in messages: they make a kind of their own,
        and survive in the stand-in.
        """
        messages, kinds = list(self.messages), list(self.kinds)
        for message in new:
            stand_in, kind = _stand_in(message, content_tests)
            messages.append(stand_in)
            kinds.append(kind)
            for i in range(len(kinds) - 2, -1, -1):  # a round trip without a new transition is cut out
                if kinds[i] == kind and _transitions(kinds[: i + 1]) == _transitions(kinds):
                    del messages[i + 1 :], kinds[i + 1 :]
                    messages[i] = stand_in  # the latest ids: a result that follows names its call
                    break
        return Outline(tuple(messages), tuple(kinds))


def _transitions(kinds: list[object]) -> set[tuple[object, object]]:
    return set(pairwise(kinds))


def _stand_in(message: Message, content_tests: tuple[str, ...]) -> tuple[Message, object]:
    """A message with its texts shortened, and what kind of message it is."""
    content = message.content or ""
    marks = tuple(test for test in content_tests if test in content)
    edges = tuple(content.startswith(test) * 1 + content.endswith(test) * 2 for test in marks)
    if marks and len(content) > 2 * _KEPT_CHARS:
        content = f"{content[:_KEPT_CHARS]} {' '.join(marks)} {content[-_KEPT_CHARS:]}"
    elif content and not marks:
        content = _STAND_IN
    stand_in = Message(
        role=message.role,
        content=content if message.content is not None else None,
        reasoning="x" if message.reasoning else message.reasoning,
        tool_calls=tuple(
            ToolCall(id=c.id, name=c.name, arguments='{"a": "x"}') for c in message.tool_calls[:2]
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
        len(stand_in.tool_calls),
        bool(message.name),
    )
    return stand_in, kind
