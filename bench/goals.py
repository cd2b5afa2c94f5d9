"""What the bench is held to: each goal, what was reached; and the picture for docs/performance.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Goal:
    """`reached` must be at most `most`, or at least `least`."""

    text: str
    reached: float
    unit: str = ""
    most: float | None = None
    least: float | None = None

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        above = self.most is None or self.reached <= self.most
        return above and (self.least is None or self.reached >= self.least)


def to_table(goals: Sequence[Goal]) -> Table:
    """One row a goal."""
    table = Table(title="goals")
    table.add_column("goal")
    for name in ("asked", "reached", ""):
        table.add_column(name, justify="right")
    for goal in goals:
        asked = f"≤ {goal.most:g}" if goal.most is not None else f"≥ {goal.least:g}"
        table.add_row(
            goal.text, asked + goal.unit, f"{goal.reached:.2g}{goal.unit}", "met" if goal.met else "missed"
        )
    return table


def plot(
    path: Path,
    latencies: Mapping[str, Mapping[int, float]],
    rates: Mapping[str, float],
    title: str,
) -> None:
    """`latencies` p50 ms by system and context, `rates` turns per second by system."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[3, 2])
    markers = iter("osD^vPX")
    for name, points in latencies.items():
        left.plot(list(points), list(points.values()), marker=next(markers), label=name)
    left.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="added latency a turn, ms (p50)")
    left.set_xticks([2000, 8000, 32000, 128000], ["2k", "8k", "32k", "128k"])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend()
    right.barh(list(rates)[::-1], list(rates.values())[::-1])
    right.set(xlabel="turns per second, 32 sessions at 8k")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
