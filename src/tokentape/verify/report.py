"""What `tokentape verify` found, as data, and what it means."""

from collections.abc import Iterator

import msgspec

from tokentape.verify.figures import EDGES, FAR, MEAN, Figures

_ENOUGH = 20
_ALIKE = 0.2
"""`Report.unscaled` agrees where at least so many tokens differ by less than this share of the tolerance."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """`Figures` of a version, or of the file. `judged`: its differences count for the verdict.

    `histogram` has one count more than `Report.histogram_edges`.
    """

    version: str | None
    judged: bool
    num_tokens: int
    share_beyond: float
    num_far: int
    num_bad_turns: int
    mean: float
    largest: float
    k3: float
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, figures: Figures, version: str | None, *, judged: bool) -> "Summary":
        """The figures of a version (None: of the whole file)."""
        return cls(
            version=version,
            judged=judged,
            num_tokens=figures.num_tokens,
            share_beyond=figures.share_beyond,
            num_far=figures.num_far,
            num_bad_turns=figures.num_bad_turns,
            mean=figures.mean,
            largest=figures.largest,
            k3=figures.k3,
            histogram=tuple(figures.histogram),
        )


class Offence(msgspec.Struct, frozen=True, kw_only=True):
    """A token that is not what the file says; `text` are its neighbours, itself in ⟦⟧, where known."""

    sample_id: str
    turn_id: str
    token: int
    token_id: int
    version: str
    recorded: float
    recomputed: float
    text: str | None = None


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """What decoding and encoding again would have made of the trained turns."""

    num_turns: int
    num_drifted: int
    num_tokens_in_drifted: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All findings about one file.

    `violations` are broken rules, in words, the first of them; `violation_text` is what the first is about,
    as `Offence.text`. `not_compared` counts trained tokens that no prefill can judge, by why. `unscaled`
    compares tokens sampled at another temperature, which this engine cannot score, with values at
    temperature 1: they must not agree. `drift` is None without a tokenizer.
    """

    path: str
    engine_version: str | None
    tolerance: float
    max_share: float
    num_samples: int
    num_trained: int
    num_violations: int
    violations: tuple[str, ...]
    violation_text: str | None
    not_compared: dict[str, int]
    whole: Summary
    versions: tuple[Summary, ...]
    unscaled: Summary | None
    first_offence: Offence | None
    drift: Drift | None
    histogram_edges: tuple[float, ...] = EDGES

    @property
    def problems(self) -> list[str]:
        """Why the file is not what it should be; empty where it is."""
        found: list[str] = []
        if self.num_violations:
            found.append(f"{self.num_violations} broken rules")
        for one in self.versions:
            if one.judged:
                found += [f"version {one.version}: {what}" for what in self._wrong(one)]
        other = self.unscaled
        if other is not None and other.num_tokens >= _ENOUGH and other.mean <= self.tolerance * _ALIKE:
            found.append(
                f"{other.num_tokens} tokens that were sampled at another temperature have log-probabilities "
                f"of temperature 1 (mean difference {other.mean:.1e}): was the engine started with "
                "SGLANG_RETURN_ORIGINAL_LOGPROB?"
            )
        if not any(one.judged and one.num_tokens for one in self.versions) and self.num_trained:
            found.append(self._unjudged())
        return found

    def _wrong(self, one: Summary) -> Iterator[str]:
        if one.num_far:
            yield f"{one.num_far} tokens are more than {FAR * self.tolerance:g} off"
        if one.num_bad_turns:
            yield f"{one.num_bad_turns} turns are more than {MEAN * self.tolerance:g} off in the mean"
        if one.share_beyond > self.max_share:
            yield (
                f"{one.share_beyond:.2%} of the tokens are more than {self.tolerance:g} off "
                f"({self.max_share:.2%} may be)"
            )

    def _unjudged(self) -> str:
        others = ", ".join(repr(one.version) for one in self.versions)
        if not others:
            return "no token could be judged"
        return (
            f"no token could be judged: the engine has weights {self.engine_version!r}, the tokens are of "
            f"{others} (--version, if they are the same)"
        )
