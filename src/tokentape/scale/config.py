"""How many replicas there are, and where."""

from dataclasses import dataclass

from tokentape.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConfig:
    """How many replicas there are.

    `replicas` to begin with. There are `min_replicas` to `max_replicas` of them, so many that each answers
    about `turns_per_replica` requests at a time; where the two are equal, nothing changes by itself. Each
    asks Ray for `num_cpus`. `address` is Ray's, None: the one that is there, or a new one on this machine.

    Raises:
        ConfigError: `replicas` is not from `min_replicas`, which is 1 or more, to `max_replicas`.
    """

    replicas: int = 2
    min_replicas: int | None = None
    max_replicas: int | None = None
    turns_per_replica: float = 64.0
    num_cpus: float = 1.0
    address: str | None = None
    look_s: float = 1.0

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ConfigError(f"{self.least} replicas answer nobody: there is at least one")
        if self.replicas < self.least:
            raise ConfigError(f"replicas is {self.replicas}: raise it, or lower min_replicas, {self.least}")
        if self.replicas > self.most:
            raise ConfigError(
                f"{self.replicas} replicas to begin with are more than there may be: raise --max-replicas "
                f"(max_replicas) from {self.most}, or give fewer --replicas (replicas)"
            )

    @property
    def least(self) -> int:
        """The fewest replicas there may be."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        """The most replicas there may be."""
        return self.replicas if self.max_replicas is None else self.max_replicas
