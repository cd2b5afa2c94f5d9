"""Untrusted text stays text: a web page that contains `<|im_end|>` must not end a turn.

Control tokens found in untrusted strings get a mark inside before the template renders them; the tokenizer
encodes a marked control token as plain text. The mark is a Unicode noncharacter that occurs nowhere in the
conversation, so it passes through trims, slices and JSON escapes of the template unchanged.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tokentape.errors import RequestError
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json

_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


@dataclass(frozen=True, slots=True)
class Marking:
    """`found`: the control tokens neutralised, sorted. `mark`: the character inside them, or ""."""

    mark: str = ""
    found: tuple[str, ...] = ()


def mark_untrusted(
    tokenizer: Tokenizer, tools: Sequence[Json], messages: Sequence[Json]
) -> tuple[Sequence[Json], Sequence[Json], Marking]:
    """Tools and template messages with the control tokens of untrusted strings marked.

    What the model said may contain the tokens of its own grammar, but no special token; everything else that
    comes from outside, tool names and schemas included, may contain no control token at all.

    Raises:
        RequestError: the conversation uses up every noncharacter that could serve as mark.
    """

    def forbidden(text: str, *, assistant: bool) -> bool:
        return not assistant or tokenizer.completed.get(text, text) in tokenizer.special_tokens

    roles = [m["role"] for m in messages]  # trusted, and a template may write them inside its control tokens
    bodies: list[Json] = [{k: v for k, v in m.items() if k != "role"} for m in messages]
    sources: list[tuple[Json, bool]] = [(tool, False) for tool in tools]
    sources += [(body, role == "assistant") for body, role in zip(bodies, roles, strict=True)]
    found = {
        tokenizer.completed.get(match[0], match[0])
        for source, assistant in sources
        for text in _strings(source)
        for match in tokenizer.untrusted_pattern.finditer(text)
        if forbidden(match[0], assistant=assistant)
    }
    if not found:
        return tools, messages, Marking()
    used = json.dumps([tools, messages], ensure_ascii=False)
    mark = next((c for c in _NONCHARACTERS if c not in used), None)
    if mark is None:
        raise RequestError(
            "the messages contain all 32 Unicode noncharacters U+FDD0 to U+FDEF: take one out",
            param="messages",
        )

    def marked(source: Json, *, assistant: bool) -> Json:
        def put(text: str) -> str:
            return tokenizer.untrusted_pattern.sub(
                lambda m: m[0][0] + mark + m[0][1:] if forbidden(m[0], assistant=assistant) else m[0], text
            )

        return _mapped(source, put)

    done = [marked(source, assistant=assistant) for source, assistant in sources]
    done[len(tools) :] = [{"role": r, **body} for r, body in zip(roles, done[len(tools) :], strict=True)]
    return done[: len(tools)], done[len(tools) :], Marking(mark, tuple(sorted(found)))


def _strings(value: Any) -> Iterator[str]:
    """Every string inside plain JSON data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in cast("Json", value).items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[Any]", value):
            yield from _strings(item)


def _mapped(value: Any, put: Callable[[str], str]) -> Any:
    """Plain JSON data with `put` applied to every string."""
    if isinstance(value, str):
        return put(value)
    if isinstance(value, dict):
        return {put(k): _mapped(v, put) for k, v in cast("Json", value).items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, put) for item in cast("Sequence[Any]", value)]
    return value
