"""Charts as inline SVG, written by hand: no script, no inline style; every one has its text.

Colours come from the page's classes, so that a chart is as dark or as light as the page. Nothing is told by
colour alone.
"""

from collections.abc import Sequence
from html import escape

from tokentape.report.figures import Bin, Distribution

WIDTH, HEIGHT = 560, 190
_WIDE = 1000
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 22, 26


def number(value: float | None) -> str:
    """A number for people: four digits, thousands apart; "-" where there is none."""
    if value is None:
        return "-"
    if abs(value) >= 1e15:
        return f"{value:.4g}"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def several(count: int, name: str) -> str:
    """So many of them, in words."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def bin_name(one: Bin) -> str:
    """A bin in words."""
    return number(one.low) if one.low == one.high else f"{number(one.low)} to {number(one.high)}"


def histogram(distribution: Distribution, title: str) -> str:
    """Bars, one a bin, with the median marked; "" of nothing."""
    bins = distribution.bins
    if not bins:
        return ""
    most = max(one.count for one in bins)
    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    step = width / len(bins)
    bar = min(step * 0.86, 56.0)
    words = (
        f"{title}: {distribution.count:,} values from {number(distribution.smallest)} to "
        f"{number(distribution.largest)}"
    )
    if distribution.median is not None:
        words += f", median {number(distribution.median)}"
    parts = [_open(words), *_grid(most)]
    for at, one in enumerate(bins):
        high = height * one.count / most
        x = _LEFT + at * step + (step - bar) / 2
        tip = f"<title>{escape(bin_name(one))}: {one.count:,}</title>"
        if one.count:
            y = _TOP + height - max(high, 1.0)
            parts.append(_rect("bar", x, y, bar, max(high, 1.0), tip))
    parts += _ticks(bins, step)
    parts.append(_median(distribution, bins, step))
    return "".join([*parts, "</svg>"])


def _open(words: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(words)}">'
        f"<title>{escape(words)}</title>"
    )


def _rect(name: str, x: float, y: float, width: float, height: float, inside: str = "") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{name}" {where} rx="2">{inside}</rect>'


def _text(name: str, x: float, y: float, words: str, anchor: str = "middle") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{name}" {where}>{escape(words)}</text>'


def _grid(most: int) -> list[str]:
    height = HEIGHT - _TOP - _BOTTOM
    parts = list[str]()
    for value in dict.fromkeys((0, most // 2, most)):
        y = _TOP + height - height * value / most
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", _LEFT - 6, y + 4, number(value), "end"))
    return parts


def _ticks(bins: Sequence[Bin], step: float) -> list[str]:
    """Values under their bars; edges of ranges between theirs, as many as there is room for."""
    y = HEIGHT - 8
    if bins[0].low == bins[0].high:
        return [_text("tick", _LEFT + (at + 0.5) * step, y, number(one.low)) for at, one in enumerate(bins)]
    edges = [*(one.low for one in bins), bins[-1].high]
    every = max(1, -(-len(edges) // 8))
    return [
        _text("tick", _LEFT + at * step, y, number(edges[at]), "middle" if at < len(bins) else "end")
        for at in range(0, len(edges), every)
    ]


def _median(distribution: Distribution, bins: Sequence[Bin], step: float) -> str:
    median = distribution.median
    if median is None or bins[0].low == bins[0].high:
        return ""
    at = next((n for n, one in enumerate(bins) if one.low <= median < one.high), len(bins) - 1)
    one = bins[at]
    x = _LEFT + (at + (median - one.low) / (one.high - one.low)) * step
    anchor = "end" if x > WIDTH * 0.75 else "start"
    shift = -5 if anchor == "end" else 5
    line = f'<line class="median" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{HEIGHT - _BOTTOM}"/>'
    return line + _text("median-name", x + shift, 14, f"median {number(median)}", anchor)


def share_bar(share: float) -> str:
    """A bar in a table's cell: the number beside it says the same, so a reader aloud skips it."""
    full = 160.0
    inside = _rect("track", 0, 0, full, 10) + (
        _rect("bar", 0, 0, max(full * share, 1.5), 10) if share else ""
    )
    return f'<svg class="share" viewBox="0 0 {full:g} 10" aria-hidden="true">{inside}</svg>'


def stack(parts: Sequence[tuple[str, int]], title: str) -> str:
    """Parts of a whole in one bar, each with a pattern of its own and a number that names it below."""
    total = sum(count for _, count in parts)
    if not total:
        return ""
    words = f"{title}: " + ", ".join(f"{name} {count / total:.0%}" for name, count in parts)
    label = escape(words)
    out = [f'<svg viewBox="0 0 {_WIDE} 44" role="img" aria-label="{label}"><title>{label}</title>', _PATTERNS]
    x = 0.0
    for index, (name, count) in enumerate(parts, 1):
        width = _WIDE * count / total
        tip = f"<title>{escape(name)}: {count:,}</title>"
        if width:
            out.append(_rect(f"part{index}", x, 0, max(width - 1.5, 0.5), 26, tip))
        if width > 8 * len(name):
            out.append(_text("tick", x + width / 2, 40, f"{name} {count / total:.0%}"))
        x += width
    return "".join([*out, "</svg>"])


_PATTERNS = (
    '<defs><pattern id="lines" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect class="paper" width="6" height="6"/>'
    '<line class="ink" x1="0" y1="0" x2="0" y2="6"/></pattern>'
    '<pattern id="dots" width="6" height="6" patternUnits="userSpaceOnUse">'
    '<rect class="paper" width="6" height="6"/><circle class="dot" cx="3" cy="3" r="1.4"/></pattern></defs>'
)


def between(edges: Sequence[float], counts: Sequence[int]) -> Distribution:
    """Bins below the first edge, between two, above the last; empty ends are left out."""
    filled = [at for at, count in enumerate(counts) if count]
    if not filled:
        return Distribution(count=0)
    first, last = filled[0], filled[-1]
    lows = [0.0, *edges]
    highs = [*edges, edges[-1] * 10]
    bins = tuple(Bin(low=lows[at], high=highs[at], count=counts[at]) for at in range(first, last + 1))
    return Distribution(count=sum(counts), smallest=bins[0].low, largest=bins[-1].high, bins=bins)
