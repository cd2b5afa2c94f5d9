"""Text that does not count: exactly the volatile pieces, nothing around them, nobody else's words."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import Recorder, call, result, said, user

from tokentape.conversation import Conversation, know
from tokentape.errors import ConfigError
from tokentape.tree import Tree
from tokentape.types import Message
from tokentape.volatile import NOTHING, RULES, Superseded, Volatile, without

BILLING = "x-anthropic-billing-header: cc_version=2.1.197.d49; cc_entrypoint=sdk-cli;"
BOTH = Volatile.of(["billing-header", "date"])

# What agents send (Claude Code 2.1, Codex 0.169, OpenCode 1.18, Qwen Code 0.15), and forms that others use.
PIECES = {
    f"{BILLING}\n\nYou are a Claude agent.": " cc_version=2.1.197.d49; cc_entrypoint=sdk-cli;",
    f"{BILLING} cch=0a1f3;\nYou": " cc_version=2.1.197.d49; cc_entrypoint=sdk-cli; cch=0a1f3;",
    f"{BILLING} cc_is_subagent=true;\n\nYou": " cc_version=2.1.197.d49; cc_entrypoint=sdk-cli;",
    "<system-reminder>\n# currentDate\nToday's date is 2026-11-23.\n\n      IMPORTANT: this": "2026-11-23",
    "<current_date>2026-11-23</current_date>\n  <timezone>Etc/UTC</timezone>": "2026-11-23",
    "Platform: linux\n  Today's date: Mon Nov 23 2026\n</env>": "Mon Nov 23 2026",
    "Today's date is Monday, November 23, 2026 (formatted according to": "Monday, November 23, 2026",
    "Current date: 2026-11-23T10:11:12Z.": "2026-11-23T10:11:12Z",
    "The current date and time is 23 November 2026, 10:11 PM UTC": "23 November 2026, 10:11 PM UTC",
    "The current time is 10:11:12.": "10:11:12",
    "today is 11/23/2026, be kind": "11/23/2026",
}
WHOLE = (
    "cc_version=1; cc_entrypoint=cli;",
    f"What is {BILLING}",
    "x-anthropic-billing-header: cc_is_subagent=true;",
    "x-anthropic-billing-header: a secret plan;",
    "Released on 2026-11-23.",
    "Today is the day to ship version 2.0 of 3 services.",
    "The date is set by the court: 14 jurors, 2 judges.",
    "Time: take 5 minutes, date: none of your 3 business partners",
    "Today's date is unknown; the deadline is 2026-11-23.",
    "The current time is money. It is 10:11.",
    "today: 5 apples",
)


@pytest.mark.parametrize("text", PIECES)
def test_a_piece_is_what_changes_and_no_more(text: str) -> None:
    message = user(text)
    [(rule, start, end)] = BOTH.pieces(message)
    assert text[start:end] == PIECES[text]
    assert without(text, BOTH.pieces(message)) == [text[:start], rule, text[end:]]


@pytest.mark.parametrize("text", WHOLE)
def test_text_that_counts_to_the_letter(text: str) -> None:
    assert BOTH.pieces(user(text)) == []
    assert know(user(text), BOTH).base == know(user(text)).base


@pytest.mark.parametrize("message", [said(BILLING), result(BILLING), said("Today's date is 2026-11-23.")])
def test_what_was_sampled_or_returned_counts_to_the_letter(message: Message) -> None:
    assert BOTH.pieces(message) == []
    assert not know(message, BOTH).volatile
    assert know(message, BOTH).base == know(message).base


def test_without_rules_every_character_counts() -> None:
    for text in PIECES:
        assert know(user(text), NOTHING).base == know(user(text)).base
        assert know(user(text), NOTHING).base != know(user(text), BOTH).base


# -- no accident

RULE = Volatile.of([r"<a:\d+>", r"b=(\d+);"])
FIXED = st.text(alphabet='x \n\ufdd0\0;:"0', max_size=4)
NUMBER = st.integers(0, 20).map(str)
PARTS = st.lists(
    st.one_of(
        FIXED.map(lambda text: (None, text)),
        NUMBER.map(lambda n: (0, f"<a:{n}>")),
        NUMBER.map(lambda n: (1, n)),
    ),
    max_size=5,
)


def text_of(parts: list[tuple[int | None, str]]) -> str:
    return "".join(f"b={text};" if rule == 1 else text for rule, text in parts)


def counted(parts: list[tuple[int | None, str]]) -> str:
    """What counts, written for people: a text in which no piece can be mistaken for anything."""
    return "".join(repr(text)[1:-1] if rule is None else ["<A>", "b=<B>;"][rule] for rule, text in parts)


@settings(deadline=None, max_examples=300)
@given(PARTS, PARTS)
def test_texts_match_only_if_all_but_the_pieces_is_the_same(
    one: list[tuple[int | None, str]], other: list[tuple[int | None, str]]
) -> None:
    messages = [user(text_of(parts)) for parts in (one, other)]
    same = know(messages[0], RULE).base == know(messages[1], RULE).base
    assert same == (counted(one) == counted(other))
    if same:
        changes = RULE.superseded(*messages)
        pieces = [t for rule, t in one if rule is not None], [t for rule, t in other if rule is not None]
        assert [(c.recorded, c.asked) for c in changes] == [
            pair for pair in zip(*pieces, strict=True) if pair[0] != pair[1]
        ]


@settings(deadline=None)
@given(PARTS)
def test_a_text_that_looks_as_if_it_were_masked_is_not(parts: list[tuple[int | None, str]]) -> None:
    """The digest's own input, sent as text."""
    message = user(text_of(parts))
    masked = without(message.content or "", RULE.pieces(message))
    for lie in (str(masked), "".join(map(str, masked)), "\ufdd0".join(map(str, masked))):
        if lie != message.content and not RULE.pieces(user(lie)):
            assert (know(user(lie), RULE).base == know(message, RULE).base) == (lie == message.content)


def test_number_and_order_of_pieces_count() -> None:
    texts = ["<a:1>", "<a:1><a:1>", "<a:1>b=1;", "b=1;<a:1>", "b=1;", "b=;", "", "<a:>"]
    assert len({know(user(text), RULE).base for text in texts}) == len(texts)
    assert know(user("<a:1>"), RULE).base == know(user("<a:22>"), RULE).base
    assert know(user("<a:1>"), RULE).base != know(Message("system", "<a:1>"), RULE).base


def test_of_overlapping_pieces_the_first_counts() -> None:
    rules = Volatile.of(["bc+", "ab.", "x|yz?", "z+"])
    assert rules.pieces(user("abcc yz")) == [(1, 0, 3), (2, 5, 7)]
    assert Volatile.of(["a(b*)", "x(y)?"]).pieces(user("a abb x xy")) == [(0, 3, 5), (1, 9, 10)]  # "" is none
    assert Volatile.of(["ab?", "ab+"]).pieces(user("abb")) == [(0, 0, 2)]  # of equals the first rule


# -- rules as options


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("billing_header", "is no rule's name: billing-header, date"),
        ("dates", "is no rule's name"),
        ("(", "is neither a rule's name .*billing-header, date.* nor a regular expression"),
        ("x*", "matches the empty text"),
        ("", "matches the empty text"),
        ("$", "matches the empty text"),
        ("(a)(b)", "has 2 groups"),
    ],
)
def test_a_rule_that_cannot_be(rule: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--volatile {re.escape(repr(rule))} {words}"):
        Volatile.of([rule])


def test_a_rule_of_ones_own() -> None:
    rules = Volatile.of([r"run-id: (\w+)", "date"])
    old, new = user("run-id: a1\nToday is 2026-11-23"), user("run-id: b2\nToday is 2026-11-24")
    assert know(old, rules).base == know(new, rules).base
    assert rules.superseded(old, new) == [
        Superseded(r"run-id: (\w+)", "a1", "b2"),
        Superseded("date", "2026-11-23", "2026-11-24"),
    ]
    assert rules.superseded(old, old) == []


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_reads_a_long_prompt_quickly(rule: str) -> None:
    """No pattern may look at a prompt again and again: 1 MB of what it begins with."""
    text = {
        "billing-header": "x-anthropic-billing-header:" + " cch=2" * 200_000,
        "date": "today is current date and time is mon nov 1 " * 25_000,
    }[rule]
    assert Volatile.of([rule]).pieces(user(text)) == []


# -- in a tree


def test_a_changing_header_does_not_break_the_line() -> None:
    recorder = Recorder(Tree((), BOTH))

    def system(suffix: str, flag: str = "") -> Message:
        return Message("system", f"{BILLING.replace('d49', suffix)}{flag}\n\nYou are an agent.")

    def attach(*messages: Message) -> int:
        conversation = Conversation.of([recorder.tree.know(m) for m in messages])
        return recorder.tree.attach(next(iter(recorder.tree._roots)), conversation).num_matched

    recorder.run([system("d49"), user("u")], said(None, call()))
    history = [user("u"), said(None, call()), result("x")]
    assert attach(system("f9d"), *history) == 3
    assert attach(system("f9d", " cc_is_subagent=true;"), *history) == 0
    assert attach(Message("system", "You are an agent."), *history) == 0
    assert attach(Message("system", f"{BILLING}\n\nYou are another agent."), *history) == 0
