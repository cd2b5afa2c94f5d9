"""The model directory: what names a model's tokenizer, template and sizes. Weights are the engine's."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]  # its tqdm class
from huggingface_hub.errors import HFValidationError

from tokentape.errors import ConfigError

TINY_MODEL = Path(__file__).parent / "models" / "tiny"
"""The bundled model: weights, tokenizer and template of a small arithmetic agent."""

_FILES = ["*.json", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a model's configuration says; None where it does not say.

    `vocab_size` ids, `context_length` tokens; `eos_ids` end a turn.
    """

    vocab_size: int | None = None
    context_length: int | None = None
    eos_ids: frozenset[int] = frozenset()


def model_directory(name: str, *, download: bool = True) -> Path:
    """The directory of a model: itself, or the tokenizer files of a hub id, downloaded once.

    Raises:
        ConfigError: neither a directory nor a hub id that can be had; without `download`, one that is not
            here yet.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"--model {name}: no such directory (and not a hub id like Qwen/Qwen3-8B)")
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=not download))
    except (OSError, ValueError, HFValidationError) as error:
        raise ConfigError(
            f"--model {name}: no such directory, and the hub does not give it: {error}; correct the name, or "
            "copy the model's files here"
        ) from error


def model_sizes(directory: Path) -> ModelSizes:
    """Read `config.json` and `generation_config.json`, where they are.

    Raises:
        ConfigError: a file is not JSON, or says something else than numbers.
    """
    config = _read(directory / "config.json")
    text: dict[str, Any] = config.get("text_config") or config  # multimodal models nest it
    if not isinstance(text, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  # of a file
        raise ConfigError(f"{directory}: text_config is no object; copy config.json from its repository")
    eos_ids: set[int] = set()
    for source in (config, text, _read(directory / "generation_config.json")):
        eos: int | list[int] | None = source.get("eos_token_id")
        listed = [eos] if isinstance(eos, int) else eos or []
        if not isinstance(listed, list) or not all(isinstance(each, int) for each in listed):  # pyright: ignore[reportUnnecessaryIsInstance]  # of a file
            raise ConfigError(
                f"{directory}: eos_token_id is {eos!r}, not an id or a list of ids; "
                "correct it in config.json or generation_config.json"
            )
        eos_ids.update(listed)
    return ModelSizes(
        _size(directory, text, "vocab_size"),
        _size(directory, text, "max_position_embeddings"),
        frozenset(eos_ids),
    )


def _size(directory: Path, config: dict[str, Any], name: str) -> int | None:
    size: object = config.get(name)
    if size is None or (isinstance(size, int) and size > 0):
        return size
    raise ConfigError(f"{directory}: {name} is {size!r}, not a number of them; correct it in config.json")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is not JSON: {error}; copy it from the model's repository again"
        ) from error
    if not isinstance(read, dict):
        raise ConfigError(f"{path} is not a JSON object; copy it from the model's repository again")
    return read  # pyright: ignore[reportUnknownVariableType]  # of a file
