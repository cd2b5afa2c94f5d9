"""The model's tokenizer: text → ids exactly as the reference does it, ids → text as they arrive.

Two libraries read the same `tokenizer.json`: `tokenizers` is the reference, `fastokens` is some fifty times
faster. The fast one is used only after it has agreed with the reference on a probe set, at load.
"""

import codecs
import hashlib
import json
import logging
import re
from array import array
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import fastokens  # pyright: ignore[reportMissingTypeStubs]
import tokenizers

from tokentape.errors import ConfigError

log = logging.getLogger(__name__)

# A control token looks like <this>, [THIS], or MiniMax's [e~[ and ]~b]. Ordinary added tokens (Gemma's runs
# of newlines, `/nothink`) do not.
_BRACKETED = re.compile(r"^[<\[\]]\S.*[>\[\]]$", re.DOTALL)

_SINGLE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

# Beside the model's own template and control tokens: scripts, digits, code, runs of whitespace, emoji, odd
# Unicode.
_PROBES = (
    "Hello, world! It's 10:30; we've paid $1,234.56 (twice).",
    "  leading\n\n\nlines \t tabs\r\n and trailing   ",
    'def f(x: int) -> str:\n    return f"{x!r}"  # naïve\n{"a": [1, 2.5e-3, null], "b\\n": "\\u00e9"}',
    "Łódź, São Paulo, Ελλάδα, Москва, עִבְרִית, العربية, हिन्दी, ไทย, 한국어, 日本語の文章。中文也可以",
    "e\u0301 vs \u00e9, \u212b, \ufb01, \u200d\u200b\ufeff, 👩‍👩‍👧‍👦🇩🇪",
    "\U0001d518\U0001d52b\U0001d526, \U0001f9ff\u0000\x7f\ufffd",
    "0123456789 " * 7 + "x" * 300 + " " * 70 + "\n" * 9 + "ab " * 60,
)


class _Backend(Protocol):
    """One library's encoder."""

    def encode(self, text: str) -> "array[int]": ...
    def encode_plain(self, text: str) -> "array[int]": ...


class _Reference:
    """`tokenizers`; plain text through a second instance without added tokens, built when needed."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._plain: tokenizers.Tokenizer | None = None

    def encode(self, text: str) -> "array[int]":
        return array("i", self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> "array[int]":
        if self._plain is None:
            spec = json.loads(self._tokenizer.to_str())
            spec["added_tokens"] = []
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
        return array("i", self._plain.encode(text, add_special_tokens=False).ids)


class _Fast:
    """`fastokens`. The flat batch call hands over machine integers: no Python object per token."""

    def __init__(self, tokenizer: fastokens.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> "array[int]":
        ids: array[int] = array("i")
        ids.frombytes(self._tokenizer.encode_batch_flat([text])[0])
        return ids

    def encode_plain(self, text: str) -> "array[int]":
        return array("i", self._tokenizer.encode_ordinary(text).ids)


class Tokenizer:
    """Encodes and decodes with one `tokenizer.json`; never adds special tokens on its own.

    `control_tokens` are the texts that a template may write and an untrusted text may not: special added
    tokens, and other bracketed added tokens that `template_text` contains. `added_ids` are the ids of all
    added tokens: a stop token is one of them. `untrusted_pattern` finds control tokens in a string,
    and texts that the template would complete to one; `completed` says to which. `fingerprint` tells one
    tokenizer from another. `vocab_size` is the largest id + 1. `num_ids` ids can be decoded, where the model
    has more of them.
    """

    def __init__(self, path: Path, *, template_text: str = "", num_ids: int | None = None) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            self._reference = tokenizers.Tokenizer.from_str(text)
        except FileNotFoundError:
            raise ConfigError(
                f"{path} is missing: --model needs a directory with the model's tokenizer.json"
            ) from None
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ConfigError(
                f"{path} is not a tokenizer that `tokenizers` can read: {error}; copy it from "
                "the model's repository again"
            ) from error
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        spec: dict[str, Any] = json.loads(text)
        self._reference.no_truncation()
        self._reference.no_padding()
        added: list[dict[str, Any]] = spec.get("added_tokens") or []
        self._vocab: dict[str, int] = self._reference.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        self.control_tokens = {
            t["content"]: int(t["id"])
            for t in added
            if _BRACKETED.match(t["content"]) and (t["special"] or t["content"] in template_text)
        }
        self.added_ids = frozenset(int(t["id"]) for t in added)
        self.special_tokens = frozenset(t["content"] for t in added if t["special"])
        longest_first = sorted(map(re.escape, self.control_tokens), key=len, reverse=True)
        self.control_pattern = re.compile("|".join(longest_first) or r"(?!)")
        self.completed, completions = _completions(self.control_tokens, template_text.split("\0"))
        self.untrusted_pattern = re.compile("|".join([*longest_first, *completions]) or r"(?!)")
        # Models pad their vocabulary: an id without a token can be sampled, and means no text.
        self._bytes = _byte_table(spec, self._vocab, max(self.vocab_size, num_ids or 0))
        probes = [*_PROBES, template_text, "".join(f"a{t['content']} b" for t in added), template_text[::-1]]
        self._backend, self.backend_name = _choose_backend(path, self._reference, probes)

    def encode(self, text: str) -> "array[int]":
        """Text to ids, int32; added tokens in it become their ids."""
        return self._backend.encode(text)

    def encode_marked(self, text: str, mark: str) -> "array[int]":
        """Like `encode`, but a control token's text that holds `mark` (one character) becomes plain text.

        The text is cut at its unmarked control tokens, where no merge can cross; a piece with marks in it
        loses them and is encoded with no added token recognised.
        """
        ids: array[int] = array("i")
        trusted_from = piece_from = (
            0  # text[trusted_from:piece_from] is waiting to be encoded with added tokens
        )
        ends = [(m.start(), m.end()) for m in self.control_pattern.finditer(text)] + [(len(text), len(text))]
        for start, end in ends:
            piece = text[piece_from:start]
            if mark in piece:
                ids += self._backend.encode(text[trusted_from:piece_from])
                ids += self._backend.encode_plain(piece.replace(mark, ""))
                trusted_from = start
            piece_from = end
        return ids + self._backend.encode(text[trusted_from:])

    def id_of(self, token: str) -> int | None:
        """The id of one token's text, None where it has none."""
        return self._vocab.get(token)

    def token_text(self, token_id: int) -> str:
        """One token's text; "" for an id that has none."""
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes; of a vocabulary that is not byte-level, its text's."""
        return self._bytes[token_id] if self._bytes is not None else self.token_text(token_id).encode()

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, control tokens included; bytes that are not UTF-8 become U+FFFD."""
        if self._bytes is None:
            return self._reference.decode(list(ids), skip_special_tokens=False)
        return b"".join([self._bytes[i] for i in ids]).decode("utf-8", errors="replace")

    def stream(self) -> "TextStream":
        """A decoder for ids that arrive one by one: its pieces joined are `decode` of all."""
        return _ByteStream(self._bytes) if self._bytes is not None else _GenericStream(self._reference)


class TextStream(Protocol):
    """Turns ids into text as they arrive."""

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is certain by now: a half character waits for its other bytes."""
        ...

    def finish(self) -> str:
        """What was held back."""
        ...


class _ByteStream:
    """For byte-level vocabularies: every token is a fixed byte string."""

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        table = self._table
        return self._decoder.decode(b"".join([table[i] for i in ids]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _GenericStream:
    """For every other vocabulary: decode what there is, hold back a run of single bytes at its end.

    (`tokenizers`' own stream decoder raises on some byte runs, and its pieces are not always the whole.)
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def feed(self, ids: Iterable[int]) -> str:
        self._ids += ids
        end = len(self._ids)
        while end and _SINGLE_BYTE.fullmatch(self._tokenizer.id_to_token(self._ids[end - 1]) or ""):
            end -= 1
        return self._show(self._ids[:end])

    def finish(self) -> str:
        return self._show(self._ids)

    def _show(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        if not text.startswith(self._shown):  # more may follow that makes it one
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new


def _completions(tokens: Collection[str], literals: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Texts that a template's own text around them completes to a control token, and patterns to find them.

    Qwen3-Coder writes `<` + a schema's key + `>`: the key `|im_end|` would end the turn. Each text is mapped
    to its token; a pattern says whether it must begin, end or be the whole string.
    """
    longest = max(map(len, tokens), default=0)
    heads = {text[:n] for text in literals for n in range(1, min(len(text), longest) + 1)}
    tails = {text[-n:] for text in literals for n in range(1, min(len(text), longest) + 1)}
    completed: dict[str, str] = {}
    patterns: list[str] = []
    for token in tokens:
        starts = [n for n in range(len(token)) if not n or token[:n] in tails]
        ends = [n for n in range(1, len(token) + 1) if n == len(token) or token[n:] in heads]
        for start in starts:
            for end in ends:
                middle = token[start:end]
                if middle and middle != token:
                    completed[middle] = token
                    before, after = r"\A" if start else "", r"\Z" if end < len(token) else ""
                    patterns.append(f"{before}{re.escape(middle)}{after}")
    return completed, patterns


def _choose_backend(path: Path, reference: tokenizers.Tokenizer, probes: list[str]) -> tuple[_Backend, str]:
    """The fast encoder where it agrees with the reference on every probe; else the reference, logged."""
    slow = _Reference(reference)
    try:
        fast = _Fast(fastokens.Tokenizer.from_file(str(path)))
        differs = next((p for p in probes if fast.encode(p) != slow.encode(p)), None)
        plain_differs = next((p for p in probes if fast.encode_plain(p) != slow.encode_plain(p)), None)
    except Exception as error:  # the library raises bare Exceptions for models it does not know
        log.warning("tokenizer: fastokens cannot load %s (%s); using tokenizers", path, error)
        return slow, "tokenizers"
    if differs is not None or plain_differs is not None:
        probe = differs if differs is not None else plain_differs
        log.warning("tokenizer: fastokens differs from tokenizers on %r; using tokenizers", probe)
        return slow, "tokenizers"
    return fast, "fastokens"


def _byte_table(spec: dict[str, Any], vocab: dict[str, int], size: int) -> list[bytes] | None:
    """Bytes of every id, for a byte-level decoder, None for any other.

    GPT-2's alphabet: printable bytes stand for themselves, the other 68 for U+0100 onwards. A token with a
    character outside the alphabet stands for its own UTF-8 (as in the library's byte-level decoder).
    """
    decoder: dict[str, Any] = spec.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return None
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    alphabet = {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
    table = [b""] * size
    for token, token_id in vocab.items():
        try:
            table[token_id] = bytes([alphabet[c] for c in token])
        except KeyError:
            table[token_id] = token.encode()
    return table
