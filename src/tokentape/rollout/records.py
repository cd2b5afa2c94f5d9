"""What an episode is given, what it gives back, and what the trainer receives."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

# pyright: reportUnknownMemberType=false
import pyarrow as pa

from tokentape.schema import SAMPLES
from tokentape.types import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One attempt at a task, as its agent sees it.

    `base_url` and `api_key` are for the agent's SDK, OpenAI's or Anthropic's; `model` is the name to ask for.
    `member` counts from 0 in the group, `attempt` from 1. `deadline_s` is how long the attempt may take.
    """

    base_url: str
    api_key: str
    model: str
    task: Any
    session_id: str
    group_id: str
    index: int
    member: int
    attempt: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """What an episode earned: as the gateway's `POST /sessions/{id}/finish` takes it.

    `reward` None is an episode without one, said on purpose.
    """

    reward: float | None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    turn_rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    branch_rewards: Mapping[str, float] = field(default_factory=dict[str, float])


EpisodeFunction: TypeAlias = Callable[[Any, Episode], Awaitable[float | Result]]
"""`async def episode(task, episode) -> reward | Result`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeFailure:
    """An attempt that came to nothing; its session is deleted. `kind` is its error's (`EpisodeFailed`).

    `outage`: the gateway, or its engine, was away meanwhile. Such a failure uses up no retry.
    """

    kind: str
    message: str
    session_id: str
    member: int
    attempt: int
    elapsed_s: float
    outage: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """An episode that is finished in the store, and its samples: an Arrow table, or a reference to one."""

    session_id: str
    reward: float | None
    num_samples: int
    samples: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A finished episode of a group. `samples` is an Arrow table, or with Ray an `ObjectRef` to one."""

    member: int
    session_id: str
    reward: float | None
    num_samples: int
    samples: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All episodes of one task. `failures` are all attempts that failed, also those that a retry made good.

    `members` are in order. Without `complete` some are missing, or all: nothing to compare with each other.
    """

    task: Any
    index: int
    group_id: str
    group_size: int
    members: tuple[Member, ...]
    failures: tuple[EpisodeFailure, ...] = ()
    resolve: Callable[[Sequence[Any]], Sequence[pa.Table]] = field(default=list, repr=False)

    @property
    def complete(self) -> bool:
        """Whether every episode of the group is there."""
        return len(self.members) == self.group_size

    @property
    def rewards(self) -> list[float | None]:
        """float[members], one an episode; None where it was finished without one."""
        return [member.reward for member in self.members]

    @property
    def session_ids(self) -> list[str]:
        """str[members]: `session_id` in the samples."""
        return [member.session_id for member in self.members]

    @property
    def refs(self) -> tuple[Any, ...]:
        """[members]: with Ray the references to the samples, for workers that read them where they are."""
        return tuple(member.samples for member in self.members)

    @property
    def table(self) -> pa.Table:
        """All samples, in the members' order; columns `schema.SAMPLES`. No array is copied.

        With Ray they are read from the object store, which may wait for another node.
        """
        tables = self.resolve(self.refs)
        return pa.concat_tables([SAMPLES.empty_table(), *tables])


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for all episodes of a run; goes to every process that runs some."""

    gateway: str
    api_key: str | None
    model: str
    deadline_s: float
    gateway_timeout_s: float
    session: Json
    work: "EpisodeFunction | tuple[str, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt: whose it is, and the session that it will have."""

    session_id: str
    group_id: str
    index: int
    member: int
    number: int
    task: Any
    notes: Json
