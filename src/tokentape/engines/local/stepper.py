"""The embedded engine's compute: prefill what joins, step all that run, sample, decide who stops.

No threads: `local.LocalEngine` calls a `Stepper` from one thread alone. Log-probabilities are float32 and
equal those of an independent forward pass over the same ids up to rounding.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tokentape.engines.local import checkpoint
from tokentape.engines.local.checkpoint import Loaded
from tokentape.engines.local.kv import (
    Batch,
    KeyValues,
    PackedBatch,
    PrefixCache,
    SeparateBatch,
    is_packable,
    key_values,
)
from tokentape.engines.local.sampler import RowSampler, Sampled, floats, sample, top_pairs
from tokentape.engines.server.requests import Generation

PREFILL_TOKENS = 2048  # per forward pass; bounds the attention's memory on long prompts
SCORED_TOKENS = 256  # the same where every position's logits are wanted: V floats each


@dataclass(slots=True)
class Row:
    """A generation with its sampler; `epoch` counts the reloads before its keys and values were computed."""

    generation: Generation
    sampler: RowSampler
    stop_ids: frozenset[int]
    max_new_tokens: int
    tail_tokens: int
    epoch: int = 0


class Stepper:
    """A model, the rows that run on it, and the keys and values of some that have finished."""

    def __init__(self, loaded: Loaded, *, prefix_cache_bytes: int) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._packable = is_packable(loaded.model.config)
        self._keeps_logits = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._batch = self._new_batch()
        self._epoch = 0
        self.weight_version = "default"
        self.running: list[Row] = []

    def row(self, generation: Generation) -> Row:
        """Prepare a generation; nothing runs yet."""
        params, loaded = generation.params, self._loaded
        stop_ids = loaded.stop_ids | frozenset(params.stop_token_ids)
        room = loaded.context_length - len(generation.prompt_ids)
        return Row(
            generation,
            RowSampler(
                params,
                stop_ids,
                num_prompt=len(generation.prompt_ids),
                vocab_size=loaded.vocab_size,
                device=loaded.device,
            ),
            frozenset[int]() if params.ignore_eos else stop_ids,
            room if params.max_new_tokens is None else min(params.max_new_tokens, room),
            # A stop string of n bytes is spelled by n tokens at most; the margin is for a character cut at
            # the edge.
            tail_tokens=max((len(s.encode()) for s in params.stop_strings), default=0) + 4,
        )

    def begin(self, row: Row) -> dict[str, Any] | None:
        """Prefill a row and sample its next token; it joins the batch, or has ended: the reason.

        A row that was retracted goes on after the tokens it has.
        """
        generation = row.generation
        tokens = generation.prompt_ids + generation.completion_ids
        row.epoch = self._epoch
        if row.max_new_tokens == 0 and not _scores(generation):
            return {"type": "length", "length": 0}
        cache, logits = self._prefill(generation, tokens)
        reason: dict[str, Any] | None = {"type": "length", "length": 0}
        if row.max_new_tokens:
            reason = self._commit([row], sample(logits, [row.sampler]))[0]
        if reason is None:
            self._batch.join(cache, len(tokens))
            self.running.append(row)
        elif self._packable and not reason.get("status_code"):
            self._prefixes.put(tokens, key_values(cache, len(tokens)))
        return reason

    def step(self) -> list[tuple[Row, dict[str, Any]]]:
        """One token for every running row; those that ended, with the reason.

        An exception leaves `running` as it was.
        """
        logits = self._batch.forward(self._model, [row.generation.completion_ids[-1] for row in self.running])
        reasons = self._commit(self.running, sample(logits, [row.sampler for row in self.running]))
        # From the last to the first: `drop` moves the last row into the gap.
        ends = [(i, reason) for i, reason in enumerate(reasons) if reason is not None]
        return [(self.drop(i, reason), reason) for i, reason in reversed(ends)]

    def drop(self, i: int, reason: dict[str, Any]) -> Row:
        """Take a running row out of the batch and keep its keys and values for prompts that begin alike."""
        row = self.running[i]
        # The last token was sampled, never fed: the cache does not hold it. Keys of mixed weights, or of a
        # model that went astray, are not worth keeping.
        sound = row.epoch == self._epoch and not reason.get("status_code")
        if sound and (cache := self._batch.extract(i)) is not None:
            self._prefixes.put(row.generation.prompt_ids + row.generation.completion_ids[:-1], cache)
        self._batch.leave(i)
        last = self.running.pop()
        if i < len(self.running):
            self.running[i] = last
        return row

    def clear(self) -> list[Row]:
        """Take all rows out and forget their keys and values; `begin` lets them go on."""
        rows, self.running = self.running, []
        self._batch = self._new_batch()
        return rows

    def flush(self) -> None:
        """Empty the prefix cache."""
        self._prefixes.clear()

    def reload(self, model_path: str, weight_version: str | None) -> None:
        """Exchange the weights under the running rows. Raises `ConfigError`, with no effect."""
        loaded = self._loaded
        self._model = checkpoint.reload(self._model, model_path, device=loaded.device, dtype=loaded.dtype)
        self._epoch += 1
        self._prefixes.clear()
        self.weight_version = self.weight_version if weight_version is None else weight_version

    def _new_batch(self) -> Batch:
        return (PackedBatch if self._packable else SeparateBatch)(self._loaded.device)

    def _new_cache(self, prefix: KeyValues) -> DynamicCache:
        if not self._packable:
            return DynamicCache(config=self._model.config)
        # Without the configuration every layer keeps all tokens; the mask alone makes a sliding window slide.
        return DynamicCache(prefix) if prefix else DynamicCache()

    def _prefill(self, generation: Generation, tokens: list[int]) -> tuple[DynamicCache, Tensor]:
        """Run int[P] tokens through the model: their cache, and the logits [1, V] of the next token.

        Where the prompt's log-probabilities are wanted from s on, the prefix cache is used up to s at most,
        since the logits at s give the first of them.
        """
        device, scores = self._loaded.device, _scores(generation)
        score_from = generation.body.logprob_start_len if scores else len(tokens)
        at, prefix = self._prefixes.longest(tokens, min(len(tokens) - 1, score_from))
        cache = self._new_cache(prefix)
        if generation.num_cached_tokens is None:
            generation.num_cached_tokens = at
        if scores and score_from < len(tokens):
            generation.input_logprobs.append(None)
            generation.input_top_logprobs.append(None)
        logits = torch.empty(0)
        while at < len(tokens):
            end = min(at + (SCORED_TOKENS if scores else PREFILL_TOKENS), len(tokens))
            num_kept = max(1, end - max(at, score_from))
            output = self._model(
                input_ids=torch.tensor([tokens[at:end]], device=device),
                attention_mask=torch.ones(1, end, dtype=torch.bool, device=device),
                position_ids=torch.arange(at, end, device=device)[None],
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": num_kept} if self._keeps_logits else {}),
            )
            logits = output.logits[0, -num_kept:]
            if scores and end > score_from:
                _score(generation, logits, tokens[end - num_kept + 1 : end + 1])
            at = end
        return cache, logits[-1:]

    def _commit(self, rows: list[Row], sampled: Sampled) -> list[dict[str, Any] | None]:
        """Append one sampled token to each row; why each ends, or None."""
        reasons: list[dict[str, Any] | None] = []
        for i, row in enumerate(rows):
            generation, logprob = row.generation, sampled.logprobs[i]
            if not -torch.inf < logprob <= 0:
                reasons.append(failure(ArithmeticError(f"the model's logits are not finite ({logprob})")))
                continue
            num_top = generation.body.top_logprobs_num
            top = sampled.top(i, num_top) if num_top else []
            if generation.body.return_sampling_mask:
                kept, kept_logprob = sampled.support(i)
                generation.kept.append(kept)
                generation.kept_logprobs.append(kept_logprob)
            generation.append(sampled.ids[i], logprob, self.weight_version, top)
            reasons.append(self._why_stop(row, sampled.ids[i]))
            if reasons[-1] is None and generation.body.stream:
                generation.on_progress()
        return reasons

    def _why_stop(self, row: Row, token: int) -> dict[str, Any] | None:
        """The finish reason after `token`. A stop wins over the length, as seen on SGLang 0.5.23."""
        if token in row.stop_ids:
            return {"type": "stop", "matched": token}
        ids = row.generation.completion_ids
        if stops := row.generation.params.stop_strings:
            tail: str = self._loaded.tokenizer.decode(ids[-row.tail_tokens :], skip_special_tokens=False)
            for stop in stops:
                if stop in tail:
                    return {"type": "stop", "matched": stop}
        if len(ids) >= row.max_new_tokens:
            return {"type": "length", "length": row.max_new_tokens}
        return None


def failure(error: Exception) -> dict[str, Any]:
    """The finish reason of a generation that our own fault ended; the server answers 500."""
    message = f"{type(error).__name__}: {error}"
    return {"type": "abort", "message": message, "status_code": 500, "err_type": "InternalServerError"}


def _scores(generation: Generation) -> bool:
    """Whether the prompt's own log-probabilities are wanted, and not there yet."""
    body = generation.body
    return body.return_logprob and body.logprob_start_len >= 0 and not generation.input_logprobs


def _score(generation: Generation, logits: Tensor, targets: list[int]) -> None:
    """Log-probabilities of the prompt's own tokens; of temperature 1, as SGLang's, unless asked otherwise."""
    temperature = generation.body.input_logprob_temperature or 1.0
    distribution = (logits[: len(targets)].float() / temperature).log_softmax(-1)
    chosen = distribution.gather(1, torch.tensor(targets, dtype=torch.long, device=logits.device)[:, None])
    generation.input_logprobs.extend(floats(chosen[:, 0]))
    if num := generation.body.top_logprobs_num:
        generation.input_top_logprobs.extend(top_pairs(position, num) for position in distribution)
