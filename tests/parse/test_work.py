"""The work of parsing is linear in the text, whatever the chunks and however broken it is.

Work is counted, not timed: the characters that readers search, take, copy and decode.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
from parsekit import QWEN, Setting, call
from writekit import write

from tokentape.formats import FORMATS, Format
from tokentape.parse import Grammar, json_calls, jsonscan, literals, pythonic, source, values, xml_calls
from tokentape.parse.source import Marks, Source
from tokentape.parse.text import Trimmed

SKIPPERS = (source, jsonscan, pythonic, xml_calls)
DECODERS = (
    (json_calls, "_decode_body"),
    (json_calls, "_check"),
    (jsonscan, "decode_string"),
    (values, "_decode"),
    (literals, "to_json"),
)


class Work:
    """Counts what the parser does from here on, in characters."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._patch = patch
        self._wrap(Source, "feed", lambda src, more: len(src.text) - src.at + len(more) + 1)
        self._wrap_rewind()
        self._wrap(Source, "kept", lambda src: src.at - src._kept_from + sum(map(len, src._kept or ())))
        self._wrap(Source, "take", lambda src, end: end - src.at + 1)
        self._wrap(Trimmed, "push", lambda _, said, trim_left: len(said))
        self._wrap(Trimmed, "release", lambda trimmed: sum(map(len, trimmed.held)))
        self._wrap_search(Marks, "search", 2)
        for module in SKIPPERS:
            self._wrap_skip(module)
        for module, name in DECODERS:
            self._wrap(module, name, len)
        for module in (values, xml_calls, pythonic):
            self._wrap(module, "quote", len)

    def _wrap(self, owner: Any, name: str, cost: Callable[..., int]) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += cost(*args, **kwargs)
            return real(*args, **kwargs)

        self._patch.setattr(owner, name, counted)

    def _wrap_rewind(self) -> None:
        real = Source.rewind

        def counted(src: Source) -> None:
            before = src.text
            real(src)
            self.count += 1 if src.text is before else len(src.text)

        self._patch.setattr(Source, "rewind", counted)

    def _wrap_search(self, owner: Any, name: str, at: int) -> None:
        real = getattr(owner, name)

        def counted(*args: Any) -> Any:
            found: re.Match[str] | None = real(*args)
            self.count += (
                (found.end() if found else len(args[at - 1])) - (args[at] if len(args) > at else 0) + 1
            )
            return found

        self._patch.setattr(owner, name, counted)

    def _wrap_skip(self, module: Any) -> None:
        skip = module.skip

        def counted(pattern: re.Pattern[str], text: str, at: int) -> int:
            end = skip(pattern, text, at)
            self.count += end - at + 1
            return end

        self._patch.setattr(module, "skip", counted)


def work_of(setting: Setting, text: str, size: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        work = Work(patch)
        setting.run(*(text[at : at + size] for at in range(0, len(text), size)))
        return work.count


def check_linear(setting: Setting, make: Callable[[int], str], size: int) -> None:
    texts = make(1_500), make(12_000)
    assert len(texts[1]) > 6 * len(texts[0])
    small, large = (work_of(setting, text, size) for text in texts)
    assert large <= 10 * small + 2_000  # 8 times the text; quadratic work would be 64 times as much
    assert large <= 60 * len(texts[1])


HEAVY = {
    "a long argument": lambda n: call('{"a": "' + "x" * n + '"}'),
    "many escapes": lambda n: call('{"a": "' + r"\n\"" * (n // 4) + '"}'),
    "many values": lambda n: call('{"a": [' + "1, " * (n // 3) + "1]}"),
    "many calls": lambda n: call() * (n // len(call())),
    "many broken calls": lambda n: "<tool_call>no</tool_call>" * (n // 25),
    "many open quotes": lambda n: '<tool_call>{"name": "</tool_call>' * (n // 33),
    "open quotes that go on": lambda n: '<tool_call>{":1,"</tool_call>' * (n // 29),
    "one open quote": lambda n: '<tool_call>{"' + '</tool_call><tool_call>{\\"' * (n // 26),
    "many openings": lambda n: "<tool_call>" * (n // 11),
    "many openings of objects": lambda n: "<tool_call>{" * (n // 12),
    "hopeless": lambda n: "<tool_call>'" + "<" * n,
    "half tags": lambda n: "<tool_call" * (n // 10),
    "spaces": lambda n: "a" + " " * n + "b",
    "spaces at the start": lambda n: " " * n + "<think>",
    "spaces in a call": lambda n: "<tool_call>" + " " * n + "{}" + " " * n + "</tool_call>",
    "text": lambda n: "some words, " * (n // 12),
    "a thought": lambda n: "<think>" + "some words.\n" * (n // 12),
    "calls in a thought": lambda n: "<think>" + '<tool_call>{"name": "f"}' * (n // 24),
    "newlines in a thought": lambda n: "<think>a" + "\n" * n + "</think>",
    "nearly stopped": lambda n: "STO" * (n // 3),
}


@pytest.mark.parametrize("size", [4, 10**9], ids=["chunks", "whole"])
@pytest.mark.parametrize("case", HEAVY)
def test_work_is_linear(case: str, size: int) -> None:
    for setting in (Setting(stop=("STOP",)), Setting(parse_tools=False)):
        check_linear(setting, HEAVY[case], size)


def heavy(grammar: Grammar) -> dict[str, Callable[[int], str]]:
    """Texts of about so many characters that make a reader start, wait, fail and go back."""
    one = write(grammar, [("f", {"a": "x", "b": [1, "y"]})])
    begins = (*grammar.begins, *grammar.at_start)
    long_text, long_list = (write(grammar, [("f", {"a": value})]) for value in ("@@", ["@@"]))
    texts: dict[str, Callable[[int], str]] = {
        "calls": lambda n: one * (n // len(one)),
        "long text": lambda n: long_text.replace("@@", "x y " * (n // 4)),
        "long list": lambda n: long_list.replace("@@", "x y " * (n // 4)),
        "quotes": lambda n: long_text.replace("@@", "'" * n),
        "backslashes": lambda n: long_list.replace("@@", "\\" * (n // 2 * 2)),
        "brackets": lambda n: long_text.replace("@@", "[(" * (n // 2)),
        "newlines": lambda n: long_list.replace("@@", "\n" * n),
        "spaces behind": lambda n: (one + " " * 100) * (n // (len(one) + 100)),
        "its own calls": lambda n: long_text.replace("@@", one * (n // len(one))),
    }
    for part in range(1, 16):
        half = one[: len(one) * part // 16 + 1]
        texts[f"{part}/16 of calls"] = lambda n, half=half: half * (n // len(half))
    for begin in begins:
        for junk in ("", "x", " ", "{", '{"', "[f(a='", '{"name": "f", "arguments": {"a": "', "f>", "f{"):
            texts[begin + junk] = lambda n, text=begin + junk: text * (n // len(text))
    return texts


@pytest.mark.parametrize("size", [4, 10**9], ids=["chunks", "whole"])
@pytest.mark.parametrize("row", [row for row in FORMATS if row.calls], ids=lambda row: row.name)
def test_work_is_linear_in_every_format(row: Format, size: int) -> None:
    for grammar in row.calls:
        for name, make in heavy(grammar).items():
            print(name)  # noqa: T201  # shown where the check fails
            check_linear(Setting(row.syntax), make, size)


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    check_linear(Setting(), HEAVY["a long argument"], 4)
    whole = Source.feed

    def forgetful(self: Source, more: str) -> None:
        self.kept()  # looks at all of the call whenever more of it comes
        whole(self, more)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "feed", forgetful)
        with pytest.raises(AssertionError):
            check_linear(Setting(QWEN), HEAVY["a long argument"], 4)
    copying = Source.rewind

    def rewind(self: Source) -> None:
        self._kept = self._kept or [""]  # copies all the rest of the text for each call that fails
        copying(self)

    monkeypatch.setattr(Source, "rewind", rewind)
    with pytest.raises(AssertionError):
        check_linear(Setting(QWEN), HEAVY["many broken calls"], 10**9)
