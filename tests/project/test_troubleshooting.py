"""docs/troubleshooting.md: every error has a line that is true, every message in it is one that is said."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from tokentape import errors
from tokentape.errors import TokentapeError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
WITHOUT_STATUS = {"config_error", "gateway_error", "group_failed"}


def classes() -> list[type[TokentapeError]]:
    every = [one for _, one in inspect.getmembers(errors, inspect.isclass)]
    return [one for one in every if issubclass(one, TokentapeError) and one is not TokentapeError]


def kind_of(one: type[TokentapeError]) -> str:
    return one.kind.fget(one.__new__(one))  # type: ignore[attr-defined]


def rows(title: str, page: str) -> list[list[str]]:
    part = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def differences(page: str) -> list[str]:
    """What the table of kinds says otherwise than the code."""
    told = {row[0].strip("` "): row for row in rows("By kind", page)}
    wrong = [f"{kind} is no error" for kind in told if kind not in map(kind_of, classes())]
    for one in classes():
        kind = kind_of(one)
        if kind not in told:
            wrong.append(f"{kind} is missing")
            continue
        _, status, again, why, advice = told[kind]
        if again != ("yes" if one.retryable else "no"):
            wrong.append(f"{kind}: again is {again}")
        is_served = not issubclass(one, errors.EpisodeFailed | errors.GatewayError) and (
            kind not in WITHOUT_STATUS
        )
        if status != (str(one.status) if is_served else "-"):
            wrong.append(f"{kind}: status is {status}")
        if min(len(why), len(advice)) < 8:
            wrong.append(f"{kind}: why, or what to do?")
    return wrong


def said() -> str:
    """All texts of the package, values as `{}`, one a line."""
    texts = list[str]()
    for path in (ROOT / "src" / "tokentape").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                texts.append("".join(map(str, parts)))
    return "\n".join(texts)


def test_every_error_is_there() -> None:
    assert differences(PAGE) == []


def test_every_message_is_said() -> None:
    texts = said()
    for row in rows("By message", PAGE):
        message = re.sub(r"\b[A-Z]{2,}\b(?=$)", "{}", row[0].strip("` "))
        assert message in texts, message
        assert len(row) == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `store_full` | 507 |", "| `store_full` | 500 |"),
        ("| `engine_failed` | 502 | yes |", "| `engine_failed` | 502 | no |"),
        ("| `lease_lost` |", "| `lease_lots` |"),
    ],
)
def test_a_wrong_line_is_seen(old: str, new: str) -> None:
    assert old in PAGE
    assert differences(PAGE.replace(old, new)) != []
