"""Which samples are odd, and why: a score that anybody can add up.

A sample has facts: it is longer than nearly all others, its reward is far from its group's, a call is
malformed, … A fact that a share s of the file's samples have counts log2(1/s) bits; one that more than half
of them have is not odd and counts nothing. The score is the sum.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from tokentape.report.figures import Distribution, Odd, Oddity
from tokentape.report.links import sample_link
from tokentape.report.read import Measured
from tokentape.report.spread import Moments
from tokentape.shown import shown

MOST = 10
_ENOUGH = 8  # fewer numbers say nothing of what is usual
_GROUP = 4  # so many samples, and a group says what its rewards are
_FAR = 1.5  # times the distance between the quartiles: Tukey's fence
_SOUND = ("ok", "unknown_tool")


@dataclass(frozen=True, slots=True)
class Usual:
    """What a file's samples are like: what each of them is held against."""

    tokens: Distribution
    turns: Distribution
    logprobs: Distribution
    branches: Distribution
    rewards: Distribution
    groups: Mapping[str, Moments]
    sessions: Mapping[str, int]


Found: TypeAlias = tuple[str, float] | None
"""A fact in words, and how far out it is; None where it is none."""


def _outside(value: float | None, usual: Distribution, above: bool) -> float | None:
    """How far beyond the quartile a number lies, None where it is within the fence.

    In distances between the quartiles; where these are the same number, in that number.
    """
    if value is None or usual.count < _ENOUGH or usual.p25 is None or usual.p75 is None:
        return None
    width = usual.p75 - usual.p25
    edge = usual.p75 if above else usual.p25
    beyond = value - edge if above else edge - value
    if beyond <= 1e-9 + 0.005 * abs(value) or beyond <= _FAR * width:  # quantiles have three digits
        return None
    return beyond / (width or abs(edge) or 1.0)


def _half(usual: Distribution, form: str = ",.0f") -> str:
    if usual.p25 == usual.p75:
        return f"at least half have {usual.p25:{form}}"
    return f"the middle half has {usual.p25:{form}} to {usual.p75:{form}}"


def _reward(sample: Measured, usual: Usual) -> Found:
    reward = sample.reward
    if reward is None or not math.isfinite(reward):
        return None
    group = usual.groups.get(sample.group_id or "")
    if group is not None and group.count >= _GROUP:
        # None of n is farther out than √(n - 1) deviations: in small groups, nearly so far is far.
        most = min(2.0, 0.95 * math.sqrt(group.count - 1))
        mean, deviation, of = group.mean, group.deviation, f"its group of {group.count}"
    elif usual.rewards.count >= _ENOUGH and usual.rewards.mean is not None and usual.rewards.deviation:
        mean, deviation, most, of = usual.rewards.mean, usual.rewards.deviation, 3.0, "the file"
    else:
        return None
    if deviation < 1e-9 or abs(reward - mean) < most * deviation:
        return None
    far = abs(reward - mean) / deviation
    return f"reward {reward:.4g}: {far:.1f} standard deviations from the mean of {of}, {mean:.3g}", far


def _long(sample: Measured, usual: Usual) -> Found:
    far = _outside(sample.num_tokens, usual.tokens, above=True)
    return None if far is None else (f"{sample.num_tokens:,} tokens; {_half(usual.tokens)}", far)


def _short(sample: Measured, usual: Usual) -> Found:
    far = _outside(sample.num_tokens, usual.tokens, above=False)
    return None if far is None else (f"only {sample.num_tokens:,} tokens; {_half(usual.tokens)}", far)


def _turns(sample: Measured, usual: Usual) -> Found:
    far = _outside(len(sample.turns), usual.turns, above=True)
    return None if far is None else (f"{len(sample.turns)} turns; {_half(usual.turns)}", far)


def _unlikely(sample: Measured, usual: Usual) -> Found:
    far = _outside(sample.mean_logprob, usual.logprobs, above=False)
    if far is None:
        return None
    words = f"mean log-probability {sample.mean_logprob:.3f}: the policy found it unlikely"
    return f"{words}; {_half(usual.logprobs, '.3f')}", far


def _branches(sample: Measured, usual: Usual) -> Found:
    count = usual.sessions[sample.session_id]
    far = _outside(count, usual.branches, above=True)
    return None if far is None else (f"its session has {count} branches; {_half(usual.branches)}", far)


def _malformed(sample: Measured, usual: Usual) -> Found:
    del usual
    bad = [turn["parse_status"] for turn in sample.turns if turn["parse_status"] not in _SOUND]
    if not bad:
        return None
    names = ", ".join(sorted({shown(str(status), 40) for status in bad}))
    return f"{len(bad)} of {len(sample.turns)} turns cannot be read as written ({names})", float(len(bad))


def _truncated(sample: Measured, usual: Usual) -> Found:
    del usual
    return ("cut by length: its last turn did not end by itself", 0.0) if sample.truncated else None


def _untrained(sample: Measured, usual: Usual) -> Found:
    del usual
    return None if sample.num_trained else ("nothing in it is trained", 0.0)


def _mixed(sample: Measured, usual: Usual) -> Found:
    del usual
    count = len({version for version, _ in sample.versions})
    return (f"sampled by {count} versions of the weights", float(count)) if count > 1 else None


FACTS: Mapping[str, Callable[[Measured, Usual], Found]] = {
    "reward": _reward,
    "long": _long,
    "short": _short,
    "many_turns": _turns,
    "unlikely": _unlikely,
    "malformed": _malformed,
    "truncated": _truncated,
    "many_branches": _branches,
    "mixed_weights": _mixed,
    "untrained": _untrained,
}
"""In the order in which a sample's oddities are listed when they count the same."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    sample: Measured
    words: Mapping[str, str]
    far: float

    @property
    def order(self) -> tuple[float, str, str]:
        return -self.far, self.sample.session_id, self.sample.sample_id


@dataclass(slots=True)
class Oddest:
    """Finds the oddest samples of a stream.

    What a fact counts is known only at the end. Samples with the same facts count the same, so the farthest
    out of each combination of facts are enough.
    """

    usual: Usual
    _num_samples: int = 0
    _having: Counter[str] = field(default_factory=Counter[str])
    _best: dict[tuple[str, ...], list[_Candidate]] = field(
        default_factory=lambda: defaultdict[tuple[str, ...], list[_Candidate]](list)
    )

    def add(self, sample: Measured) -> None:
        """Look at a sample."""
        self._num_samples += 1
        found = {name: fact for name, look in FACTS.items() if (fact := look(sample, self.usual)) is not None}
        if not found:
            return
        self._having.update(found.keys())
        words = {name: fact[0] for name, fact in found.items()}
        best = self._best[tuple(found)]
        best.append(_Candidate(sample, words, sum(fact[1] for fact in found.values())))
        best.sort(key=lambda each: each.order)
        del best[MOST:]

    def oddest(self, viewer: str) -> tuple[Odd, ...]:
        """The oddest first; fewer than ten where no more are odd."""
        scored = [
            (-self._bits(names), *candidate.order, candidate)
            for names, candidates in self._best.items()
            for candidate in candidates
            if self._bits(names) > 0
        ]
        scored.sort(key=lambda each: each[:-1])
        return tuple(self._odd(each[-1], -each[0], viewer) for each in scored[:MOST])

    def _bits(self, names: tuple[str, ...]) -> float:
        return sum(math.log2(1 / self._share(name)) for name in names if self._share(name) <= 0.5)

    def _share(self, name: str) -> float:
        return self._having[name] / self._num_samples

    def _odd(self, candidate: _Candidate, bits: float, viewer: str) -> Odd:
        sample = candidate.sample
        return Odd(
            session_id=sample.session_id,
            sample_id=sample.sample_id,
            reward=sample.reward,
            num_tokens=sample.num_tokens,
            num_turns=len(sample.turns),
            bits=bits,
            oddities=tuple(self._oddities(candidate.words)),
            link=sample_link(viewer, sample.session_id, sample.sample_id),
        )

    def _oddities(self, words: Mapping[str, str]) -> Iterator[Oddity]:
        for name in sorted(words, key=self._share):
            if self._share(name) <= 0.5:
                yield Oddity(fact=name, words=words[name], share=self._share(name))
