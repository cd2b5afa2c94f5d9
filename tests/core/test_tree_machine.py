"""Random agents against a tree and its store, beside a model that knows no digests and no trie.

The model keeps conversations as lists of what was meant, and compares a request with each of them in turn.
What the tree answers must be what the model finds; what it exports must hold every invariant; what the store
gives back must be the same tree.
"""

import asyncio
import json
import random
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from recorded import Recorder, new_messages, record, turn

from tokentape.export.samples import samples, to_json_rows
from tokentape.gateway.session import restore
from tokentape.invariants import check_samples
from tokentape.store import SQLiteStore
from tokentape.tape import Origin, Turn
from tokentape.tree import BranchReason
from tokentape.types import Json, Message, Prompt, ToolCall, VersionSpan

# Small alphabets: the same words must come again for other reasons, or nothing is ever ambiguous.
WORDS = st.sampled_from(["a", "b"])
THOUGHTS = st.sampled_from([None, "", "r1", "r2"])
ARGUMENTS = st.sampled_from(['{"x": 1, "y": {"p": 1, "q": [2.0]}}', '{"x": 2}', "{}", '{"x": '])
CALLS = st.lists(st.tuples(st.sampled_from(["f", "g"]), ARGUMENTS), max_size=2)
FRAMES: list[tuple[tuple[Json, ...], Json]] = [
    ((), {}),
    (({"name": "f", "parameters": {"a": 1, "b": 2}},), {}),
    (({"name": "f", "parameters": {"a": 1, "b": 2}}, {"name": "g"}), {}),
    ((), {"enable_thinking": False, "depth": {"a": 1, "b": 2}}),
]


@dataclass(frozen=True)
class Said:
    """What a message means. `arguments` are Python values, `answers` the position of the answered call."""

    role: str
    text: str
    calls: tuple[tuple[str, str], ...] = ()
    answers: int = -1
    thought: str = ""


@dataclass(frozen=True)
class Conversation:
    """A committed turn as the model knows it: everything said up to its reply, in a frame."""

    turn: Turn
    frame: int
    said: tuple[Said, ...]


def meant(messages: Sequence[Message]) -> tuple[Said, ...]:
    """What messages mean, written without the tree's digests: values compared as values."""
    out: list[Said] = []
    calls: tuple[ToolCall, ...] = ()
    taken: set[int] = set()
    for message in messages:
        text = message.content or ""
        answers = -1
        if message.role == "assistant":
            text, calls, taken = text.strip(), message.tool_calls, set()
        elif message.role == "tool":
            at = [i for i, c in enumerate(calls) if c.id == (message.tool_call_id or "")]
            answers = next((i for i in at if i not in taken), -1)
            taken.add(answers)
        thought = (message.reasoning or "").strip() if message.role == "assistant" else ""
        out.append(
            Said(
                message.role,
                text,
                tuple((c.name, value_of(c.arguments)) for c in message.tool_calls),
                answers,
                thought,
            )
        )
    return tuple(out)


def value_of(text: str) -> str:
    try:
        return repr(ordered(json.loads(text)))
    except ValueError:
        return f"text {text}"


def ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((k, ordered(v)) for k, v in value.items())
    if isinstance(value, list):
        return [ordered(v) for v in value]
    return int(value) if isinstance(value, float) and value == int(value) else value


def replays(request: Said, recorded: Said) -> bool:
    """Whether a replayed message stands for a recorded one: thoughts may be dropped, not changed."""
    if (request.role, request.text, request.calls, request.answers) != (
        recorded.role, recorded.text, recorded.calls, recorded.answers,
    ):  # fmt: skip
        return False
    return not request.thought or request.thought == recorded.thought


class Agents(RuleBasedStateMachine):
    """Agents share a session: each rule is one request that one of them may send."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self.conversations: list[Conversation] = []
        self.prompts: dict[str, Prompt] = {}
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "store.sqlite"
        self.runner = asyncio.Runner()

    @initialize()
    def open(self) -> None:
        self.store = SQLiteStore(self.path)
        self.do(self.store.put_session(record()))

    def teardown(self) -> None:
        self.do(self.store.aclose())
        self.runner.close()
        self.directory.cleanup()

    def do(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    # -- one request

    def send(self, messages: Sequence[Message], frame: int, reply: Message, data: st.DataObject) -> None:
        """Ask the tree, compare with the model, sample, store, commit: in the gateway's order."""
        said = meant(messages)
        parent, num_matched, reason = self.recorder.plan(messages, *FRAMES[frame])
        expected = self.expected(said, frame)
        assert (parent, num_matched) == ((expected.turn, len(expected.said)) if expected else (None, 0)), (
            "another turn is continued than the model says"
        )
        assert reason == self.reason(expected, said, frame)
        size = data.draw(st.integers(0, 3), label="sampled tokens")
        cut = data.draw(st.integers(0, size), label="weights change at")
        turn_id = f"t{next(self.recorder.names)}"
        label = data.draw(st.sampled_from([None, None, None, "x", "main"]), label="label")
        made = turn(
            turn_id,
            parent_id=parent.turn_id if parent else None,
            branch_reason=reason,
            prompt=[next(self.recorder.ids) for _ in range(data.draw(st.integers(0, 2), label="new ids"))],
            completion=[next(self.recorder.ids) for _ in range(size)],
            logprobs=array("f", [-0.1 * (i + 1) for i in range(size)]),
            versions=tuple(VersionSpan(f"v{a}", a, b) for a, b in ((0, cut), (cut, size)) if a < b),
            finish_reason=data.draw(st.sampled_from(["stop", "length"])),
            messages=new_messages(messages, num_matched, parent),
            reply=reply,
            tools=FRAMES[frame][0],
            arguments=FRAMES[frame][1],
            origin=Origin("chat", turn_id, turn_id, label),
        )
        self.do(self.store.put_turns("s", [made]))
        self.recorder.tree.commit(made)
        self.prompts[made.turn_id] = self.recorder.tree.prompt(made.turn_id)
        before = expected.said if expected else ()
        self.conversations.append(Conversation(made, frame, (*before, *said[num_matched:], *meant([reply]))))

    def expected(self, said: tuple[Said, ...], frame: int) -> Conversation | None:
        """The longest conversation that the request replays, the latest of equals: one look at each."""
        found = None
        for c in self.conversations:
            if (
                c.frame == frame
                and self.is_prefix(c.said, said)
                and (not found or len(c.said) >= len(found.said))
            ):
                found = c
        return found

    @staticmethod
    def is_prefix(recorded: tuple[Said, ...], said: tuple[Said, ...]) -> bool:
        return len(recorded) <= len(said) and all(map(replays, said, recorded))

    def reason(self, parent: Conversation | None, said: tuple[Said, ...], frame: int) -> str | None:
        """Why the request starts a branch, told from the conversations alone."""
        new = said[len(parent.said) :] if parent else said
        speaks = any(m.role == "assistant" for m in new)
        same = any(
            c.frame == frame and len(c.said) == len(said) + 1 and self.is_prefix(c.said[:-1], said)
            for c in self.conversations
        )
        if parent is not None:
            children = [c for c in self.conversations if c.turn.parent_id == parent.turn.turn_id]
            if not children:
                return None
            if speaks:
                return BranchReason.EDITED_HISTORY
            whole = (*parent.said, *new)
            same = any(
                c.frame == frame and len(c.said) == len(whole) + 1 and c.said[:-1] == whole
                for c in self.conversations
            )
            return BranchReason.RESAMPLED if same else BranchReason.FORKED
        if not self.conversations:
            return BranchReason.ROOT
        if same:
            return BranchReason.RESAMPLED
        if not speaks:
            return BranchReason.NEW_CONVERSATION
        other = [
            max(
                (len(c.said) for c in self.conversations if c.frame == f and self.is_prefix(c.said, said)),
                default=0,
            )
            for f in range(len(FRAMES))
        ]
        if not any(other):
            return BranchReason.EDITED_HISTORY
        tied = [f for f, n in enumerate(other) if n == max(other)]
        roots = [c.frame for c in self.conversations if c.turn.parent_id is None]
        nearest = min(tied, key=roots.index)
        return (
            BranchReason.TOOLS_CHANGED
            if FRAMES[nearest][0] != FRAMES[frame][0]
            else BranchReason.ARGUMENTS_CHANGED
        )

    # -- what agents do

    def reply(self, data: st.DataObject) -> Message:
        calls = data.draw(CALLS, label="calls")
        return Message(
            "assistant",
            data.draw(st.sampled_from([None, "", "a", "b", " a\n"])),
            data.draw(THOUGHTS),
            tuple(ToolCall(f"c{i}", name, arguments) for i, (name, arguments) in enumerate(calls)),
        )

    def transcript(self, data: st.DataObject) -> tuple[list[Message], int]:
        """A recorded conversation as its agent remembers it."""
        c = data.draw(st.sampled_from(self.conversations), label="conversation")
        path = self.recorder.tree.path(c.turn.turn_id)
        return [m for t in path for m in (*t.messages, t.reply)], c.frame

    def new(self, messages: Sequence[Message], data: st.DataObject) -> list[Message]:
        """What an agent adds: results of the calls if there are any, in some order; or what the user says."""
        calls = messages[-1].tool_calls if messages else ()
        if not calls or data.draw(st.integers(0, 4)) == 0:
            return [Message("user", data.draw(WORDS))]
        order = data.draw(st.permutations(calls))
        return [
            Message("tool", data.draw(st.sampled_from(["a", "b", None])), tool_call_id=c.id) for c in order
        ]

    @rule(data=st.data(), frame=st.integers(0, len(FRAMES) - 1), system=st.booleans())
    def begin(self, data: st.DataObject, frame: int, system: bool) -> None:
        head = [Message("system", "s")] if system else []
        self.send([*head, Message("user", data.draw(WORDS))], frame, self.reply(data), data)

    @rule(data=st.data(), seed=st.integers(0, 1000))
    @precondition(lambda self: self.conversations)
    def go_on(self, data: st.DataObject, seed: int) -> None:
        """A replay with every harmless difference at once, and something new."""
        messages, frame = self.transcript(data)
        messages = rewritten(messages, random.Random(seed))
        self.send([*messages, *self.new(messages, data)], frame, self.reply(data), data)

    @rule(data=st.data(), seed=st.integers(0, 1000), seeds=st.integers(2, 3))
    @precondition(lambda self: self.conversations)
    def retry(self, data: st.DataObject, seed: int, seeds: int) -> None:
        messages, frame = self.transcript(data)
        for offset in range(seeds - 1):
            self.send(rewritten(messages[:-1], random.Random(seed + offset)), frame, self.reply(data), data)

    @rule(data=st.data())
    @precondition(lambda self: self.conversations)
    def edit(self, data: st.DataObject) -> None:
        """One message of the history changed, dropped, or put in."""
        messages, frame = self.transcript(data)
        at = data.draw(st.integers(0, len(messages) - 1))
        how = data.draw(st.sampled_from(["text", "drop", "insert", "thought", "calls", "answer"]))
        message = messages[at]
        if how == "text":
            messages[at] = msgspec.structs.replace(message, content=(message.content or "") + "!")
        elif how == "drop":
            del messages[at]
        elif how == "insert":
            messages.insert(at, self.reply(data))
        elif how == "thought":
            messages[at] = msgspec.structs.replace(message, reasoning="invented")
        elif how == "calls":
            messages[at] = msgspec.structs.replace(message, tool_calls=message.tool_calls[1:])
        else:
            messages[at] = msgspec.structs.replace(message, tool_call_id="c1")
        self.send([*messages, *self.new(messages, data)], frame, self.reply(data), data)

    @rule(data=st.data(), frame=st.integers(0, len(FRAMES) - 1))
    @precondition(lambda self: self.conversations)
    def change_the_frame(self, data: st.DataObject, frame: int) -> None:
        messages, _ = self.transcript(data)
        self.send([*messages, *self.new(messages, data)], frame, self.reply(data), data)

    @rule(data=st.data())
    @precondition(lambda self: self.conversations)
    def fork(self, data: st.DataObject) -> None:
        """Back to any point of a conversation, another way on."""
        messages, frame = self.transcript(data)
        cut = data.draw(st.integers(0, len(messages)))
        messages = messages[:cut]
        self.send([*messages, *self.new(messages, data)], frame, self.reply(data), data)

    # -- what always holds

    @invariant()
    def every_sample_is_sound(self) -> None:
        rows = self.recorder.rows()
        assert check_samples(rows) == []
        assert {row["sample_id"] for row in rows} == self.ends()
        sampled = sum(len(c.turn.completion) for c in self.conversations)
        assert sum(sum(row["loss_mask"]) for row in rows) == sampled  # trained once, counted another way

    def ends(self) -> set[str]:
        """Turns with none of their own label behind them."""
        of = {turn_id: label.name for turn_id, label in self.recorder.tree.labels().items()}
        ends = set(of)
        for c in self.conversations:
            for before in self.recorder.tree.path(c.turn.turn_id)[:-1]:
                if of[before.turn_id] == of[c.turn.turn_id]:
                    ends.discard(before.turn_id)
        return ends

    @invariant()
    def every_prompt_is_an_exact_extension(self) -> None:
        for c in self.conversations:
            if c.turn.parent_id is not None:
                parent = self.recorder.tree.path(c.turn.parent_id)[-1]
                sent = [*self.prompts[parent.turn_id].to_list(), *parent.completion.ids]
                assert self.prompts[c.turn.turn_id].to_list() == [*sent, *c.turn.prompt.ids]
        for tape in self.recorder.tree.tapes():
            for span in tape.turns:
                assert list(tape.token_ids[: span.start]) == self.prompts[span.turn.turn_id].to_list()

    @rule(data=st.data(), seed=st.integers(0, 1000))
    @precondition(lambda self: self.conversations)
    def restart(self, data: st.DataObject, seed: int) -> None:
        """The process dies; the session goes on from the store as if nothing had been."""
        self.do(self.store.aclose())
        self.store = SQLiteStore(self.path)
        stored = self.do(self.store.load("s"))
        before, after = self.recorder.tree, restore(stored).tree
        assert list(after.turns()) == list(before.turns())
        rows = [to_json_rows(samples(record(), tree.tapes())) for tree in (before, after)]
        assert rows[0] == rows[1]
        other = Recorder(after)
        for _ in range(3):
            messages, frame = self.transcript(data)
            messages = rewritten(messages, random.Random(seed))[: data.draw(st.integers(1, len(messages)))]
            assert other.plan(messages, *FRAMES[frame]) == self.recorder.plan(messages, *FRAMES[frame])
        self.recorder.tree = after  # and from here on


def rewritten(messages: Sequence[Message], rng: random.Random) -> list[Message]:
    """The same conversation as an agent sends it back: everything harmless changed, by the toss of a coin."""
    names: dict[str, str] = {}
    out: list[Message] = []
    style = rng.choice(["keep", "renumber", "drop"])
    for message in messages:
        content, reasoning = message.content, message.reasoning
        if not (content or "").strip() and message.role == "assistant":
            content = rng.choice([None, "", "\n"])
        elif not content:
            content = rng.choice([None, ""])
        elif message.role == "assistant":
            content = rng.choice(["", " \n"]) + content.strip() + rng.choice(["", "\n\n"])
        if reasoning and rng.random() < 0.4:
            reasoning = rng.choice([None, ""])
        calls: list[ToolCall] = []
        if message.tool_calls:
            names = {}
        for call in message.tool_calls:
            names[call.id] = {"keep": call.id, "renumber": f"n{rng.random()}", "drop": call.id}[style]
            calls.append(ToolCall(names[call.id], call.name, rewritten_json(call.arguments, rng)))
        call_id = names.get(message.tool_call_id or "", message.tool_call_id)
        out.append(Message(message.role, content, reasoning, tuple(calls), call_id, message.name))
    return without_ids(out) if style == "drop" else out


def without_ids(messages: list[Message]) -> list[Message]:
    """Ids dropped where no meaning is lost with them: where results stand in the order of their calls."""
    out = list(messages)
    for at, message in enumerate(messages):
        size = len(message.tool_calls)
        behind = messages[at + 1 : at + 1 + size]
        following = [m.tool_call_id for m in messages[at + 1 :]][:size]
        if (
            not size
            or following != [c.id for c in message.tool_calls]
            or any(m.role != "tool" for m in behind)
        ):
            continue
        if any(m.role == "tool" for m in messages[at + 1 + size : at + 2 + size]):
            continue
        calls = tuple(ToolCall("", c.name, c.arguments) for c in message.tool_calls)
        out[at] = msgspec.structs.replace(out[at], tool_calls=calls)
        for index in range(at + 1, at + 1 + size):
            out[index] = msgspec.structs.replace(out[index], tool_call_id="" if index % 2 else None)
    return out


def rewritten_json(text: str, rng: random.Random) -> str:
    """JSON text with other spaces, other key orders, 2 for 2.0; text that is no JSON stays."""
    try:
        value = json.loads(text)
    except ValueError:
        return text

    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            items = list(value.items())
            rng.shuffle(items)
            return {k: shuffled(v) for k, v in items}
        if isinstance(value, list):
            return [shuffled(v) for v in value]
        if isinstance(value, float) and rng.random() < 0.5:
            return int(value)
        return value

    return json.dumps(shuffled(value), indent=rng.choice([None, 1]))


TestAgents = Agents.TestCase
TestAgents.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
