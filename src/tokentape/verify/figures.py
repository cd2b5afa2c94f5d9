"""Differences of log-probabilities, summed up as they come: nothing grows with the number of tokens."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

EDGES = tuple(base * 10.0**power for power in range(-7, 2) for base in (1.0, 2.0, 5.0))
"""Edges of the histogram's bins, nats: below the first, between two, above the last."""
FAR = 10
"""So many times the tolerance, no token may be off."""
MEAN = 0.5
"""So many times the tolerance, no turn may be off in the mean."""
_SHORT = 10  # tokens; a shorter turn is taken for one of this length: its mean says less


@dataclass(slots=True)
class Figures:
    """Of some tokens: |recomputed - recorded| in nats, and the estimate of what it means.

    `num_beyond` exceed the tolerance, `num_far` ten times that; `num_bad_turns` are turns that are off by
    more than half of it in the mean. `k3` is the mean of exp(r) - 1 - r with
    r = recomputed - recorded: an estimate of the divergence KL(sampled from || recomputed), never negative.
    """

    tolerance: float
    num_tokens: int = 0
    num_beyond: int = 0
    num_far: int = 0
    num_bad_turns: int = 0
    largest: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * (len(EDGES) + 1))
    _sum: float = 0.0
    _sum_k3: float = 0.0

    def add(self, recorded: float, recomputed: float) -> float:
        """Count a token; its difference, nats."""
        ratio = recomputed - recorded
        difference = abs(ratio)
        self.num_tokens += 1
        self._sum += difference
        self._sum_k3 += math.expm1(min(ratio, 700.0)) - ratio
        self.largest = max(self.largest, difference)
        self.histogram[bisect_right(EDGES, difference)] += 1
        self.num_beyond += difference > self.tolerance
        self.num_far += difference > FAR * self.tolerance
        return difference

    def add_turn(self, differences: Sequence[float]) -> bool:
        """Count a turn whose tokens have been counted; whether it is off as a whole."""
        bad = sum(differences) > MEAN * self.tolerance * max(len(differences), _SHORT)
        self.num_bad_turns += bad
        return bad

    @property
    def mean(self) -> float:
        """The mean difference, nats."""
        return self._sum / self.num_tokens if self.num_tokens else 0.0

    @property
    def k3(self) -> float:
        """The estimated divergence, nats a token."""
        return self._sum_k3 / self.num_tokens if self.num_tokens else 0.0

    @property
    def share_beyond(self) -> float:
        """The share of tokens beyond the tolerance."""
        return self.num_beyond / self.num_tokens if self.num_tokens else 0.0
