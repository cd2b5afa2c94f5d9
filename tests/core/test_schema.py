"""Columns: every field of a turn comes back as it was; names and types are those of DESIGN.md §5."""

import sqlite3
from array import array
from dataclasses import fields
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import call, turn

from tokentape.schema import (
    FAILURES,
    SAMPLES,
    SESSIONS,
    TURNS,
    create_table,
    insert_into,
    rows_to_turns,
    turn_to_row,
)
from tokentape.store import Failure, SessionRecord
from tokentape.tape import Origin, Turn
from tokentape.types import Message, RoutedExperts, Sampling, Support, TokenRun, ToolCall, VersionSpan
from tokentape.volatile import Superseded

TEXT = st.text(max_size=8)  # hypothesis leaves surrogates out of text()
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
MAYBE = st.none() | TEXT
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | TEXT | FLOAT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=5,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
MESSAGE = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=MAYBE,
    reasoning=MAYBE,
    tool_calls=st.lists(st.builds(ToolCall, TEXT, TEXT, TEXT), max_size=2).map(tuple),
    tool_call_id=MAYBE,
    name=MAYBE,
)
SAMPLING = st.builds(
    Sampling,
    temperature=st.none() | FLOAT,
    top_p=st.none() | FLOAT,
    top_k=st.none() | st.integers(-1, 100),
    max_tokens=st.none() | st.integers(0, 2**31),
    stop=st.lists(TEXT, max_size=2).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=2).map(tuple),
    frequency_penalty=st.none() | FLOAT,
    seed=st.none() | st.integers(0, 2**63 - 1),
    logit_bias=st.lists(st.tuples(st.integers(0, 2**31 - 1), FLOAT), max_size=2).map(tuple),
    json_schema=MAYBE,
    structural_tag=MAYBE,
)


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
    completion = draw(ids)
    size = len(completion)
    return Turn(
        turn_id=draw(st.uuids()).hex,
        parent_id=draw(MAYBE),
        branch_reason=draw(MAYBE),
        prompt=TokenRun(draw(ids)),
        completion=TokenRun(completion),
        logprobs=array(
            "f",
            draw(
                st.lists(
                    st.floats(max_value=0, allow_infinity=False, allow_nan=False, width=32),
                    min_size=size,
                    max_size=size,
                )
            ),
        ),
        versions=tuple(VersionSpan(draw(TEXT), i, i + 1) for i in range(size)),
        logprob_basis=draw(TEXT),
        support=draw(st.none() | st.builds(Support, *[st.binary(max_size=8)] * 3)),
        routed_experts=draw(
            st.none() | st.builds(RoutedExperts, st.binary(max_size=8), TEXT, st.integers(0, 64))
        ),
        finish_reason=draw(TEXT),
        stop_id=draw(st.none() | st.integers(0, 2**31 - 1)),
        messages=tuple(draw(st.lists(MESSAGE, max_size=2))),
        reply=draw(MESSAGE),
        in_reasoning=draw(st.booleans()),
        parse_status=draw(TEXT),
        attempts=tuple(draw(st.lists(OBJECT, max_size=2))),
        tools=tuple(draw(st.lists(OBJECT, max_size=2))),
        arguments=draw(OBJECT),
        sampling=draw(SAMPLING),
        neutralised=tuple(draw(st.lists(TEXT, max_size=2))),
        superseded=tuple(draw(st.lists(st.builds(Superseded, TEXT, TEXT, TEXT), max_size=2))),
        origin=Origin(
            draw(TEXT),
            draw(TEXT),
            draw(TEXT),
            draw(MAYBE),
            tuple(draw(st.lists(TEXT, max_size=2))),
            draw(OBJECT),
        ),
        num_cached_tokens=draw(st.none() | st.integers(0, 2**40)),
        created_at=draw(st.floats(0, 1e12)),
    )


def through_sql(made: Turn) -> Turn:
    """The turn after a real table: affinities and all."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.row_factory = sqlite3.Row
        connection.execute(create_table("turns", TURNS))
        rows = [made]
        if made.parent_id is not None:  # a child is read with its parent, whose tools it has
            rows.insert(0, turn(made.parent_id, tools=made.tools, arguments=made.arguments))
        for each in rows:
            connection.execute(insert_into("turns", TURNS), turn_to_row("s", each))
        stored = connection.execute("SELECT * FROM turns").fetchall()
        assert {row["session_id"] for row in stored} == {"s"}
        assert (stored[-1]["tools"] is None) == (made.parent_id is not None)
        return rows_to_turns(stored)[-1]
    finally:
        connection.close()


@settings(max_examples=50, deadline=None)
@given(turns())
def test_a_turn_comes_back_as_it_was(made: Turn) -> None:
    back = through_sql(made)
    for field in fields(Turn):
        one, other = getattr(made, field.name), getattr(back, field.name)
        assert (one, type(one), repr(one)) == (other, type(other), repr(other)), field.name
    assert back.logprobs.tobytes() == made.logprobs.tobytes()  # -0.0 and every last bit


NEAR: list[dict[str, Any]] = [
    {"reply": Message("assistant", None)},
    {"reply": Message("assistant", "")},
    {"reply": Message("assistant", None, "")},
    {"reply": Message("assistant", None, None, (call(id=""),))},
    {"reply": Message("assistant", None, tool_call_id="")},
    {"messages": ()},
    {"messages": (Message("user", None),)},
    {"messages": (Message("user", ""),)},
    {"branch_reason": None},
    {"branch_reason": ""},
    {"stop_id": None},
    {"stop_id": 0},
    {"num_cached_tokens": None},
    {"num_cached_tokens": 0},
    {"sampling": Sampling(temperature=0.0)},
    {"sampling": Sampling(temperature=None)},
    {"sampling": Sampling(seed=0)},
    {"arguments": {"a": None}},
    {"arguments": {}},
    {"arguments": {"a": 1}},
    {"arguments": {"a": "1"}},
    {"in_reasoning": True},
    {"neutralised": ("",)},
    {"origin": Origin("chat", "", "", None)},
    {"origin": Origin("chat", "", "", "")},
    {"origin": Origin("chat", "", "", noted={"a": None})},
    {"superseded": (Superseded("", "", ""),)},
]


def test_values_that_are_near_each_other_stay_apart() -> None:
    """None, empty and 0 are different things, before and after."""
    rows = [msgspec.json.encode(turn_to_row("s", turn(**changes))) for changes in NEAR]
    assert len(set(rows)) >= len({repr(turn(**changes)) for changes in NEAR})
    for changes in NEAR:
        assert repr(through_sql(turn(**changes))) == repr(turn(**changes))


def test_the_control_a_column_that_loses_something_is_seen() -> None:
    made = turn(logprobs=array("f", [-0.0, -1.5]))
    row = turn_to_row("s", made)
    assert rows_to_turns([row]) == (made,)
    assert rows_to_turns([{**row, "logprobs": array("f", [0.0, -1.25]).tobytes()}]) != (made,)
    assert rows_to_turns([{**row, "reply": '{"role":"assistant"}'}]) != (made,)


def test_columns_are_the_fields_of_what_they_hold() -> None:
    names = [field.name for field in fields(Turn)]
    assert [c.name for c in TURNS] == [names[0], "session_id", *names[1:]]
    assert [c.name for c in SESSIONS] == [field.name for field in fields(SessionRecord)]
    assert [c.name for c in FAILURES] == ["session_id", *(field.name for field in fields(Failure))]


@pytest.mark.parametrize("column", [c for c in TURNS if not c.nullable], ids=lambda c: c.name)
def test_what_is_not_nullable_cannot_be_null(column: Any) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute(create_table("turns", TURNS))
    row = {**turn_to_row("s", turn()), column.name: None}
    with pytest.raises(sqlite3.IntegrityError, match=f"turns.{column.name}"):
        connection.execute(insert_into("turns", TURNS), row)
    connection.close()


def test_the_sample_columns_are_those_of_the_design() -> None:
    span = pa.struct([("version", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
    of_turn = pa.struct(
        [
            ("turn_id", pa.string()),
            ("start", pa.int32()),
            ("end", pa.int32()),
            ("finish_reason", pa.string()),
            ("trained", pa.bool_()),
            ("parse_status", pa.string()),
            ("label", pa.string()),
            ("logprob_basis", pa.string()),
            ("reward", pa.float64()),
        ]
    )
    expected = {
        "session_id": pa.string(),
        "sample_id": pa.string(),
        "group_id": pa.string(),
        "branch_reason": pa.string(),
        "label": pa.string(),
        "label_by": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.int8()),
        "logprobs": pa.list_(pa.float32()),
        "weight_versions": pa.list_(span),
        "sampling_logprobs": pa.list_(pa.float32()),
        "support": pa.list_(pa.list_(pa.int32())),
        "routed_experts": pa.struct(
            [("data", pa.large_binary()), ("dtype", pa.string()), ("width", pa.int32())]
        ),
        "num_prompt_tokens": pa.int32(),
        "turns": pa.list_(of_turn),
        "reward": pa.float64(),
        "truncated": pa.bool_(),
        "messages": pa.string(),
        "tools": pa.string(),
        "sampling": pa.string(),
        "metadata": pa.string(),
    }
    assert dict(zip(SAMPLES.names, SAMPLES.types, strict=True)) == expected
    assert [field.name for field in SAMPLES if field.nullable] == [
        "group_id", "sampling_logprobs", "support", "routed_experts", "reward",
    ]  # fmt: skip
