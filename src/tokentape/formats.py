"""One row per model family: how it writes tool calls and thoughts, and how its chat template shows it.

The tool grammar and the reasoning tags are chosen independently, each by name or from the template. The
template is asked: it renders a call, and the row whose grammar reads that call back is the family's. Only
where a template shows no calls (SmolLM2) is its source searched for marks that tell a family.
"""

import itertools
import json
import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tokentape.errors import ConfigError, TemplateRefused
from tokentape.parse import (
    Grammar,
    Harmony,
    JsonCalls,
    NamedCalls,
    Parser,
    PythonicCalls,
    Section,
    Syntax,
    ThinkTags,
    XmlCalls,
)
from tokentape.parse.harmony import CHANNEL
from tokentape.parse.values import JSON, Typing
from tokentape.template import PROBE_TOOL, ChatTemplate
from tokentape.types import Json, Message, ToolCall

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Format:
    """One family. Empty, None: what it does not have.

    `calls` are its grammars of tool calls; the first that can read a block reads it. `marks`: a template
    whose source has all of them writes calls this family's way, should it not render any.
    """

    name: str
    calls: tuple[Grammar, ...] = ()
    reasoning: ThinkTags | Harmony | None = None
    marks: tuple[str, ...] = ()

    @property
    def syntax(self) -> Syntax:
        """What a `Parser` needs to know of it."""
        return Syntax(self.calls, self.reasoning)


THINK = ThinkTags()
MISTRAL_THINK = ThinkTags("[THINK]", "[/THINK]")

_HERMES = JsonCalls()
_QWEN_XML = XmlCalls(
    "<function=", ">", "<parameter=", ">", "</parameter>", "</function>",
    section=Section("<tool_call>", "</tool_call>"), newlines=True, typing=Typing(nulls=("null",)),
    style="qwen_xml",
)  # fmt: skip
_GLM = XmlCalls(
    "<tool_call>", "", "<arg_key>", "</arg_key>", "</arg_value>", "</tool_call>",
    value_open="<arg_value>", typing=JSON, style="glm_xml",
)  # fmt: skip
_MINIMAX = XmlCalls(
    '<invoke name="', '">', '<parameter name="', '">', "</parameter>", "</invoke>",
    section=Section("<minimax:tool_call>", "</minimax:tool_call>"), newlines=True,
    typing=Typing(union_json=True, misfit_json=True, nulls=("null", "none", "nil")),
    style="minimax_xml",
)  # fmt: skip
_DSML = XmlCalls(
    '<｜DSML｜invoke name="', '">', '<｜DSML｜parameter name="', '" string="',
    "</｜DSML｜parameter>", "</｜DSML｜invoke>",
    kind_end='">', section=Section("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"), typing=JSON,
    style="deepseek_xml",
)  # fmt: skip
_DEEPSEEK_SECTION = Section("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_V3 = NamedCalls(
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```json\n",
    "\n```<｜tool▁call▁end｜>",
    _DEEPSEEK_SECTION,
)
_DEEPSEEK_V31 = NamedCalls(
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", _DEEPSEEK_SECTION
)
_KIMI = NamedCalls(
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    Section("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"), numbered=True,
)  # fmt: skip
_MISTRAL_LIST = JsonCalls("", "", list_open="[TOOL_CALLS]")
_NEMOTRON_LIST = JsonCalls("", "", list_open="<TOOLCALL>", list_close="</TOOLCALL>")
_GRANITE_LIST = JsonCalls("", "", list_open="<|tool_call|>")
_MISTRAL = NamedCalls("[TOOL_CALLS]", "[ARGS]", id_begin="[CALL_ID]")
_LLAMA3 = JsonCalls("<|python_tag|>", "", separator=";")
_HUNYUAN = XmlCalls(
    "<tool_call>", "<tool_sep>", "<arg_key>", "</arg_key>", "</arg_value>", "</tool_call>",
    value_open="<arg_value>", section=Section("<tool_calls>", "</tool_calls>"), typing=JSON,
)  # fmt: skip
_STEP3 = XmlCalls(
    '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="', '">',
    '<steptml:parameter name="', '">', "</steptml:parameter>", "</steptml:invoke><｜tool_call_end｜>",
    section=Section("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"),
    typing=Typing(union_json=True, misfit_json=True),
)  # fmt: skip
_MIMO = replace(_QWEN_XML, newlines=False)
_LFM2 = PythonicCalls("<|tool_call_start|>", "<|tool_call_end|>")
_SEED = replace(_QWEN_XML, section=Section("<seed:tool_call>", "</seed:tool_call>"))

FORMATS: tuple[Format, ...] = (
    Format("qwen3-coder", (_QWEN_XML,), None, ("<function=", "<parameter=")),
    Format("qwen3.5", (_QWEN_XML,), THINK, ("<function=", "<parameter=")),
    Format("mimo", (_MIMO,), THINK, ("<function=", "<parameter=")),
    Format("nemotron-3", (_QWEN_XML,), THINK, ("<function=", "<parameter=")),
    Format("seed-oss", (_SEED,), ThinkTags("<seed:think>", "</seed:think>"), ("<seed:tool_call>",)),
    Format("hunyuan", (_HUNYUAN,), THINK, ("<tool_sep>", "<arg_key>")),
    Format("glm", (_GLM,), THINK, ("<arg_key>", "<arg_value>")),
    Format("minimax", (_MINIMAX,), THINK, ("<minimax:tool_call>", "<invoke name=")),
    Format("deepseek-v3.2", (_DSML,), THINK, ("｜DSML｜",)),
    Format("deepseek-v3", (_DEEPSEEK_V3,), None, ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>",)),
    Format("deepseek-r1", (_DEEPSEEK_V3,), THINK, ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>",)),
    Format("deepseek-v3.1", (_DEEPSEEK_V31,), THINK, ("<｜tool▁calls▁begin｜>",)),
    Format("kimi-k2", (_KIMI,), THINK, ("<|tool_calls_section_begin|>",)),
    Format("mistral", (_MISTRAL_LIST, _MISTRAL), MISTRAL_THINK, ("[TOOL_CALLS]",)),
    Format("gpt-oss", (Harmony(),), Harmony(), ("<|channel|>", "<|message|>")),
    Format("step3", (_STEP3,), THINK, ("<steptml:invoke",)),
    Format("llama3", (_LLAMA3,), None, ('{"name": function name, "parameters":',)),
    Format("hermes", (_HERMES,), None, ("<tool_call>", '"name"', '"arguments"')),
    Format("qwen", (_HERMES,), THINK, ("<tool_call>", '"name"', '"arguments"')),
    Format("nemotron-nano-v2", (_NEMOTRON_LIST,), THINK, ("<TOOLCALL>",)),
    Format("granite", (_GRANITE_LIST,), None, ("<|tool_call|>",)),
    Format("gemma", (PythonicCalls(),), None, ("[func_name1(params_name1=params_value1",)),
    Format("llama4", (PythonicCalls("<|python_start|>", "<|python_end|>"),), None, ("<|python_start|>",)),
    Format("lfm2", (_LFM2,), THINK, ("<|tool_call_start|>",)),
    Format("plain"),
)
"""The families. Where rows have the same grammar, the reasoning tags tell which of them it is."""

_PLAIN = FORMATS[-1]
# The newlines at the value's edges tell MiMo's grammar from Qwen's, which has newlines of its own there.
_PROBES: tuple[Json, ...] = ({"key0": "\nprobe0\n"}, {"key0": "probe0"})
_PROBE_IDS = ("probe0001", "functions.tool0:0")  # Mistral takes nine letters and digits, Kimi writes the id


@dataclass(frozen=True, slots=True)
class Detected:
    """The row that was chosen, and why, for the log.

    `told` is False where nothing tells how calls are written. `contradicted` names the row whose calls the
    template writes, where another one was asked for.
    """

    format: Format
    why: str
    told: bool
    contradicted: str | None = None


def detect(
    template: ChatTemplate,
    tool_format: str = "auto",
    reasoning_format: str = "auto",
    *,
    formats: Sequence[Format] = FORMATS,
) -> Detected:
    """Choose tool grammar and reasoning tags, each from the row of a name; "auto" asks the template.

    Reasoning is on when the template itself knows the tags: where it never renders a thought, thoughts stay
    content.

    Raises:
        ConfigError: a name that is not known, or that has no such thing.
    """
    tools, why_tools, told = _choose_tools(template, tool_format, formats)
    thoughts, why_thoughts = _choose_reasoning(template.source, reasoning_format, tools, formats)
    named = [row for row in formats if (row.calls, row.reasoning) == (tools.calls, thoughts.reasoning)]
    name = tools.name if tools in named or not named else named[0].name
    chosen = Format(name, tools.calls, thoughts.reasoning)
    contradicted = None
    if tool_format != "auto":
        own, _, known = _choose_tools(template, "auto", formats)
        contradicted = own.name if known and own.calls != tools.calls else None
    return Detected(chosen, f"tool calls: {why_tools}; reasoning: {why_thoughts}", told, contradicted)


def foreign(
    text: str, tools: Mapping[str, Json], row: Format, formats: Sequence[Format] = FORMATS
) -> str | None:
    """The row whose grammar reads a call to one of `tools` in a text that `row` takes for content.

    None where there is none: a wrong choice of format would otherwise look like a model that calls no tools.
    """
    for other in formats:
        begins = (mark for grammar in other.calls for mark in (*grammar.begins, *grammar.at_start))
        if other.calls == row.calls or not any(mark in text for mark in begins):
            continue
        parser = Parser(other.syntax, tools=tools, parse_tools=True, reasoning_open=False, new_call_id=str)
        parser.feed(text)
        if any(call.name in tools for call in parser.finish()[1].tool_calls):
            return other.name
    return None


def _choose_tools(template: ChatTemplate, name: str, formats: Sequence[Format]) -> tuple[Format, str, bool]:
    if name != "auto":
        row = _named("--tool-format", name, [row for row in formats if row.calls or row == _PLAIN])
        return row, f"{name} was asked for", True
    for arguments, call_id in itertools.product(_PROBES, _PROBE_IDS):
        text = _rendered_call(template, arguments, call_id)
        read = [(left, row) for row in formats if (left := _left_by(row, text, arguments)) is not None]
        if read:  # of several, the one that knows all its marks
            _, row = min(read, key=lambda pair: pair[0])
            return row, f"{row.name} reads the call that the template writes: {_short(text)}", True
    source = template.source.replace(
        '\\"', '"'
    )  # templates often show the grammar inside a string of their own
    for row in formats:
        if row.calls and row.marks and all(mark in source for mark in row.marks):
            return row, f"the template shows {row.name}'s marks ({' '.join(row.marks)})", True
    return _PLAIN, "the template shows no grammar that is known: tool calls stay text", False


def _rendered_call(template: ChatTemplate, arguments: Json, call_id: str) -> str:
    """How the template writes a call behind its generation prompt; "" where it does not."""
    user = Message(role="user", content="u")
    call = ToolCall(id=call_id, name="tool0", arguments=json.dumps(arguments))
    turn = template.to_json(Message(role="assistant", tool_calls=(call,)))
    try:
        prompt = template.render([template.to_json(user)], [PROBE_TOOL], {}, add_generation_prompt=True)
        whole = template.render([template.to_json(user), turn], [PROBE_TOOL], {}, add_generation_prompt=False)
    except TemplateRefused:
        return ""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    # The prompt opens a thought that the turn does not have: go back to before the tag that differs.
    end = len(os.path.commonprefix([prompt, whole]))  # noqa: RUF071  # of texts
    return whole[max(whole.rfind(mark, 0, end) + len(mark) for mark in (">", "]", "\n")) :]


def _left_by(row: Format, text: str, arguments: Json) -> int | None:
    """How many characters a row leaves as content, of a text whose one call it reads; None if it does not."""
    tools = {"tool0": PROBE_TOOL["function"]["parameters"]}
    parser = Parser(Syntax(row.calls), tools=tools, parse_tools=True, reasoning_open=False, new_call_id=str)
    parser.feed(text)
    result = parser.finish()[1]
    calls = [(call.name, json.loads(call.arguments)) for call in result.tool_calls]
    return len(result.content or "") if calls == [("tool0", arguments)] else None


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 160 else f"{text[:160]}…", ensure_ascii=False)


def _choose_reasoning(source: str, name: str, tools: Format, formats: Sequence[Format]) -> tuple[Format, str]:
    if name != "auto":
        row = _named("--reasoning-format", name, [row for row in formats if row.reasoning or row == _PLAIN])
        return row, f"{name} was asked for"
    for row in (tools, *formats):  # of equal evidence, the family's own
        tags = row.reasoning
        if isinstance(tags, Harmony) and CHANNEL in source:
            return row, f"the template knows {CHANNEL}"
        if isinstance(tags, ThinkTags) and (tags.open in source or tags.close in source):
            return row, f"the template knows {tags.open}{tags.close}"
    return _PLAIN, "the template knows no tags for it: thoughts stay content"


def _named(option: str, name: str, rows: Sequence[Format]) -> Format:
    for row in rows:
        if row.name == name:
            return row
    raise ConfigError(
        f"{option} {name!r} is not known: choose from {', '.join(['auto', *(r.name for r in rows)])}"
    )
