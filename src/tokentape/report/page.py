"""A report as one self-contained HTML page: no script, no request to anywhere, everything escaped."""

import base64
import hashlib
from html import escape
from importlib.resources import files

from tokentape.report.charts import number, several
from tokentape.report.figures import Report
from tokentape.report.sections import SECTIONS
from tokentape.shown import shown

_STYLE = files("tokentape.report").joinpath("style.css").read_text(encoding="utf-8")
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
# Whatever a file's texts hold: the page loads nothing, runs nothing, and has no style but its own.
POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'"


def page(report: Report) -> str:
    """The whole page."""
    name = escape(shown(report.path.rsplit("/", 1)[-1]))
    links = " ".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in SECTIONS)
    body = "".join(
        f'<section aria-labelledby="{s.anchor}"><h2 id="{s.anchor}">{escape(s.title)}</h2>{s.write(report)}'
        "</section>"
        for s in SECTIONS
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{name} - tokentape report</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>Rollouts in <bdi>{name}</bdi></h1>
<p class="path"><bdi>{escape(shown(report.path, 400))}</bdi></p>
{_tiles(report)}
<nav aria-label="Sections">{links}</nav>
</header>
{body}
<footer>Written by <code>tokentape report</code>. Numbers are kept to three digits where they are counted:
quantiles and bins are right to 0.5 %, means and extremes exact. Turns that several samples share are counted
once, where they are trained.</footer>
</main>
</body>
</html>
"""


def _tiles(report: Report) -> str:
    budget, rewards = report.budget, report.rewards
    share = f"{budget.trained / budget.total:.0%} of {number(budget.total)}" if budget.total else "of none"
    spread = "" if rewards.deviation is None else f"± {rewards.deviation:.3g}, {rewards.missing} without"
    mismatch = report.mismatch
    tiles = [
        ("samples", number(report.num_samples), f"of {several(report.num_sessions, 'session')}"),
        ("turns trained", number(report.num_turns), f"{number(report.turns.mean)} a sample in the mean"),
        ("tokens trained", number(budget.trained), share),
        ("mean reward a sample", "-" if rewards.mean is None else f"{rewards.mean:.3g}", spread),
        (
            "cut by length",
            f"{report.num_truncated / report.num_samples:.1%}",
            several(report.num_truncated, "sample"),
        ),
        (
            "mean mismatch",
            "-" if mismatch is None else f"{mismatch.verified.whole.mean:.1e}",
            "not recomputed" if mismatch is None else "nats a token",
        ),
        _drift(report),
    ]
    cells = (
        f'<div class="tile"><dt>{escape(name)}</dt>'
        f"<dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _drift(report: Report) -> tuple[str, str, str]:
    drift = report.drift
    if drift is None or not drift.num_turns:
        return "would drift", "-", "not recomputed" if drift is None else "no turn is trained"
    share = f"{drift.num_drifted / drift.num_turns:.1%}"
    return "would drift", share, f"{several(drift.num_drifted, 'turn')}, if kept as text"
