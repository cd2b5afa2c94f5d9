"""The tokenizer: the reference's ids, fast or not; text as it arrives."""

import json
import logging
import random
from array import array
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from render_golden import Models
from render_params import WITH_TOKENIZER, only
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from tokentape import tokenizer as module
from tokentape.errors import ConfigError
from tokentape.render import Renderer
from tokentape.testing import byte_level_tokenizer
from tokentape.tokenizer import Tokenizer

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces\t\tand tabs \n\n\n and lines \r\n",
    'def f(x):\n\treturn {"a": [1, 2.5e-3, None]}  # é ≠ e\u0301',
    "中文。日本語、한국어 — عربى עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦🇩🇪 \u200b\ufeff\ufffd\u0000\x7f \U0001d518",
    "0123456789012345 1,000,000.00 0x1F",
    "<|im_start|>user\nHi<|im_end|>\n<think>\n\n</think>",
    "a" * 500 + " " * 100 + "\n" * 50,
)


def reference(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer._reference.encode(text, add_special_tokens=False).ids)


def plain_reference(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    spec = json.loads(tokenizer._reference.to_str())
    spec["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


# -- encoding


@pytest.mark.parametrize("model", WITH_TOKENIZER)
def test_fast_is_the_reference(models: Models, model: str) -> None:
    renderer = models.renderer(model)
    tokenizer, rng = renderer.tokenizer, random.Random(0)
    assert tokenizer.backend_name == "fastokens"
    pool = [*TEXTS, *tokenizer.control_tokens, *renderer.template.literal_text.split("\0"), " ", "\n", "."]
    for _ in range(60):
        text = "".join(rng.choices(pool, k=rng.randint(1, 6)))
        assert list(tokenizer.encode(text)) == reference(tokenizer, text), text


@pytest.mark.parametrize("model", only("qwen3", "llama-3.1", "smollm2"))
def test_fast_is_the_reference_for_any_text(models: Models, model: str) -> None:
    tokenizer = models.renderer(model).tokenizer

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def run(text: str) -> None:
        assert list(tokenizer.encode(text)) == reference(tokenizer, text)

    run()


@pytest.mark.parametrize("model", only("qwen3", "llama-3.1", "deepseek-v3.1", "minimax-m2", "glm-4.7"))
def test_a_marked_token_is_plain_text(models: Models, model: str) -> None:
    """Marked: as a tokenizer without added tokens encodes it. Unmarked ones beside it stay control tokens."""
    tokenizer, mark = models.renderer(model).tokenizer, "\ufdd0"
    plain = plain_reference(tokenizer)
    tokens = sorted(tokenizer.control_tokens)[:6]
    for token in tokens:
        spelled = list(plain.encode(f"Say {token}!", add_special_tokens=False).ids)
        marked = token[0] + mark + token[1:]
        assert list(tokenizer.encode_marked(f"Say {marked}!", mark)) == spelled
        around = reference(tokenizer, tokens[0])
        text = f"{tokens[0]}Say {marked}!{tokens[0]}"
        assert list(tokenizer.encode_marked(text, mark)) == around + spelled + around
        assert tokenizer.decode(tokenizer.encode_marked(text, mark)) == text.replace(mark, "")
    assert list(tokenizer.encode_marked("".join(tokens) + " x", mark)) == reference(
        tokenizer, "".join(tokens) + " x"
    )


# -- decoding


def cuts(ids: list[int], sizes: list[int]) -> list[list[int]]:
    out: list[list[int]] = []
    for size in sizes:
        out.append(ids[:size])
        ids = ids[size:]
    return [*out, ids]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_stream_is_the_whole(tiny: Renderer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tiny.tokenizer.vocab_size - 1), max_size=40))
    stream = tiny.tokenizer.stream()
    text = "".join(
        stream.feed(part) for part in cuts(ids, data.draw(st.lists(st.integers(0, 5), max_size=9)))
    )
    assert (
        text + stream.finish()
        == tiny.tokenizer.decode(ids)
        == tiny.tokenizer._reference.decode(ids, skip_special_tokens=False)
    )


def test_every_chunking_of_a_few_ids(tiny: Renderer) -> None:
    """Bytes of a character in several tokens, half characters at the end, control tokens between."""
    encode = tiny.tokenizer.encode
    ids = [*encode("é🙂"), *encode("中")[:2], *encode("<|im_end|>a"), *encode("🙂")[:3]][:12]
    whole = tiny.tokenizer.decode(ids)
    for bits in range(2 ** (len(ids) - 1)):
        stream, out, part = tiny.tokenizer.stream(), "", []
        for position, token_id in enumerate(ids):
            part.append(token_id)
            if bits >> position & 1:
                out += stream.feed(part)
                part = []
        assert out + stream.feed(part) + stream.finish() == whole


@pytest.mark.parametrize("model", WITH_TOKENIZER)
def test_decoding_is_the_reference_s(models: Models, model: str) -> None:
    tokenizer, rng = models.renderer(model).tokenizer, random.Random(1)
    known = sorted(tokenizer._vocab.values())
    for _ in range(20):
        ids = rng.choices(known, k=30)
        expected = tokenizer._reference.decode(ids, skip_special_tokens=False)
        stream = tokenizer.stream()
        assert tokenizer.decode(ids) == expected
        assert "".join(stream.feed([i]) for i in ids) + stream.finish() == expected
        assert b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace") == expected


def test_padded_ids_mean_no_text(tiny_dir: Path) -> None:
    """A model may have more ids than its tokenizer, and samples them once in a while."""
    tokenizer = Tokenizer(tiny_dir / "tokenizer.json", num_ids=1000)
    hello = list(tokenizer.encode("hello"))
    assert tokenizer.vocab_size < 999
    assert tokenizer.decode([*hello, 999, *hello]) == "hellohello"
    assert tokenizer.token_text(999) == ""
    assert tokenizer.token_bytes(999) == b""
    stream = tokenizer.stream()
    assert stream.feed([999]) + stream.feed(hello) + stream.finish() == "hello"


# -- loading


def test_a_tokenizer_that_the_fast_library_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING):
        loaded = Tokenizer(tmp_path / "tokenizer.json")
    assert loaded.backend_name == "tokenizers"
    assert "fastokens" in caplog.text
    assert "using tokenizers" in caplog.text
    assert list(loaded.encode("hello world")) == [1, 2]
    stream = loaded.stream()
    assert "".join(stream.feed([i]) for i in [1, 2, 1]) + stream.finish() == loaded.decode([1, 2, 1])


class WrongBackend(module._Fast):
    """A fast encoder with one fault, in one way of encoding."""

    fault = ""

    def encode(self, text: str) -> "array[int]":
        ids = super().encode(text)
        return ids[:-1] if self.fault == "encode" and "Ελλάδα" in text else ids

    def encode_plain(self, text: str) -> "array[int]":
        ids = super().encode_plain(text)
        return ids[:-1] if self.fault == "plain" and "Ελλάδα" in text else ids


@pytest.mark.parametrize(
    ("fault", "expected"), [("encode", "tokenizers"), ("plain", "tokenizers"), ("", "fastokens")]
)
def test_a_fast_library_that_differs_is_not_used(
    tiny_dir: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    expected: str,
) -> None:
    monkeypatch.setattr(module, "_Fast", WrongBackend)
    monkeypatch.setattr(WrongBackend, "fault", fault)
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer(tiny_dir / "tokenizer.json")
    assert tokenizer.backend_name == expected
    assert ("differs from tokenizers on" in caplog.text and "Ελλάδα" in caplog.text) == bool(fault)
    assert list(tokenizer.encode("Ελλάδα")) == reference(tokenizer, "Ελλάδα")


def test_a_vocabulary_that_is_not_byte_level(tmp_path: Path) -> None:
    """SentencePiece style: the library's own decoder streams."""
    pieces = {"<unk>": 0, "▁": 1, "▁hello": 2, "▁world": 3, "!": 4} | {
        f"<0x{b:02X}>": 5 + b for b in range(256)
    }
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer(tmp_path / "tokenizer.json")
    for ids in ([2, 3, 4], [5 + 0xC3, 5 + 0xA9, 3], [2, 261, 3], [5 + 0xF0, 5 + 0x9F, 4]):
        stream = loaded.stream()
        assert "".join(stream.feed([i]) for i in ids) + stream.finish() == loaded.decode(ids)
    assert loaded.decode([5 + 0xC3, 5 + 0xA9]) == "é"


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match=f"{path} is missing"):
        Tokenizer(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{path} is not a tokenizer"):
        Tokenizer(path)


def test_which_tokens_are_control_tokens(tmp_path: Path) -> None:
    """Brackets of any kind; a token that is not special only where the template writes it."""
    special, added = ("<|im_end|>", "[INST]", "[e~[", "]~b]", "/nothink"), ("<think>", "<code>", "\n\n", "<")
    byte_level_tokenizer(special, added).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", template_text="x <think> y \n\n")
    assert set(tokenizer.control_tokens) == {"<|im_end|>", "[INST]", "[e~[", "]~b]", "<think>"}
    assert tokenizer.special_tokens == set(special)
    assert tokenizer.added_ids == {tokenizer.id_of(t) for t in (*special, *added)}
    assert tokenizer.id_of("no such token") is None


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary that is not byte-level, as Llama 2's: pieces, and single bytes for the rest."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ab", "▁a", "ß", "��"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    made.save(str(path))
    return Tokenizer(path)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 256), st.integers(257, 263)), max_size=24))
def test_other_vocabularies_stream_what_they_decode(byte_fallback: Tokenizer, ids: list[int]) -> None:
    stream = byte_fallback.stream()
    pieces = [stream.feed([i]) for i in ids]
    assert "".join(pieces) + stream.finish() == byte_fallback.decode(ids)


def test_other_vocabularies_do_not_wait_for_the_end(byte_fallback: Tokenizer) -> None:
    stream = byte_fallback.stream()
    assert [stream.feed([i]) for i in (258, 259, 1 + 0xC3, 1 + 0x9F, 258)] == ["a", "b", "", "", "ßa"]
