"""What an audit finds. `dataclasses` only: the fields' names are the keys of `--json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tokentape.types import Json


class Outcome(StrEnum):
    """What becomes of a recorded turn when messages follow it."""

    EXACT = "exact"
    """Prompt + completion + bridge is the full render of the conversation, id by id."""
    SEAM = "exact*"
    """So is its text. The ids that the model saw are kept; a full render merges some where they meet."""
    KEPT = "kept"
    """The sampled ids stay, the bridge is the template's, and the template would write the turn otherwise."""
    BRANCH = "branch"
    """It cannot be extended: a new branch starts with a full render, and carries the reason."""
    REFUSED = "refused"
    """The template raises on what stands before the turn: such a request is answered 400."""
    DRIFT = "drift"
    """`extend` and the template contradict each other: a bug of tokentape's."""


GOOD = (Outcome.EXACT, Outcome.SEAM)


class Thinking(StrEnum):
    """Where a thought begins."""

    NEVER = "never"
    """The template knows no tags for thoughts: what a model thinks is content."""
    FREE = "free"
    """The model opens its thoughts, or does not think."""
    OPENED = "opened"
    """The prompt ends inside a thought: every turn has one."""
    CLOSED = "closed"
    """The prompt holds an empty thought: no turn has one."""


class Severity(StrEnum):
    """What a defect means. Errors make the verdict negative."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case: a turn and what follows it.

    `reason` is a `render.Rewrite` where the outcome is a branch. `possible`: a model that is prompted so can
    sample such a turn. `counted`: the verdict hangs on it.
    """

    name: str
    title: str
    outcome: Outcome
    reason: str | None
    detail: str | None
    possible: bool
    counted: bool


@dataclass(frozen=True, slots=True)
class ReadBack:
    """One tool call, or two, written by the template and read by the parser.

    `read` is what came back, None where the template does not write the call; `wrote` is the template's text.
    """

    name: str
    ok: bool
    wrote: str | None
    expected: tuple[Json, ...]
    read: tuple[Json, ...] | None


@dataclass(frozen=True, slots=True)
class Help:
    """A template argument that makes cases hold.

    `gained` and `lost` are names of cases; `exact` and `thinking` are the report's under this argument.
    """

    argument: Mapping[str, Any]
    thinking: Thinking
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    exact: bool


@dataclass(frozen=True, slots=True)
class Defect:
    """What is wrong, or worth knowing, and what it means."""

    kind: str
    severity: Severity
    detail: str


@dataclass(frozen=True, slots=True)
class FormatFacts:
    """The row of `formats.FORMATS` that reads this model's completions.

    `grammars` are the names of its grammars, `reasoning` its tags. `told`, `why`, `contradicted`: see
    `formats.Detected`.
    """

    name: str
    grammars: tuple[str, ...]
    reasoning: str | None
    why: str
    told: bool
    contradicted: str | None


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """How the template wants its messages.

    `arguments` of tool calls: "object" or "text" (JSON text). `empty_content`: what stands as content in a
    turn of calls only, null or "". `call_ids`: "any" or "nine letters and digits". `variables` are the
    arguments that it reads. `stop_text`, `stop_calls`: the token that ends a turn, null where it writes none.
    """

    arguments: str
    empty_content: str | None
    call_ids: str
    variables: tuple[str, ...]
    thinking: Thinking
    stop_text: str | None
    stop_calls: str | None


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The encoder in use, and what was measured.

    Speeds are MB of UTF-8 a second, one thread; `speedup` is their ratio; `fastokens_mb_s` is null where that
    library cannot read the tokenizer. `round_trip`: every probe text is `decode(encode(text))`; `nfc`: those
    that differ are in Unicode form NFC afterwards; `lossy` are the probes that differ otherwise. `adds` are
    the tokens that the tokenizer puts before a text when asked for special tokens (tokentape never asks).
    """

    backend: str
    num_ids: int
    mb_s: float
    tokenizers_mb_s: float
    fastokens_mb_s: float | None
    speedup: float | None
    round_trip: bool
    nfc: bool
    lossy: tuple[str, ...]
    adds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """A whole audit. `version` counts changes of the keys that are not additions.

    `exact`: multi-turn tool use extends exactly, or as `history` asks for. `preserved`: its cases hold with
    `--history preserve`. `reasons` says why it is not exact, `advice` what to do.
    """

    version: int
    model: str
    history: str
    arguments: Mapping[str, Any]
    exact: bool
    preserved: bool
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    format: FormatFacts
    template: TemplateFacts
    cases: tuple[CaseResult, ...]
    calls: tuple[ReadBack, ...]
    helps: tuple[Help, ...]
    defects: tuple[Defect, ...]
    tokenizer: TokenizerFacts
