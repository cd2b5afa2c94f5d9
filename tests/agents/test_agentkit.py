"""The kit itself, without an agent: its verdict can be 'no', and the table is kept in order."""

from pathlib import Path

import agentkit
import pytest
from agentkit import Row, Seen, extends, offered, row_in_readme, write_row


def seen(turn_id: str, prompt: list[int], completion: list[int]) -> Seen:
    return Seen(turn_id, prompt, completion, [0.0] * len(completion))


def test_a_main_line_is_exact_only_if_every_prompt_extends_the_one_before() -> None:
    first, aside = seen("a", [1, 2], [3, 4]), seen("x", [9], [9])
    assert extends({"a", "b"}, [first, aside, seen("b", [1, 2, 3, 4, 5], [6])])
    assert not extends({"a", "b"}, [first, aside, seen("b", [1, 2, 34, 5], [6])])
    assert not extends({"a", "b", "x"}, [first, aside, seen("b", [1, 2, 3, 4, 5], [6])])


def test_offered_tools_are_read_from_the_prompt() -> None:
    tools = '<tools>\n{"function": {"name": "add"}}\n{"function": {"name": "read"}}\n</tools>'
    assert offered(f"system\n{tools}\n\nuser") == {"add", "read"}
    assert offered("no tools") == set()


def test_a_row_replaces_its_own_and_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(["# Agents", "", *agentkit.TABLE_HEAD, "", "the end"]) + "\n")
    monkeypatch.setattr(agentkit, "README", readme)
    order = [("one", "chat"), ("one", "messages"), ("two", "chat")]
    rows = [Row(agent, "1", protocol, "3", "root 1", "yes") for agent, protocol in reversed(order)]
    changed = Row("two", "2", "chat", "4", "root 1", "no: it edits")
    for row in [*rows, changed]:
        write_row(row, order)
    table = readme.read_text().splitlines()[2:-2]
    assert table == [*agentkit.TABLE_HEAD, str(rows[2]), str(rows[1]), str(changed)]
    assert row_in_readme(changed) == str(changed)
    assert row_in_readme(Row("three", "1", "chat", "1", "", "yes")) == ""
