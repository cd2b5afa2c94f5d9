"""An object store as Arrow sees one, in memory: clients that fail, die or are held up at any step."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

BUCKET = "bucket/data"


class Killed(BaseException):
    """The process is no more."""


@dataclass
class Objects:
    """What is stored, by path. An object appears when its stream is closed, and not before."""

    stored: dict[str, bytes] = field(default_factory=dict)

    def client(self, **hooks: Any) -> "Client":
        return Client(self, **hooks)

    def names(self) -> list[str]:
        return sorted(path.rpartition("/")[2] for path in self.stored)


@dataclass
class Client:
    """One process's connection. `before` and `after` are told of each step by its number and name."""

    server: Objects
    before: Callable[[int, str], None] = lambda number, step: None
    after: Callable[[int, str], None] = lambda number, step: None
    steps: list[str] = field(default_factory=list)
    dead: bool = False
    lock: Any = field(default_factory=threading.Lock)

    @property
    def filesystem(self) -> PyFileSystem:
        return PyFileSystem(_Handler(self))

    def step(self, name: str, effect: Callable[[], Any]) -> Any:
        """Nothing that a killed process still tries has an effect: its clean-up code does not run."""
        with self.lock:
            if self.dead:
                raise OSError("this process was killed")
            number = len(self.steps)
            self.steps.append(name)
        try:
            self.before(number, name)
            result = effect()
            self.after(number, name)
        except Killed:
            self.dead = True
            raise
        return result


class _Stream:
    """What is written to an object; as Arrow's own, it completes the object whenever it is closed."""

    def __init__(self, client: Client, path: str) -> None:
        self.client, self.path, self.parts, self.closed = client, path, list[bytes](), False

    def write(self, data: Any) -> int:
        self.client.step(f"write {self.path}", lambda: self.parts.append(bytes(data)))
        return len(data)

    def flush(self) -> None:
        pass

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        if not self.closed:
            content = b"".join(self.parts)
            self.client.step(
                f"close {self.path}", lambda: self.client.server.stored.update({self.path: content})
            )
            self.closed = True


class _Handler(FileSystemHandler):  # type: ignore[misc]
    def __init__(self, client: Client) -> None:
        self.client = client

    def get_type_name(self) -> str:
        return "objects"

    def _info(self, path: str) -> FileInfo:
        content = self.client.server.stored.get(path)
        return FileInfo(
            path, FileType.NotFound if content is None else FileType.File, size=len(content or b"")
        )

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return self.client.step("stat", lambda: [self._info(path) for path in paths])

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        return self.client.step(
            "list",
            lambda: [
                self._info(path)
                for path in list(self.client.server.stored)
                if path.startswith(f"{selector.base_dir}/")
            ],
        )

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        self.client.step(f"create {path}", lambda: None)
        return pa.PythonFile(_Stream(self.client, path), mode="w")

    def open_input_file(self, path: str) -> Any:
        def effect() -> Any:
            if path not in self.client.server.stored:
                raise FileNotFoundError(path)
            return pa.BufferReader(self.client.server.stored[path])

        return self.client.step(f"read {path}", effect)

    def delete_file(self, path: str) -> None:
        self.client.step(f"delete {path}", lambda: self.client.server.stored.pop(path, None))

    def _never(self, *_: Any) -> Any:
        raise NotImplementedError

    open_input_stream = open_append_stream = normalize_path = create_dir = delete_dir = _never
    delete_dir_contents = delete_root_dir_contents = move = copy_file = _never
