"""What a SGLang server says of itself: the answers of its information routes. No I/O."""

from typing import Any

import msgspec

from tokentape import errors
from tokentape.types import Sampling

_PREFERRED = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty"),
    }
)


class ModelInfo(msgspec.Struct):
    """The answer of `/model_info`."""

    model_path: str | None = None
    weight_version: str | None = None
    preferred_sampling_params: dict[str, Any] | None = None

    def sampling(self) -> Sampling:
        """What the server adds to requests (`--preferred-sampling-params`), as far as we know its fields.

        Raises:
            EngineProtocolError: a value is of another type.
        """
        given = self.preferred_sampling_params or {}
        try:
            return msgspec.convert({k: v for k, v in given.items() if k in _PREFERRED}, Sampling)
        except msgspec.ValidationError as error:
            raise errors.EngineProtocolError(f"preferred_sampling_params: {error}") from None


class ModelCard(msgspec.Struct):
    """One model of `/v1/models`; a LoRA adapter has no length of its own."""

    max_model_len: int | None = None


class Models(msgspec.Struct):
    """The answer of `/v1/models`."""

    data: list[ModelCard] = msgspec.field(default_factory=list[ModelCard])


class ServerInfo(msgspec.Struct):
    """The answer of `/get_server_info`; the length is null unless set on the command line.

    `dtype` is the embedded engine's own word, or what SGLang was told ("auto"). `version` is the server's.
    """

    context_length: int | None = None
    dtype: str | None = None
    version: str | None = None


class Tokenized(msgspec.Struct):
    """The answer of `/tokenize`: a text's ids, special tokens of the tokenizer's own included."""

    tokens: list[int]
