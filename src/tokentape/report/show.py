"""A report's short summary for a terminal; the page has the rest."""

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokentape.report.charts import number, several
from tokentape.report.figures import Distribution, Report
from tokentape.shown import shown

_ODD = 3
_NAMES = 4


def summary(report: Report) -> RenderableType:
    """The figures in a few lines, then the oddest samples."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, words in _lines(report):
        table.add_row(name, Text(words))
    return Group(table, *_oddest(report))


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    budget, groups, stale = report.budget, report.groups, report.staleness
    sessions, turns = several(report.num_sessions, "session"), several(report.num_turns, "turn")
    yield "samples", f"{report.num_samples:,} of {sessions}, {turns}"
    yield (
        "reward a sample",
        _spread(report.rewards) + (f", {report.rewards.missing:,} missing" if report.rewards.missing else ""),
    )
    if groups.num_groups:
        yield "groups", f"{groups.num_groups:,}, in {groups.num_equal:,} of them all rewards are equal"
    yield "tokens", _spread(report.tokens)
    share = budget.trained / budget.total if budget.total else 0.0
    yield "trained", f"{budget.trained:,} of {budget.total:,} tokens ({share:.0%})"
    yield "turns", _spread(report.turns)
    yield "branches", _names(report.branch_reasons)
    yield "parsing", _names(report.parse_statuses)
    yield (
        "cut by length",
        f"{several(report.num_truncated, 'sample')} ({report.num_truncated / report.num_samples:.1%})",
    )
    if stale.versions:
        known = stale.mean_age is not None
        age = f"{number(stale.mean_age)} old in the mean" if known else "in no known order"
        age += f", {several(stale.num_mixed, 'sample')} of several"
        yield "weights", f"{several(len(stale.versions), 'version')}, {age}"
    yield "log-probability", _spread(report.logprobs)
    if report.num_without_logprob:
        missing = several(report.num_without_logprob, "trained token")
        yield "", f"{missing} without one: do not train on this file"
    if (mismatch := report.mismatch) is not None:
        whole, verdict = mismatch.verified.whole, "; ".join(mismatch.problems) or "verified"
        yield (
            "mismatch",
            (
                f"mean {whole.mean:.1e}, largest {whole.largest:.1e} over "
                f"{several(whole.num_tokens, 'token')} of {several(mismatch.num_sessions, 'session')}: "
                f"{shown(verdict, 400)}"
            ),
        )
    if (drift := report.drift) is not None and drift.num_turns:
        yield (
            "would drift",
            f"{drift.num_drifted:,} of {drift.num_turns:,} turns ({drift.num_drifted / drift.num_turns:.1%})",
        )
    for why in report.not_recomputed:
        yield "not recomputed", why


def _spread(one: Distribution) -> str:
    if not one.count:
        return "none"
    return (
        f"mean {number(one.mean)}, median {number(one.median)}, "
        f"from {number(one.smallest)} to {number(one.largest)}"
    )


def _names(counts: Mapping[str, int]) -> str:
    listed = [f"{count:,} {shown(name, 40)}" for name, count in [*counts.items()][:_NAMES]]
    return ", ".join(listed) + (f" and {len(counts) - _NAMES} more" if len(counts) > _NAMES else "")


def _oddest(report: Report) -> Iterator[RenderableType]:
    for one in report.odd[:_ODD]:
        yield Text(f"odd: sample {shown(one.sample_id)} ({one.bits:.1f} bits)", style="yellow")
        yield from (Text(f"  {shown(each.words, 400)}") for each in one.oddities)
        yield Text(f"  {one.link}")
