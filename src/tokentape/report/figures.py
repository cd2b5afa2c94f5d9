"""What a report says, as data: the fields' names are the keys of `--json`."""

import msgspec

from tokentape.verify import Report as Verified


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """`count` numbers from `low` up to `high`, which is the next one's; of one value where both are it."""

    low: float
    high: float
    count: int


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """How `count` numbers are spread; `missing` more were null or not finite. None: there is no number."""

    count: int
    missing: int = 0
    mean: float | None = None
    deviation: float | None = None
    smallest: float | None = None
    p05: float | None = None
    p25: float | None = None
    median: float | None = None
    p75: float | None = None
    p95: float | None = None
    largest: float | None = None
    bins: tuple[Bin, ...] = ()


class Groups(msgspec.Struct, frozen=True, kw_only=True):
    """Samples that are compared with each other.

    `num_equal` groups of two and more sessions have one reward: no advantage, nothing to learn; branches of
    one session are no group. `sizes` are in samples. `num_ungrouped` samples have no group.
    """

    num_groups: int
    num_equal: int
    num_ungrouped: int
    sizes: Distribution


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """Where the tokens of all tapes are: `trained` have mask 1, all others are context.

    `prompts` are those of first turns, `bridges` came between turns, `repeated` were sampled and are trained
    in another sample, with which this one shares the turn.
    """

    trained: int
    prompts: int
    bridges: int
    repeated: int

    @property
    def total(self) -> int:
        """All tokens."""
        return self.trained + self.prompts + self.bridges + self.repeated


class VersionUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one version of the weights sampled; `age` versions have come since, None: nobody knows."""

    version: str
    age: int | None
    num_tokens: int
    num_samples: int


class Staleness(msgspec.Struct, frozen=True, kw_only=True):
    """Which weights sampled, oldest first.

    Where their names have no order, `versions` are those with the most tokens first, and there are no ages.
    `ages` are each sample's, of its oldest trained token; `spans` are how many versions lie between its
    oldest and its newest. `num_mixed` samples have tokens of several. `mean_age` is over trained tokens.
    """

    versions: tuple[VersionUse, ...]
    num_mixed: int
    mean_age: float | None
    ages: Distribution
    spans: Distribution


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities recomputed on an engine: what `tokentape verify` says of `num_sessions` sessions."""

    num_sessions: int
    problems: tuple[str, ...]
    verified: Verified


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """What decoding and encoding again would have made of the trained turns.

    `num_unknown` turns have ids that the tokenizer does not know: it is another model's.
    """

    num_turns: int
    num_drifted: int
    num_tokens: int
    num_tokens_in_drifted: int
    num_unknown: int


class Oddity(msgspec.Struct, frozen=True, kw_only=True):
    """Why a sample is odd: a fact of `report.odd.FACTS`, in words; `share` of the samples have it."""

    fact: str
    words: str
    share: float


class Odd(msgspec.Struct, frozen=True, kw_only=True):
    """One of the oddest samples; `bits` is the sum of log2(1 / share) over its oddities."""

    session_id: str
    sample_id: str
    reward: float | None
    num_tokens: int
    num_turns: int
    bits: float
    oddities: tuple[Oddity, ...]
    link: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of a file of samples.

    Of a sample: `rewards`, `tokens` (all of its tape), `trained` (those with mask 1), `turns`, `logprobs`
    (the mean of its trained tokens, nats). Of a trained turn: `completions` (tokens), `parse_statuses`,
    `finish_reasons`, `logprob_bases`. Of a session: `branches` (samples). `num_without_logprob` trained
    tokens have no finite log-probability. `mismatch` and `drift` are None where nothing could recompute them:
    `not_recomputed` says why.
    """

    version: int = 1
    path: str
    num_samples: int
    num_sessions: int
    num_turns: int
    num_truncated: int
    num_without_logprob: int
    rewards: Distribution
    groups: Groups
    tokens: Distribution
    trained: Distribution
    completions: Distribution
    turns: Distribution
    branches: Distribution
    branch_reasons: dict[str, int]
    labels: dict[str, int]
    parse_statuses: dict[str, int]
    finish_reasons: dict[str, int]
    logprob_bases: dict[str, int]
    budget: Budget
    staleness: Staleness
    logprobs: Distribution
    mismatch: Mismatch | None
    drift: Drift | None
    not_recomputed: tuple[str, ...]
    odd: tuple[Odd, ...]
