"""Log-probabilities by one plain forward pass over a tape: no cache, no batch, no engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Forward:
    """A model in float32 on the CPU, for checking what an engine recorded."""

    def __init__(self, model_dir: Path) -> None:
        auto: Any = AutoModelForCausalLM  # transformers leaves its arguments untyped
        model = auto.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
        self._model = model.eval()

    def logprobs(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """float[N-1] nats: entry i is log p(token i+1 | tokens 0..i), temperature-scaled."""
        ids = torch.tensor([list(token_ids)])
        with torch.inference_mode():
            logits = self._model(ids).logits[0, :-1].float() / temperature
        picked: Any = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])
        return picked[:, 0].tolist()
