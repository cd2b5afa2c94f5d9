"""How the text of a parameter becomes a JSON value: by the schema, then by the family; Python's literals."""

import ast
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.parse.literals import to_json
from tokentape.parse.values import JSON, TEXT, Typing, types_of

UNION = Typing(union_json=True)
MISFIT = Typing(misfit_json=True)
NULLS = Typing(nulls=("null", "none"))


@pytest.mark.parametrize(
    ("typing", "types", "text", "value"),
    [
        (TEXT, ["string"], "5", "5"),
        (JSON, ["string"], "5", "5"),
        (TEXT, ["string"], " x\n", " x\n"),
        (TEXT, ["integer"], "5", 5),
        (TEXT, ["integer"], " 5\n", 5),
        (TEXT, ["integer"], "5.5", "5.5"),
        (MISFIT, ["integer"], "5.5", 5.5),
        (TEXT, ["number"], "5", 5),
        (TEXT, ["integer"], "five", "five"),
        (MISFIT, ["integer"], "five", "five"),
        (TEXT, ["boolean"], "true", True),
        (TEXT, ["boolean"], "True", True),
        (TEXT, ["boolean"], "yes", "yes"),
        (TEXT, ["integer"], "true", "true"),
        (TEXT, ["array"], "[1, 2]", [1, 2]),
        (TEXT, ["array"], "['a', True, None]", ["a", True, None]),
        (TEXT, ["array"], "1, 2", [1, 2]),
        (TEXT, ["array"], r"[{\"a\": 1}]", [{"a": 1}]),
        (TEXT, ["array"], "[1, 2", "[1, 2"),
        (TEXT, ["object"], '{"a": {"b": []}}', {"a": {"b": []}}),
        (TEXT, ["object"], "{'a': (1, 2)}", {"a": [1, 2]}),
        (TEXT, ["object"], "[1]", "[1]"),
        (MISFIT, ["object"], "[1]", [1]),
        (TEXT, ["integer", "null"], "null", None),
        (TEXT, ["integer", "null"], "7", 7),
        (TEXT, ["integer", "string"], "7", "7"),
        (UNION, ["integer", "string"], "7", 7),
        (UNION, ["integer", "string"], "x", "x"),
        (UNION, ["integer", "string"], "[7]", "[7]"),
        (TEXT, [], "7", "7"),
        (JSON, [], "7", 7),
        (JSON, [], '{"a": 1}', {"a": 1}),
        (JSON, [], "{'a': 1}", "{'a': 1}"),
        (JSON, [], "seven", "seven"),
        (NULLS, ["string"], "None", None),
        (NULLS, ["integer"], " NULL ", None),
        (NULLS, ["string"], "nothing", "nothing"),
        (TEXT, ["integer"], "", ""),
        (JSON, [], "[" * 257 + "]" * 257, "[" * 257 + "]" * 257),
        (JSON, [], '["' + "[" * 999 + '"]', ["[" * 999]),
        (JSON, [], "7" * 4301, "7" * 4301),
        (JSON, [], f'["{"7" * 4301}"]', ["7" * 4301]),
    ],
)
def test_a_value_is_typed(typing: Typing, types: list[str], text: str, value: Any) -> None:
    found = json.loads(typing.to_json(text, frozenset(types) | ({"integer"} if "number" in types else set())))
    assert (type(found), found) == (type(value), value)
    if typing.is_text(frozenset(types)):
        assert found == text


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, ["string"]),
        ({"type": "number"}, ["number", "integer"]),
        ({"type": ["integer", "null"]}, ["integer", "null"]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["string", "null"]),
        ({"oneOf": [{"enum": [1, "a", None]}]}, ["integer", "string", "null"]),
        ({"const": True}, ["boolean"]),
        ({"$ref": "#/$defs/T"}, ["array"]),
        ({"$ref": "#/$defs/loop"}, []),
        ({"$ref": "elsewhere.json"}, []),
        ({"$ref": "#/$defs/none"}, []),
        ({"items": {}}, ["array"]),
        ({"properties": {}}, ["object"]),
        ({}, []),
        (True, []),
        (None, []),
    ],
)
def test_the_types_that_a_schema_allows(schema: Any, types: list[str]) -> None:
    defs = {"T": {"type": "array"}, "loop": {"$ref": "#/$defs/loop"}}
    assert types_of({"properties": {"a": schema}, "$defs": defs}, "a") == frozenset(types)
    assert types_of({"properties": {"a": schema}}, "b") == frozenset()
    assert types_of({}, "a") == frozenset()


LITERALS = st.recursive(
    st.one_of(
        st.text(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()
    ),
    lambda of: st.one_of(
        st.lists(of, max_size=4),
        st.lists(of, max_size=3).map(tuple),
        st.dictionaries(st.text(), of, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(LITERALS)
def test_what_python_prints_is_read(value: Any) -> None:
    assert json.loads(to_json(repr(value))) == json.loads(json.dumps(value))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([*"'\"\\\nrn7x u4{}[](),:-.e", "'''", '"""', "True", "\\x41", "\\u0041"]), max_size=12
    ).map("".join)
)
def test_a_literal_means_what_it_means_to_python(text: str) -> None:
    try:
        found = json.loads(to_json(text))
    except ValueError:
        return
    try:
        expected = ast.literal_eval(f"({text.strip()}\n)")
    except (SyntaxError, ValueError):  # half an escape stays as it stands; JSON's words
        assert "\\" in text or "true" in text
        return
    assert found == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'a' \"b\"", "ab"),
        (r"'it\'s'", "it's"),
        (r"'\x41\u00e9\101\n'", "Aé" + "A\n"),
        (r"r'\n'", r"\n"),
        ('"""a"b"""', 'a"b'),
        ("(1)", 1),
        ("(1,)", [1]),
        ("0x10", 16),
        ("1_0", None),
        ("+1", 1),
        (".5", 0.5),
        ("007", None),
        ("1e999", math.inf),
        ("f'{a}'", None),
        ("b'a'", None),
        ("a", None),
        ("__import__('os')", None),
        ("1 + 1", None),
        ("{1: 2}", None),
        ("{'a': 1, 'a': 2}", None),
        ("['a' 'b', 'c',]", ["ab", "c"]),
        ("[1 2]", None),
        ("", None),
        (r"'\ud800'", None),
        ("[" * 1000, None),
    ],
)
def test_literals(text: str, value: Any) -> None:
    if value is None:
        with pytest.raises(ValueError, match=r".+"):
            to_json(text)
    else:
        assert json.loads(to_json(text)) == value
