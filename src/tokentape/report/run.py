"""Reads a file twice: its figures first, then each sample is held against them.

In memory are a few samples, and a few numbers for each session, group and version of the weights.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokentape.errors import ConfigError
from tokentape.report.drift import Drifting
from tokentape.report.figures import (
    Budget,
    Groups,
    Mismatch,
    Report,
    Staleness,
    VersionUse,
)
from tokentape.report.links import DEFAULT_VIEWER, checked_viewer
from tokentape.report.odd import Oddest, Usual
from tokentape.report.read import Measured, measured
from tokentape.report.spread import Moments, Names, Spread
from tokentape.tape import numbered_versions
from tokentape.tokenizer import Tokenizer


def report(
    path: Path,
    *,
    tokenizer: Tokenizer | None = None,
    mismatch: Mismatch | None = None,
    viewer: str = DEFAULT_VIEWER,
) -> Report:
    """The figures of a Parquet file of samples.

    With a `tokenizer` (the model's), what re-encoding would have changed; `mismatch` is what an engine made
    of the file, where it was asked. Links to samples begin with `viewer`.

    Raises:
        ConfigError: it is no file of samples, has no sample, or `viewer` is no URL to link to.
    """
    checked_viewer(viewer)
    whole, drifting = _Whole(), None if tokenizer is None else Drifting(tokenizer)
    for sample in measured(path, with_ids=drifting is not None):
        whole.add(sample)
        if drifting is not None:
            drifting.add(sample)
    if not whole.num_samples:
        raise ConfigError(f"{path} has no samples: nothing to report; were the sessions exported?")
    usual = whole.usual()
    oddest, stale = Oddest(usual), _Stale(numbered_versions(whole.versions))
    for sample in measured(path):
        oddest.add(sample)
        stale.add(sample)
    return Report(
        path=str(path),
        num_samples=whole.num_samples,
        num_sessions=len(whole.sessions),
        num_turns=whole.num_turns,
        num_truncated=whole.num_truncated,
        num_without_logprob=whole.num_without_logprob,
        rewards=usual.rewards,
        groups=_groups(whole),
        tokens=usual.tokens,
        trained=whole.trained.distribution(),
        completions=whole.completions.distribution(),
        turns=usual.turns,
        branches=usual.branches,
        branch_reasons=whole.reasons.counts(),
        labels=whole.labels.counts(),
        parse_statuses=whole.statuses.counts(),
        finish_reasons=whole.finishes.counts(),
        logprob_bases=whole.bases.counts(),
        budget=whole.budget(),
        staleness=stale.staleness(whole.versions, whole.samples_of),
        logprobs=usual.logprobs,
        mismatch=mismatch,
        drift=None if drifting is None else drifting.drift(),
        not_recomputed=tuple(_why_not(mismatch, tokenizer)),
        odd=oddest.oddest(viewer),
    )


def _why_not(mismatch: Mismatch | None, tokenizer: Tokenizer | None) -> Sequence[str]:
    why = list[str]()
    if mismatch is None:
        why.append("log-probabilities: give --engine URL of an engine with the weights that sampled")
    if tokenizer is None:
        why.append("drift: give --model DIR, whose tokenizer decodes and encodes again")
    return why


@dataclass(slots=True)
class _Whole:
    """The first pass."""

    num_samples: int = 0
    num_turns: int = 0
    num_truncated: int = 0
    num_without_logprob: int = 0
    num_ungrouped: int = 0
    rewards: Spread = field(default_factory=Spread)
    tokens: Spread = field(default_factory=Spread)
    trained: Spread = field(default_factory=Spread)
    completions: Spread = field(default_factory=Spread)
    turns: Spread = field(default_factory=Spread)
    logprobs: Spread = field(default_factory=Spread)
    reasons: Names = field(default_factory=Names)
    labels: Names = field(default_factory=Names)
    statuses: Names = field(default_factory=Names)
    finishes: Names = field(default_factory=Names)
    bases: Names = field(default_factory=Names)
    sessions: Counter[str] = field(default_factory=Counter[str])
    groups: dict[str, Moments] = field(default_factory=lambda: defaultdict[str, Moments](Moments))
    rewarded: Counter[str] = field(default_factory=Counter[str])
    group_sizes: Counter[str] = field(default_factory=Counter[str])
    versions: Counter[str] = field(default_factory=Counter[str])
    samples_of: Counter[str] = field(default_factory=Counter[str])
    _tokens: Counter[str] = field(default_factory=Counter[str])
    _rewarded_sessions: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    def add(self, sample: Measured) -> None:
        self.num_samples += 1
        self.num_truncated += sample.truncated
        self.num_without_logprob += max(sample.num_trained - sample.num_logprobs, 0)
        self.rewards.add(sample.reward)
        self.tokens.add(sample.num_tokens)
        self.trained.add(sample.num_trained)
        self.turns.add(len(sample.turns))
        self.logprobs.add(sample.mean_logprob)
        self.reasons.add(sample.branch_reason)
        self.labels.add(sample.label)
        self.sessions[sample.session_id] += 1
        if sample.group_id is None:
            self.num_ungrouped += 1
        else:
            self.group_sizes[sample.group_id] += 1
            self._add_reward(sample.group_id, sample)
        for version, count in sample.versions:
            self.versions[version] += count
        self.samples_of.update({version for version, _ in sample.versions})
        self._add_turns(sample)

    def _add_reward(self, group_id: str, sample: Measured) -> None:
        """One that is no finite number says nothing of the others. Branches of a session are one episode."""
        if sample.reward is None or not math.isfinite(sample.reward):
            return
        self.groups[group_id].add(sample.reward)
        if (group_id, sample.session_id) not in self._rewarded_sessions:
            self._rewarded_sessions.add((group_id, sample.session_id))
            self.rewarded[group_id] += 1

    def _add_turns(self, sample: Measured) -> None:
        """A turn that several samples share is counted where it is trained: once."""
        sampled = 0
        for turn in sample.turns:
            sampled += turn["end"] - turn["start"]
            if not turn["trained"]:
                continue
            self.num_turns += 1
            self.completions.add(turn["end"] - turn["start"])
            self.statuses.add(str(turn["parse_status"]))
            self.finishes.add(str(turn["finish_reason"]))
            self.bases.add(str(turn["logprob_basis"]))
        self._tokens["trained"] += sample.num_trained
        self._tokens["prompts"] += sample.num_prompt_tokens
        self._tokens["repeated"] += max(sampled - sample.num_trained, 0)
        rest = sample.num_tokens - sample.num_prompt_tokens - max(sampled, sample.num_trained)
        self._tokens["bridges"] += max(rest, 0)

    def budget(self) -> Budget:
        names = ("trained", "prompts", "bridges", "repeated")
        return Budget(**{name: self._tokens[name] for name in names})

    def usual(self) -> Usual:
        branches = Spread()
        for count in self.sessions.values():
            branches.add(count)
        return Usual(
            tokens=self.tokens.distribution(),
            turns=self.turns.distribution(),
            logprobs=self.logprobs.distribution(),
            branches=branches.distribution(),
            rewards=self.rewards.distribution(),
            groups=self.groups,
            sessions=self.sessions,
        )


def _groups(whole: _Whole) -> Groups:
    sizes = Spread()
    for count in whole.group_sizes.values():
        sizes.add(count)
    equal = sum(
        whole.rewarded[name] > 1 and group.smallest == group.largest for name, group in whole.groups.items()
    )
    return Groups(
        num_groups=len(whole.group_sizes),
        num_equal=equal,
        num_ungrouped=whole.num_ungrouped,
        sizes=sizes.distribution(),
    )


@dataclass(slots=True)
class _Stale:
    """The second pass: `places` are the versions' own, the oldest is 0; None where nobody knows."""

    places: dict[str, int] | None
    num_mixed: int = 0
    ages: Spread = field(default_factory=Spread)
    spans: Spread = field(default_factory=Spread)

    def add(self, sample: Measured) -> None:
        versions = {version for version, _ in sample.versions}
        self.num_mixed += len(versions) > 1
        if not versions or self.places is None:
            return
        places = {self.places[version] for version in versions}
        self.ages.add(len(self.places) - 1 - min(places))
        self.spans.add(max(places) - min(places))

    def staleness(self, tokens: Counter[str], samples: Counter[str]) -> Staleness:
        places, total = self.places, tokens.total()
        names = sorted(tokens, key=lambda name: -tokens[name] if places is None else places[name])
        used = tuple(
            VersionUse(
                version=version,
                age=None if places is None else len(places) - 1 - places[version],
                num_tokens=tokens[version],
                num_samples=samples[version],
            )
            for version in names
        )
        aged = sum(one.age * one.num_tokens for one in used if one.age is not None)
        return Staleness(
            versions=used,
            num_mixed=self.num_mixed,
            mean_age=aged / total if total and places is not None else None,
            ages=self.ages.distribution(),
            spans=self.spans.distribution(),
        )
