"""The values that every layer speaks: messages, tools, sampling, token runs. No I/O."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Json: TypeAlias = dict[str, Any]

GREEDY_BELOW = 1e-6
"""A lower temperature means: take the likeliest token (SGLang's own threshold)."""


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call that the assistant made. `arguments` is JSON text, as the model or the caller wrote it."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a conversation, the same for every wire.

    `content` is plain text (text parts are joined); None and "" differ, because templates treat them
    differently. `reasoning` is None where there was none, "" where the thought was opened and closed empty.
    """

    role: Role
    content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the policy is sampled with. None means: not given, the engine's own default holds.

    `max_tokens` counts sampled tokens. `stop` are strings, `stop_token_ids` ids. `seed` makes one turn
    repeatable where the engine supports it. `logit_bias` are pairs of a token id and what is added to its
    logit. `json_schema` and `structural_tag` are JSON texts, at most one of them: the engine samples only
    what they allow.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None
    structural_tag: str | None = None

    @property
    def is_constrained(self) -> bool:
        """Whether only some texts may be sampled."""
        return self.json_schema is not None or self.structural_tag is not None

    @property
    def is_penalised(self) -> bool:
        """Whether a token's chance depends on how often it was sampled before."""
        repetition = self.repetition_penalty not in (None, 1.0)
        return bool(self.frequency_penalty or self.presence_penalty) or repetition


@dataclass(frozen=True, slots=True)
class JsonOutput:
    """Asked of a reply: its content is JSON of this `schema`, or it calls one of the tools `or_calls`."""

    schema: Json
    or_calls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CallOutput:
    """Asked of a reply: at least one tool call, each to one of the tools `names`."""

    names: tuple[str, ...]


Demand: TypeAlias = JsonOutput | CallOutput


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `start:end` of one completion were sampled by the weights named `version`."""

    version: str
    start: int
    end: int


class Support(msgspec.Struct, frozen=True):
    """What truncation (top-k, top-p, min-p) left to draw each of C sampled tokens from.

    `lengths` int32[C]: how many ids were kept at each place; `ids` int32: those ids, place after place;
    `logprobs` float32[C] nats: of the sampled tokens under the distribution that was left. Little-endian.
    """

    lengths: bytes
    ids: bytes
    logprobs: bytes

    @classmethod
    def joined(cls, parts: "Sequence[Support | None]") -> "Support | None":
        """That of tokens that were sampled in parts; None where one has none."""
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        columns = (b"".join(getattr(part, name) for part in known) for name in cls.__struct_fields__)
        return cls(*columns)


class RoutedExperts(msgspec.Struct, frozen=True):
    """The experts that R tokens were sent to, one row a token, of `width` entries (layers x experts a token).

    `data` [R, width] little-endian unsigned integers of `dtype`: "uint8" or "uint16".
    """

    data: bytes
    dtype: str
    width: int

    @classmethod
    def joined(cls, parts: "Sequence[RoutedExperts | None]") -> "RoutedExperts | None":
        """The rows of several parts, one after the other, in the wider type.

        None where one has none, or they are of models with other numbers of entries.
        """
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts) or len({part.width for part in known}) > 1:
            return None
        wide = any(part.dtype == "uint16" for part in known)
        data = (
            array("H", list(part.data)).tobytes() if wide and part.dtype == "uint8" else part.data
            for part in known
        )
        return cls(b"".join(data), "uint16" if wide else "uint8", known[0].width)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one turn; the engine had `num_cached` of the prompt's (None: it did not say)."""

    num_prompt: int
    num_completion: int
    num_cached: int | None


class TokenRun:
    """An immutable run of token ids, kept twice: as int32 array and as the JSON text that an engine is sent.

    The JSON text (no brackets) is made once, when the run is new; a prompt of many runs is joined from these
    texts without touching a single earlier token. `max_id` lets a client check the vocabulary without
    rereading history.
    """

    __slots__ = ("ids", "json", "max_id")

    ids: "array[int]"
    json: bytes
    max_id: int

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = ids if isinstance(ids, array) else array("i", ids)
        numbers = self.ids.tolist()
        self.json = msgspec.json.encode(numbers)[1:-1]
        if b"-" in self.json:
            raise ValueError(f"negative token id {min(numbers)}")
        self.max_id = max(numbers, default=-1)

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenRun) and self.ids == other.ids

    def __hash__(self) -> int:
        return hash(self.json)

    def __repr__(self) -> str:
        return f"TokenRun({self.ids.tolist()})"


class Prompt:
    """The ids of one engine call: those `before`, then a run. Immutable; `Prompt()` has none.

    Prompts that go on from each other share what they have in common. `num_tokens`, also its `len`, and
    `max_id`, -1 where there is none, are kept, not counted again.
    """

    __slots__ = ("before", "max_id", "num_tokens", "run")

    def __init__(self, run: TokenRun | None = None, before: "Prompt | None" = None) -> None:
        self.before = before
        self.run = run
        num_before, max_before = (0, -1) if before is None else (before.num_tokens, before.max_id)
        self.num_tokens: int = num_before + (0 if run is None else len(run))
        self.max_id: int = max_before if run is None else max(max_before, run.max_id)

    def followed_by(self, run: TokenRun) -> "Prompt":
        """The prompt that goes on with `run`."""
        return Prompt(run, self)

    def __len__(self) -> int:
        return self.num_tokens

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prompt) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def runs(self) -> list[TokenRun]:
        """The runs, the first one first."""
        runs: list[TokenRun] = []
        at: Prompt | None = self
        while at is not None:
            if at.run is not None:
                runs.append(at.run)
            at = at.before
        return runs[::-1]

    def to_json(self) -> bytes:
        """The ids as a JSON list, joined from texts that were encoded once."""
        return b"[" + b",".join([run.json for run in self.runs if run.json]) + b"]"

    def to_list(self) -> list[int]:
        """The ids as Python ints: for tests and small prompts, never on the hot path."""
        return [i for run in self.runs for i in run.ids]

    @classmethod
    def of(cls, ids: Sequence[int]) -> "Prompt":
        """A prompt of one run."""
        return cls(TokenRun(ids))
