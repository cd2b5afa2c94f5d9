"""Whose turn is it: what the caller says, what a rule knows, what the conversations tell."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import TOOLS, Recorder, call, result, said, turn, user

from tokentape.invariants import check_samples
from tokentape.labels import RULES, labels, summary_of
from tokentape.tape import Label, Origin, Turn
from tokentape.types import Json, Message

OTHER_TOOLS: tuple[Json, ...] = ({"type": "function", "function": {"name": "look"}},)
SYSTEM = Message("system", "You are an agent.")
SUMMARY = "1. The user asked for a file. 2. It is written, and says forty-two."


def by_caller(label: str) -> dict[str, Any]:
    return {"origin": Origin("chat", "d", "r", label)}


def names(recorder: Recorder) -> list[str]:
    return [label.name for label in labels(recorder.tree.turns()).values()]


def told_by(recorder: Recorder) -> list[str]:
    return [label.by for label in labels(recorder.tree.turns()).values()]


# -- rules, each with the words that the agent really sends

BILLING = "x-anthropic-billing-header: cc_version=2.1.197.692; cc_entrypoint=sdk-cli;"
PROMPTS: dict[str, list[tuple[str, str]]] = {
    "claude-code-subagent": [("system", f"{BILLING} cc_is_subagent=true;\n\nYou are a Claude agent.")],
    "claude-code-compaction": [
        (
            "last_user",
            "And now tell me again\n\n\nCRITICAL: Respond with TEXT ONLY. Do NOT call any tools.\n\n\n"
            "Your task is to create a detailed summary of the conversation so far, paying close attention to "
            "the user's explicit requests and your previous actions.",
        ),
        (
            "last_user",
            "Your task is to create a detailed summary of the RECENT portion of the conversation —",
        ),
        ("last_user", "Your task is to create a detailed summary of this conversation. This summary will be"),
    ],
    "claude-code-summarizer": [
        ("system", f"{BILLING}\n\nYou are a helpful AI assistant tasked with summarizing conversations.")
    ],
    "claude-code-title": [
        (
            "system",
            f"{BILLING}\n\nGenerate a concise, sentence-case title (3-7 words) that captures the main",
        ),
        (
            "first_user",
            "You are coming up with a succinct title and git branch name for a coding session based",
        ),
        ("first_user", "Please write a 5-10 word title for the following conversation:\n\nUser: hi"),
        ("system", "Summarize this coding conversation in under 50 characters."),
    ],
    "claude-code-topic": [
        (
            "system",
            "You are Claude Code, Anthropic's official CLI.\n\nAnalyze if this message indicates a "
            "new conversation topic. If it does, extract a 2-3 word title",
        )
    ],
    "claude-code-quota": [("first_user", "quota")],
    "claude-code-warmup": [("first_user", "Warmup")],
    "claude-code-suggestion": [
        (
            "last_user",
            "[SUGGESTION MODE: Suggest what the user might naturally type next into Claude Code.]\n\nFIRST:",
        )
    ],
    "claude-code-recap": [
        (
            "last_user",
            "The user stepped away and is coming back. Recap in under 40 words, 1-2 plain sentences",
        )
    ],
    "claude-code-memory": [
        (
            "last_user",
            "You are now acting as the memory extraction subagent. Analyze the most recent ~6 messages",
        )
    ],
    "claude-code-web-fetch": [
        (
            "first_user",
            "A page.\n---\n\nwhat is it\n\nProvide a concise response based only on the content above. In",
        )
    ],
    "codex-compaction": [
        (
            "last_user",
            "You are performing a CONTEXT CHECKPOINT COMPACTION. Create a handoff summary for another LLM "
            "that will resume the task.\n\nInclude:",
        )
    ],
    "codex-title": [("system", "Generate a concise, single-line task title of at most 6 words.")],
    "opencode-title": [
        ("system", "You are a title generator. You output ONLY a thread title. Nothing else.\n\n<task>")
    ],
    "opencode-compaction": [
        (
            "system",
            "You are a context summarization agent. You are given a conversation between a user and",
        ),
        (
            "last_user",
            "<conversation>…</conversation>\nCreate a new anchored summary from the conversation history in "
            "the <conversation> tags above so another coding agent can continue the work.",
        ),
    ],
    "opencode-summary": [
        ("system", "Summarize what was done in this conversation. Write like a pull request description.\n")
    ],
    "qwen-code-compaction": [
        (
            "system",
            "\nYou are the component that summarizes internal chat history into a given structure.\n\nWhen",
        ),
        ("last_user", "First, reason in your scratchpad. Then, generate the <state_snapshot>."),
    ],
    "qwen-code-next-speaker": [
        (
            "last_user",
            "Analyze *only* the content and structure of your immediately preceding response (your last turn",
        )
    ],
    "session-name": [
        ("last_user", "Generate a short kebab-case name (2-4 words) that captures the main topic of this")
    ],
    "chat-task": [
        (
            "first_user",
            "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.",
        )
    ],
    "title": [
        ("first_user", "Generate a title for this conversation:\n"),
        ("system", "Please write a short, descriptive title for the following chat."),
    ],
    "summary": [("system", "Summarize the conversation between the user and the assistant.")],
}
ASK = [(name, where, text) for name, prompts in PROMPTS.items() for where, text in prompts]


def test_every_rule_has_its_real_words() -> None:
    assert {rule.name for rule in RULES} == set(PROMPTS)


@pytest.mark.parametrize(("name", "where", "text"), ASK, ids=[f"{n}-{w}" for n, w, _ in ASK])
def test_a_known_prompt(name: str, where: str, text: str) -> None:
    """Beside the agent's own line, whichever comes first."""
    rule = next(rule for rule in RULES if rule.name == name)
    aside = {
        "system": [Message("system", text), user("the text")],
        "first_user": [user(text)],
        "last_user": [SYSTEM, user("do it"), said("done"), user(text)],
    }[where]
    expected = Label(rule.label, f"rule:{name}")
    for order in ("before", "after"):
        recorder = Recorder()
        if order == "before" and where != "last_user":
            recorder.run(aside, said("x"))
        recorder.run([SYSTEM, user("do it")], said("done"), TOOLS)
        if order == "after" or where == "last_user":
            recorder.run(aside, said("x"), () if rule.bare or where == "first_user" else TOOLS)
        found = labels(recorder.tree.turns())
        assert list(found.values()).count(expected) == 1
        assert Label("main", "inferred") in found.values()
        assert check_samples(recorder.rows()) == []


def test_patterns_begin_where_they_stand() -> None:
    """A prompt inside other text is somebody's talk about it."""
    for rule in RULES:
        pattern = re.sub(r"^\(\?[a-z]+\)", "", rule.pattern)
        assert pattern.startswith((r"\A", "^", r"(?:\A|\n)")), rule.name
    recorder = Recorder()
    recorder.run([user("What does 'You are a title generator.' mean?")], said("a"))
    recorder.run([user("u"), said(None, call()), result(PROMPTS["codex-compaction"][0][1])], said("b"))
    assert set(told_by(recorder)) == {"inferred"}


def test_a_bare_rule_leaves_requests_with_tools_alone() -> None:
    recorder = Recorder()
    recorder.run([user("Write a title for this conversation, then publish it.")], said("a"), TOOLS)
    assert names(recorder) == ["main"]


# -- what the caller says


def test_the_callers_label_holds_for_what_continues_it() -> None:
    recorder = Recorder()
    u = user("u")
    recorder.run([u], said("a"), TOOLS, **by_caller("planner"))
    recorder.run([u, said("a"), user("v")], said("b"), TOOLS)
    recorder.run([u, said("a"), user("v"), said("b"), user("w")], said("c"), TOOLS, **by_caller("worker"))
    recorder.run([u, said("a"), user("v"), said("b"), user("w"), said("c"), user("x")], said("d"), TOOLS)
    recorder.run([u, said("a"), user("other")], said("e"), TOOLS)  # forked from the first
    recorder.run([user("another")], said("f"), TOOLS)
    assert names(recorder) == ["planner", "planner", "worker", "worker", "planner", "main"]
    assert told_by(recorder) == ["caller"] * 5 + ["inferred"]


def test_the_caller_knows_better_than_a_rule() -> None:
    recorder = Recorder()
    recorder.run([user("quota")], said("a"), **by_caller("main"))
    recorder.run([user("other")], said("b"), TOOLS)
    assert labels(recorder.tree.turns()) == {
        "t1": Label("main", "caller"),
        "t2": Label("subagent", "inferred"),
    }


def test_a_branch_is_its_labels() -> None:
    """Turns of other labels in one path: each is trained where the sample says so, and nowhere else."""
    recorder = Recorder()
    history = [user("u")]
    for index, label in enumerate(["a", "b", "b", "a", "c"]):
        reply = said(f"r{index}")
        recorder.run(history, reply, TOOLS, **by_caller(label))
        history += [reply, user(f"u{index}")]
    rows = recorder.rows()
    assert check_samples(rows) == []
    assert [
        (r["sample_id"], r["label"], r["branch_reason"], [t["turn_id"] for t in r["turns"] if t["trained"]])
        for r in rows
    ] == [
        ("t3", "b", "label_changed", ["t2", "t3"]),
        ("t4", "a", "root", ["t1", "t4"]),
        ("t5", "c", "label_changed", ["t5"]),
    ]
    assert [t["label"] for t in rows[2]["turns"]] == ["a", "b", "b", "a", "c"]


# -- what the conversations tell


def test_main_is_the_first_conversation_with_tools() -> None:
    recorder = Recorder()
    recorder.run([user("an unknown auxiliary prompt")], said("x"))
    recorder.run([SYSTEM, user("task")], said(None, call(arguments='{"prompt": "SUBTASK: run ls"}')), TOOLS)
    recorder.run([user("SUBTASK: run ls")], said("y"))  # no tools, but a tool call asked for it
    recorder.run([user("look around")], said("z"), OTHER_TOOLS)
    recorder.run([user("another auxiliary prompt")], said("x"))
    assert names(recorder) == ["auxiliary", "main", "subagent", "subagent", "auxiliary"]
    assert set(told_by(recorder)) == {"inferred"}


def test_without_tools_main_is_the_first_that_no_rule_claims() -> None:
    recorder = Recorder()
    recorder.run([Message("system", PROMPTS["opencode-title"][0][1]), user("t")], said("x"))
    recorder.run([user("task")], said("y"))
    recorder.run([user("other")], said("z"))
    assert names(recorder) == ["auxiliary", "main", "auxiliary"]


def test_a_conversation_has_tools_if_it_ever_has() -> None:
    recorder = Recorder()
    recorder.run([user("plan")], said("a plan"))
    recorder.run([user("helper")], said("x"), OTHER_TOOLS)
    recorder.run([user("plan"), said("a plan"), user("go")], said("y"), TOOLS)
    assert [t.branch_reason for t in recorder.tree.turns()] == ["root", "new_conversation", "tools_changed"]
    assert names(recorder) == ["main", "subagent", "main"]


def branches_off(reason: str) -> tuple[Sequence[Message], tuple[Json, ...], Json]:
    u, v = user("task"), user("v")
    return {
        "edited_history": ([SYSTEM, u, said("edited"), v], TOOLS, {}),
        "tools_changed": ([SYSTEM, u, said("a"), v], OTHER_TOOLS, {}),
        "template_arguments_changed": ([SYSTEM, u, said("a"), v], TOOLS, {"x": 1}),
        "resampled": ([SYSTEM, u], TOOLS, {}),
        "compacted": ([SYSTEM, user(f"{SUMMARY} Go on."), said("ok"), v], TOOLS, {}),
    }[reason]


@pytest.mark.parametrize(
    "reason", ["edited_history", "tools_changed", "template_arguments_changed", "resampled", "compacted"]
)
@pytest.mark.parametrize("label", [None, "solver"])
def test_a_branch_has_the_label_of_the_line_that_it_comes_from(reason: str, label: str | None) -> None:
    recorder = Recorder()
    recorder.run([SYSTEM, user("task")], said("a"), TOOLS, **(by_caller(label) if label else {}))
    recorder.run([user("helper")], said("b"), TOOLS)
    compaction = Message("user", PROMPTS["claude-code-compaction"][1][1])
    recorder.run([SYSTEM, user("task"), said("a"), compaction], said(SUMMARY), TOOLS)
    made = recorder.run(branches_off(reason)[0], said("new"), *branches_off(reason)[1:])
    assert made.branch_reason == reason
    found = labels(recorder.tree.turns())
    assert found["t4"] == found["t1"] == Label(label or "main", "caller" if label else "inferred")
    assert check_samples(recorder.rows()) == []


def test_a_subagents_branch_is_a_subagents() -> None:
    recorder = Recorder()
    recorder.run([SYSTEM, user("task")], said("a"), TOOLS)
    recorder.run([Message("system", "helper"), user("x")], said("b"), OTHER_TOOLS)
    recorder.run([Message("system", "helper"), user("x"), said("edited"), user("y")], said("c"), OTHER_TOOLS)
    assert names(recorder) == ["main", "subagent", "subagent"]


def test_of_equal_beginnings_the_one_with_the_same_tools_counts() -> None:
    recorder = Recorder()
    recorder.run([SYSTEM, user("task")], said("a"), TOOLS)
    recorder.run([SYSTEM, user("helper")], said("b"), OTHER_TOOLS)
    recorder.run([SYSTEM, user("task!"), said("edited"), user("v")], said("c"), TOOLS)
    recorder.run(
        [SYSTEM, user("helper"), said("b"), user("v")], said("c"), TOOLS
    )  # nearer: a longer beginning
    assert names(recorder) == ["main", "subagent", "main", "subagent"]


def test_a_dated_system_prompt_stays_with_its_tools() -> None:
    """Nothing is shared but the tools; a known call beside it has them too."""
    recorder = Recorder()
    recorder.run([Message("system", "It is Monday."), user("task")], said("a"), TOOLS)
    recorder.run([user("Warmup")], said("b"), TOOLS)
    made = recorder.run(
        [Message("system", "It is Tuesday."), user("task"), said("a"), user("v")], said("c"), TOOLS
    )
    assert made.branch_reason == "edited_history"
    recorder.run([Message("system", "few shots"), user("q"), said("shot"), user("r")], said("d"), OTHER_TOOLS)
    recorder.run([Message("system", "few shots, no tools"), user("q"), said("shot"), user("r")], said("d"))
    assert names(recorder) == ["main", "auxiliary", "main", "subagent", "auxiliary"]


@pytest.mark.parametrize("how", ["in its own line", "without tools", "from outside", "an unknown prompt"])
def test_a_compacted_line_goes_on_under_its_label(how: str) -> None:
    """Claude Code asks at the end of the history; Codex too, without tools; OpenCode and Qwen ask another."""
    recorder = Recorder()
    history = [SYSTEM, user("task"), said("a"), user("v"), said("b")]
    recorder.run(history[:2], said("a"), TOOLS)
    recorder.run(history[:4], said("b"), TOOLS)
    ask, outside = user(PROMPTS["codex-compaction"][0][1]), Message("system", "You summarize.")
    if how == "from outside":
        outside = Message("system", PROMPTS["opencode-compaction"][0][1])
    request, tools = {
        "in its own line": ([*history, ask], TOOLS),
        "without tools": ([*history, ask], ()),
        "from outside": ([outside, user(PROMPTS["opencode-compaction"][1][1])], ()),
        "an unknown prompt": ([outside, user("<conversation>…")], ()),
    }[how]
    recorder.run(request, said(SUMMARY), tools)
    after = [SYSTEM, user("task"), user(f"Another model began. Its summary:\n{SUMMARY}")]
    made = recorder.run(after, said("c"), TOOLS)
    recorder.run([*after, said("c"), user("w")], said("d"), TOOLS)
    assert made.branch_reason == "compacted"
    aside = "auxiliary" if how == "an unknown prompt" else "compaction"
    assert names(recorder) == ["main", "main", aside, "main", "main"]
    rows = recorder.rows()
    assert check_samples(rows) == []
    trained = {r["label"]: [t["turn_id"] for t in r["turns"] if t["trained"]] for r in rows}
    assert trained[aside] == ["t3"]
    assert sorted(t for r in rows if r["label"] == "main" for t in (x["turn_id"] for x in r["turns"])) == [
        "t1", "t2", "t4", "t5"
    ]  # fmt: skip


def test_an_agent_without_tools_and_system_prompt_is_known_by_its_summary() -> None:
    recorder = Recorder()
    recorder.run([user("task")], said("a"))
    recorder.run([user("task"), said("a"), user("sum up, in words that no rule knows")], said(SUMMARY))
    assert recorder.run([user(f"So far: {SUMMARY}")], said("b")).branch_reason == "compacted"
    assert names(recorder) == ["main", "main", "main"]


def test_what_is_asked_at_the_end_of_the_line_is_no_part_of_it() -> None:
    """A suggestion between two turns, which calls a tool; the agent's own line goes on as if it were not."""
    recorder = Recorder()
    history = [user("u"), said("a")]
    recorder.run(history[:1], said("a"), TOOLS)
    suggestion = user(PROMPTS["claude-code-suggestion"][0][1])
    recorder.run([*history, suggestion], said(None, call()), TOOLS)
    recorder.run([*history, suggestion, said(None, call()), result("x")], said("b"), TOOLS)
    recorder.run([*history, user("v")], said("c"), TOOLS)
    assert names(recorder) == ["main", "auxiliary", "auxiliary", "main"]
    rows = recorder.rows()
    assert check_samples(rows) == []
    assert {r["label"]: [t["turn_id"] for t in r["turns"] if t["trained"]] for r in rows} == {
        "auxiliary": ["t2", "t3"],
        "main": ["t1", "t4"],
    }


def test_an_agent_that_keeps_the_summary_goes_on() -> None:
    recorder = Recorder()
    history = [user("u"), said("a"), user(PROMPTS["claude-code-compaction"][1][1]), said(SUMMARY), user("v")]
    for size in (1, 3, 5):
        recorder.run(history[:size], said(["a", SUMMARY, "c"][size // 2]), TOOLS)
    assert names(recorder) == ["main", "compaction", "main"]
    assert [(r["label"], r["branch_reason"]) for r in recorder.rows()] == [
        ("compaction", "label_changed"),
        ("main", "root"),
    ]


def test_choices_are_one_request() -> None:
    recorder = Recorder()
    first = recorder.run([user("u")], said("a"), **by_caller("x"))
    second = turn(
        "t9",
        branch_reason="choice",
        messages=(user("u"),),
        origin=Origin("chat", "d", first.turn_id),
        prompt=[1],
    )
    recorder.tree.commit(second)
    assert names(recorder) == ["x", "x"]


def test_what_counts_as_a_summary() -> None:
    assert summary_of(turn(reply=said(SUMMARY))) == SUMMARY
    assert (
        summary_of(turn(reply=said(f"<analysis>a</analysis>\n<summary>\n{SUMMARY}\n</summary>\n"))) == SUMMARY
    )
    assert summary_of(turn(reply=said("too short"))) is None
    assert summary_of(turn(reply=said("x" * 60 + "<summary>short</summary>"))) is None
    assert summary_of(turn(reply=said(SUMMARY, call()))) is None
    assert summary_of(turn(reply=said(None))) is None


# -- always

WORDS = st.sampled_from(["u", "quota", "SUBTASK: run ls", PROMPTS["codex-compaction"][0][1], SUMMARY])
REPLY = st.sampled_from(
    [
        said("a"),
        said(SUMMARY),
        said(None, call(arguments='{"p": ["SUBTASK: run ls"]}')),
        said("b", call(arguments="{")),
    ]
)
SYSTEMS = st.sampled_from([None, "s", PROMPTS["opencode-title"][0][1]])


@st.composite
def sessions(draw: st.DrawFn) -> list[Turn]:
    """Requests of every kind, each a cut and continued history of an earlier one."""
    recorder = Recorder()
    histories: list[list[Message]] = [[]]
    for _ in range(draw(st.integers(1, 8))):
        system = draw(SYSTEMS)
        history = list(draw(st.sampled_from(histories)))
        history = history[: draw(st.integers(0, len(history)))] if draw(st.booleans()) else history
        history = history or ([Message("system", system)] if system else [])
        calls = history[-1].tool_calls if history else ()
        new = [result("r", calls[0].id)] if calls and draw(st.booleans()) else [user(draw(WORDS))]
        reply = draw(REPLY)
        label = draw(st.sampled_from([None, None, None, "main", "x"]))
        tools = draw(st.sampled_from([(), TOOLS, TOOLS, OTHER_TOOLS]))
        recorder.run([*history, *new], reply, tools, origin=Origin("chat", "", "", label))
        histories.append([*history, *new, reply])
    return list(recorder.tree.turns())


@settings(deadline=None, max_examples=150)
@given(sessions())
def test_labels_always(turns: list[Turn]) -> None:
    found = labels(turns)
    assert list(found) == [t.turn_id for t in turns]
    assert labels(turns) == found
    by_id = {t.turn_id: t for t in turns}
    held: set[str | None] = set()  # where the caller's word holds
    for t in turns:
        label = found[t.turn_id]
        assert label.name
        if t.origin.label is not None:
            assert label == Label(t.origin.label, "caller")
        elif t.parent_id in held:
            assert label == found[t.parent_id or ""]
        if t.origin.label is not None or t.parent_id in held:
            held.add(t.turn_id)
        assert label.by != "caller" or any(label.name == each.origin.label for each in by_id.values())
    recorder = Recorder()
    for t in turns:
        recorder.tree.commit(t)
    rows = recorder.rows()
    assert check_samples(rows) == []
    leaves = set(by_id) - {t.parent_id for t in turns}
    assert leaves <= {r["sample_id"] for r in rows}
    for row in rows:
        assert json.loads(row["messages"])
        assert row["turns"][-1]["trained"]


def test_the_control_labels_that_are_mixed_up_are_seen() -> None:
    recorder = Recorder()
    recorder.run([user("u")], said("a"), TOOLS)
    recorder.run([user("u"), said("a"), user("v")], said("b"), TOOLS, **by_caller("x"))
    rows = recorder.rows()
    assert check_samples(rows) == []
    assert [r["label"] for r in rows] == ["main", "x"]
    rows[1]["turns"][0]["label"] = "x"
    assert check_samples(rows) == ["session s: turn t1 differs between samples t1 and t2"]


def test_a_long_session_costs_what_it_is_long() -> None:
    """Twice the turns, about twice the work: counted, not timed."""
    sizes: list[int] = []
    for num_turns in (100, 200):
        recorder = Recorder()
        history: list[Message] = [SYSTEM, user("u")]
        for index in range(num_turns):
            reply = said(None, call(arguments=f'{{"n": {index}}}'))
            recorder.run(history, reply, TOOLS)
            history += [reply, result(f"r{index}")]
        turns = list(recorder.tree.turns())
        looked = 0

        class Counted(str):
            __slots__ = ()

            def strip(self, *chars: Any) -> str:
                nonlocal looked
                looked += 1
                return str(self)

        for t in turns:
            object.__setattr__(t, "reply", Message("assistant", Counted("x" * 50), None, t.reply.tool_calls))
        labels(turns)
        sizes.append(looked)
    assert 0 < sizes[1] <= 2 * sizes[0]
