"""Distributions and counts that do not grow with the file."""

import math
from bisect import bisect_right
from collections import Counter

from tokentape.report.figures import Bin, Distribution

_DIGITS = 3
_MOST_BINS = 20
_MOST_NAMES = 1000
OTHERS = "(others)"
"""Under this name `Names` counts all that came after the first thousand names."""


class Moments:
    """Count, mean, standard deviation and extremes of finite numbers, however large (Welford's recurrence).

    The sum of squares is kept as its root: squares would overflow, and cancel where the mean is far from 0.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.smallest = math.inf
        self.largest = -math.inf
        self._root = 0.0

    def add(self, value: float) -> None:
        """Count a number."""
        self.count += 1
        before = value - self.mean
        self.mean += value / self.count - self.mean / self.count
        after = value - self.mean
        self._root = math.hypot(self._root, math.sqrt(abs(before)) * math.sqrt(abs(after)))
        self.smallest, self.largest = min(self.smallest, value), max(self.largest, value)

    @property
    def deviation(self) -> float:
        """The standard deviation; 0 of nothing, infinite where no number can tell it."""
        return self._root / math.sqrt(self.count) if self.count else 0.0


class Spread:
    """How numbers are spread. Each is kept to three digits, so there are few different ones, however many.

    Mean, smallest and largest are exact, quantiles to 0.5 %.
    """

    def __init__(self) -> None:
        self._seen: Counter[float] = Counter()
        self._missing = 0
        self._moments = Moments()

    def add(self, value: float | None) -> None:
        """Count a number; None, and what is no finite number, is counted as missing."""
        if value is None or not math.isfinite(value):
            self._missing += 1
            return
        kept = float(f"{value:.{_DIGITS}g}")
        self._seen[kept if math.isfinite(kept) else value] += 1  # the largest ones are rounded to no number
        self._moments.add(value)

    def distribution(self) -> Distribution:
        """What was counted so far."""
        count = self._seen.total()
        if not count:
            return Distribution(count=0, missing=self._missing)
        moments, deviation = self._moments, self._moments.deviation
        values = sorted(self._seen)
        p05, p25, p50, p75, p95 = self._quantiles(values, count)
        return Distribution(
            count=count,
            missing=self._missing,
            mean=moments.mean,
            deviation=deviation if math.isfinite(deviation) else None,
            smallest=moments.smallest,
            p05=p05,
            p25=p25,
            median=p50,
            p75=p75,
            p95=p95,
            largest=moments.largest,
            bins=self._bins(values, p50),
        )

    def _quantiles(self, values: list[float], count: int) -> list[float]:
        found, at, below = list[float](), 0, 0
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):
            while below + self._seen[values[at]] < share * count:
                below += self._seen[values[at]]
                at += 1
            found.append(min(max(values[at], self._moments.smallest), self._moments.largest))
        return found

    def _bins(self, values: list[float], median: float) -> tuple[Bin, ...]:
        """One for each value where there are few, else of equal width; of equal ratio if a tail is long."""
        if len(values) <= _MOST_BINS // 2:
            return tuple(Bin(low=v, high=v, count=self._seen[v]) for v in values)
        low, high = values[0], values[-1]
        if not 1e-300 < high - low < math.inf:  # no steps can be counted between them
            return (Bin(low=low, high=high, count=self._seen.total()),)
        if high - low < _MOST_BINS and all(value.is_integer() for value in values):
            whole = map(float, range(int(low), int(high) + 1))
            return tuple(Bin(low=v, high=v, count=self._seen[v]) for v in whole)
        edges = _ratios(low, high) if low > 0 and high > 20 * median else _steps(low, high)
        counts = [0] * (len(edges) - 1)
        for value in values:
            counts[min(bisect_right(edges, value) - 1, len(counts) - 1)] += self._seen[value]
        return tuple(Bin(low=edges[at], high=edges[at + 1], count=count) for at, count in enumerate(counts))


def _steps(low: float, high: float) -> list[float]:
    """Edges of equal width, round numbers, that hold both."""
    raw = (high - low) / _MOST_BINS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [float(f"{step * n:.12g}") for n in range(first, last + 1)]


def _ratios(low: float, high: float) -> list[float]:
    """Edges 1, 2, 5, 10, … that hold both; two of a decade where there are many decades."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= _MOST_BINS // 3 else (1,)
    edges = [float(f"{factor}e{power}") for power in powers for factor in factors]
    edges = [edge for edge in edges if edge < math.inf]
    first = max(bisect_right(edges, low) - 1, 0)
    last = next((at for at, edge in enumerate(edges) if edge > high), len(edges) - 1)
    return edges[first : last + 1]


class Names:
    """How often each name came; a thousand different ones, and the rest together."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Count a name."""
        known = name in self._seen or len(self._seen) < _MOST_NAMES
        self._seen[name if known else OTHERS] += count

    def counts(self) -> dict[str, int]:
        """The most frequent first."""
        return dict(sorted(self._seen.items(), key=lambda each: (-each[1], each[0])))
