"""How many replicas there are, and where."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConfig:
    """How many replicas there are.

    `replicas` to begin with. There are `min_replicas` to `max_replicas` of them, so many that each answers
    about `turns_per_replica` requests at a time; where the two are equal, nothing changes by itself. Each
    asks Ray for `num_cpus`. `address` is Ray's, None: the one that is there, or a new one on this machine.
    """

    replicas: int = 2
    min_replicas: int | None = None
    max_replicas: int | None = None
    turns_per_replica: float = 64.0
    num_cpus: float = 1.0
    address: str | None = None
    look_s: float = 1.0

    @property
    def least(self) -> int:
        """The fewest replicas there may be."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        """The most replicas there may be."""
        return max(self.replicas if self.max_replicas is None else self.max_replicas, self.least)
