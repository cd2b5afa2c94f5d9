"""A report as tables for the terminal, in plain words. Makes renderables; `cli` prints them."""

import json
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokentape.audit.report import CaseResult, Outcome, Report, Severity, Thinking

MEANS: dict[Outcome, str] = {
    Outcome.EXACT: "one tape; the prompt is what the template writes, id by id",
    Outcome.SEAM: "one tape; the same text, with the ids that the model saw where it stopped or began",
    Outcome.KEPT: "one tape, as it was sampled; the template would have written the turn otherwise",
    Outcome.BRANCH: "a new branch: the prompt is rendered again, the turns so far keep a tape of their own",
    Outcome.REFUSED: "the template raises on such a conversation: the request is answered 400",
    Outcome.DRIFT: "a bug of tokentape: please report it",
}
"""What an outcome means for training."""

THOUGHTS: dict[Thinking, str] = {
    Thinking.NEVER: "the template knows none: what a model thinks is part of its text",
    Thinking.FREE: "the model opens them, or does not think",
    Thinking.OPENED: "the prompt opens one in every turn",
    Thinking.CLOSED: "the prompt closes an empty one in every turn: the model does not think",
}
_COLOURS: dict[Outcome, str] = {
    Outcome.EXACT: "green",
    Outcome.SEAM: "green",
    Outcome.KEPT: "yellow",
    Outcome.BRANCH: "yellow",
    Outcome.REFUSED: "yellow",
    Outcome.DRIFT: "red",
}
_SEVERITIES = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.INFO: "dim"}


def tables(report: Report) -> RenderableType:
    """The whole report, the verdict last."""
    return Group(*_parts(report))


def _parts(report: Report) -> Iterator[RenderableType]:
    yield _facts(report)
    yield _cases(report)
    yield _legend(report)
    yield from _calls(report)
    yield from _helps(report)
    yield from _defects(report)
    yield from _verdict(report)


def _facts(report: Report) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    row, template, tokenizer = report.format, report.template, report.tokenizer
    grammars = ", ".join(row.grammars) or "no tool calls"
    given = f"; template arguments {json.dumps(dict(report.arguments))}" if report.arguments else ""
    ends = f"{template.stop_text or 'nothing'} after text, {template.stop_calls or 'nothing'} after calls"
    speed = f"{tokenizer.mb_s} MB/s with {tokenizer.backend}"
    if tokenizer.speedup is not None:
        speed += f"; fastokens is {tokenizer.speedup} times as fast as tokenizers"
    for name, said in (
        ("model", f"{report.model} (--history {report.history}{given})"),
        ("format", f"{row.name} ({grammars}; thoughts: {row.reasoning or 'none'})"),
        ("why", row.why),
        ("thoughts", THOUGHTS[template.thinking]),
        ("turns end with", ends),
        (
            "call arguments",
            f"the template takes {_ARGUMENTS[template.arguments]}; ids of calls: {template.call_ids}",
        ),
        ("no content", f"a turn of calls only has the content {json.dumps(template.empty_content)}"),
        ("reads", ", ".join(template.variables) or "no template arguments"),
        ("tokenizer", f"{tokenizer.num_ids} ids; {speed}"),
        ("round trip", _round_trip(report)),
    ):
        table.add_row(name, Text(said))
    return table


_ARGUMENTS = {"object": "objects", "text": "JSON text"}


def _round_trip(report: Report) -> str:
    tokenizer = report.tokenizer
    if tokenizer.round_trip:
        return "exact on all probe texts"
    if tokenizer.nfc:
        return "exact but for Unicode form NFC, into which the tokenizer brings all text"
    return f"{len(tokenizer.lossy)} probe texts come back changed, as {tokenizer.lossy[0]!r}"


def _cases(report: Report) -> Table:
    table = Table(title="\nWhat becomes of a turn when messages follow", title_justify="left")
    for name in ("the turn, then", "outcome", "why"):
        table.add_column(name, no_wrap=name == "outcome")
    for case in report.cases:
        style = None if case.possible else "dim"
        table.add_row(Text(_title(case)), _outcome(case), Text(_means(case)), style=style)
    return table


def _legend(report: Report) -> Table:
    """What the outcomes that occur mean for training."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(Text("•"), "the verdict hangs on it; grey: cannot happen with this prompt")
    for outcome in Outcome:
        names = {c.reason or outcome.value for c in report.cases if c.outcome is outcome and c.possible}
        if names:
            style = _COLOURS[outcome]
            table.add_row(Text("\n".join(sorted(names)), style=style), MEANS[outcome])
    return table


def _title(case: CaseResult) -> str:
    return f"{'•' if case.counted else ' '} {case.title}"


def _outcome(case: CaseResult) -> Text:
    return Text(case.reason or case.outcome.value, style=_COLOURS[case.outcome] if case.possible else "dim")


def _means(case: CaseResult) -> str:
    if not case.possible:
        return "the prompt leaves the model no such turn"
    return case.detail or ""


def _calls(report: Report) -> Iterator[RenderableType]:
    wrong = [call for call in report.calls if not call.ok]
    if not wrong:
        yield Text(f"\nAll {len(report.calls)} kinds of calls are read back as the template writes them.")
        return
    table = Table(title="\nCalls that are not read back as the template writes them", title_justify="left")
    for name in ("argument", "the template writes", "read back"):
        table.add_column(name)
    for call in wrong:
        read = "-" if call.read is None else json.dumps(call.read, ensure_ascii=False)
        table.add_row(call.name, Text(call.wrote or "nothing: it raises"), Text(read))
    yield table


def _helps(report: Report) -> Iterator[RenderableType]:
    if not report.helps:
        return
    table = Table(title="\nTemplate arguments that would help", title_justify="left")
    for name in ("chat_template_kwargs", "then exact", "then no more", "tool use exact"):
        table.add_column(name)
    for each in report.helps:
        argument = json.dumps(dict(each.argument))
        yes = "yes" if each.exact else "no"
        table.add_row(Text(argument), ", ".join(each.gained), ", ".join(each.lost) or "-", yes)
    yield table


def _defects(report: Report) -> Iterator[RenderableType]:
    if not report.defects:
        yield Text("\nNo defects found.")
        return
    table = Table(title="\nDefects, and what is worth knowing", title_justify="left")
    for name in ("", "what", "it means"):
        table.add_column(name)
    for defect in report.defects:
        style = _SEVERITIES[defect.severity]
        table.add_row(Text(defect.severity.value, style=style), defect.kind, Text(defect.detail))
    yield table


def _verdict(report: Report) -> Iterator[RenderableType]:
    if report.exact:
        kept = " (kept as sampled, where the template would rewrite)" if report.history == "preserve" else ""
        yield Text(
            f"\nMulti-turn tool use is exact{kept}: every rollout of it is one tape.", style="bold green"
        )
        return
    yield Text("\nMulti-turn tool use is not exact:", style="bold red")
    yield from (Text(f"  - {reason}") for reason in report.reasons)
    yield Text("What to do:", style="bold")
    yield from (Text(f"  - {each}") for each in report.advice)
