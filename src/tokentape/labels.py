"""Whose turn is it: the agent's own, a sub-agent's, an auxiliary call, a compaction?

Labels are told from the recorded turns alone, so that a better rule labels old sessions as well. First holds
what the caller says, then a rule that knows the prompt, then what is inferred from the conversations.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import msgspec

from tokentape.tape import BranchReason, Label, Turn
from tokentape.types import Message

Where: TypeAlias = Literal["system", "first_user", "last_user"]
_SYSTEM: tuple[Where, ...] = ("system",)
_FIRST: tuple[Where, ...] = ("first_user",)
_LAST: tuple[Where, ...] = ("last_user",)
_OPENING: tuple[Where, ...] = ("system", "first_user")


@dataclass(frozen=True, slots=True)
class Rule:
    """A prompt that is known.

    "system" and "first_user" stand at a conversation's beginning and label all of it; "last_user" is what a
    turn was asked, and labels that turn. `bare`: only where the request has no tools.
    """

    name: str
    label: str
    where: tuple[Where, ...]
    pattern: str
    bare: bool = False


RULES: tuple[Rule, ...] = (
    # Claude Code 2.1 (recorded, and read in its program)
    Rule("claude-code-subagent", "subagent", _SYSTEM,
         r"\Ax-anthropic-billing-header:[^\n]* cc_is_subagent=true;"),
    Rule("claude-code-compaction", "compaction", _LAST,
         r"(?m)^Your task is to create a detailed summary of "
         r"(?:the conversation so far|the RECENT portion of the conversation|this conversation)\b"),
    Rule("claude-code-summarizer", "compaction", _SYSTEM,
         r"(?m)^You are a helpful AI assistant tasked with summarizing conversations\."),
    Rule("claude-code-title", "auxiliary", _OPENING,
         r"(?m)^(?:Generate a concise, sentence-case title \("
         r"|You are coming up with a succinct title and git branch name"
         r"|Summarize this coding conversation in under "
         r"|Please write a 5-10 word title for the following conversation)", bare=True),
    Rule("claude-code-topic", "auxiliary", _SYSTEM,
         r"(?m)^Analyze if this message indicates a new conversation topic\.", bare=True),
    Rule("claude-code-quota", "auxiliary", _FIRST, r"\Aquota\Z", bare=True),
    Rule("claude-code-warmup", "auxiliary", _FIRST, r"(?m)^Warmup\Z"),
    Rule("claude-code-suggestion", "auxiliary", _LAST, r"(?m)^\[SUGGESTION MODE: "),
    Rule("claude-code-recap", "auxiliary", _LAST,
         r"(?m)^The user stepped away and is coming back\. Recap in under "),
    Rule("claude-code-memory", "auxiliary", _LAST,
         r"(?m)^You are now acting as the memory extraction subagent\."),
    Rule("claude-code-web-fetch", "auxiliary", _FIRST,
         r"(?m)^Provide a concise response based (?:only )?on the content above\.", bare=True),
    # Codex 0.169
    Rule("codex-compaction", "compaction", _LAST,
         r"\AYou are performing a CONTEXT CHECKPOINT COMPACTION\."),
    Rule("codex-title", "auxiliary", _OPENING,
         r"(?m)^Generate a concise, single-line task title of at most ", bare=True),
    # OpenCode 1.18
    Rule("opencode-title", "auxiliary", _SYSTEM, r"\AYou are a title generator\.", bare=True),
    Rule("opencode-compaction", "compaction", _SYSTEM, r"\AYou are a context summarization agent\."),
    Rule("opencode-compaction", "compaction", _LAST,
         r"(?m)^Create a new anchored summary from the conversation history in the <conversation> tags"),
    Rule("opencode-summary", "auxiliary", _SYSTEM,
         r"\ASummarize what was done in this conversation\. Write like a pull request description\.",
         bare=True),
    # Qwen Code 0.15
    Rule("qwen-code-compaction", "compaction", _SYSTEM,
         r"\A\s*You are the component that summarizes internal chat history into a given structure\."),
    Rule("qwen-code-compaction", "compaction", _LAST,
         r"\AFirst, reason in your scratchpad\. Then, generate the <state_snapshot>\."),
    Rule("qwen-code-next-speaker", "auxiliary", _LAST,
         r"\AAnalyze \*only\* the content and structure of your immediately preceding response "),
    # several
    Rule("session-name", "auxiliary", (*_OPENING, "last_user"),
         r"(?m)^Generate a short kebab-case name \(2-4 words\) ", bare=True),
    Rule("chat-task", "auxiliary", _OPENING,
         r"\A### Task:\s+(?:Generate a concise, 3-5 word title|Generate 1-3 broad tags"
         r"|Suggest 3-5 relevant follow-up)", bare=True),
    Rule("title", "auxiliary", _OPENING,
         r"(?i)\A\s*(?:please )?(?:generate|write|create|suggest) an? (?:[\w-]+,? ){0,3}title "
         r"(?:for|of|that|summari[sz]ing|based on) (?:[\w']+ ){0,6}(?:conversation|chat|session|thread)\b",
         bare=True),
    Rule("summary", "compaction", _SYSTEM,
         r"(?i)\A\s*(?:please |your task is to )?"
         r"(?:summari[sz]e|(?:create|write|provide) an? (?:[\w-]+,? ){0,3}summary of) (?:the|this|our) "
         r"(?:[\w-]+ ){0,2}(?:conversation|chat history|dialogue|transcript)\b", bare=True),
)  # fmt: skip
"""Known prompts; the first that fits counts. Rules of one name are one rule that looks in two places."""

_LINE = "(?m)^"
_PATTERNS = tuple((rule, re.compile(rule.pattern), rule.pattern.startswith(_LINE)) for rule in RULES)
# A long text is read once, not once for each of the rules that look at all its lines.
_ANY_LINE = re.compile(
    _LINE
    + "(?:"
    + "|".join(f"(?:{p.pattern.removeprefix(_LINE)})" for _, p, of_line in _PATTERNS if of_line)
    + ")"
)
_BEGINNINGS = {BranchReason.ROOT, BranchReason.NEW_CONVERSATION}
_MIN_SUMMARY = 40  # characters: a shorter reply may stand in any text
_APART = 8
_PIECE = _MIN_SUMMARY - _APART + 1
_MIN_TASK = 8


def labels(turns: Iterable[Turn]) -> dict[str, Label]:
    """The label of every turn of a session, by its id; `turns` in the order of their commits."""
    session = Labels()
    for turn in turns:
        session.add(turn)
    return session.of_turns()


def summary_of(turn: Turn) -> str | None:
    """What a later prompt would hold of this reply if it summed up the history; None: nothing that counts.

    Claude Code keeps what stands inside `<summary>` alone, others keep the whole reply (recorded).
    """
    text = turn.reply.content or ""
    if turn.reply.tool_calls or len(text) < _MIN_SUMMARY:
        return None
    inside = text.rpartition("<summary>")[2].partition("</summary>")[0].strip()
    return inside if len(inside) >= _MIN_SUMMARY else None


def told(messages: Iterable[Message]) -> str:
    """What system and user say, in one text."""
    return "\n\n".join(m.content or "" for m in messages if m.role in ("system", "user"))


@dataclass(eq=False, slots=True)
class _Conversation:
    """Lines that come from one beginning. `claimed`: the caller or a rule says what it is."""

    claimed: Label | None
    spawned: bool = False
    has_tools: bool = False


@dataclass(eq=False, slots=True)
class _Line:
    """Turns of one label: what is `known` of it, else what `source` is, else what its conversation is."""

    conversation: _Conversation
    known: Label | None
    source: "_Line | None" = None


_Step: TypeAlias = tuple[int, str, str, tuple[tuple[str, str], ...]]


@dataclass(eq=False, slots=True)
class Summary:
    """A text that several turns may have replied with. `num_ends`: as many of them as nothing follows.

    `asked_for` is the line of the latest that a rule calls a compaction, `unclaimed` the latest line that
    nobody says anything of; each with the turn's number.
    """

    num_ends: int = 0
    asked_for: "tuple[int, _Line] | None" = None
    unclaimed: "tuple[int, _Line] | None" = None


@dataclass(eq=False, slots=True)
class _Stretch:
    """A place in the trie of summaries, `size` characters before the next. `rests` are by their lengths."""

    size: int = _MIN_SUMMARY
    longer: "dict[str, _Stretch]" = field(default_factory=dict[str, "_Stretch"])
    rests: dict[int, dict[str, Summary]] = field(default_factory=dict[int, dict[str, Summary]])


class Summaries:
    """The summaries of a session: which of them does a text hold?

    It takes the time that it takes to read the text, however many there are. `_PIECE` characters from every
    `_APART`-th on are looked up: one of these pieces lies in the beginning of any summary. Behind a hit the
    summaries are a trie of stretches, each twice as long as the one before.
    """

    def __init__(self) -> None:
        self._offsets: dict[str, int] = {}  # where a piece stands in the beginnings of summaries: bit by bit
        self._start = _Stretch()

    def get(self, text: str) -> Summary:
        """The summary of this text, of `_MIN_SUMMARY` characters at least; made where it is new."""
        for offset in range(_APART):
            piece = text[offset : offset + _PIECE]
            self._offsets[piece] = self._offsets.get(piece, 0) | 1 << offset
        at, end = self._start, 0
        while len(text) - end >= at.size:
            piece = text[end : end + at.size]
            end += at.size
            at = at.longer.setdefault(piece, _Stretch(2 * at.size))
        return at.rests.setdefault(len(text) - end, {}).setdefault(text[end:], Summary())

    def in_text(self, text: str) -> Iterator[Summary]:
        """The summaries that stand in a text; one may come again."""
        offsets = self._offsets
        if not offsets:
            return
        for place in range(0, len(text) - _PIECE + 1, _APART):
            piece = text[place : place + _PIECE]
            if piece in offsets:
                for offset in range(min(_APART, place + 1)):
                    if offsets[piece] >> offset & 1:
                        yield from self._from(text, place - offset)

    def _from(self, text: str, end: int) -> Iterator[Summary]:
        """The summaries that begin at this place of a text."""
        at: _Stretch | None = self._start
        while at is not None:
            for size, rests in at.rests.items():
                summary = rests.get(text[end : end + size])
                if summary is not None:
                    yield summary
            at, end = at.longer.get(text[end : end + at.size]), end + at.size


@dataclass(slots=True)
class Labels:
    """The labels of a session's turns, kept as these come. Places are points in a trie of what was said."""

    conversations: list[_Conversation] = field(default_factory=list[_Conversation])
    summaries: Summaries = field(default_factory=Summaries)
    open: dict[str, Summary] = field(default_factory=dict[str, Summary])  # of turns that nothing follows
    lines: dict[str, _Line] = field(default_factory=dict[str, _Line])
    asked: dict[str, Label] = field(
        default_factory=dict[str, Label]
    )  # of turns, by a rule for what they were asked
    places: dict[_Step, int] = field(default_factory=dict["_Step", int])
    ends: dict[str, tuple[int, bytes]] = field(default_factory=dict[str, tuple[int, bytes]])
    seen: dict[tuple[int, bytes | None], _Line] = field(default_factory=dict[tuple[int, bytes | None], _Line])
    tasks: set[str] = field(default_factory=set[str])  # texts in the arguments of calls

    def add(self, turn: Turn) -> None:
        """The next turn."""
        parent = self.lines[turn.parent_id] if turn.parent_id is not None else None
        at, frame = self.ends[turn.parent_id] if turn.parent_id is not None else (0, _frame(turn))
        if parent is None:
            line = self._begin(turn, frame)
        else:
            line = parent
            own = turn.origin.label
            if own is not None and (parent.known is None or parent.known != Label(own, "caller")):
                line = _Line(parent.conversation, Label(own, "caller"))
        if line.known is None or line.known.by != "caller":
            label = self._asked(turn)
            if label is not None:
                self.asked[turn.turn_id] = label
        line.conversation.has_tools |= bool(turn.tools)
        if parent is None and turn.tools and not _is_aside(line.known):
            self.seen[at, frame] = line
        for message in (*turn.messages, turn.reply):
            at = self.places.setdefault(_step(at, message), len(self.places) + 1)
            self.seen[at, frame] = self.seen[at, None] = line
        self.ends[turn.turn_id] = at, frame
        self.lines[turn.turn_id] = line
        for call in turn.reply.tool_calls:
            self.tasks.update(_texts(call.arguments))
        self._keep_summary(turn, line)

    def of_turns(self) -> dict[str, Label]:
        """The label of every turn that was added."""
        main = self._main()
        of_line: dict[_Line, Label] = {}
        for line in self.lines.values():  # a source comes before the lines that have it
            if line in of_line:
                continue
            if line.known is not None:
                of_line[line] = line.known
            elif line.source is not None:
                of_line[line] = of_line[line.source]
            elif line.conversation is main:
                of_line[line] = Label("main", "inferred")
            else:
                agent = line.conversation.has_tools or line.conversation.spawned
                of_line[line] = Label("subagent" if agent else "auxiliary", "inferred")
        return {turn_id: self.asked.get(turn_id) or of_line[line] for turn_id, line in self.lines.items()}

    def _main(self) -> _Conversation | None:
        """The agent's own conversation, unless the caller says which it is."""
        if Label("main", "caller") in [c.claimed for c in self.conversations]:
            return None
        free = [c for c in self.conversations if c.claimed is None]
        return next((c for c in free if c.has_tools), free[0] if free else None)

    def _begin(self, turn: Turn, frame: bytes) -> _Line:
        """The line of a turn that continues none."""
        known = Label(turn.origin.label, "caller") if turn.origin.label is not None else None
        first = next((m.content or "" for m in turn.messages if m.role == "user"), "")
        if known is None:
            system = "\n\n".join(m.content or "" for m in _leading(turn.messages))
            known = _by_rule(turn, {"system": system, "first_user": first})
        source = self._source(turn, frame)
        if source is not None:
            return _Line(source.conversation, known, source)
        conversation = _Conversation(known, spawned=first.strip() in self.tasks)
        self.conversations.append(conversation)
        return _Line(conversation, known)

    def _source(self, turn: Turn, frame: bytes) -> _Line | None:
        """The recorded line that a root comes from; None where it is a conversation of its own."""
        if turn.branch_reason in _BEGINNINGS:
            return None
        nearest = self._nearest(turn.messages, frame)
        if turn.branch_reason != BranchReason.COMPACTED:
            return nearest
        quoted = list(self.summaries.in_text(told(turn.messages)))
        lines = [summary.asked_for for summary in quoted if summary.asked_for]
        if not lines and nearest is None:
            lines = [summary.unclaimed for summary in quoted if summary.unclaimed]
        return max(lines, key=lambda numbered: numbered[0])[1] if lines else nearest

    def _keep_summary(self, turn: Turn, line: _Line) -> None:
        """What later prompts may quote of a turn; its parent has a turn that follows now."""
        followed = self.open.pop(turn.parent_id or "", None)
        if followed is not None:
            followed.num_ends -= 1
        text = summary_of(turn)
        if text is None:
            return
        summary = self.open[turn.turn_id] = self.summaries.get(text)
        summary.num_ends += 1
        asked, number = self.asked.get(turn.turn_id), len(self.lines)
        if asked is not None and asked.name == "compaction" and not _is_aside(line.known):
            summary.asked_for = number, line
        if line.known is None:
            summary.unclaimed = number, line

    def _nearest(self, messages: Sequence[Message], frame: bytes) -> _Line | None:
        """The line that shares the longest beginning, of equals one in this frame; else one of its tools."""
        at, found = 0, self.seen.get((0, frame))
        for message in messages:
            step = _step(at, message)
            if step not in self.places:
                break
            at = self.places[step]
            found = self.seen.get((at, frame)) or self.seen[at, None]
        return found

    def _asked(self, turn: Turn) -> Label | None:
        """The label of what a turn was asked; a turn that only brings results goes on with its parent's."""
        question = next((m for m in reversed(turn.messages) if m.role in ("user", "assistant")), None)
        if question is not None and question.role == "user":
            return _by_rule(turn, {"last_user": question.content or ""})
        return self.asked.get(turn.parent_id or "") if question is None else None


def _is_aside(label: Label | None) -> bool:
    """Whether this is no agent that works on the task."""
    return label is not None and label.name in ("auxiliary", "compaction")


def _by_rule(turn: Turn, texts: Mapping[Where, str]) -> Label | None:
    by_line = {place: text for place, text in texts.items() if _ANY_LINE.search(text)}
    for rule, pattern, of_line in _PATTERNS:
        if rule.bare and turn.tools:
            continue
        among = by_line if of_line else texts
        if any(place in among and pattern.search(among[place]) for place in rule.where):
            return Label(rule.label, f"rule:{rule.name}")
    return None


def _leading(messages: Sequence[Message]) -> list[Message]:
    """The system messages that a conversation begins with."""
    end = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    return list(messages[:end])


def _frame(turn: Turn) -> bytes:
    return msgspec.json.encode((turn.tools, turn.arguments))


def _step(at: int, message: Message) -> _Step:
    text = message.content or ""
    calls = tuple((call.name, call.arguments) for call in message.tool_calls)
    return at, message.role, text.strip() if message.role == "assistant" else text, calls


def _texts(arguments: str) -> set[str]:
    """The texts in the arguments of a call that may be another agent's task."""
    try:
        left: list[Any] = [json.loads(arguments)]
    except (ValueError, RecursionError):
        return set()
    found: set[str] = set()
    while left:
        value = left.pop()
        if isinstance(value, str) and len(value.strip()) >= _MIN_TASK:
            found.add(value.strip())
        elif isinstance(value, dict):
            left += cast("dict[str, Any]", value).values()
        elif isinstance(value, list):
            left += cast("list[Any]", value)
    return found
