"""The parts of the page, one function each. Texts of the file go through `_name`, and nowhere else in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tokentape.report.charts import between, bin_name, histogram, number, several, share_bar, stack
from tokentape.report.figures import Distribution, Mismatch, Odd, Report
from tokentape.report.spread import OTHERS
from tokentape.shown import shown

_SHOWN = 12  # names in a table; the others are counted together
_PROBLEMS = 5


def _name(text: str) -> str:
    """A text of the file: escaped, on one line, its direction its own."""
    return f"<bdi>{escape(shown(text))}</bdi>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, chart: int | None = None) -> str:
    """Cells are HTML; the first of a row names it, all others are numbers, but for a `chart`."""
    heads = "".join(
        f'<th scope="col"{"" if n in (0, chart) else " class=n"}>{escape(each)}</th>'
        for n, each in enumerate(head)
    )
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(
            f'<td class="{"chart" if n == chart else "n"}">{cell}</td>' for n, cell in enumerate(row[1:], 1)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, distribution: Distribution, note: str, unit: str) -> str:
    """A histogram with its quantiles below, and all of its bins in a table."""
    one = distribution
    if not one.count:
        missing = f" ({one.missing:,} are missing)" if one.missing else ""
        return f'<figure><h3>{escape(title)}</h3><p class="soft">Nothing to show{missing}.</p></figure>'
    facts = [
        f"{number(one.count)} in all",
        f"mean {number(one.mean)}",
        f"5 % at most {number(one.p05)}",
        f"5 % at least {number(one.p95)}",
        f"from {number(one.smallest)} to {number(one.largest)}",
    ]
    facts += [f"{one.missing:,} missing"] if one.missing else []
    return (
        f"<figure><h3>{escape(title)}</h3><figcaption>{escape(note)} {escape('; '.join(facts))}.</figcaption>"
        f"{histogram(one, title)}{_bins(one, unit)}</figure>"
    )


def _bins(one: Distribution, unit: str) -> str:
    rows = [(bin_name(each), number(each.count), f"{each.count / one.count:.1%}") for each in one.bins]
    table = _table((unit, "count", "share"), rows)
    return f"<details><summary>As a table</summary>{table}</details>"


def _counts(title: str, counts: Mapping[str, int], what: str, note: str = "") -> str:
    """Names with bars: the table is the chart."""
    total = sum(counts.values())
    if not total:
        return f'<div class="card"><h3>{escape(title)}</h3><p class="soft">Nothing to show.</p></div>'
    listed = [(name, count) for name, count in counts.items() if name != OTHERS]
    rest = listed[_SHOWN:]
    rows = [
        (_name(name), share_bar(count / total), number(count), f"{count / total:.1%}")
        for name, count in listed[:_SHOWN]
    ]
    if left := sum(count for _, count in rest) + counts.get(OTHERS, 0):
        more = f"{len(rest)}{' and more' if OTHERS in counts else ''} others"
        rows.append((more, share_bar(left / total), number(left), f"{left / total:.1%}"))
    said = f'<p class="soft">{escape(note)}</p>' if note else ""
    table = _table((what, "", "count", "share"), rows, chart=1)
    return f'<div class="card"><h3>{escape(title)}</h3>{said}{table}</div>'


def _pair(*parts: str) -> str:
    return f'<div class="pair">{"".join(parts)}</div>'


def _stack(*parts: str) -> str:
    return f'<div class="stack">{"".join(parts)}</div>'


def _rewards(report: Report) -> str:
    groups, total = report.groups, report.num_samples
    has = "has" if report.rewards.missing == 1 else "have"
    lines = [f"{number(report.rewards.missing)} of {several(total, 'sample')} {has} no reward."]
    if groups.num_groups:
        share = groups.num_equal / groups.num_groups
        fewest, most = groups.sizes.smallest, int(groups.sizes.largest or 0)
        sizes = ("" if fewest == most else f"{number(fewest)} to ") + several(most, "sample")
        lines.append(
            f"{several(groups.num_groups, 'group')} of {sizes}. In {number(groups.num_equal)} ({share:.0%}) "
            "all rewards are equal: against their own mean they teach nothing. Branches of one session are "
            "one episode, and no group."
        )
    else:
        lines.append("No sample has a group: nothing is compared within one.")
    if groups.num_groups and groups.num_ungrouped:
        is_in = "is" if groups.num_ungrouped == 1 else "are"
        lines.append(f"{several(groups.num_ungrouped, 'sample')} {is_in} in no group.")
    return f"<p>{escape(' '.join(lines))}</p>" + _pair(
        _figure("Rewards", report.rewards, "One a sample: each branch of a session has it.", "reward"),
        _figure("Samples a group", groups.sizes, "", "samples"),
    )


def _lengths(report: Report) -> str:
    return _pair(
        _figure("Tokens a sample", report.tokens, "The whole tape.", "tokens"),
        _figure("Trained tokens a sample", report.trained, "Those with mask 1.", "tokens"),
        _figure("Tokens a turn", report.completions, "What was sampled.", "tokens"),
        _figure("Turns a sample", report.turns, "", "turns"),
    )


def _budget(report: Report) -> str:
    budget = report.budget
    parts = [
        ("trained", budget.trained, "sampled, with mask 1"),
        ("first prompts", budget.prompts, "what the first turn was given"),
        ("bridges", budget.bridges, "tool results, users, and the template's own, between turns"),
        ("trained elsewhere", budget.repeated, "sampled in a turn that another sample shares and trains"),
    ]
    rows = [
        (
            f"{escape(name)}<br><span class=soft>{escape(what)}</span>",
            number(count),
            _percent(count, budget.total),
        )
        for name, count, what in parts
    ]
    context = budget.total - budget.trained
    words = f"{number(budget.trained)} tokens are trained, {number(context)} are their context" + (
        f": {context / budget.trained:.1f} for each trained one." if budget.trained else "."
    )
    bar = stack([(name, count) for name, count, _ in parts], "Where the tokens are")
    table = _table(("part", "tokens", "share"), rows)
    return f"<figure><figcaption>{escape(words)}</figcaption>{bar}{table}</figure>"


def _percent(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "-"


def _branches(report: Report) -> str:
    note = "Why each sample's branch began; root is a session's first."
    return _pair(
        _counts("Branch reasons", report.branch_reasons, "reason", note),
        _stack(
            _counts("Labels", report.labels, "label", "Whose turns a sample trains."),
            _figure("Branches a session", report.branches, "", "samples"),
        ),
    )


def _parsing(report: Report) -> str:
    words = (
        f"{number(report.num_truncated)} of {several(report.num_samples, 'sample')} "
        f"({_percent(report.num_truncated, report.num_samples)}) "
        f"{'was' if report.num_truncated == 1 else 'were'} cut by length in their last turn."
    )
    return f"<p>{escape(words)}</p>" + _pair(
        _counts(
            "Parse statuses",
            report.parse_statuses,
            "status",
            "Of trained turns; ok, or the first thing wrong.",
        ),
        _counts("How turns ended", report.finish_reasons, "finish reason", "Of trained turns."),
    )


def _staleness(report: Report) -> str:
    stale = report.staleness
    if not stale.versions:
        return '<p class="soft">Nothing is trained, so no version of the weights is named.</p>'
    if len(stale.versions) == 1:
        return f"<p>One version of the weights sampled everything: {_name(stale.versions[0].version)}.</p>"
    has = "has" if stale.num_mixed == 1 else "have"
    mixed = f"{several(stale.num_mixed, 'sample')} {has} tokens of several versions."
    if stale.mean_age is None:
        words = (
            f"{len(stale.versions)} versions sampled. Which is older nobody knows: their names differ in "
            f"more than numbers. So there are no ages. {mixed}"
        )
        newest, title = stale.versions, "Versions"
    else:
        words = (
            f"{len(stale.versions)} versions sampled; a trained token's weights are {number(stale.mean_age)} "
            f"versions old in the mean, counted from the newest in this file. {mixed} Versions are ordered "
            "by the numbers in their names."
        )
        newest, title = stale.versions[::-1], "Versions, newest first"
    total = sum(one.num_tokens for one in newest)
    rows = [
        (
            _name(one.version),
            share_bar(one.num_tokens / total if total else 0),
            number(one.age),
            number(one.num_tokens),
            number(one.num_samples),
        )
        for one in newest[:_SHOWN]
    ]
    more = f'<p class="soft">and {len(newest) - _SHOWN} more</p>' if len(newest) > _SHOWN else ""
    table = _table(("version", "", "age", "tokens", "samples"), rows, chart=1)
    return f"<p>{escape(words)}</p>" + _pair(
        f'<div class="card"><h3>{title}</h3>{table}{more}</div>',
        _stack(
            _figure("Age of a sample's oldest token", stale.ages, "In versions.", "versions"),
            _figure("Versions within a sample", stale.spans, "From its oldest to its newest.", "versions"),
        ),
    )


def _logprobs(report: Report) -> str:
    missing = report.num_without_logprob
    words = (
        f'<p class="verdict warn">{several(missing, "trained token")} '
        f"{'has' if missing == 1 else 'have'} no finite log-probability: such a file must not be trained "
        "on; <code>tokentape verify</code> names the first.</p>"
        if missing
        else ""
    )
    return (
        words
        + _pair(
            _figure("Mean log-probability", report.logprobs, "Of a sample's trained tokens, nats.", "nats"),
            _mismatch(report.mismatch),
        )
        + _bases(report)
    )


def _mismatch(mismatch: Mismatch | None) -> str:
    title = "<h3>Recorded against recomputed</h3>"
    if mismatch is None:
        return (
            f'<figure>{title}<p class="soft">Not recomputed. <code>--engine URL</code> has an engine with '
            "the weights that sampled compute them again, for some sessions; <code>tokentape verify</code> "
            "does it for all.</p></figure>"
        )
    found = mismatch.verified
    rows = [
        (
            _name(one.version or "all"),
            number(one.num_tokens),
            f"{one.mean:.1e}",
            f"{one.largest:.1e}",
            f"{one.k3:.1e}",
            "yes" if one.judged else "no",
        )
        for one in (*found.versions, *([found.whole] if len(found.versions) > 1 else []))
    ]
    caption = (
        f"{several(found.whole.num_tokens, 'token')} of {several(mismatch.num_sessions, 'session')}: the "
        "difference of each token's log-probability, nats."
    )
    bins = between(found.histogram_edges, found.whole.histogram)
    picture = histogram(bins, "Differences of log-probabilities, nats") + _bins(bins, "nats")
    table = _table(("weights", "tokens", "mean", "largest", "k3", "judged"), rows)
    shows = f"<figcaption>{escape(caption)}</figcaption>{picture}{table}"
    return f"<figure>{title}{shows}{_verdict(mismatch)}</figure>"


def _verdict(mismatch: Mismatch) -> str:
    if not mismatch.problems:
        return '<p class="verdict good">These sessions are verified.</p>'
    items = "".join(f"<li>{_name(each)}</li>" for each in mismatch.problems[:_PROBLEMS])
    return f'<p class="verdict warn">These sessions are not verified:</p><ul>{items}</ul>'


def _bases(report: Report) -> str:
    note = "What a turn's log-probabilities are of; untruncated and greedy ones need care in the loss."
    return _pair(_counts("Distribution", report.logprob_bases, "basis", note), _drift(report))


def _drift(report: Report) -> str:
    drift = report.drift
    title = "<h3>Drift</h3>"
    if drift is None:
        return (
            f'<div class="card">{title}<p class="soft">Not recomputed. <code>--model DIR</code> names the '
            "tokenizer: each trained turn is decoded and encoded again.</p></div>"
        )
    rows = [
        (
            "turns that come back as other ids",
            number(drift.num_drifted),
            _percent(drift.num_drifted, drift.num_turns),
        ),
        (
            "their tokens",
            number(drift.num_tokens_in_drifted),
            _percent(drift.num_tokens_in_drifted, drift.num_tokens),
        ),
    ]
    if drift.num_unknown:
        unknown = _percent(drift.num_unknown, drift.num_turns)
        rows.append(("turns with ids that this tokenizer does not know", number(drift.num_unknown), unknown))
    note = "Had the turns been kept as text and encoded again. The tapes themselves have the sampled ids."
    table = _table((f"of {several(drift.num_turns, 'trained turn')}", "count", "share"), rows)
    return f'<div class="card">{title}<p class="soft">{note}</p>{table}</div>'


def _odd(report: Report) -> str:
    if not report.odd:
        return "<p>No sample is odd: none has a fact that at most half of the others have.</p>"
    words = (
        "Each fact that few samples have counts log2(1 / share) bits: what one in a thousand has counts ten. "
        "The score is the sum. Links lead into the viewer of the gateway that has the sessions; --viewer "
        "names it. Without one, `tokentape view FILE` shows this file: --viewer is the address that it says."
    )
    items = "".join(_odd_item(one) for one in report.odd)
    return f'<p class="soft">{escape(words)}</p><div class="card"><ol class="odd">{items}</ol></div>'


def _odd_item(one: Odd) -> str:
    facts = [
        f"{one.bits:.1f} bits",
        "no reward" if one.reward is None else f"reward {number(one.reward)}",
        f"{number(one.num_tokens)} tokens",
        several(one.num_turns, "turn"),
    ]
    why = "".join(
        f"<li>{_name_long(each.words)} ({each.share:.1%} of the samples)</li>" for each in one.oddities
    )
    return (
        f'<li><div class="head"><a href="{escape(one.link)}" rel="noreferrer noopener">'
        f'{_name(one.sample_id)}</a></div><div class="facts">session {_name(one.session_id)} · '
        f"{escape(' · '.join(facts))}</div><ul>{why}</ul></li>"
    )


def _name_long(text: str) -> str:
    return f"<bdi>{escape(shown(text, 400))}</bdi>"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    write: Callable[[Report], str]


SECTIONS = (
    Section("rewards", "Rewards", _rewards),
    Section("lengths", "Lengths and turns", _lengths),
    Section("budget", "Token budget", _budget),
    Section("branches", "Branches", _branches),
    Section("parsing", "Parsing and truncation", _parsing),
    Section("staleness", "Staleness", _staleness),
    Section("logprobs", "Log-probabilities and drift", _logprobs),
    Section("odd", "The oddest samples", _odd),
)
"""In the order of the page."""
