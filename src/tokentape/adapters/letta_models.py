"""Letta's names of models and servers → what `tokentape.open` takes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokentape.errors import ConfigError
from tokentape.model import model_directory

# What Letta's settings call a model's tool calls (SGLang's `--tool-call-parser`) → tokentape's formats.
TOOL_FORMATS: Mapping[str, str] = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "hermes": "hermes",
    "qwen3_coder": "qwen3-coder",
    "glm": "glm",
    "glm45": "glm",
    "glm47": "glm",
    "minimax-m2": "minimax",
    "deepseekv3": "deepseek",
    "deepseekv31": "deepseek",
    "kimi_k2": "kimi",
    "mistral": "mistral",
    "gpt-oss": "harmony",
    "llama3": "llama3",
}
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_CHATML = Path(__file__).parent / "chatml.jinja"


def endpoint(url: str | None) -> str:
    """The server of a `model_endpoint`, without the OpenAI route behind it.

    Raises:
        ConfigError: there is none.
    """
    if not url:
        raise ConfigError("the agent's llm_config has no model_endpoint: give it SGLang's URL")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def model_of(name: str) -> str:
    """The tokenizer's directory or hub id: of `sglang//models/qwen` it is `/models/qwen`, as with Letta."""
    before, slashes, path = name.partition("//")
    return f"/{path}" if before and slashes and path else name


def tool_format(parser: str | None) -> str | None:
    """The tool format of a `tool_call_parser`, None where none is named.

    Raises:
        ConfigError: it is none that tokentape knows.
    """
    if not parser:
        return None
    if parser not in TOOL_FORMATS:
        known = ", ".join(sorted(TOOL_FORMATS))
        raise ConfigError(f"tool_call_parser {parser!r} is not known: choose from {known}")
    return TOOL_FORMATS[parser]


def with_template(model: str, scratch: Path) -> tuple[str, bool]:
    """A model directory that has a chat template: `model`, or one in `scratch` that adds ChatML to it.

    Only a model without any template gets ChatML, and only if ChatML's tokens are single tokens of its own;
    the second value says whether it did.

    Raises:
        ConfigError: the model cannot be had.
    """
    directory = model_directory(model)
    if _has_template(directory) or not _knows_chatml(directory):
        return str(directory), False  # without a template, what opens it says what is missing
    for file in directory.iterdir():
        if file.suffix in (".json", ".model"):
            (scratch / file.name).symlink_to(file.resolve())
    (scratch / "chat_template.jinja").write_text(_CHATML.read_text(encoding="utf-8"), encoding="utf-8")
    return str(scratch), True


def _has_template(directory: Path) -> bool:
    named = directory / "chat_template.jinja"
    return named.exists() or bool(_json(directory / "tokenizer_config.json").get("chat_template"))


def _knows_chatml(directory: Path) -> bool:
    added = _json(directory / "tokenizer.json").get("added_tokens", ())
    return set(_CHATML_TOKENS) <= {token["content"] for token in added}


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
