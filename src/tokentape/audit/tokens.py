"""What a tokenizer does to text, and how fast."""

import itertools
import json
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import fastokens  # pyright: ignore[reportMissingTypeStubs]
import tokenizers

from tokentape.audit.report import TokenizerFacts
from tokentape.tokenizer import Tokenizer

# Each is one thing that tokenizers get wrong. The last is not in form NFC.
PROBES = (
    "Hello, world! It's 10:30; we've paid $1,234.56 (twice).",
    "  leading and trailing  ",
    "\n\n\nlines\r\n\tand tabs \t\n\n",
    'def f(x: int) -> str:\n    return f"{x!r}"  # naïve\n',
    '{"a": [1, 2.5e-3, null], "b\\n": "\\u00e9"}',
    "Łódź, São Paulo, Ελλάδα, Москва, עִבְרִית, العربية, हिन्दी, ไทย, 한국어, 日本語の文章。",
    "👩‍👩‍👧‍👦🇩🇪 \u200b\u200d \U0001f9ff",
    "0123456789" * 5 + "x" * 100 + " " * 40,
    "it 's , do n't . a !",
    "e\u0301 \u212b",
)
_SPEED_TEXT = "".join(PROBES[:7]) * 80  # 40 kB: the reference takes some 30 ms
_ENOUGH_S = 0.15


def examine(tokenizer: Tokenizer, path: Path) -> TokenizerFacts:
    """Measure the encoder in use and its two libraries on `path`, the model's `tokenizer.json`."""
    differ = [text for text in PROBES if tokenizer.decode(tokenizer.encode(text)) != text]
    lossy = tuple(text for text in differ if not _is_nfc_of(tokenizer, text))
    reference = tokenizers.Tokenizer.from_file(str(path))
    used = _mb_s(tokenizer.encode)
    slow = _mb_s(lambda text: reference.encode(text, add_special_tokens=False))
    fast = used if tokenizer.backend_name == "fastokens" else _fastokens_mb_s(path)
    return TokenizerFacts(
        backend=tokenizer.backend_name,
        num_ids=tokenizer.vocab_size,
        mb_s=used,
        tokenizers_mb_s=slow,
        fastokens_mb_s=fast,
        speedup=None if fast is None else round(fast / slow, 1),
        round_trip=not differ,
        nfc=bool(differ) and not lossy,
        lossy=lossy,
        adds=_added_at_start(reference),
    )


def _added_at_start(reference: tokenizers.Tokenizer) -> tuple[str, ...]:
    plain: list[int] = reference.encode("x", add_special_tokens=False).ids
    whole: list[int] = reference.encode("x", add_special_tokens=True).ids
    starts = [n for n in range(len(whole)) if whole[n : n + len(plain)] == plain]
    return tuple(reference.id_to_token(i) or "" for i in whole[: starts[0]]) if starts else ()


def _is_nfc_of(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def _fastokens_mb_s(path: Path) -> float | None:
    try:
        fast = fastokens.Tokenizer.from_file(str(path))
        return _mb_s(lambda text: fast.encode_batch_flat([text]))
    except Exception:  # the library raises bare Exceptions for models it does not know
        return None


def _mb_s(encode: Callable[[str], object]) -> float:
    """MB of UTF-8 a second, after a first text: the libraries build what they need when it comes."""
    encode(_SPEED_TEXT)
    num_bytes, started, took_s = 0, time.perf_counter(), 0.0
    for n in itertools.count():
        text = f"{n} {json.dumps(n * 7919)} {_SPEED_TEXT[n % 97 :]}"
        encode(text)
        num_bytes += len(text.encode())
        took_s = time.perf_counter() - started
        if took_s >= _ENOUGH_S:
            break
    return round(num_bytes / took_s / 1e6, 2)
