"""What Letta says as Chat Completions dicts, and replies put back where Letta keeps a lossy copy."""

import json
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace as Object
from typing import Any

import pytest

from gatewaykit import WEATHER, byte_level_tokenizer
from tokentape.adapters import letta_models as models
from tokentape.adapters.letta_messages import Replies, chat_messages, chat_tools
from tokentape.errors import ConfigError, RequestError
from tokentape.testing import write_model_dir


class Role(StrEnum):
    """As Letta's MessageRole."""

    assistant = "assistant"
    approval = "approval"


def call(call_id: str | None, name: str = "f", arguments: Any = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES = {
    "dict": ({"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}),
    "object": (Object(role="user", content="hi"), {"role": "user", "content": "hi"}),
    "no content": ({"role": "assistant", "content": None}, {"role": "assistant", "content": None}),
    "object without content": (Object(role="user", content=None), {"role": "user", "content": ""}),
    "parts, objects": (
        Object(role="user", content=[Object(type="text", text="a"), Object(type="text", text="b")]),
        {"role": "user", "content": "a\nb"},
    ),
    "parts, dicts": (
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": "a"},
    ),
    "a thought": (
        Object(
            role=Role.assistant,
            content=[Object(type="reasoning", reasoning="hm"), Object(type="text", text="a")],
        ),
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
    ),
    "a thought left out": (
        Object(role=Role.approval, content=[Object(type="omitted_reasoning")]),
        {"role": "assistant", "content": None},
    ),
    "calls, objects": (
        Object(
            role="assistant",
            content="",
            tool_calls=[Object(id="c1", function=Object(name="f", arguments='{"a": 1}'))],
        ),
        {"role": "assistant", "content": "", "tool_calls": [call("c1", arguments='{"a": 1}')]},
    ),
    "calls, dicts, arguments an object": (
        {"role": "assistant", "content": None, "tool_calls": [call("c1", arguments={"a": 1})]},
        {"role": "assistant", "content": None, "tool_calls": [call("c1", arguments={"a": 1})]},
    ),
    "summary": ({"role": "summary", "content": "so far"}, {"role": "user", "content": "so far"}),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_of_any_kind_is_a_chat_dict(name: str) -> None:
    given, expected = MESSAGES[name]
    assert chat_messages([given]) == [expected]


def test_a_result_keeps_its_call_and_its_name() -> None:
    made = chat_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": [call("c1"), call("c2")]},
            Object(role="tool", content="two", tool_call_id="c2", name="f"),
            {"role": "tool", "content": "one"},
        ]
    )
    assert made[1:] == [
        {"role": "tool", "content": "two", "tool_call_id": "c2", "name": "f"},
        {"role": "tool", "content": "one", "tool_call_id": "c1"},
    ]


def test_calls_and_results_without_ids_are_paired_by_order() -> None:
    made = chat_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": [call(None), call(None)]},
            {"role": "tool", "content": "one"},
            {"role": "tool", "content": "two"},
        ]
    )
    ids = [made[0]["tool_calls"][0]["id"], made[0]["tool_calls"][1]["id"]]
    assert [m["tool_call_id"] for m in made[1:]] == ids
    assert len(set(ids)) == 2


def test_an_image_is_refused_not_dropped() -> None:
    with pytest.raises(RequestError, match="image"):
        chat_messages([{"role": "user", "content": [{"type": "image", "source": {}}]}])


@pytest.mark.parametrize(
    "tool",
    [
        WEATHER,
        WEATHER["function"],
        Object(type="function", function=Object(**WEATHER["function"])),
        Object(**WEATHER["function"]),
    ],
    ids=["dict", "bare dict", "object", "bare object"],
)
def test_a_tool_of_any_kind_is_a_chat_dict(tool: Any) -> None:
    assert chat_tools([tool]) == [WEATHER]


USER = {"role": "user", "content": "hi"}
REPLY = {
    "role": "assistant",
    "content": "Let me see. ",
    "reasoning_content": "hm",
    "tool_calls": [
        call("call_1", "f", '{"b":1, "a": "é}{", "thinking": "x"}'),
        call("call_2", "g", '{"c": 2.0}'),
    ],
}


def copy(*, calls: int = 2, content: Any = None, **changed: Any) -> dict[str, Any]:
    """Letta's copy: text scrubbed, arguments dumped again."""
    kept = [
        call("call_1", "f", '{"b": 1, "a": "\\u00e9}{", "thinking": "x"}'),
        call("call_2", "g", '{"c": 2.0}'),
    ]
    return {"role": "assistant", "content": content, "tool_calls": kept[:calls], **changed}


COPIES = {
    "text and thought scrubbed": copy(),
    "text kept": copy(content="Let me see."),
    "only the first call": copy(calls=1),
    "an argument popped": copy(tool_calls=[call("call_1", "f", "{}"), call("call_2", "g", '{"c": 2}')]),
    "arguments that Letta cannot load": copy(calls=1, tool_calls=[call("call_1", "f", "{}")]),
}
EDITS = {
    "another text": copy(content="Let us see."),
    "another argument": copy(tool_calls=[call("call_2", "g", '{"c": 3}')]),
    "another name": copy(tool_calls=[call("call_2", "h", '{"c": 2.0}')]),
    "a call more": copy(
        tool_calls=[call("call_1", "f", REPLY["tool_calls"][0]["function"]["arguments"]), call("x")]
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_reply_is_put_back_where_letta_kept_a_copy(name: str) -> None:
    replies = Replies()
    replies.add([USER], REPLY)
    assert replies.put_back([USER, COPIES[name]]) == [USER, REPLY]


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_reply_stays_edited(name: str) -> None:
    replies = Replies()
    replies.add([USER], REPLY)
    assert replies.put_back([USER, EDITS[name]]) == [USER, EDITS[name]]


def test_a_reply_without_text_and_calls_is_put_back_where_letta_dropped_it() -> None:
    replies = Replies()
    silent = {"role": "assistant", "content": None, "reasoning_content": "hm"}
    replies.add([USER], silent)
    again = {"role": "user", "content": "well?"}
    assert replies.put_back([USER, again]) == [USER, silent, again]
    assert replies.put_back([USER]) == [USER]
    other = {"role": "user", "content": "something else"}
    assert replies.put_back([other, again]) == [other, again]


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_endpoint_is_the_server_without_its_route(url: str) -> None:
    assert models.endpoint(url) == "http://h:1"


def test_a_missing_endpoint_is_said() -> None:
    with pytest.raises(ConfigError, match="model_endpoint"):
        models.endpoint(None)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/models/qwen", "/models/qwen"),
        ("slime-sglang//models/qwen", "/models/qwen"),
    ],
)
def test_a_handle_names_its_model(name: str, model: str) -> None:
    assert models.model_of(name) == model


def test_a_tool_call_parser_is_known_or_refused() -> None:
    assert models.tool_format(None) is None
    assert models.tool_format("qwen25") == "hermes"
    with pytest.raises(ConfigError, match="nonsense"):
        models.tool_format("nonsense")


def test_only_a_model_without_a_template_gets_chatml(tmp_path: Path) -> None:
    model = write_model_dir(tmp_path / "model")
    assert models.with_template(str(model), tmp_path / "unused") == (str(model), False)
    (model / "chat_template.jinja").unlink()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert models.with_template(str(model), scratch) == (str(scratch), True)
    assert (scratch / "chat_template.jinja").exists()
    assert json.loads((scratch / "config.json").read_text())


def test_a_model_without_chatml_tokens_gets_no_chatml(tmp_path: Path) -> None:
    plain = byte_level_tokenizer(special=("<|endoftext|>", "<s>", "<|im_end|>"))
    model = write_model_dir(tmp_path / "model", tokenizer=plain)
    (model / "chat_template.jinja").unlink()
    assert models.with_template(str(model), tmp_path / "scratch") == (str(model), False)
