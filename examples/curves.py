"""What a run of grpo.py came to: curves, their picture, and the summary in words."""

import json
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

GOAL = 0.30  # of the exact-answer rate on held-out questions, above its start
LIMIT_S = 600.0


@dataclass(slots=True)
class Curves:
    """What a run came to: `held_out` as pairs of step and rate, the rest one value a step.

    `mismatch_max` and `mismatch_mean` are of |recorded - recomputed|, the log-probabilities (nats) of the
    tokens in the step's first update, before it.
    """

    seed: int
    held_out: list[tuple[int, float]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    mismatch_max: list[float] = field(default_factory=list)
    mismatch_mean: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def gain(self) -> float:
        """The held-out rate at the end, less that at the start."""
        return round(self.held_out[-1][1] - self.held_out[0][1], 6)


def plot(
    path: Path, panels: Sequence[tuple[str, str, dict[str, tuple[Sequence[float], Sequence[float]]]]]
) -> None:
    """Write a PNG of panels side by side: a title, the y axis's scale ("linear" or "log"), lines by name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for axis, (title, scale, lines) in zip(axes, panels, strict=True):
        for name, (x, y) in lines.items():
            axis.plot(x, y, marker=".", label=name, linestyle="--" if "re-encoded" in name else "-")
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.grid(alpha=0.3)
        if scale == "linear":
            axis.set_ylim(0, 1)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(runs: Sequence[Curves], out: Path, console: Console) -> bool:
    """Write curves, picture and summary; True when every seed has reached the goal."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "curves.json").write_text(json.dumps([asdict(each) for each in runs], indent=1) + "\n")

    def lines(name: str) -> dict[str, Any]:
        return {f"seed {each.seed}": (range(len(each.rewards)), getattr(each, name)) for each in runs}

    held_out = {f"seed {each.seed}": tuple(zip(*each.held_out, strict=True)) for each in runs}
    panels: Any = [
        ("held-out questions answered right", "linear", held_out),
        ("mean reward of the episodes trained on", "linear", lines("rewards")),
        ("largest |recorded - recomputed|, nats", "log", lines("mismatch_max")),
    ]
    plot(out / "curves.png", panels)
    words = [
        f"seed {each.seed}: {each.held_out[0][1]:.1%} of the held-out questions right at the start, "
        f"{each.held_out[-1][1]:.1%} at the end ({100 * each.gain:+.1f} points) in {each.seconds:.0f} s; "
        f"log-probabilities recorded and recomputed differ by {max(each.mismatch_max):.1e} nats at most"
        for each in runs
    ]
    reached = all(each.gain >= GOAL and each.seconds <= LIMIT_S for each in runs)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(each.ru_utime + each.ru_stime for each in usage)
    took_s = sum(each.seconds for each in runs)
    words.append(f"all seeds: {took_s:.0f} s, and {cpu_s:.0f} s of CPU time in all processes together")
    goal = f"goal: {100 * GOAL:.0f} points within {LIMIT_S:.0f} s, every seed: "
    words.append(goal + ("reached" if reached else "not reached"))
    (out / "summary.txt").write_text("\n".join(words) + "\n")
    console.print("\n".join(words), highlight=False)
    console.print(f"curves   {out / 'curves.png'}")
    return reached
