"""Which groups have been delivered: a file of JSON lines, which also keeps a second driver away."""

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from tokentape.errors import ConfigError, StoreError


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    run: str
    group_size: int


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    delivered: int


class Journal:
    """The journal of a run; it is this process's until it is closed, or the process ends, however it ends.

    `delivered` are the indices of tasks whose groups the consumer is done with.

    Raises:
        ConfigError: the file is another run's, no journal, or in use.
    """

    def __init__(self, path: Path, run: str, group_size: int) -> None:
        self._path = path
        self.delivered: set[int] = set()
        with contextlib.ExitStack() as opened:
            try:
                self._file = opened.enter_context(path.open("a+b"))
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read(_Head(run, group_size))
            except BlockingIOError:
                raise ConfigError(
                    f"journal {path}: another driver is at work on it; stop it, or give another file"
                ) from None
            except OSError as error:
                raise ConfigError(f"journal {path}: {error}") from error
            self._opened = opened.pop_all()

    def _read(self, head: _Head) -> None:
        """Read what there is; a last line without its end was never written: it is cut off."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            self._file.truncate(len(whole))
        first, *rest = whole.splitlines() or [b""]
        if not first:
            self._write(head)
            return
        try:
            if (found := msgspec.json.decode(first, type=_Head)) != head:
                raise ConfigError(
                    f"journal {self._path}: it is of run {found.run!r} in groups of {found.group_size}, "
                    f"not of {head.run!r} in groups of {head.group_size}"
                )
            self.delivered = {msgspec.json.decode(line, type=_Line).delivered for line in rest}
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"journal {self._path}: not a journal of rollouts ({error}); give another file"
            ) from error

    def mark(self, index: int) -> None:
        """Note that a group is delivered; on disk when it returns.

        Raises:
            StoreError: it could not be written.
        """
        try:
            self._write(_Line(index))
        except OSError as error:
            raise StoreError(f"journal {self._path}: {error}", uncertain=True) from error
        self.delivered.add(index)

    def _write(self, line: msgspec.Struct) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let another driver have it."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
