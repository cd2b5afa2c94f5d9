"""formats: which grammar and tags a chat template shows, and which the options ask for."""

from pathlib import Path

import pytest

from tokentape.errors import ConfigError
from tokentape.formats import FORMATS, detect
from tokentape.parse import JsonCalls, Syntax, ThinkTags

MODELS = Path(__file__).parents[2] / "shared" / "models"
QWEN = '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>'
NOT_YET = "not supported yet: tool calls stay text"
TEMPLATES = {  # directory → row, and the family whose grammar is recognised without having a parser
    "deepseek-r1": ("deepseek-r1", "deepseek"),
    "deepseek-v3.1": ("deepseek-r1", "deepseek"),
    "glm-4.6v": ("deepseek-r1", "glm"),
    "glm-4.7": ("deepseek-r1", "glm"),
    "gpt-oss": ("plain", "harmony"),
    "hermes-3": ("hermes", None),
    "kimi-k2": ("plain", "kimi"),
    "llama-3.1": ("plain", "llama3"),
    "minimax-m2": ("deepseek-r1", "minimax"),
    "mistral-small-3.2": ("plain", "mistral"),
    "nemotron-3": ("deepseek-r1", "qwen3-coder"),
    "qwen2.5": ("hermes", None),
    "qwen3": ("qwen", None),
    "qwen3-2507": ("hermes", None),
    "qwen3-coder": ("plain", "qwen3-coder"),
    "qwen3.5": ("deepseek-r1", "qwen3-coder"),
    "smollm2": ("plain", None),
}


@pytest.mark.shared
@pytest.mark.parametrize("model", TEMPLATES)
def test_the_real_templates(model: str) -> None:
    path = MODELS / model / "chat_template.jinja"
    if not path.exists():
        pytest.skip(f"no reference templates at {MODELS}")
    name, unsupported = TEMPLATES[model]
    row, why = detect(path.read_text())
    assert row.name == name
    if unsupported:
        assert f"{unsupported}'s grammar" in why
    assert (NOT_YET in why) == (unsupported is not None)


@pytest.mark.shared
def test_every_template_at_hand_is_in_the_table() -> None:
    if not MODELS.exists():
        pytest.skip(f"no reference templates at {MODELS}")
    assert {path.parent.name for path in MODELS.glob("*/chat_template.jinja")} == set(TEMPLATES)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("", "plain"),
        (QWEN, "hermes"),
        (QWEN.replace('\\"', '"'), "hermes"),
        (QWEN + "<think>", "qwen"),
        ("<think>", "deepseek-r1"),
        (QWEN + "<function=x><parameter=y>", "plain"),
        ("<tool_call>", "plain"),
    ],
)
def test_auto_reads_the_template(source: str, name: str) -> None:
    row, why = detect(source)
    assert row.name == name
    assert why.startswith("tool calls: ")
    assert "; reasoning: " in why


@pytest.mark.parametrize(
    ("tools", "reasoning", "syntax"),
    [
        ("hermes", "auto", Syntax(JsonCalls(), ThinkTags())),
        ("auto", "plain", Syntax()),
        ("qwen", "plain", Syntax(JsonCalls())),
        ("plain", "qwen", Syntax(None, ThinkTags())),
        ("plain", "plain", Syntax()),
    ],
)
def test_the_options_choose_independently(tools: str, reasoning: str, syntax: Syntax) -> None:
    row, why = detect("<think>", tools, reasoning)
    assert row.syntax == syntax
    assert why.count("asked for") == (tools != "auto") + (reasoning != "auto")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("hermse", "auto"), ["--tool-format", "'hermse'", "not known", "auto, hermes, qwen, plain"]),
        (("glm", "auto"), ["--tool-format", "'glm'", "not supported", "auto, hermes, qwen, plain"]),
        (("auto", "hermes"), ["--reasoning-format", "'hermes'", "auto, qwen, deepseek-r1, plain"]),
        (("", "auto"), ["--tool-format", "''"]),
    ],
)
def test_a_wrong_name_lists_the_valid_ones(arguments: tuple[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        detect(QWEN, *arguments)
    for word in words:
        assert word in str(caught.value)


def test_the_table_is_complete() -> None:
    names = [row.name for row in FORMATS]
    assert len(set(names)) == len(names)
    syntaxes = [row.syntax for row in FORMATS if not (row.marks and row.calls is None)]
    for calls in {syntax.calls for syntax in syntaxes}:
        for reasoning in {syntax.reasoning for syntax in syntaxes}:
            assert syntaxes.count(Syntax(calls, reasoning)) == 1
