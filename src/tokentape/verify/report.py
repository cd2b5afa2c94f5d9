"""What `tokentape verify` found, as data, and what it means."""

import msgspec

from tokentape.verify.figures import EDGES, Figures


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """`Figures` of a version, or of the file. `judged`: its differences count for the verdict.

    `histogram` has one count more than `Report.histogram_edges`.
    """

    version: str | None
    judged: bool
    num_tokens: int
    share_beyond: float
    num_far: int
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

    `violations` are broken rules, in words, the first of them. `not_compared` counts trained tokens that no
    prefill can judge, by why. `drift` is None without a tokenizer.
    """

    path: str
    engine_version: str | None
    tolerance: float
    max_share: float
    num_samples: int
    num_trained: int
    num_violations: int
    violations: tuple[str, ...]
    not_compared: dict[str, int]
    whole: Summary
    versions: tuple[Summary, ...]
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
            if not one.judged:
                continue
            if one.num_far:
                found.append(
                    f"version {one.version}: {one.num_far} tokens are more than {10 * self.tolerance:g} off"
                )
            if one.share_beyond > self.max_share:
                found.append(
                    f"version {one.version}: {one.share_beyond:.2%} of the tokens are more than "
                    f"{self.tolerance:g} off ({self.max_share:.2%} may be)"
                )
        if not any(one.judged and one.num_tokens for one in self.versions) and self.num_trained:
            found.append("no token could be judged")
        return found
