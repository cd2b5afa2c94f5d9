"""A `Generation` → the JSON that SGLang answers: whole, or event by event. No I/O."""

import time
from typing import Any, Protocol

from tokentape.engines.server.requests import Generation, TopLogprobs


class Decode(Protocol):
    """Ids → text."""

    def __call__(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Decode int[n]."""
        ...


class Answer:
    """Reads one generation while the engine's thread extends it.

    `cumulative` and `delta` look at the generation anew each time. Text is decoded step by step while it runs
    (a character is held back until all its bytes are there) and once more as a whole, trimmed, when it has
    ended.
    """

    def __init__(self, generation: Generation, decode: Decode) -> None:
        self.generation = generation
        self._decode = decode
        self._text = ""
        self._decoded_from = self._decoded_to = 0
        self._num_sent = 0
        self._sent_text = ""

    def failure(self) -> dict[str, Any] | None:
        """The finish reason, when it is an error that has an HTTP status."""
        reason = self.generation.finish_reason
        return reason if reason is not None and reason.get("status_code") else None

    def is_due(self) -> bool:
        """Whether enough new tokens are there for an event (`stream_interval`)."""
        return len(self.generation.completion_ids) - self._num_sent >= max(
            1, self.generation.params.stream_interval
        )

    def cumulative(self) -> dict[str, Any]:
        """Everything so far: the answer as a whole, and SGLang's default stream event."""
        finish_reason = self.generation.finish_reason
        num = len(self.generation.completion_ids)
        self._num_sent = num
        return self._event(0, num, finish_reason, self._text_until(num, finish_reason))

    def delta(self) -> dict[str, Any]:
        """What is new since the last event."""
        finish_reason = self.generation.finish_reason
        start, num = self._num_sent, len(self.generation.completion_ids)
        text = self._text_until(num, finish_reason)
        # A stop string may have been sent in part before it was complete: what is sent cannot be taken back.
        new = text[len(self._sent_text) :]
        self._num_sent = num
        self._sent_text = max(self._sent_text, text, key=len)
        return self._event(start, num, finish_reason, new)

    def _event(self, start: int, num: int, finish_reason: dict[str, Any] | None, text: str) -> dict[str, Any]:
        generation = self.generation
        event: dict[str, Any] = {
            "text": text,
            "output_ids": generation.completion_ids[start:num],
            "meta_info": self._meta(start, num, finish_reason),
        }
        if generation.body.return_prompt_token_ids:
            event["prompt_token_ids"] = generation.prompt_ids
        return event

    def _meta(self, start: int, num: int, finish_reason: dict[str, Any] | None) -> dict[str, Any]:
        generation = self.generation
        meta: dict[str, Any] = {
            "id": generation.rid,
            "finish_reason": finish_reason,
            "prompt_tokens": len(generation.prompt_ids),
            "weight_version": generation.weight_version,
            "num_retractions": generation.num_retractions,
        }
        if generation.body.return_logprob:
            meta |= self._logprobs(start, num)
        if generation.body.input_logprob_temperature is not None:
            meta["input_logprob_temperature"] = generation.body.input_logprob_temperature
        if generation.body.return_sampling_mask:
            meta["output_token_sampling_mask"] = generation.kept[start:num]
            meta["output_token_sampling_logprobs"] = generation.kept_logprobs[start:num]
            meta["output_token_sampling_mask_length"] = num
        cached = generation.num_cached_tokens or 0
        meta |= {"reasoning_tokens": 0, "completion_tokens": num, "cached_tokens": cached}
        if finish_reason is not None:
            meta["weight_versions"] = [
                {"version": v.version, "start": v.start, "end": v.end} for v in generation.versions
            ]
        meta["cached_tokens_details"] = {"device": cached, "host": 0} if cached else None
        meta["dp_rank"] = None
        if finish_reason is not None:
            meta["e2e_latency"] = time.monotonic() - generation.started_s
        return meta

    def _logprobs(self, start: int, num: int) -> dict[str, Any]:
        generation = self.generation
        scored = len(generation.input_logprobs)
        input_ids = generation.prompt_ids[len(generation.prompt_ids) - scored :]
        fields: dict[str, Any] = {
            "input_token_logprobs": self._named(generation.input_logprobs, input_ids),
            "output_token_logprobs": self._named(
                generation.logprobs[start:num], generation.completion_ids[start:num]
            ),
            "output_token_logprobs_length": num,
        }
        if generation.body.top_logprobs_num:
            fields["input_top_logprobs"] = [self._tops(top) for top in generation.input_top_logprobs]
            fields["output_top_logprobs"] = [self._tops(top) for top in generation.top_logprobs[start:num]]
        return fields

    def _named(self, logprobs: list[Any], ids: list[int]) -> list[tuple[float | None, int, str | None]]:
        if not self.generation.body.return_text_in_logprobs:
            return [(logprob, token, None) for logprob, token in zip(logprobs, ids, strict=True)]
        texts = [self._decode([token], skip_special_tokens=False) for token in ids]
        return list(zip(logprobs, ids, texts, strict=True))

    def _tops(self, top: TopLogprobs | None) -> list[tuple[float | None, int, str | None]] | None:
        return (
            None if top is None else self._named([logprob for logprob, _ in top], [token for _, token in top])
        )

    def _text_until(self, num: int, finish_reason: dict[str, Any] | None) -> str:
        params, ids = self.generation.params, self.generation.completion_ids
        if finish_reason is None:
            return self._text_so_far(num)
        matched = finish_reason.get("matched")
        trims = matched is not None and not params.no_stop_trim
        kept = ids[: num - 1] if trims and isinstance(matched, int) else ids[:num]
        text = self._decode(kept, skip_special_tokens=params.skip_special_tokens)
        if trims and isinstance(matched, str) and (at := text.find(matched)) >= 0:
            return text[:at]
        return text

    def _text_so_far(self, num: int) -> str:
        """The text of the first `num` tokens, at the cost of the new ones.

        New text is what a window's decoding gains by the new tokens, the window beginning at the last but one
        boundary: tokenizers decode the first token of a text differently.
        """
        ids, skip = self.generation.completion_ids, self.generation.params.skip_special_tokens
        before = self._decode(ids[self._decoded_from : self._decoded_to], skip_special_tokens=skip)
        after = self._decode(ids[self._decoded_from : num], skip_special_tokens=skip)
        if after.endswith("\ufffd"):
            return self._text  # bytes of an unfinished character
        self._text += after[len(before) :]
        self._decoded_from, self._decoded_to = self._decoded_to, num
        return self._text
