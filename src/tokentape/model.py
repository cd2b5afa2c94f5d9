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
    """What `config.json` says: the number of ids and positions; None where it does not say."""

    vocab_size: int | None
    context_length: int | None


def model_directory(name: str) -> Path:
    """The directory of a model: itself, or the tokenizer files of a hub id, downloaded once.

    Raises:
        ConfigError: neither a directory nor a hub id that can be had.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"--model {name}: no such directory (and not a hub id like Qwen/Qwen3-8B)")
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, ValueError, HFValidationError) as error:
        raise ConfigError(
            f"--model {name}: no such directory, and the hub does not give it: {error}"
        ) from error


def model_sizes(directory: Path) -> ModelSizes:
    """Read the sizes from `config.json`, where there is one.

    Raises:
        ConfigError: the file is not JSON.
    """
    path = directory / "config.json"
    if not path.exists():
        return ModelSizes(None, None)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    text: dict[str, Any] = config.get("text_config") or config  # multimodal models nest it
    return ModelSizes(text.get("vocab_size"), text.get("max_position_embeddings"))
