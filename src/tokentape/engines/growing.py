"""JSON lists that grow from event to event of a stream: only what is new is decoded. No I/O."""

from typing import Generic, NoReturn, TypeVar

import msgspec

from tokentape import errors

_T = TypeVar("_T")


class GrowingList(Generic[_T]):
    """One list with an entry per sampled token, as text, event after event.

    An event carries all entries so far, or (SGLang's `--incremental-streaming-output`) the new ones: the
    counts tell which. `name` is for messages, `decoder` reads the list. What was seen is compared, in C,
    never decoded again.
    """

    __slots__ = ("_decode", "_name", "_num_seen", "_seen", "_text")

    def __init__(self, name: str, decoder: "msgspec.json.Decoder[list[_T]]") -> None:
        self._name = name
        self._decode = decoder.decode
        self._num_seen = 0
        self._text = b"[]"  # the cumulative list of the event before; b"[]" also in an incremental stream
        self._seen: list[_T] = []

    def feed(self, text: bytes, num_new: int) -> list[_T]:
        """The entries of the event's `num_new` tokens; `text` is its JSON list, b"" where it has none.

        Raises:
            EngineProtocolError: no list, not of such entries, too few or too many, or earlier ones changed.
        """
        if text in (b"", b"null"):
            self._disagree(" is missing, though it was asked for")
        new = self._new(text, num_new)
        self._num_seen += num_new
        self._seen += new
        return new

    def _new(self, text: bytes, num_new: int) -> list[_T]:
        num_seen, seen = self._num_seen, self._text
        if num_seen and text == seen and not num_new:
            return []
        if num_seen and text.startswith(seen[:-1] + b","):
            # The text seen before, and more: decode only the rest. The count excludes that it is an
            # incremental list which happens to begin like the entries before.
            entries = self._read(b"[" + text[len(seen) :])
            if len(entries) == num_new:
                self._text = text
                return entries
        entries = self._read(text)
        if len(entries) == num_new:
            self._text = text if not num_seen else b"[]"
            return entries
        if len(entries) != num_seen + num_new:
            self._disagree(f" has {len(entries)} entries for {num_new} new tokens after {num_seen} seen")
        if entries[:num_seen] != self._seen:
            self._disagree(f" changed within the {num_seen} tokens received before")
        self._text = text
        return entries[num_seen:]

    def _read(self, text: bytes) -> list[_T]:
        try:
            return self._decode(text)
        except msgspec.MsgspecError as error:
            self._disagree(f": {error}")

    def _disagree(self, what: str) -> NoReturn:
        raise errors.EngineProtocolError(f"{self._name}{what}", num_tokens=self._num_seen)
