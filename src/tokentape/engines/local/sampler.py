"""Logits → one token per row, with the log-probability it had under the temperature-scaled distribution.

The log-probability is taken after penalties and `logit_bias`, and before top-k, top-p and min-p cut the
distribution, as SGLang does; greedy rows are not scaled at all. A token is drawn by inverting the cumulative
distribution at one uniform number per row, a hash of the row's seed and the token's place in the sequence:
nothing of a draw depends on which other rows share the batch, and a generation that is retracted, or aborted
and resumed behind its tokens, draws as if it had not been.
"""

import hashlib
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentape.engines.server.requests import SamplingParams
from tokentape.types import GREEDY_BELOW


class RowSampler:
    """The sampling state of one generation: its parameters, its seed, and what it has sampled so far.

    `stop_ids` are kept from being sampled while fewer than `min_new_tokens` are. `num_prompt` is the place
    of the first token to sample.
    """

    def __init__(
        self,
        params: SamplingParams,
        stop_ids: frozenset[int],
        *,
        num_prompt: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.greedy = params.greedy
        self.temperature = 1.0 if params.temperature < GREEDY_BELOW else params.temperature
        self.truncates = not self.greedy and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)
        self.params = params
        self.num_sampled = 0
        self._num_prompt = num_prompt
        seed = secrets.randbits(63) if params.sampling_seed is None else params.sampling_seed
        self._seed = f"{seed}:".encode()
        known = [token for token in stop_ids if 0 <= token < vocab_size]
        self._stop_ids = torch.tensor(known, dtype=torch.long, device=device)
        self._bias: Tensor | None = None
        if params.logit_bias:
            self._bias = torch.zeros(vocab_size, device=device)
            for key, value in params.logit_bias.items():
                self._bias[int(key)] = value
        self._counts: Tensor | None = None
        if params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1:
            self._counts = torch.zeros(vocab_size, device=device)

    def uniform(self) -> float:
        """The next token's number in [0, 1). 52 bits: the product with a total is never rounded up to it."""
        place = str(self._num_prompt + self.num_sampled).encode()
        digest = hashlib.blake2b(self._seed + place, digest_size=8).digest()
        return (int.from_bytes(digest) >> 12) * 2.0**-52

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` would change anything now."""
        return (
            self._bias is not None
            or self._counts is not None
            or self.num_sampled < self.params.min_new_tokens
        )

    def adjust(self, logits: Tensor) -> None:
        """Apply penalties (of sampled tokens only, as SGLang), bias, minimum length to float[V], in place."""
        if self._counts is not None:
            seen = self._counts > 0
            scaled = torch.where(
                logits < 0, logits * self.params.repetition_penalty, logits / self.params.repetition_penalty
            )
            logits.copy_(torch.where(seen, scaled, logits))
            logits.sub_(self._counts * self.params.frequency_penalty + seen * self.params.presence_penalty)
        if self._bias is not None:
            logits.add_(self._bias)
        if self.num_sampled < self.params.min_new_tokens:
            logits[self._stop_ids] = -torch.inf

    def observe(self, token: int) -> None:
        """Take note of the token that was sampled."""
        self.num_sampled += 1
        if self._counts is not None:
            self._counts[token] += 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's tokens.

    `ids` int[B], `logprobs` float[B] nats, `distribution` float32[B, V] nats. `kept` float32[B, V] are the
    probabilities that truncation left, None where all rows took the likeliest token.
    """

    ids: list[int]
    logprobs: list[float]
    distribution: Tensor
    kept: Tensor | None
    greedy: list[bool]

    def support(self, row: int) -> tuple[list[int], float]:
        """The ids that a row was drawn from, and the log-probability of the sampled one among them."""
        if self.kept is None or self.greedy[row]:
            return [self.ids[row]], 0.0
        probs = self.kept[row].double()
        logprob = (probs[self.ids[row]] / probs.sum()).log()
        return ints(probs.nonzero()[:, 0]), min(float(logprob), 0.0)

    def top(self, row: int, num: int) -> list[tuple[float, int]]:
        """The `num` likeliest tokens of a row, as pairs of log-probability and id."""
        return top_pairs(self.distribution[row], num)


def top_pairs(logprobs: Tensor, num: int) -> list[tuple[float, int]]:
    """The `num` largest of float[V] as pairs of log-probability and id, largest first.

    An impossible token has the float minimum, as from SGLang: JSON has no infinity.
    """
    values, ids = logprobs.topk(min(num, logprobs.shape[-1]))
    values = values.clamp(min=torch.finfo(values.dtype).min)
    return list(zip(floats(values), ints(ids), strict=True))


def floats(tensor: Tensor) -> list[float]:
    """float[n] as Python numbers."""
    return tensor.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def ints(tensor: Tensor) -> list[int]:
    """int[n] as Python numbers."""
    return tensor.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def sample(logits: Tensor, rows: list[RowSampler]) -> Sampled:
    """Draw one token per row from logits [B, V]; the rows have observed their tokens afterwards."""
    logits = logits.float()
    if any(row.adjusts for row in rows):
        logits = logits.clone()
        for i, row in enumerate(rows):
            if row.adjusts:
                row.adjust(logits[i])
    if any(row.temperature != 1 for row in rows):
        logits = logits / torch.tensor([[row.temperature] for row in rows], device=logits.device)
    distribution = logits.log_softmax(-1)
    greedy = all(row.greedy for row in rows)
    kept = None if greedy else _kept(distribution, rows)
    chosen = distribution.argmax(-1) if kept is None else _draw(distribution, kept, rows)
    ids = ints(chosen)
    logprobs = floats(distribution.gather(1, chosen[:, None])[:, 0])
    for row, token in zip(rows, ids, strict=True):
        row.observe(token)
    return Sampled(ids, logprobs, distribution, kept, [row.greedy for row in rows])


def _kept(distribution: Tensor, rows: list[RowSampler]) -> Tensor:
    """float32[B, V]: probabilities, zero where truncation excludes a token; not renormalised."""
    probs = distribution.exp()
    cut = [i for i, row in enumerate(rows) if row.truncates]
    if cut:
        probs[cut] = _truncate(probs[cut], [rows[i].params for i in cut])
    return probs


def _draw(distribution: Tensor, probs: Tensor, rows: list[RowSampler]) -> Tensor:
    """int64[B]: inverse of the cumulative distribution in vocabulary order, argmax for greedy rows."""
    # In float64: over 10^5 tokens a float32 running sum is off by more than rare tokens weigh.
    cumulative = probs.double().cumsum(-1)
    uniform = torch.tensor([[row.uniform()] for row in rows], dtype=torch.float64, device=probs.device)
    # The first token whose cumulative probability exceeds the target has a probability above zero itself. The
    # clamp acts on rows of NaN alone, whose log-probability the caller refuses.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    drawn = drawn.clamp_(max=probs.shape[-1] - 1)
    if any(row.greedy for row in rows):
        greedy = torch.tensor([row.greedy for row in rows], device=probs.device)
        drawn = torch.where(greedy, distribution.argmax(-1), drawn)
    return drawn


def _truncate(probs: Tensor, params: list[SamplingParams]) -> Tensor:
    """float[b, V] with the tokens that top-k, top-p and min-p exclude set to zero; not renormalised.

    All three look at the untruncated distribution, as SGLang's own PyTorch sampler does.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    num_tokens = probs.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=probs.device)[:, None]

    rank = torch.arange(num_tokens, device=probs.device)
    keep = rank < column([p.top_k if p.top_k > 0 else num_tokens for p in params])
    # A token stays while those before it have not reached top_p; at 1 rounding must not cut the tail.
    before = ordered.cumsum(-1) - ordered
    keep &= before < column([p.top_p if p.top_p < 1 else torch.inf for p in params])
    keep &= ordered >= ordered[:, :1] * column([p.min_p for p in params])
    keep[:, 0] = True
    return torch.zeros_like(probs).scatter_(1, order, ordered * keep)
