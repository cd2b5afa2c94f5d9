"""What constraints say. That a real engine takes them so is `tests/live/test_constraints.py`'s."""

import dataclasses
import json
from typing import Any

import pytest

from tokentape.constrain import MAX_DEPTH, MAX_SPACES, constrain
from tokentape.errors import RequestError
from tokentape.formats import FORMATS
from tokentape.types import CallOutput, Demand, JsonOutput, Sampling

ROW = {row.name: row for row in FORMATS}
SCHEMA = {
    "type": "object",
    "properties": {"z": {"type": "integer"}, "a": {"type": "string"}},
    "required": ["z"],
}
PARAMETERS = {"type": "object", "properties": {"e": {"type": "string"}}, "required": ["e"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "calc", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "no_args"}},
]
BREAK = {"type": "regex", "pattern": "\\n{0,2}"}
TEXT = {"type": "any_text"}
THOUGHT = {"type": "tag", "begin": "<think>", "content": TEXT, "end": "</think>"}
OPENED = {"type": "tag", "begin": "", "content": TEXT, "end": "</think>"}
OPTIONAL = {"type": "optional", "content": {"type": "sequence", "elements": [THOUGHT, BREAK]}}


def elements(demand: Demand, row: str, tools: Any = TOOLS, *, reasoning_open: bool = False) -> list[Any]:
    wanted = constrain(demand, ROW[row], tools, reasoning_open=reasoning_open)
    assert wanted.structural_tag is not None
    assert wanted == Sampling(structural_tag=wanted.structural_tag)
    tag = json.loads(wanted.structural_tag)
    assert (tag["type"], tag["format"]["type"]) == ("structural_tag", "sequence")
    return tag["format"]["elements"]


def a_json(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_SPACES}


def a_call(name: str, schema: Any) -> dict[str, Any]:
    begin = '<tool_call>\n{"name": "' + name + '", "arguments": '
    return {"type": "tag", "begin": begin, "content": a_json(schema), "end": "}\n</tool_call>"}


def calls(*tags: Any) -> dict[str, Any]:
    return {"type": "tags_with_separator", "tags": [*tags], "separator": "\n", "at_least_one": True}


CALC, NO_ARGS = a_call("calc", PARAMETERS), a_call("no_args", {"type": "object", "properties": {}})


@pytest.mark.parametrize("row", ["plain", "hermes"])
@pytest.mark.parametrize("reasoning_open", [False, True])
def test_json_without_reasoning_is_a_plain_schema(row: str, reasoning_open: bool) -> None:
    wanted = constrain(JsonOutput(SCHEMA), ROW[row], TOOLS, reasoning_open=reasoning_open)
    assert wanted == Sampling(json_schema=json.dumps(SCHEMA))
    assert list(json.loads(wanted.json_schema or "")["properties"]) == [
        "z",
        "a",
    ]  # their order is the reply's


@pytest.mark.parametrize("row", ["qwen", "deepseek-r1"])
def test_json_behind_a_thought(row: str) -> None:
    assert elements(JsonOutput(SCHEMA), row) == [OPTIONAL, a_json(SCHEMA)]
    assert elements(JsonOutput(SCHEMA), row, reasoning_open=True) == [OPENED, BREAK, a_json(SCHEMA)]


def test_json_or_calls() -> None:
    either = {"type": "or", "elements": [a_json(SCHEMA), calls(NO_ARGS)]}
    demand = JsonOutput(SCHEMA, ("no_args",))
    assert elements(demand, "hermes") == [either]
    assert elements(demand, "qwen", reasoning_open=True) == [OPENED, BREAK, either]
    assert constrain(demand, ROW["plain"], TOOLS, reasoning_open=False).json_schema is not None
    plain_thoughts = dataclasses.replace(ROW["qwen"], calls=())
    wanted = constrain(demand, plain_thoughts, TOOLS, reasoning_open=False)
    assert json.loads(wanted.structural_tag or "")["format"]["elements"] == [OPTIONAL, a_json(SCHEMA)]


def test_calls() -> None:
    assert elements(CallOutput(("calc", "no_args")), "hermes") == [calls(CALC, NO_ARGS)]
    assert elements(CallOutput(("calc",)), "qwen") == [OPTIONAL, calls(CALC)]
    assert elements(CallOutput(("calc",)), "qwen", reasoning_open=True) == [OPENED, BREAK, calls(CALC)]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, {"type": "object"}),
        ({"properties": {"a": {}}}, {"properties": {"a": {}}, "type": "object"}),
        ({"type": ["object", "null"]}, {"type": "object"}),
        ({"$ref": "#/$defs/a", "$defs": {"a": {}}}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}),
        ({"type": "object", "not": {}}, {"type": "object", "not": {}}),  # left to the tool
    ],
    ids=str,
)
def test_arguments_are_an_object(given: Any, meant: Any) -> None:
    tools = [{"type": "function", "function": {"name": "t", "parameters": given}}]
    assert elements(CallOutput(("t",)), "hermes", tools) == [calls(a_call("t", meant))]


def test_every_family_s_calls() -> None:
    """The begin of a call to `calc`, and what stands around the calls; None where none can be demanded."""
    found: dict[str, tuple[str, str] | None] = {}
    for row in FORMATS:
        try:
            [rule] = elements(CallOutput(("calc",)), row.name)[-1:]
        except RequestError:
            found[row.name] = None
            continue
        edges = [part["value"] for part in rule.get("elements", []) if part["type"] == "const_string"]
        [calls_rule] = [rule] if "tags" in rule else [part for part in rule["elements"] if "tags" in part]
        assert calls_rule["at_least_one"] is True
        [tag] = calls_rule["tags"]
        found[row.name] = ("".join([*edges[:1], tag["begin"]]), "".join([tag["end"], *edges[1:]]))
    assert {name for name, edges in found.items() if edges is None} == {
        *("plain", "gemma", "llama4", "lfm2", "gpt-oss", "mistral", "granite", "nemotron-nano-v2"),
        *("hunyuan", "step3"),
    }
    assert found["kimi-k2"] == (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.calc:",
        "<|tool_call_end|><|tool_calls_section_end|>",
    )
    assert found["llama3"] == ('{"name": "calc", "parameters": ', "}")
    assert found["glm"] == ("<tool_call>calc", "</tool_call>")
    assert found["qwen3-coder"] == (
        "<tool_call>\n<function=calc>\n",
        "\n</function>\n</tool_call>",
    )


def test_names_are_json() -> None:
    tools = [{"type": "function", "function": {"name": 'a"\\é'}}]
    [rule] = elements(CallOutput(('a"\\é',)), "hermes", tools)
    assert rule["tags"][0]["begin"] == '<tool_call>\n{"name": "a\\"\\\\é", "arguments": '


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("demand", "row", "tools", "param", "words"),
    [
        (CallOutput(("calc",)), "plain", TOOLS, "tool_choice", "no grammar for tool calls"),
        (CallOutput(("calc",)), "gemma", TOOLS, "tool_choice", "in no way that can be enforced"),
        (CallOutput(("calc",)), "gpt-oss", TOOLS, "tool_choice", "writes in channels"),
        (JsonOutput(SCHEMA), "gpt-oss", TOOLS, "response_format", "writes in channels"),
        (CallOutput(("other",)), "qwen", TOOLS, "tool_choice", "'other', which is not on offer"),
        (CallOutput(()), "qwen", TOOLS, "tool_choice", "no tool is on offer"),
        (CallOutput(("t",)), "qwen", [{"name": "t", "parameters": {"type": "string"}}], "tool_choice", "'t'"),
        (CallOutput(("t",)), "qwen", [{"name": "t", "parameters": []}], "tool_choice", "not an object's"),
        (
            CallOutput(("t",)),
            "qwen",
            [{"name": "t", "parameters": nested(999)}],
            "tool_choice",
            "levels deep",
        ),
        (JsonOutput(nested(100_000)), "plain", [], "response_format", f"{MAX_DEPTH} levels deep"),
    ],
)
def test_refusals(demand: Demand, row: str, tools: Any, param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        constrain(demand, ROW[row], tools, reasoning_open=False)
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"uniqueItems": True}, "#"),
        ({"properties": {"p": {"multipleOf": 2}}}, "#/properties/p"),
        ({"items": {"not": {}}}, "#/items"),
        ({"anyOf": [{}, {"if": {}}]}, "#/anyOf/1"),
        ({"$defs": {"d": {"contains": {}}}}, r"#/\$defs/d"),
        ({"additionalProperties": {"format": "colour"}}, "#/additionalProperties"),
        ({"type": "string", "pattern": "a", "minLength": 1}, "#"),
        ({"type": ["string", "null"], "format": {}}, "#"),
    ],
    ids=str,
)
def test_what_would_silently_not_be_kept(schema: Any, where: str) -> None:
    """Inside a structural tag SGLang ignores it; of a plain schema it refuses it by itself."""
    with pytest.raises(RequestError, match=f"the schema at {where} asks") as refused:
        elements(JsonOutput(schema), "qwen")
    assert refused.value.param == "response_format"
    assert constrain(JsonOutput(schema), ROW["plain"], [], reasoning_open=False).json_schema


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"not": {"type": "string"}, "if": {}}},  # names, not keywords
        {"const": {"uniqueItems": True}},
        {"enum": [{"format": "colour"}]},
        {"type": "integer", "format": "int64"},
        {"type": "string", "format": "date"},
        {"type": 5},
        nested(MAX_DEPTH - 2),
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_what_is_kept(schema: Any) -> None:
    assert elements(JsonOutput(schema), "qwen")[-1] == a_json(schema)
