"""Turns for the core's tests: made by hand, token ids from a counter, no renderer and no engine."""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokentape.conversation import Conversation, frame_key, know
from tokentape.export.samples import samples, to_json_rows
from tokentape.store import SessionRecord
from tokentape.tape import Origin, Turn
from tokentape.tree import Tree
from tokentape.types import Json, Message, Sampling, TokenRun, ToolCall, VersionSpan

TOOLS: tuple[Json, ...] = (
    {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}},
)


def user(text: str) -> Message:
    return Message("user", text)


def said(text: str | None, *calls: ToolCall, reasoning: str | None = None) -> Message:
    return Message("assistant", text, reasoning, tuple(calls))


def call(name: str = "search", arguments: str = '{"q": "a"}', id: str = "c1") -> ToolCall:  # noqa: A002
    return ToolCall(id, name, arguments)


def result(text: str | None, call_id: str | None = "c1") -> Message:
    return Message("tool", text, tool_call_id=call_id)


def record(session_id: str = "s", **changes: Any) -> SessionRecord:
    return SessionRecord(**{"session_id": session_id, "state": "open", "created_at": 1.5, **changes})


def turn(turn_id: str = "t", **changes: Any) -> Turn:
    """A valid turn of its own; `completion` and `prompt` are lists, log-probabilities follow from the ids."""
    prompt: Sequence[int] = changes.pop("prompt", [1, 2, 3])
    completion: Sequence[int] = changes.pop("completion", [7, 8])
    values: dict[str, Any] = {
        "turn_id": turn_id,
        "parent_id": None,
        "branch_reason": "root",
        "prompt": TokenRun(prompt),
        "completion": TokenRun(completion),
        "logprobs": array("f", [-i / 8 for i in range(len(completion))]),
        "versions": (VersionSpan("v1", 0, len(completion)),) if completion else (),
        "logprob_basis": "sampled",
        "support": None,
        "routed_experts": None,
        "finish_reason": "stop",
        "stop_id": None,
        "messages": (user("hello"),),
        "reply": said("hi"),
        "in_reasoning": False,
        "parse_status": "ok",
        "attempts": (),
        "tools": (),
        "arguments": {},
        "sampling": Sampling(),
        "neutralised": (),
        "superseded": (),
        "origin": Origin("chat", turn_id, turn_id),
        "num_cached_tokens": 0,
        "created_at": 2.25,
    }
    return Turn(**values | changes)


def new_messages(messages: Sequence[Message], num_matched: int, parent: Turn | None) -> tuple[Message, ...]:
    """What a turn adds, as the gateway records it: results under the ids of the calls that were sampled."""
    out: list[Message] = []
    keys = Conversation.of([know(message) for message in messages]).keys_from(0)
    calls = parent.reply.tool_calls if parent is not None else ()
    for message, key in zip(messages[num_matched:], keys[num_matched:], strict=True):
        if message.role == "assistant":
            calls = ()  # what follows answers these calls
        known = 0 <= key.ordinal < len(calls)
        out.append(msgspec.structs.replace(message, tool_call_id=calls[key.ordinal].id) if known else message)
    return tuple(out)


@dataclass
class Recorder:
    """What the gateway does around a tree, with tokens that mean nothing: attach, sample, commit."""

    tree: Tree = field(default_factory=lambda: Tree(()))
    ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(100))
    names: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    sent: list[tuple[Sequence[Message], Conversation]] = field(default_factory=list)

    def plan(
        self, messages: Sequence[Message], tools: tuple[Json, ...] = (), arguments: Json | None = None
    ) -> tuple[Turn | None, int, str | None]:
        """The turn that a request continues, how many messages are recorded, why it starts a branch."""
        frame = frame_key(tools, arguments or {})
        conversation = self.conversation(messages)
        found = self.tree.attach(frame, conversation)
        parent_id = found.turn.turn_id if found.turn is not None else None
        reason = self.tree.branch_reason(parent_id, frame, conversation.keys_from(found.num_matched))
        return found.turn, found.num_matched, reason

    def conversation(self, messages: Sequence[Message]) -> Conversation:
        """A request's messages, read as the gateway reads them: behind those of an earlier request."""
        before = max(
            (one for one in self.sent[-4:] if list(one[0]) == list(messages[: len(one[0])])),
            key=lambda one: len(one[0]),
            default=((), Conversation()),
        )
        new = [know(message) for message in messages[len(before[0]) :]]
        conversation = before[1].followed_by(new) if new else before[1]
        self.sent.append((tuple(messages), conversation))
        return conversation

    def run(
        self,
        messages: Sequence[Message],
        reply: Message,
        tools: tuple[Json, ...] = (),
        arguments: Json | None = None,
        **changes: Any,
    ) -> Turn:
        """Commit the turn that answers a request."""
        parent, num_matched, reason = self.plan(messages, tools, arguments)
        made = turn(
            f"t{next(self.names)}",
            parent_id=parent.turn_id if parent is not None else None,
            branch_reason=reason,
            prompt=[next(self.ids) for _ in range(3)],
            completion=changes.pop("completion", [next(self.ids) for _ in range(2)]),
            messages=new_messages(messages, num_matched, parent),
            reply=reply,
            tools=tools,
            arguments=arguments or {},
            **changes,
        )
        self.tree.commit(made)
        return made

    def rows(self, **changes: Any) -> list[Json]:
        """The session's samples, as the control API answers them."""
        return msgspec.json.decode(to_json_rows(samples(record(**changes), self.tree.tapes())))
