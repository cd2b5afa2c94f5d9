"""formats: which grammar and tags a chat template shows, and which the options ask for."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tokentape.errors import ConfigError
from tokentape.formatfile import GRAMMARS, read_formats
from tokentape.formats import FORMATS, Format, detect, foreign
from tokentape.parse import (
    Harmony,
    JsonCalls,
    NamedCalls,
    Parser,
    ParseResult,
    PythonicCalls,
    Section,
    Syntax,
    ThinkTags,
    XmlCalls,
)
from tokentape.parse.values import Typing
from tokentape.template import ChatTemplate

MODELS = Path(__file__).parents[2] / "shared" / "models"
ROW = {row.name: row for row in FORMATS}
HERMES, THINK = (JsonCalls(),), ThinkTags()
TOOLS: dict[str, Any] = {"f": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TEMPLATES = {  # directory → row, and whether it has reasoning
    "deepseek-r1": ("deepseek-r1", True),
    "deepseek-v3.1": ("deepseek-v3.1", True),
    "glm-4.6v": ("glm", True),
    "glm-4.7": ("glm", True),
    "gpt-oss": ("gpt-oss", True),
    "hermes-3": ("hermes", False),
    "kimi-k2": ("kimi-k2", False),
    "llama-3.1": ("llama3", False),
    "minimax-m2": ("minimax", True),
    "mistral-small-3.2": ("mistral", False),
    "nemotron-3": ("qwen3.5", True),  # the same grammar and tags
    "qwen2.5": ("hermes", False),
    "qwen3": ("qwen", True),
    "qwen3-2507": ("hermes", False),
    "qwen3-coder": ("qwen3-coder", False),
    "qwen3.5": ("qwen3.5", True),
    "smollm2": ("plain", False),
}


def template(body: str = "", *, after: str = "", opening: str = "<|im_start|>assistant\n") -> ChatTemplate:
    """A template that writes a call as `body` (Jinja, over `f`, the function); `after` is in its source."""
    return ChatTemplate(
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + body + "{% endfor %}<|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + opening + "{% endif %}"
        "{% if never %}" + after + "{% endif %}",
        {},
    )


HERMES_BODY = '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
XML_BODY = (
    "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}"
    "<parameter={{ k }}>EDGE{{ v }}EDGE</parameter>\n{% endfor %}</function>\n</tool_call>"
)
HERMES_TEMPLATE = template(HERMES_BODY)


# -- the template is asked


@pytest.mark.shared
@pytest.mark.parametrize("model", TEMPLATES)
def test_the_real_templates(model: str) -> None:
    directory = MODELS / model
    if not directory.exists():
        pytest.skip(f"no reference templates at {MODELS}")
    name, has_reasoning = TEMPLATES[model]
    found = detect(ChatTemplate.from_dir(directory))
    assert (found.format.name, found.format.reasoning is not None) == (name, has_reasoning)
    assert (found.told, found.contradicted) == (name != "plain", None)
    assert ("reads the call that the template writes" in found.why) == (name != "plain")


@pytest.mark.shared
def test_every_template_at_hand_is_in_the_table() -> None:
    if not MODELS.exists():
        pytest.skip(f"no reference templates at {MODELS}")
    assert {path.parent.name for path in MODELS.glob("*/chat_template.jinja")} == set(TEMPLATES)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (template(), "plain"),
        (HERMES_TEMPLATE, "hermes"),
        (template(HERMES_BODY, after="<think>"), "qwen"),
        (template(HERMES_BODY, opening="<|im_start|>assistant\n<think>\n"), "qwen"),
        (template(after="<think>"), "plain"),
        (template(XML_BODY.replace("EDGE", "\n")), "qwen3-coder"),
        (template(XML_BODY.replace("EDGE", "")), "mimo"),
        (template(XML_BODY.replace("EDGE", ""), after="<tool_call>"), "mimo"),
        (template("[{{ f.name }}(key0={{ f.arguments.key0 | tojson }})]"), "gemma"),
        (
            template("<|python_start|>[{{ f.name }}(key0={{ f.arguments.key0 | tojson }})]<|python_end|>"),
            "llama4",
        ),
        (
            template('[TOOL_CALLS][{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}]'),
            "mistral",
        ),
        (template("[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}"), "mistral"),
        (template('{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'), "llama3"),
        (template("CALL {{ f.name }} {{ f.arguments | tojson }}"), "plain"),
        # no call is rendered: the marks in the source tell
        (template(after='<tool_call>{\\"name\\": 1, \\"arguments\\": 2}'), "hermes"),
        (template(after="[TOOL_CALLS]"), "mistral"),
        (template(after="<tool_call>"), "plain"),
    ],
)
def test_auto_asks_the_template(source: ChatTemplate, name: str) -> None:
    found = detect(source)
    assert found.format.calls == ROW[name].calls
    if name in ("hermes", "qwen", "qwen3-coder"):
        assert found.format.name == name
    assert found.told == (name != "plain")
    assert found.why.startswith("tool calls: ")
    assert "; reasoning: " in found.why


def test_a_thought_that_only_the_prompt_opens_is_no_part_of_the_call() -> None:
    """The prompt ends with `<think>`, the turn has none: what differs begins inside the call's own mark."""
    found = detect(template(HERMES_BODY, opening="<|im_start|>assistant\n<tool_x>"))
    assert found.format.calls == HERMES


@pytest.mark.parametrize(
    ("tools", "reasoning", "calls", "tags", "contradicted"),
    [
        ("hermes", "auto", HERMES, None, None),
        ("hermes", "qwen", HERMES, THINK, None),
        ("auto", "plain", HERMES, None, None),
        ("qwen", "plain", HERMES, None, None),
        ("plain", "qwen", (), THINK, "hermes"),
        ("glm", "plain", ROW["glm"].calls, None, "hermes"),
        ("plain", "plain", (), None, "hermes"),
    ],
)
def test_the_options_choose_independently(
    tools: str, reasoning: str, calls: Any, tags: Any, contradicted: str | None
) -> None:
    found = detect(HERMES_TEMPLATE, tools, reasoning)
    assert found.format.syntax == Syntax(calls, tags)
    assert found.why.count("asked for") == (tools != "auto") + (reasoning != "auto")
    assert found.contradicted == contradicted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("hermse", "auto"), ["--tool-format", "'hermse'", "auto, qwen3-coder", "plain"]),
        (("auto", "hermes"), ["--reasoning-format", "'hermes'", "auto, ", "gpt-oss", "plain"]),
        (("", "auto"), ["--tool-format", "''"]),
    ],
)
def test_a_wrong_name_lists_the_valid_ones(arguments: tuple[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        detect(HERMES_TEMPLATE, *arguments)
    for word in words:
        assert word in str(caught.value)


def test_the_table() -> None:
    names = [row.name for row in FORMATS]
    assert len(set(names)) == len(names)
    assert names[-1] == "plain"
    for row in FORMATS[:-1]:
        assert row.calls
        assert row.marks
        assert {type(grammar) for grammar in row.calls} <= set(GRAMMARS.values())


# -- another family's calls


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('Sure. <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "hermes"),
        (
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
            "qwen3-coder",
        ),
        ("<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>", "glm"),
        ("[f(a=1)]", "gemma"),
        ('{"name": "f", "parameters": {"a": 1}}', "llama3"),
        ('<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', None),  # no tool of that name
        ("Say <tool_call> and then <function=f>.", None),
        ("f(a=1)", None),
        ('The answer is {"name": "f"}.', None),
        ("", None),
    ],
)
def test_foreign_calls_are_told(text: str, name: str | None) -> None:
    assert foreign(text, TOOLS, ROW["plain"]) == name


def test_one_s_own_calls_are_not_foreign() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert foreign(text, TOOLS, ROW["qwen"]) is None
    assert foreign(text, TOOLS, ROW["glm"]) == "hermes"


# -- rows of one's own

TOML = """
[[format]]
name = "acme"
marks = ["<acme>"]
reasoning = { open = "<thought>", close = "</thought>" }

[[format.calls]]
grammar = "named"
open = "<acme>"
name_end = ":"
close = "</acme>"

[[format]]
name = "acme-xml"

[[format.calls]]
grammar = "xml"
open = "<call "
name_end = ">"
key_open = "<p "
key_end = ">"
value_end = "</>"
close = "</call>"
newlines = true
typing = { untyped_json = true, nulls = ["nil"] }
section = { open = "<calls>", close = "</calls>", optional = true }

[[format.calls]]
grammar = "json"

[[format]]
name = "acme-channels"
reasoning = "harmony"
calls = [{ grammar = "harmony" }, { grammar = "pythonic" }]
"""


def parse(row: Format, text: str) -> ParseResult:
    ids = map(str, itertools.count())
    parser = Parser(row.syntax, tools=TOOLS, parse_tools=True, reasoning_open=False, new_call_id=ids.__next__)
    parser.feed(text)
    return parser.finish()[1]


def test_rows_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "formats.toml"
    path.write_text(TOML)
    acme, xml, channels = read_formats(path)
    assert acme == Format(
        "acme", (NamedCalls("<acme>", ":", "</acme>"),), ThinkTags("<thought>", "</thought>"), ("<acme>",)
    )
    assert xml.calls == (
        XmlCalls(
            *("<call ", ">", "<p ", ">", "</>", "</call>"),
            newlines=True,
            typing=Typing(untyped_json=True, nulls=("nil",)),
            section=Section("<calls>", "</calls>", optional=True),
        ),
        JsonCalls(),
    )
    assert channels.syntax == Syntax((Harmony(), PythonicCalls()), Harmony())
    result = parse(acme, '<thought>Hm.</thought>Yes.<acme>f: {"a": 1}</acme>')
    assert (result.reasoning, result.content) == ("Hm.", "Yes.")
    assert [(call.name, json.loads(call.arguments)) for call in result.tool_calls] == [("f", {"a": 1})]
    result = parse(xml, "<calls><call f><p a>\n1\n</></call></calls>")
    assert [(call.name, json.loads(call.arguments)) for call in result.tool_calls] == [("f", {"a": 1})]


def test_the_page_s_example(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs" / "formats.md"
    path = tmp_path / "acme.toml"
    path.write_text(page.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0])
    tags = ThinkTags("<thought>", "</thought>")
    assert read_formats(path) == (Format("acme", (NamedCalls("<acme>", ":", "</acme>"),), tags, ("<acme>",)),)


def test_own_rows_come_first_and_are_found_by_the_template() -> None:
    own = Format("own", (JsonCalls("<tool_call>", "</tool_call>", separator=""),), ThinkTags("<t>", "</t>"))
    acme = Format("acme", (NamedCalls("CALL ", " WITH "),))
    formats = (own, acme, *FORMATS)
    assert detect(HERMES_TEMPLATE, formats=formats).why.startswith("tool calls: own reads")
    found = detect(template("CALL {{ f.name }} WITH {{ f.arguments | tojson }}"), formats=formats)
    assert (found.format.name, found.told) == ("acme", True)
    assert detect(HERMES_TEMPLATE, "acme", "own", formats=formats).format.reasoning == ThinkTags(
        "<t>", "</t>"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no [[format]] table"]),
        ("name = 1", ["no [[format]] table"]),
        ("[[format]", ["formats.toml"]),
        ("[[format]]", ["format 1", "name"]),
        ('[[format]]\nname = "a"\ncolour = 1', ["format 1", "'colour'", "known are name, calls"]),
        ('[[format]]\nname = "a"\n[[format.calls]]', ["calls 1", "grammar is one of json, named, xml"]),
        ('[[format]]\nname = "a"\n[[format.calls]]\ngrammar = "nope"', ["grammar is one of"]),
        ('[[format]]\nname = "a"\n[[format.calls]]\ngrammar = "named"', ["calls 1", "open"]),
        ('[[format]]\nname = "a"\n[[format.calls]]\ngrammar = "json"\nopen = 1', ["calls 1", "str", "open"]),
        (
            '[[format]]\nname = "a"\n[[format.calls]]\ngrammar = "json"\nopne = ""',
            ["'opne'", "known are open"],
        ),
        (
            '[[format]]\nname = "a"\n[[format.calls]]\ngrammar = "xml"\nopen = "["\nname_end = ">"\n'
            'key_open = "<"\nkey_end = ">"\nvalue_end = "</p>"\nclose = "</f>"',
            ["calls 1", "'</p>' begins with '<'"],
        ),
        ('[[format]]\nname = "a"\nreasoning = "x"', ["open, close", "harmony"]),
        ('[[format]]\nname = "a"\nreasoning = { opened = "x" }', ["reasoning", "'opened'"]),
    ],
)
def test_a_wrong_file_says_what_to_change(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "formats.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_formats(path)
    for word in words:
        assert word in str(caught.value)
