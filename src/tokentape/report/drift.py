"""Drift: which trained turns would be other ids, had they been kept as text."""

from dataclasses import dataclass

from tokentape.report.figures import Drift
from tokentape.report.read import Measured
from tokentape.tokenizer import Tokenizer


@dataclass(slots=True)
class Drifting:
    """Decodes and encodes every trained turn of a stream of samples."""

    tokenizer: Tokenizer
    _num_turns: int = 0
    _num_drifted: int = 0
    _num_tokens: int = 0
    _num_in_drifted: int = 0
    _num_unknown: int = 0

    def add(self, sample: Measured) -> None:
        """Look at a sample that was read with its ids."""
        assert sample.ids is not None  # noqa: S101  # the reader was told
        for turn in sample.turns:
            ids = sample.ids[turn["start"] : turn["end"]]
            if not turn["trained"] or not ids:
                continue
            self._num_turns += 1
            self._num_tokens += len(ids)
            if min(ids) < 0 or max(ids) >= self.tokenizer.vocab_size:
                self._num_unknown += 1
            elif self.tokenizer.encode(self.tokenizer.decode(ids)) != ids:
                self._num_drifted += 1
                self._num_in_drifted += len(ids)

    def drift(self) -> Drift:
        """What was found."""
        return Drift(
            num_turns=self._num_turns,
            num_drifted=self._num_drifted,
            num_tokens=self._num_tokens,
            num_tokens_in_drifted=self._num_in_drifted,
            num_unknown=self._num_unknown,
        )
