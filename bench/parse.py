"""How fast completions are parsed, one row a family: megabytes of UTF-8 text a second, on one core.

    python bench/parse.py [ROW …]

`whole`: each completion in one piece; `40`, `4`: in pieces of so many characters, as they stream. Completions
have a thought (where the family has them), a paragraph of text, and two calls, one of which writes a file.

The second table is one argument of 100,000 and of 400,000 characters in pieces of four: where the work is
linear, it takes four times as long.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import partial

from tokentape.formats import FORMATS, Format
from tokentape.parse import (
    Grammar,
    Harmony,
    JsonCalls,
    NamedCalls,
    Parser,
    PythonicCalls,
    ThinkTags,
    XmlCalls,
)

TOOLS = {
    "write_file": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
    },
    "run_tests": {
        "type": "object",
        "properties": {"verbose": {"type": "boolean"}, "limit": {"type": "integer"}},
    },
}
THOUGHT = (
    "The user wants the parser to count lines. I should look at the file first, then change `count`.\n" * 12
)
TEXT = (
    "I will change the function so that it counts the lines and not the characters, and run the tests.\n" * 6
)
CODE = (
    'def count(text: str) -> int:\n    """How many lines there are."""\n    return len(text.split("\\n"))\n\n'
    * 40
)
SECONDS = 0.4


def write(grammar: Grammar, name: str, arguments: dict[str, object]) -> str:
    """One call, without its section."""
    body = json.dumps(arguments, ensure_ascii=False)
    match grammar:
        case JsonCalls():
            call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
            return f"{grammar.list_open or grammar.open}{'[' * bool(grammar.list_open)}{call}" + (
                f"]{grammar.list_close}" if grammar.list_open else f"\n{grammar.close}"
            )
        case NamedCalls():
            shown = f"functions.{name}:0" if grammar.numbered else name
            return f"{grammar.open}{shown}{grammar.name_end}{body}{grammar.close}"
        case XmlCalls():
            return write_xml(grammar, name, arguments)
        case PythonicCalls():
            return f"[{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"
        case Harmony():
            return f"<|start|>assistant<|channel|>commentary to=functions.{name} <|message|>{body}<|call|>"
        case _:
            raise TypeError(grammar)


def write_xml(grammar: XmlCalls, name: str, arguments: dict[str, object]) -> str:
    call = f"{grammar.open}{name}{grammar.name_end}\n"
    for key, value in arguments.items():
        kind = f"{str(isinstance(value, str)).lower()}{grammar.kind_end}" if grammar.kind_end else ""
        text = value if isinstance(value, str) else json.dumps(value)
        call += f"{grammar.key_open}{key}{grammar.key_end}{grammar.value_open}{kind}\n{text}\n"
        call += f"{grammar.value_end}\n"
    return call + grammar.close


def block(grammar: Grammar, calls: Sequence[tuple[str, dict[str, object]]]) -> str:
    """Calls, in their section."""
    text = "".join(write(grammar, *call) for call in calls)
    section = grammar.section if isinstance(grammar, NamedCalls | XmlCalls) else None
    return f"{section.open}\n{text}\n{section.close}" if section else text


def completion(row: Format) -> str:
    text = TEXT
    if isinstance(row.reasoning, ThinkTags):
        text = f"{row.reasoning.open}\n{THOUGHT}\n{row.reasoning.close}\n\n{TEXT}"
    elif isinstance(row.reasoning, Harmony):
        text = f"<|channel|>analysis<|message|>{THOUGHT}<|end|>"
        text += f"<|start|>assistant<|channel|>final<|message|>{TEXT}<|end|>"
    if row.calls:
        text += block(row.calls[-1], [("run_tests", {"verbose": True, "limit": 10})])
        text += block(row.calls[-1], [("write_file", {"path": "src/count.py", "content": CODE})])
    return text


def long_argument(row: Format, num_chars: int) -> str:
    lines = "some text, a line of it\n" * (num_chars // 24)
    return block(row.calls[-1], [("write_file", {"content": lines})])


def parse(row: Format, text: str, size: int) -> int:
    """Parse a completion in pieces of `size` characters; the number of its calls."""
    parser = Parser(
        row.syntax,
        tools=TOOLS,
        parse_tools=True,
        reasoning_open=False,
        new_call_id=map(str, itertools.count()).__next__,
    )
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    return len(parser.finish()[1].tool_calls)


def seconds_of(run: Callable[[], object], at_most: float = SECONDS) -> float:
    """The shortest of several runs."""
    best, until = float("inf"), time.perf_counter() + at_most
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("rows", nargs="*", help="names of rows; all of them where none is named")
    names = options.parse_args().rows
    rows = [row for row in FORMATS if not names or row.name in names]
    print(f"{'MB/s':<18}{'kB':>6}{'whole':>8}{'40':>8}{'4':>8}")
    for row in rows:
        text = completion(row)
        expected = 2 if row.calls else 0
        if parse(row, text, len(text)) != expected:
            raise SystemExit(f"{row.name} does not read its own calls")
        size = len(text.encode())
        speeds = [size / seconds_of(partial(parse, row, text, n)) / 1e6 for n in (len(text), 40, 4)]
        print(f"{row.name:<18}{size / 1e3:>6.1f}" + "".join(f"{speed:>8.1f}" for speed in speeds))
    print(f"\n{'one argument, in fours':<24}{'100k, s':>10}{'400k, s':>10}{'ratio':>8}")
    for row in rows:
        if row.calls:
            texts = [long_argument(row, num_chars) for num_chars in (100_000, 400_000)]
            times = [seconds_of(partial(parse, row, text, 4)) for text in texts]
            print(f"{row.name:<24}{times[0]:>10.3f}{times[1]:>10.3f}{times[1] / times[0]:>8.1f}")


if __name__ == "__main__":
    main()
