"""A `Report` for a terminal, and its histogram as a picture."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokentape.errors import ConfigError
from tokentape.shown import shown
from tokentape.verify.report import Report, Summary

_SHOWN = 10
_MOST = 2000  # characters


def tables(report: Report) -> Group:
    """The whole report; the verdict stands last."""
    return Group(*_parts(report))


def _parts(report: Report) -> Iterator[RenderableType]:
    yield Text(
        f"{shown(report.path, _MOST)}: {report.num_samples} samples, {report.num_trained:,} trained tokens"
    )
    version = report.engine_version
    yield Text(f"engine: weights {'(it does not say)' if version is None else shown(version)}")
    table = Table(title="recorded against recomputed (nats)", title_justify="left")
    for name in ("weights", "tokens", "mean", "largest", f"beyond {report.tolerance:g}", "k3", "judged"):
        table.add_column(name, justify="left" if name in ("weights", "judged") else "right")
    for one in report.versions:
        table.add_row(*_row(one.version or "", one), "yes" if one.judged else "no")
    if len(report.versions) > 1:
        table.add_row(*_row("all", report.whole), "", style="bold")
    yield table
    for why, count in report.not_compared.items():
        yield Text(f"not compared: {count:,} tokens ({shown(why, _MOST)})")
    if (drift := report.drift) is not None and drift.num_turns:
        share = drift.num_drifted / drift.num_turns
        yield (
            f"decoding and encoding again would have changed {drift.num_drifted} of {drift.num_turns} turns "
            f"({share:.0%}), which have {drift.num_tokens_in_drifted:,} tokens"
        )
    yield f"broken rules: {report.num_violations}"
    for number, violation in enumerate(report.violations[:_SHOWN]):
        yield Text(f"  {shown(violation, _MOST)}", style="red")
        if number == 0 and report.violation_text is not None:
            yield Text(f"    {report.violation_text!r}")
    if report.num_violations > _SHOWN:
        yield f"  and {report.num_violations - _SHOWN} more"
    if (first := report.first_offence) is not None:
        yield Text(
            f"first token beyond {report.tolerance:g}: sample {shown(first.sample_id)}, turn "
            f"{shown(first.turn_id)}, token "
            f"{first.token} (id {first.token_id}): recorded {first.recorded:.6f}, recomputed "
            f"{first.recomputed:.6f}"
        )
        if first.text is not None:
            yield Text(f"  {first.text!r}")
    if problems := report.problems:
        yield Text(f"not verified: {shown('; '.join(problems), _MOST)}", style="bold red")
    else:
        yield Text("verified", style="bold green")


def _row(name: str, one: Summary) -> tuple[str | Text, ...]:
    figures = (f"{one.mean:.2e}", f"{one.largest:.2e}", f"{one.share_beyond:.2%}", f"{one.k3:.2e}")
    return Text(shown(name) if name else ""), f"{one.num_tokens:,}", *figures


def check_can_draw(path: Path) -> None:
    """Say before a long run that there will be no picture.

    Raises:
        ConfigError: matplotlib is not installed, or the directory cannot be made.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(f"a picture needs matplotlib: pip install 'tokentape[train]' ({error})") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def draw_histogram(report: Report, path: Path) -> None:
    """Write the histogram of |recomputed - recorded| as PNG; `check_can_draw` has said that one can.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    edges = report.histogram_edges
    figure: Any = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lefts, rights = [edges[0] / 2, *edges], [*edges, edges[-1] * 2]
    widths = [right - left for left, right in zip(lefts, rights, strict=True)]
    below = [0] * len(lefts)
    for one in report.versions:
        axes.bar(lefts, one.histogram, widths, bottom=below, align="edge", label=f"weights {one.version}")
        below = [b + n for b, n in zip(below, one.histogram, strict=True)]
    axes.axvline(report.tolerance, color="black", linestyle="--", label=f"tolerance {report.tolerance:g}")
    axes.set_xscale("log")
    axes.set_xlabel("|recomputed - recorded|, nats")
    axes.set_ylabel("tokens")
    axes.set_title(
        f"{report.whole.num_tokens:,} tokens, mean {report.whole.mean:.1e}, k3 {report.whole.k3:.1e}"
    )
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
