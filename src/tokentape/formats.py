"""One row per model family: how it writes tool calls and thoughts, and how its chat template shows it.

The tool grammar and the reasoning tags are chosen independently, each by name or from the template. A family
whose grammar has no parser yet has a row too: it is recognised and said, and its tool calls stay text, rather
than being read by rules that are not its own.
"""

from dataclasses import dataclass

from tokentape.errors import ConfigError
from tokentape.parse import JsonCalls, Syntax, ThinkTags


@dataclass(frozen=True, slots=True)
class Format:
    """One family; None for what it does not have.

    `marks`: a template whose source has all of them writes calls this family's way. A row with `marks` and
    without `calls` is a grammar that is known and has no parser yet.
    """

    name: str
    calls: JsonCalls | None = None
    reasoning: ThinkTags | None = None
    marks: tuple[str, ...] = ()

    @property
    def syntax(self) -> Syntax:
        """What a `Parser` needs to know of it."""
        return Syntax(self.calls, self.reasoning)


# Marks are tried in this order. Several families use `<tool_call>`: the special ones come before the common.
FORMATS: tuple[Format, ...] = (
    Format("qwen3-coder", marks=("<function=", "<parameter=")),
    Format("glm", marks=("<arg_key>", "<arg_value>")),
    Format("minimax", marks=("<invoke name=",)),
    Format("deepseek", marks=("<｜tool▁calls▁begin｜>",)),  # noqa: RUF001 - DeepSeek's own characters
    Format("kimi", marks=("<|tool_calls_section_begin|>",)),
    Format("mistral", marks=("[TOOL_CALLS]",)),
    Format("harmony", marks=("<|channel|>",)),
    Format("llama3", marks=('{"name": function name, "parameters":',)),
    Format("hermes", calls=JsonCalls(), marks=("<tool_call>", '"name"', '"arguments"')),
    Format("qwen", calls=JsonCalls(), reasoning=ThinkTags()),
    Format("deepseek-r1", reasoning=ThinkTags()),
    Format("plain"),
)
"""The families. Every combination of a supported grammar and supported tags has a row."""

_PLAIN = FORMATS[-1]


def detect(
    template_source: str, tool_format: str = "auto", reasoning_format: str = "auto"
) -> tuple[Format, str]:
    """Choose tool grammar and reasoning tags; return their row, and the reasons for the log.

    "auto" reads the chat template. Reasoning is on when the template itself knows the tag: where it never
    renders a thought, thoughts stay content.

    Raises:
        ConfigError: a name that is not known, or is not supported for that option.
    """
    tools, why_tools = _choose_tools(template_source, tool_format)
    thoughts, why_thoughts = _choose_reasoning(template_source, reasoning_format)
    rows = [row for row in FORMATS if row.calls or row.reasoning or row is _PLAIN]
    chosen = next(row for row in rows if (row.calls, row.reasoning) == (tools.calls, thoughts.reasoning))
    return chosen, f"tool calls: {why_tools}; reasoning: {why_thoughts}"


def _choose_tools(source: str, name: str) -> tuple[Format, str]:
    if name != "auto":
        row = _named("--tool-format", name, [row for row in FORMATS if row.calls or row is _PLAIN])
        return row, f"{name} was asked for"
    source = source.replace('\\"', '"')  # templates often show the grammar inside a string of their own
    for row in FORMATS:
        if row.marks and all(mark in source for mark in row.marks):
            seen = f"the template shows {row.name}'s grammar ({' '.join(row.marks)})"
            if row.calls:
                return row, seen
            return _PLAIN, f"{seen}, not supported yet: tool calls stay text"
    return _PLAIN, "the template shows no grammar that is known: tool calls stay text"


def _choose_reasoning(source: str, name: str) -> tuple[Format, str]:
    if name != "auto":
        row = _named("--reasoning-format", name, [row for row in FORMATS if row.reasoning or row is _PLAIN])
        return row, f"{name} was asked for"
    for row in FORMATS:
        if row.reasoning and row.reasoning.open in source:
            return row, f"the template knows {row.reasoning.open}"
    return _PLAIN, "the template knows no tag for it: thoughts stay content"


def _named(option: str, name: str, rows: list[Format]) -> Format:
    for row in rows:
        if row.name == name:
            return row
    known = any(row.name == name for row in FORMATS)
    valid = ", ".join(["auto", *(row.name for row in rows)])
    raise ConfigError(f"{option} {name!r} is not {'supported' if known else 'known'}: choose from {valid}")
