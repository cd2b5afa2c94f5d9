"""What all grammars of tool calls share: calls, sections of calls, and the writer that they tell.

A grammar is a frozen dataclass of the marks that it is written with. `begins` are the marks that begin a
block of calls in the content; `read` is started where one of them stands and reads that block. It knows
nothing of the tools on offer, of reasoning, or of streaming events: that is `parser.Parser`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokentape.parse.events import CallStatus
from tokentape.parse.source import Malformed, Marks, Source, Steps, marks
from tokentape.types import Json

_NO_NAME = re.compile(r"""[\s"'<>(){}\[\]]""")


class Call:
    """A call while it is read. `read_name` comes first; `argue` takes the arguments' JSON text as it comes.

    `arguments` is all of them, once they are known to be right; `id` is what the model itself calls the call.
    """

    def __init__(self, tools: Mapping[str, Json], on_arguments: Callable[[str, str], None]) -> None:
        self.name: str | None = None
        self.arguments: str | None = None
        self.id: str | None = None
        self.any_argued = False
        self._tools = tools
        self._on_arguments = on_arguments

    @property
    def schema(self) -> Json:
        """The schema of the tool's parameters; empty where nothing is known of it."""
        return self._tools.get(self.name or "", {})

    def read_name(self, name: str) -> None:
        """Take the tool's name, as it stands between the marks.

        Raises:
            Malformed: it is empty, or no name: with another family's call there, it must not become one.
        """
        if not name:
            raise Malformed(CallStatus.NO_NAME, "the call has no name")
        if _NO_NAME.search(name):
            raise Malformed(CallStatus.MALFORMED, f"{name[:40]!r} stands where the tool's name must be")
        self.name = name

    def argue(self, text: str) -> None:
        """Say more of the arguments; before the name is known, nobody could use them."""
        if self.name is not None and text:
            self.any_argued = True
            self._on_arguments(self.name, text)


class Writer(Protocol):
    """What a grammar tells of what it reads."""

    def text(self, text: str) -> None:
        """Say content."""
        ...

    def begin_thought(self, spaces: str = "") -> None:
        """Reasoning begins; of the `spaces` at its edges nothing is said."""
        ...

    def thought(self, text: str) -> None:
        """Say reasoning."""
        ...

    def end_thought(self) -> None:
        """The thought was closed."""
        ...

    def called_in_thought(self, start: int, name: str) -> None:
        """Record a call that was a thought: it stands between position `start` and here."""
        ...

    def markup(self, text: str) -> None:
        """Pass over a tag."""
        ...

    def glue(self, text: str) -> None:
        """Pass over what stands around calls: markup if the first of them is delivered, else content."""
        ...

    def attempt(
        self, read: Callable[[Source, Call], Steps[None]], ends: "Ends", *, outside: bool = False
    ) -> Steps[bool]:
        """Read one call that begins here; False where it is none, and then nothing was read.

        `ends` tell where the attempt ends if it fails. `outside` a section, a call is not delivered.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ends:
    """Where an attempt that failed ends: right behind the first of `behind`, or right before one of `before`.

    They are sought behind its first `skip` characters. Where none of them comes, the attempt is all the rest.
    """

    behind: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    skip: int = 0

    @property
    def marks(self) -> Marks:
        """Both of them."""
        return marks(*self.behind, *self.before)


class Grammar(Protocol):
    """How a family writes its calls."""

    @property
    def begins(self) -> tuple[str, ...]:
        """The marks that begin a block of calls in the content."""
        ...

    @property
    def at_start(self) -> tuple[str, ...]:
        """The marks that do so only where the content begins, space aside."""
        ...

    @property
    def one_call_stop(self) -> str | None:
        """A stop string behind which no second call can come; None where the grammar has none."""
        ...

    def read(self, src: Source, out: Writer) -> Steps[None]:
        """Read the block that begins here.

        Raises:
            NotACall: this is not this grammar's block; nothing was said.
        """
        ...

    def rule(self, names: Sequence[str], schema_of: Callable[[str], Json]) -> Json | None:
        """The structural tag (SGLang's) of one call or more to the tools `names`; None where it has none.

        `schema_of` a tool's name is the format that its arguments, a JSON object, must have.
        """
        ...


@dataclass(frozen=True, slots=True)
class Section:
    """The marks around a block of calls. `optional`: calls may stand without."""

    open: str
    close: str
    optional: bool = False


def section_rule(section: Section | None, tags: Sequence[Json], *, separator: str, space: str = "") -> Json:
    """The structural tag of one of `tags` or more, in their section."""
    calls: Json = {"type": "tags_with_separator", "tags": tags, "separator": separator, "at_least_one": True}
    if section is None:
        return calls
    edges = (section.open + space, space + section.close)
    before, after = ({"type": "const_string", "value": edge} for edge in edges)
    return {"type": "sequence", "elements": [before, calls, after]}


def read_section(
    src: Source,
    out: Writer,
    section: Section,
    begin: str,
    close: str,
    read: Callable[[Source, Call], Steps[None]],
) -> Steps[None]:
    """Read a section that opens here: calls that begin with `begin` and end with `close`, space between."""

    def read_other(src: Source, call: Call) -> Steps[None]:
        del call
        error = Malformed(
            CallStatus.MALFORMED, "something else stands in the section where a call must begin"
        )
        yield from src.expect((begin, section.close), error)
        raise error

    out.glue(src.take_mark(section.open))
    ends = Ends((close,), (section.close,))
    any_call = False
    while True:
        out.glue((yield from src.space()))
        found = yield from src.starts(begin, section.close)
        if any_call and found == section.close:
            out.glue(src.take_mark(section.close))
            break
        if any_call and found is None and src.at == len(src.text):
            break
        if not (yield from out.attempt(read if found == begin else read_other, ends)):
            break
        any_call = True
