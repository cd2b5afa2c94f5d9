"""A session's turns as a tree: find the recorded turn that a request continues, commit what it sampled.

Requests are matched on meaning: messages are the edges of a trie, under their keys (`conversation`). Tools
and template arguments are part of the prompt: the places of the trie hold apart, by such pairs, the turns
that end there.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from tokentape.conversation import Conversation, Digest, Known, MessageKey, frame_key, keys_of, know
from tokentape.errors import InternalError
from tokentape.labels import Labels, told
from tokentape.outline import Outline
from tokentape.tape import BranchReason, Label, Tape, Turn, lay_out
from tokentape.types import Message, Prompt
from tokentape.volatile import NOTHING, Volatile

_Edge: TypeAlias = tuple[Digest, int]
_MAX_NEW = 64
"""More commits since a walk are not looked through: it begins anew."""


@dataclass(eq=False, slots=True)
class _Place:
    """A point in the trie: the messages so far. `edges` lead on by base and ordinal, then by reasoning.

    By the number of a frame: `turns` whose reply is the last of these messages, and one of the turns that
    `answered` all of them. `earliest`: the two lowest numbers in `turns`.
    """

    edges: "dict[_Edge, dict[Digest | None, _Place]]" = field(
        default_factory=dict["_Edge", "dict[Digest | None, _Place]"]
    )
    turns: dict[int, list[Turn]] = field(default_factory=dict[int, list[Turn]])
    answered: dict[int, Turn] = field(default_factory=dict[int, Turn])
    earliest: tuple[int, ...] = ()


@dataclass(eq=False, slots=True)
class _Node:
    """The session's turn number `index`, in frame number `frame`.

    Its reply ends at `place`; `before` stands for what precedes it. `prompt` is what the engine was sent,
    `whole` that and what it sampled.
    """

    turn: Turn
    index: int
    frame: int
    place: _Place
    before: Outline
    prompt: Prompt
    whole: Prompt
    num_children: int = 0


@dataclass(frozen=True, slots=True)
class _Walk:
    """How far a conversation was followed from `start`, in frame number `frame`: to the turn `turn_id`.

    Its first `num_matched` messages led to `places` when the tree had `num_turns` turns.
    """

    start: _Place
    frame: int
    places: "list[_Place]"
    num_matched: int
    turn_id: str | None
    num_turns: int


@dataclass(frozen=True, slots=True)
class Attachment:
    """Where a request joins the tree.

    `turn` is the one that it continues, None where there is none. The request's first `num_matched` messages
    are recorded. `before` stands for the messages before the turn's reply, `prompt` are all ids through it.
    """

    turn: Turn | None
    num_matched: int
    before: Outline
    prompt: Prompt


class Tree:
    """The turns of one session. Append-only.

    `content_tests` are what the chat template looks for in messages (see `Outline`).
    """

    def __init__(self, content_tests: tuple[str, ...], volatile: Volatile = NOTHING) -> None:
        self._content_tests = content_tests
        self._volatile = volatile
        self._start = _Place()
        self._roots: dict[tuple[Digest, Digest], int] = {}  # frames, numbered as their first roots came
        self._frames: list[tuple[Digest, Digest]] = []
        self._openers: set[str] = set()  # the roles that speak first
        self._nodes: dict[str, _Node] = {}
        self._labels = Labels()  # of as many turns as were needed: see `_labelled`
        self._num_labelled = 0
        self._labelling = threading.Lock()  # questions are answered in threads

    def __contains__(self, turn_id: str) -> bool:
        """Whether a turn of this id is committed."""
        return turn_id in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def turns(self) -> Iterator[Turn]:
        """All turns in the order of their commits."""
        return (node.turn for node in self._nodes.values())

    def attach(self, frame: tuple[Digest, Digest], conversation: Conversation) -> Attachment:
        """The longest recorded prefix of a request that ends in a sampled turn."""
        turn, num_matched = self._longest(frame, conversation)
        if turn is None:
            return Attachment(None, 0, Outline(), Prompt())
        node = self._nodes[turn.turn_id]
        return Attachment(turn, num_matched, node.before, node.whole)

    def branch_reason(
        self, parent_id: str | None, frame: tuple[Digest, Digest], keys: Sequence[MessageKey]
    ) -> str | None:
        """Why a turn would start a branch if committed now; None where it simply continues its parent.

        `keys` are its new messages: all of the request's where it has no parent.
        """
        if parent_id is not None:
            parent = self._nodes[parent_id]
            if not parent.num_children:
                return None
            if any(key.by_assistant for key in keys):
                return BranchReason.EDITED_HISTORY
            again = _was_answered(parent.place, parent.frame, keys)
            return BranchReason.RESAMPLED if again else BranchReason.FORKED
        if not self._nodes:
            return BranchReason.ROOT
        number = self._roots.get(frame)
        if number is not None and _was_answered(self._start, number, keys):
            return BranchReason.RESAMPLED
        nearest = self._nearest(number, keys)
        if nearest is not None:
            return BranchReason.TOOLS_CHANGED if nearest[0] != frame[0] else BranchReason.ARGUMENTS_CHANGED
        if number is not None and self._is_compacted([key.message for key in keys]):
            return BranchReason.COMPACTED
        if any(key.by_assistant for key in keys):
            return BranchReason.EDITED_HISTORY
        return BranchReason.NEW_CONVERSATION

    def commit(self, turn: Turn) -> None:
        """Append a turn.

        Raises:
            InternalError: the turn breaks an invariant, is known already, or its parent is not.
        """
        turn.verify()
        if turn.turn_id in self._nodes:
            raise InternalError(f"turn {turn.turn_id} is committed already")
        if turn.parent_id is None:
            frame = frame_key(turn.tools, turn.arguments)
            number, place = self._roots.get(frame, len(self._frames)), self._start
            before, after, whole = Outline(), None, Prompt()
        else:
            parent = self._nodes.get(turn.parent_id)
            if parent is None:
                raise InternalError(
                    f"turn {turn.turn_id}: its parent {turn.parent_id} is not in this session"
                )
            if (turn.tools, turn.arguments) != (parent.turn.tools, parent.turn.arguments):
                raise InternalError(f"turn {turn.turn_id}: its tools or arguments are not its parent's")
            number, place, after, whole = parent.frame, parent.place, parent.turn.reply, parent.whole
            frame = self._frames[number]
            before = parent.before.followed_by([after], self._content_tests)
        before = before.followed_by(turn.messages, self._content_tests)
        said = [self.know(message) for message in (*turn.messages, turn.reply)]
        *asked, replied = keys_of(said, after=after)
        for key in asked:  # nothing raises from here on
            place = _step(place, key)
        place.answered[number] = turn
        place = _step(place, replied)
        place.turns.setdefault(number, []).append(turn)
        place.earliest = tuple(sorted({*place.earliest, number})[:2])
        if turn.parent_id is not None:
            self._nodes[turn.parent_id].num_children += 1
        else:
            self._openers.update(message.role for message in turn.messages[:1])
            if number == len(self._frames):
                self._roots[frame] = number
                self._frames.append(frame)
        prompt = whole.followed_by(turn.prompt)
        whole = prompt.followed_by(turn.completion)
        self._nodes[turn.turn_id] = _Node(turn, len(self._nodes), number, place, before, prompt, whole)

    def know(self, message: Message) -> Known:
        """The digests of one message, as this tree matches it."""
        return know(message, self._volatile)

    def turn(self, turn_id: str) -> Turn | None:
        """The turn of this id, None where there is none."""
        node = self._nodes.get(turn_id)
        return node.turn if node is not None else None

    def prompt(self, turn_id: str) -> Prompt:
        """All ids that the engine was sent for this turn."""
        return self._nodes[turn_id].prompt

    def path(self, turn_id: str) -> tuple[Turn, ...]:
        """The turns from the root to this one."""
        path: list[Turn] = []
        at: str | None = turn_id
        while at is not None:
            path.append(self._nodes[at].turn)
            at = path[-1].parent_id
        return tuple(reversed(path))

    def labels(self) -> dict[str, Label]:
        """The label of every turn, by its id."""
        return self._labelled().of_turns()

    def ends(self, labels: Mapping[str, Label]) -> list[str]:
        """The last turns of all branches, in the order of their commits; `labels` are those of this tree.

        A branch ends where none of the turns behind it has its label: at every leaf, and where only others go
        on, as when the history is summarised in its own line. So each turn is on a path of its own label.
        """
        below: dict[str, set[str]] = {}
        ends: list[str] = []
        for turn_id in reversed(self._nodes):  # children before their parents
            parent_id, name = self._nodes[turn_id].turn.parent_id, labels[turn_id].name
            behind = below.pop(turn_id, set[str]())
            if name not in behind:
                ends.append(turn_id)
                behind.add(name)
            if parent_id is not None:
                fewer, more = sorted((behind, below.get(parent_id, set())), key=len)
                more |= fewer  # this way round a long line of many labels costs no more than it has
                below[parent_id] = more
        return ends[::-1]

    def branches(self) -> list[tuple[Turn, ...]]:
        """Paths from a root to the `ends`."""
        return [self.path(turn_id) for turn_id in self.ends(self.labels())]

    def tapes(self) -> list[Tape]:
        """All branches laid out. A turn is trained once: in the longest of those that end with its label."""
        labels = self.labels()
        branches = [self.path(turn_id) for turn_id in self.ends(labels)]
        trained: list[set[str]] = [set() for _ in branches]
        owned: set[str] = set()
        for index in sorted(range(len(branches)), key=lambda i: -len(branches[i])):
            name = labels[branches[index][-1].turn_id].name
            mine = {t.turn_id for t in branches[index] if labels[t.turn_id].name == name} - owned
            trained[index] = mine
            owned |= mine
        return [lay_out(path, mine, labels) for path, mine in zip(branches, trained, strict=True)]

    def _is_compacted(self, messages: Sequence[Message]) -> bool:
        """Whether system or user quote a reply that nothing follows; the first to speak is so elsewhere."""
        if not messages or messages[0].role not in self._openers:
            return False
        return any(summary.num_ends for summary in self._labelled().summaries.in_text(told(messages)))

    def _nearest(self, number: int | None, keys: Sequence[MessageKey]) -> tuple[Digest, Digest] | None:
        """The other frame with the longest recorded prefix that ends in a turn; the earliest of equals."""
        places, nearest = [self._start], None
        for key in keys:
            places = _follow(places, key)
            if not places:
                break
            here = [each for place in places for each in place.earliest if each != number]
            nearest = min(here) if here else nearest
        return self._frames[nearest] if nearest is not None else None

    def _labelled(self) -> Labels:
        """The labels of all turns. Nothing in a turn hangs on them: they are made when somebody asks."""
        with self._labelling:
            for node in islice(self._nodes.values(), self._num_labelled, None):
                self._labels.add(node.turn)
            self._num_labelled = len(self._nodes)
        return self._labels

    def _longest(self, frame: tuple[Digest, Digest], conversation: Conversation) -> tuple[Turn | None, int]:
        number = self._roots.get(frame)
        if number is None:
            return None, 0
        walk = self._walked(conversation, number) or _Walk(self._start, number, [self._start], 0, None, 0)
        found = self.turn(walk.turn_id) if walk.turn_id is not None else None
        num_matched, at = walk.num_matched, walk.places
        places = at
        for num_keys, key in enumerate(conversation.keys_from(num_matched), num_matched + 1):
            places = _follow(places, key)
            if not places:
                break
            ended = [turn for place in places for turn in place.turns.get(number, ())]
            if ended:
                found = max(ended, key=lambda turn: self._preference(turn, key))
                num_matched, at = num_keys, places
        turn_id = found.turn_id if found is not None else None
        conversation.walk = _Walk(self._start, number, at, num_matched, turn_id, len(self._nodes))
        return found, num_matched

    def _walked(self, conversation: Conversation, number: int) -> _Walk | None:
        """How far the conversation, or one that it goes on from, was followed, where that still holds.

        Turns committed since that continue the very turn that was found add nothing before its end.
        """
        walk: _Walk | None = conversation.walk
        if walk is None or walk.start is not self._start or walk.frame != number:
            return None
        num_new = len(self._nodes) - walk.num_turns
        if num_new > _MAX_NEW:
            return None
        new = islice(reversed(self._nodes.values()), num_new)
        return walk if all(node.turn.parent_id == walk.turn_id for node in new) else None

    def _preference(self, turn: Turn, key: MessageKey) -> tuple[bool, bool, int]:
        """Of turns that say the same in one place: the named one, the one of these call ids, the latest."""
        ids = [call.id for call in turn.reply.tool_calls]
        same_ids = bool(ids) and ids == [call.id for call in key.message.tool_calls]
        return turn.turn_id == key.turn_id, same_ids, self._nodes[turn.turn_id].index


def _follow(places: Sequence[_Place], key: MessageKey) -> list[_Place]:
    """Where a message leads. Without reasoning it may be any that was recorded, whatever that thought."""
    variants = [place.edges.get((key.base, key.ordinal), {}) for place in places]
    if key.reasoning is None:
        return [target for targets in variants for target in targets.values()]
    return [targets[key.reasoning] for targets in variants if key.reasoning in targets]


def _step(place: _Place, key: MessageKey) -> _Place:
    """Where a recorded message leads, the way made if it is new."""
    return place.edges.setdefault((key.base, key.ordinal), {}).setdefault(key.reasoning, _Place())


def _was_answered(place: _Place, number: int, keys: Sequence[MessageKey]) -> bool:
    """Whether exactly these messages have been answered before by a sampled turn of this frame."""
    places = [place]
    for key in keys:
        places = _follow(places, key)
    return any(number in at.answered for at in places)
