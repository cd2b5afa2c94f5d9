"""A history that is sent again: however it is read, the same conversation and the same digest come out."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from tokentape.conversation import Conversation, Known, know
from tokentape.gateway.replays import Read, Replays
from tokentape.types import Message, ToolCall

HEADS = ("chat", ()), ("messages", (know(Message("system", "s")),))


class Reader:
    """Reads lists of messages, and counts those that it is given to decode."""

    def __init__(self) -> None:
        self.replays = Replays()
        self.num_decoded = 0

    def read(self, raw: bytes, head: Any = HEADS[0]) -> Read:
        return self.replays.read(Raw(raw), head, self.decode)

    def decode(self, items: Sequence[Raw], first: int, before: Conversation) -> list[Known]:
        assert len(before) >= first
        self.num_decoded += len(items)
        return [know(message(msgspec.json.decode(item))) for item in items]


def message(text: str) -> Message:
    calls = (ToolCall(f"c{text}", "f", "{}"),) if text == "call" else ()
    role = "assistant" if calls else "tool" if text == "result" else "user"
    return Message(role, text, None, calls, "ccall" if role == "tool" else None)


def encode(texts: Sequence[str], space: str = "") -> bytes:
    return f"[{f',{space}'.join(msgspec.json.encode(text).decode() for text in texts)}]".encode()


TEXTS = st.sampled_from(["a", "b", "call", "result", 'quo"te', "é", "]", ","])


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[list[str], str, int]]:
    """Requests that go on from any earlier one, or from a part of it."""
    sent: list[tuple[list[str], str, int]] = []
    for _ in range(draw(st.integers(1, 12))):
        before = draw(st.sampled_from([[], *(texts for texts, _, _ in sent)]))
        kept = before[: draw(st.integers(0, len(before)))] if draw(st.booleans()) else before
        texts = [*kept, *draw(st.lists(TEXTS, max_size=3))]
        sent.append((texts, draw(st.sampled_from(["", "", " "])), draw(st.sampled_from([0, 0, 1]))))
    return sent


@settings(deadline=None)
@given(requests())
def test_every_way_of_reading_gives_the_same(sent: list[tuple[list[str], str, int]]) -> None:
    reader = Reader()
    reads: list[tuple[Read, Read]] = []
    for texts, space, head in sent:
        raw = encode(texts, space)
        reads.append((reader.read(raw, HEADS[head]), Reader().read(raw, HEADS[head])))
    for (texts, _, head), (read, fresh) in zip(
        sent, reads, strict=True
    ):  # what came later changed none of them
        assert read.num_items == len(texts)
        assert read.digest == fresh.digest
        assert [known.message for known in read.conversation.known()] == [
            *(known.message for known in HEADS[head][1]),
            *map(message, texts),
        ]
        assert read.conversation.keys_from(0) == fresh.conversation.keys_from(0)
        assert read.conversation.has_call("ccall") == ("call" in texts)
        assert len(read.conversation) == len(texts) + len(HEADS[head][1])


def test_a_history_is_decoded_once() -> None:
    reader = Reader()
    texts: list[str] = []
    for index in range(100):
        texts += [f"u{index}", f"a{index}"]
        reader.read(encode(texts))
    assert reader.num_decoded == 200
    reader.read(encode(texts))  # a retry
    reader.read(encode([*texts[:100], "other"]))  # from an earlier request on, another way
    reader.read(encode([*texts, "more"]))  # and the first line goes on
    assert reader.num_decoded == 202
    reader.read(encode(["x", *texts]))  # the negative control: nothing of it begins alike
    assert reader.num_decoded == 202 + 201


def test_some_lines_at_a_time_are_known() -> None:
    reader = Reader()
    for line in "abcd" * 3:
        reader.read(encode([line] * 3))
    assert reader.num_decoded == 12
    reader.read(encode(["e"]))  # one line too many: the one used longest ago is forgotten
    assert reader.num_decoded == 13
    reader.read(encode(["a"] * 3))
    assert reader.num_decoded == 16


@pytest.mark.parametrize("raw", [b"{}", b'"text"', b"3"])
def test_what_is_no_list(raw: bytes) -> None:
    reader = Reader()
    with pytest.raises(msgspec.DecodeError):
        reader.read(raw)
    assert reader.read(encode(["a"])).num_items == 1


def test_an_empty_list() -> None:
    assert Reader().read(b"[]").num_items == 0


def test_what_fails_leaves_nothing_behind() -> None:
    reader = Reader()
    reader.read(encode(["a"]))
    with pytest.raises(msgspec.ValidationError):
        reader.replays.read(
            Raw(encode(["a", "b"])), HEADS[0], lambda *_: msgspec.json.decode(b"1", type=list)
        )
    assert reader.read(encode(["a", "b"])).num_items == 2
    assert reader.num_decoded == 2
