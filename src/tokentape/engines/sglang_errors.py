"""What SGLang's refusals mean, sans-IO: statuses, error events and bodies of every shape.

Facts were observed on SGLang 0.5.23.
"""

import re
from typing import Any, cast

import msgspec

from tokentape import errors

_CONTEXT_LENGTH = re.compile(r"(?:context length \(|maximum context length of )(\d+) tokens")
_PROMPT_LENGTH = re.compile(r"input \((\d+) tokens\)|(\d+) tokens from the input")


def refusal(status: int | None, message: str, num_tokens: int = 0) -> errors.TokentapeError:
    """The error that an HTTP status means, wherever it was said; `None`: an error event without one."""
    said = f"the engine answered {status}: {message}" if status else f"the engine reported: {message}"
    if status in (None, 400) and "context length" in message.lower():
        prompt, context = _PROMPT_LENGTH.search(message), _CONTEXT_LENGTH.search(message)
        return errors.ContextOverflow(
            message,
            num_prompt_tokens=int(prompt[1] or prompt[2]) if prompt else None,
            context_length=int(context[1]) if context else None,
        )
    if status is None or status >= 500:
        return errors.EngineFailed(said, num_tokens=num_tokens)
    if status == 429:
        return errors.EngineUnavailable(said, num_tokens=num_tokens)
    if status in (401, 403):
        said += "; check the engine's API key"
    if status < 400 or status in (404, 405):
        said += "; the URL must be that of SGLang's own server, without /v1"
    return errors.EngineRejected(said, num_tokens=num_tokens)


def lost(message: str, num_tokens: int) -> errors.EngineError:
    """The connection ended too early: after the first token, or before it."""
    if num_tokens:
        return errors.EngineDisconnected(message, num_tokens=num_tokens)
    return errors.EngineUnavailable(message)


def error_message(body: bytes) -> str:
    """What an error body says; observed: four JSON shapes, and a proxy's may be no JSON at all."""
    try:
        return find_message(msgspec.json.decode(body))
    except msgspec.MsgspecError:
        return body[:500].decode("utf-8", "replace") or "(no text)"


def code_of(said: object) -> int | None:
    """The status inside an error event, None where it has none."""
    code = cast("dict[str, object]", said).get("code") if isinstance(said, dict) else None
    return code if isinstance(code, int) else None


def find_message(said: Any) -> str:
    """The words inside an error of any of SGLang's shapes."""
    if isinstance(said, str):
        return said
    fields = cast("dict[str, Any]", said) if isinstance(said, dict) else {}
    for name in ("error", "message", "detail"):
        if fields.get(name):
            return find_message(fields[name])
    return msgspec.json.encode(said)[:500].decode("utf-8", "replace")
