"""`tokentape audit` as a user runs it: exit codes, tables, JSON."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from auditkit import template
from click.testing import CliRunner, Result

from tokentape.audit import report as report_module
from tokentape.audit.cases import CASES
from tokentape.audit.report import CaseResult, Outcome, Report
from tokentape.audit.show import MEANS, THOUGHTS
from tokentape.cli import main
from tokentape.model import TINY_MODEL

ModelDir = Callable[[str], Path]
SWITCH = template(keep="and (loop.last or some_odd_switch == true)")


def run(model: object, *options: str) -> Result:
    return CliRunner().invoke(main, ["audit", "--model", str(model), *options])


def as_json(model: object, *options: str) -> tuple[int, Any]:
    result = run(model, "--json", *options)
    return result.exit_code, json.loads(result.stdout)


def test_exit_code_and_words_of_an_exact_model() -> None:
    result = run(TINY_MODEL)
    assert result.exit_code == 0, result.output
    assert "Multi-turn tool use is exact" in result.stdout
    assert "two calls, both results" in result.stdout


def test_exit_code_and_words_of_one_that_is_not(model_dir: ModelDir) -> None:
    result = run(model_dir(SWITCH))
    assert result.exit_code == 1, result.output
    text = " ".join(result.stdout.split())
    for words in (
        "is not exact",
        "reasoning_dropped",
        "would help",
        "thought+call",
        "--history preserve",
        "What to do",
    ):
        assert words in text


def test_what_would_help_helps(model_dir: ModelDir) -> None:
    directory = model_dir(SWITCH)
    assert run(directory, "--template-arg", "some_odd_switch=true").exit_code == 0
    assert run(directory, "--template-arg", "some_odd_switch=false").exit_code == 1
    assert run(directory, "--history", "preserve").exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tool-format", "nope"), "'nope' is not known"),
        (("--reasoning-format", "nope"), "'nope' is not known"),
        (("--template-arg", "thinking"), "KEY=JSON"),
        (("--template-arg", "thinking=no"), "KEY=JSON"),
        (("--template-arg", "messages=[]"), "messages"),
        (("--history", "maybe"), "maybe"),
    ],
)
def test_a_wrong_option_is_exit_code_2(options: tuple[str, ...], words: str) -> None:
    result = run(TINY_MODEL, *options)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stdout == ""


def test_an_unknown_model_is_one_line(tmp_path: Path) -> None:
    for model in (tmp_path / "nowhere", tmp_path, "no-such-model", "no\nsuch\nmodel"):
        result = run(model)
        assert result.exit_code == 2, result.output
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("tokentape: ")


def test_formats_of_ones_own(model_dir: ModelDir, tmp_path: Path) -> None:
    source = template().replace("<tool_call>\\n", "[[").replace("\\n</tool_call>", "]]")
    rows = tmp_path / "formats.toml"
    rows.write_text(
        '[[format]]\nname = "mine"\n[[format.calls]]\ngrammar = "json"\nopen = "[["\nclose = "]]"\n', "utf-8"
    )
    directory = model_dir(source)
    assert run(directory).exit_code == 1
    code, report = as_json(directory, "--formats", str(rows))
    assert (code, report["format"]["name"]) == (0, "mine")


def test_json_has_the_documented_keys(model_dir: ModelDir) -> None:
    code, report = as_json(model_dir(SWITCH))
    assert code == 1
    assert report["version"] == 1
    assert report["exact"] is False
    assert list(report) == [field.name for field in dataclasses.fields(Report)]
    assert [case["name"] for case in report["cases"]] == [case.name for case in CASES]
    assert list(report["cases"][0]) == [field.name for field in dataclasses.fields(CaseResult)]
    assert report["helps"][0]["argument"] == {"some_odd_switch": True}
    assert report["reasons"]
    assert report["advice"]
    call = report["calls"][0]
    assert call["ok"] is True
    assert call["read"] == call["expected"] == [{"name": "record", "arguments": {"value": "plain words"}}]


def test_the_manual_has_every_key_and_word() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    classes = [c for c in vars(report_module).values() if dataclasses.is_dataclass(c)]
    names = {field.name for c in classes for field in dataclasses.fields(c)}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
    assert [outcome for outcome in Outcome if f"`{outcome.value}`" not in page] == []


def test_every_outcome_has_its_meaning() -> None:
    assert set(MEANS) == set(Outcome)
    assert set(THOUGHTS) == set(report_module.Thinking)
