"""Whether an engine has the model whose ids it is to be sent: one it does not know kills a real server."""

import hashlib
from pathlib import Path

from tokentape.engines.sglang import SGLangEngine
from tokentape.errors import ConfigError
from tokentape.model import model_sizes
from tokentape.tokenizer import Tokenizer

_PROBES = ("Hello, world! It's 10:30.", "naïve 日本語 👩‍👧\n\tx = 1  # y", "0123456789")


def other_directory(there: Path, directory: Path) -> str | None:
    """How the model in a directory that an engine names differs from ours, None where it does not.

    Raises:
        ConfigError: a directory's files cannot be read.
    """
    files = [each / "tokenizer.json" for each in (there, directory)]
    digests = {hashlib.sha256(path.read_bytes()).digest() for path in files}
    if len(digests) > 1 and not _same_ids(*map(Tokenizer, files)):  # saved again, a file has other bytes
        return f"{there} has another tokenizer.json"
    theirs, ours = model_sizes(there).vocab_size, model_sizes(directory).vocab_size
    return None if theirs == ours else f"{there} has {theirs} ids, --model {ours}"


def _same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    if one.vocab_size != other.vocab_size or one.added_ids != other.added_ids:
        return False
    ids = range(one.vocab_size)
    return all(one.token_bytes(i) == other.token_bytes(i) for i in ids) and all(
        one.encode(probe) == other.encode(probe) for probe in _PROBES
    )


async def other_tokenizer(engine: SGLangEngine, tokenizer: Tokenizer) -> str | None:
    """How the engine's tokenizer differs from ours; None where it does not, "" where it cannot be asked.

    The engine's may put its own token before a text; ours never does. Of two models of one family the newer
    often has more tokens: the last ones are asked for by name.

    Raises:
        EngineError: as `SGLangEngine.info`.
    """
    last = max(tokenizer.added_ids, default=tokenizer.vocab_size - 1)
    for probe in filter(None, (*_PROBES, tokenizer.token_text(last))):
        said = await engine.tokenize(probe)
        if said is None:
            return ""
        mine = tokenizer.encode(probe).tolist()
        if mine != said[len(said) - len(mine) :] or len(said) - len(mine) > 1:
            return f"it makes {said[:8]} of {probe[:12]!r}…, --model's tokenizer {mine[:8]}"
    return None


async def check_same(engine: SGLangEngine, served: str | None, directory: Path, tokenizer: Tokenizer) -> None:
    """See to it that ids of the model in `directory` may be sent to an engine that says it has `served`.

    Raises:
        ConfigError: it has another model.
        EngineError: as `SGLangEngine.info`.
    """
    differs = await other_tokenizer(engine, tokenizer)
    if not differs and served is not None and (Path(served) / "tokenizer.json").is_file():
        differs = other_directory(Path(served), directory)
    if differs:
        raise ConfigError(
            f"the engine has another model than --model {directory}: {differs}; give the --model that it "
            "serves: an id that it does not know would kill it"
        )
