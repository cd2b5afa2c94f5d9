"""A Hugging Face model directory → model, tokenizer and limits, or a `ConfigError` naming what is missing."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers.utils import logging as transformers_logging

from tokentape.errors import ConfigError

# Neither library's loaders are typed; what comes out of them is checked below.
_hub: Any = huggingface_hub
_auto: Any = transformers

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run. `context_length` in tokens; `stop_ids` end a completion."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    context_length: int
    vocab_size: int
    num_parameters: int
    stop_ids: frozenset[int]


def load(model_dir: str | Path, *, device: str, dtype: str, context_length: int | None) -> Loaded:
    """Load a directory, or the snapshot of a hub id. Raises `ConfigError`."""
    directory = find(model_dir)
    _require(directory, ("config.json",), "model configuration", "config.json")
    _require(directory, _TOKENIZERS, "tokenizer", "tokenizer.json")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen_device = torch.device(device)
    chosen_dtype = _dtype(dtype, chosen_device)
    model = _weights(directory, chosen_device, chosen_dtype)
    try:
        tokenizer: Any = _auto.AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model_dir}: the tokenizer cannot be loaded: {error}") from error
    length = context_length or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not length:
        raise ConfigError(f"{model_dir}: config.json names no max_position_embeddings; give a context length")
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        device=chosen_device,
        dtype=chosen_dtype,
        context_length=int(length),
        vocab_size=int(model.get_input_embeddings().num_embeddings),
        num_parameters=int(model.num_parameters()),
        stop_ids=frozenset(_stop_ids(model, tokenizer)),
    )


def reload(old: Any, model_dir: str, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Weights of the same shapes from another directory. Raises `ConfigError`; `old` is not touched."""
    new = _weights(find(model_dir), device, dtype)
    shapes, expected = _shapes(new), _shapes(old)
    if type(new) is not type(old) or shapes != expected:
        names = shapes.keys() | expected.keys()
        differing = sorted(name for name in names if shapes.get(name) != expected.get(name))
        what = ", ".join(differing[:3]) or type(new).__name__
        raise ConfigError(
            f"{model_dir}: not the model that is running: {what}; load weights of the same model"
        )
    return new


def find(model_dir: str | Path) -> Path:
    """The directory itself, or the downloaded snapshot of a hub id such as `Qwen/Qwen3-0.6B`."""
    path = Path(model_dir)
    if path.is_dir():
        return path
    if path.is_absolute() or str(model_dir).startswith(".") or str(model_dir).count("/") != 1:
        raise ConfigError(f"{model_dir}: no such directory; name one with config.json, tokenizer and weights")
    try:
        return Path(_hub.snapshot_download(str(model_dir)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model_dir}: neither a directory nor a model that the hub gives out: {error}"
        ) from error


def _require(directory: Path, patterns: tuple[str, ...], what: str, usual: str) -> None:
    if not any(any(directory.glob(pattern)) for pattern in patterns):
        raise ConfigError(f"{directory}: no {what}: {usual} is missing; copy it from the model's repository")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    except KeyError:
        raise ConfigError(f"dtype {name!r}: one of auto, float32, bfloat16, float16") from None


def _weights(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    _require(directory, ("config.json",), "model configuration", "config.json")
    _require(directory, _WEIGHTS, "weights", "model.safetensors")
    transformers_logging.disable_progress_bar()
    try:
        config = _auto.AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        model, report = _auto.AutoModelForCausalLM.from_pretrained(
            str(directory), config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{directory}: the model cannot be loaded: {error}") from error
    # transformers fills a weight that the files lack with random numbers and only warns.
    if missing := sorted(str(name) for name in report["missing_keys"]):
        raise ConfigError(
            f"{directory}: weights are missing: {', '.join(missing[:3])} ({len(missing)} in all); "
            "copy all of its *.safetensors files"
        )
    return model.to(device).eval()


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _stop_ids(model: Any, tokenizer: Any) -> Iterator[int]:
    """Where SGLang looks: generation_config.json, config.json, the tokenizer, and Llama's end of message."""
    for source in (model.generation_config, model.config.get_text_config(), model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        yield from found if isinstance(found, list) else [] if found is None else [found]
    if (end_of_message := tokenizer.get_added_vocab().get("<|eom_id|>")) is not None:
        yield end_of_message
