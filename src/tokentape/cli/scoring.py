"""An engine that recomputes log-probabilities of a model's ids, for `verify`, `report` and `view`."""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from tokentape.doctor.same import check_same
from tokentape.engines.base import EngineInfo
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.errors import ConfigError
from tokentape.model import model_directory, model_sizes
from tokentape.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Scoring:
    """An engine, what it says of itself, and the tokenizer of the model that both have."""

    engine: SGLangEngine
    info: EngineInfo
    tokenizer: Tokenizer


@contextlib.asynccontextmanager
async def scoring(config: SGLangConfig, model: str | None) -> AsyncGenerator[Scoring]:
    """The engine while the context is open; `model` None: the one that it serves, if it is a directory here.

    Raises:
        ConfigError: it has another model, or nobody says which.
        EngineError: as `SGLangEngine.info`.
    """
    # The vocabulary is known only with the model: until then nothing is scored.
    async with contextlib.aclosing(SGLangEngine(config, vocab_size=1)) as asking:
        info = await asking.info()
        directory = model_directory(_model_of(model, info.model))
        tokenizer = tokenizer_of(directory)
        await check_same(asking, info.model, directory, tokenizer)
    vocab_size = model_sizes(directory).vocab_size or tokenizer.vocab_size
    async with contextlib.aclosing(SGLangEngine(config, vocab_size=vocab_size)) as engine:
        yield Scoring(engine, info, tokenizer)


def tokenizer_of(directory: Path) -> Tokenizer:
    """A model's tokenizer, with as many ids as the model has."""
    return Tokenizer(directory / "tokenizer.json", num_ids=model_sizes(directory).vocab_size)


def _model_of(asked: str | None, served: str | None) -> str:
    if asked is not None:
        return asked
    if served is not None and Path(served).is_dir():
        return served
    raise ConfigError(f"--model is needed: the engine serves {served!r}, which is no directory here")
