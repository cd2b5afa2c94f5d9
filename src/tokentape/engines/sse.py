"""Server-sent events, sans-IO: bytes in whatever pieces they arrive, payloads out."""


class SSEDecoder:
    r"""Splits a `text/event-stream` body into the payloads of its events.

    Follows the HTML standard's event stream rules as far as payloads go: lines end in `\n`, `\r\n` or `\r`; a
    blank line ends an event; the `data` lines of one event are joined by `\n`; comments and other fields are
    skipped; an event that the stream's end cuts short is dropped. Chunk boundaries may fall anywhere, also
    between `\r` and `\n`.

    There is no limit on an event's size: SGLang's cumulative events grow by about 40 bytes with every token,
    beyond any reader's line limit.
    """

    __slots__ = ("_after_cr", "_data", "_partial")

    def __init__(self) -> None:
        self._partial: list[bytes] = []  # pieces of the line not ended yet, joined once
        self._data: list[bytes] = []  # the data lines of the event not ended yet
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take the next bytes of the body; return the payloads of the events that they complete."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # the second half of a "\r\n" that the chunk boundary split
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        payloads: list[bytes] = []
        for piece in chunk.splitlines(keepends=True):
            line = piece.rstrip(b"\r\n")
            self._partial.append(line)
            if len(line) < len(piece) and (payload := self._end_line()) is not None:
                payloads.append(payload)
        return payloads

    def _end_line(self) -> bytes | None:
        line = b"".join(self._partial)
        self._partial.clear()
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        if not self._data:
            return None
        payload = b"\n".join(self._data)
        self._data.clear()
        return payload
