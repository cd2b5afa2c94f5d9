"""Conversations that agents could have, for hypothesis."""

import json

from hypothesis import strategies as st
from render_golden import TOOLS, Case

from tokentape.types import Message, ToolCall

# Any character but surrogates; what tokenizers and templates stumble over comes often.
_CHARS = st.one_of(
    st.sampled_from(" \n\t.{}\"'\\<>|/aé中🙂\u0301\u200d\u3000"), st.characters(exclude_categories=["Cs"])
)
# By characters: `st.text` also draws strings out of our source, and a control token's text is another test's.
_TEXT = st.lists(_CHARS, max_size=12).map("".join)
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-99, 10**12), _TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(_TEXT, inner, max_size=2)),
    max_leaves=4,
)


@st.composite
def texts(draw: st.DrawFn, number: int) -> str:
    """A text with one word that no other has."""
    return f"{draw(_TEXT)}word{number}q{draw(_TEXT)}"


@st.composite
def turns(draw: st.DrawFn, number: int, *, max_calls: int = 3) -> Message:
    """An assistant's turn; its calls have ids that every template takes."""
    names = draw(st.lists(st.sampled_from(["get_weather", "get_time"]), max_size=max_calls))
    arguments = st.dictionaries(st.sampled_from(["city", "tz", "n"]), _VALUES, max_size=2)
    calls = tuple(
        ToolCall(
            id=f"call{number:02}{i:03}", name=name, arguments=json.dumps(draw(arguments), ensure_ascii=False)
        )
        for i, name in enumerate(names)
    )
    content = (
        draw(st.one_of(st.none(), st.just("")) if calls else st.just(""))
        if draw(st.booleans())
        else draw(texts(number))
    )
    # A thought like "0" would be found in the turn's text where a template drops it.
    thought = draw(st.one_of(st.none(), st.just(""), texts(10_000 + number)))
    return Message(role="assistant", content=content, reasoning=thought, tool_calls=calls)


@st.composite
def answers(draw: st.DrawFn, turn: Message, number: int) -> tuple[Message, ...]:
    """What follows a turn: all its results, or a user."""
    results = tuple(
        Message(role="tool", content=draw(texts(100 * number + i)), tool_call_id=call.id)
        for i, call in enumerate(turn.tool_calls)
    )
    return results or (Message(role="user", content=draw(texts(100 * number))),)


@st.composite
def conversations(draw: st.DrawFn, *, max_turns: int = 3, max_calls: int = 3) -> Case:
    """A case of 1 to `max_turns` turns: 2 messages at least."""
    before: list[Message] = []
    if draw(st.booleans()):
        before.append(Message(role="system", content=draw(st.one_of(_TEXT, texts(1)))))
    before.append(Message(role="user", content=draw(st.one_of(_TEXT, texts(2)))))
    for number in range(10, 10 + draw(st.integers(0, max_turns - 1))):
        turn = draw(turns(number, max_calls=max_calls))
        before += [turn, *draw(answers(turn, number))]
    reply = draw(turns(50, max_calls=max_calls))
    new = draw(answers(reply, 50))
    has_calls = any(m.tool_calls for m in (*before, reply))
    return Case("", tuple(before), reply, new, TOOLS if has_calls or draw(st.booleans()) else ())
