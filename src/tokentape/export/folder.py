"""A folder on any Arrow filesystem: a file appears in it whole or not at all, and one process writes it.

A local folder has renames and a lock that the kernel lets go of. An object store has neither: there an object
appears when its upload is complete, and a writer that another one has replaced finds that out by reading.
"""

import contextlib
import fcntl
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import pyarrow as pa
import pyarrow.fs as pfs

from tokentape.errors import ConfigError

_WRITER = "_writer"
_PARTIAL = ".partial"
_KEYLESS = ("hdfs", "viewfs")  # HOST:PORT/PATH: what is before an @ in the path is no secret
_UPLOAD_BYTES = 32 << 20  # of an upload, so many are in memory at a time


class Folder:
    """The folder of a URI: `s3://bucket/path`, `gs://bucket/path`, `file:///path` or a local path.

    Args:
        uri: with `filesystem`, a path there, as pyarrow's own functions have it.
        filesystem: an Arrow filesystem of your own, in place of the one that the URI names.

    Raises:
        ConfigError: the URI names no folder of a known kind.
    """

    def __init__(self, uri: str | Path, filesystem: pfs.FileSystem | None = None) -> None:
        self.name = _without_secrets(str(uri))
        self._filesystem, self._root = (
            (filesystem, str(uri)) if filesystem is not None else _resolved(str(uri), self.name)
        )
        self._root = self._root.rstrip("/")
        if not self._root:
            raise ConfigError(f"{self.name} names no folder")
        self._local = Path(self._root) if isinstance(self._filesystem, pfs.LocalFileSystem) else None

    def path_of(self, name: str) -> str:
        """A file's name as errors show it."""
        return f"{self.name.rstrip('/')}/{name}"

    def files(self) -> dict[str, int]:
        """The files directly in it and their sizes, bytes; none where there is no such folder.

        Raises:
            ConfigError: it cannot be listed.
        """
        with self._as_config_error("cannot be listed"):
            selector = pfs.FileSelector(self._root, allow_not_found=True)
            found = self._filesystem.get_file_info(selector)
            return {info.base_name: info.size for info in found if info.type == pfs.FileType.File}

    @contextlib.contextmanager
    def opened(self, name: str) -> Generator[Any]:
        """A file to read, and to seek in.

        Raises:
            ConfigError: it cannot be read, also later on; or what the caller makes of it is a ValueError.
        """
        with (
            self._as_config_error(f"holds {name}, which cannot be read"),
            self._filesystem.open_input_file(f"{self._root}/{name}") as file,
        ):
            yield file

    @contextlib.contextmanager
    def writing(self) -> Generator[Callable[[], bool]]:
        """Be the one who writes it; gives what asks whether that is still so.

        This is the probe as well: whoever may not list, read and write the folder gets an error here. A local
        folder is made, and is locked: the second writer is refused. Elsewhere the second takes over, so that
        one that was killed is in nobody's way; the first is told when it asks.

        Raises:
            ConfigError: another process writes the folder, or this one may not.
        """
        if self._local is not None:
            with self._locked(self._local):
                yield lambda: True
            return
        self.files()
        mine = uuid.uuid4().hex.encode()
        with self._as_config_error("cannot be written"):
            self._send(_WRITER, pa.py_buffer(mine))

        def still() -> bool:
            with self.opened(_WRITER) as file:
                return file.read() == mine

        try:
            still()  # may it be read?
        except ConfigError:
            with contextlib.suppress(ConfigError):
                self.remove(_WRITER)
            raise
        yield still

    @contextlib.contextmanager
    def scratch(self, name: str) -> Generator[Path]:
        """A local path to write what is to become the file `name`; gone at the end."""
        with contextlib.ExitStack() as stack:
            if self._local is not None:
                path = self._local / f".{name}{_PARTIAL}"
            else:
                made = tempfile.TemporaryDirectory(prefix="tokentape-", ignore_cleanup_errors=True)
                path = Path(stack.enter_context(made)) / name
            try:
                yield path
            finally:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def put(self, name: str, source: Path) -> None:
        """Let a file appear that nobody else writes, with what was written to its `scratch` path.

        Raises:
            ConfigError: it cannot be written; nothing has appeared.
        """
        with self._as_config_error(f"cannot take {name}"):
            if self._local is not None:
                self._move(source, self._local / name)
                return
            content = pa.memory_map(str(source)).read_buffer()
            try:
                self._send(name, content)
                size = self._filesystem.get_file_info(f"{self._root}/{name}").size
                if size != content.size:
                    raise OSError(f"{size} bytes have arrived of {content.size}")  # noqa: TRY301
            except BaseException:
                with contextlib.suppress(OSError, ValueError):  # it may be there, and not be whole
                    self._filesystem.delete_file(f"{self._root}/{name}")
                raise

    def put_bytes(self, name: str, content: bytes) -> None:
        """Let a small file appear; one of that name is replaced.

        Raises:
            ConfigError: it cannot be written.
        """
        with self._as_config_error(f"cannot take {name}"):
            if self._local is None:
                self._send(name, pa.py_buffer(content))
                return
            with self.scratch(name) as path:
                path.write_bytes(content)
                self._move(path, self._local / name)

    def remove(self, name: str) -> None:
        """Remove a file.

        Raises:
            ConfigError: it cannot be removed.
        """
        with self._as_config_error(f"holds {name}, which cannot be removed"):
            self._filesystem.delete_file(f"{self._root}/{name}")

    def _move(self, source: Path, target: Path) -> None:
        _settle(source)
        source.replace(target)
        _settle(target.parent)

    def _send(self, name: str, content: pa.Buffer) -> None:
        """Upload an object. Arrow completes an upload when its stream is closed, or is forgotten unclosed."""
        stream = self._filesystem.open_output_stream(f"{self._root}/{name}")
        try:
            for start in range(0, content.size, _UPLOAD_BYTES):
                stream.write(content.slice(start, min(_UPLOAD_BYTES, content.size - start)))
                stream.flush()  # wait for it: Arrow would take all of it into memory
        finally:
            stream.close()

    @contextlib.contextmanager
    def _locked(self, root: Path) -> Generator[None]:
        with contextlib.ExitStack() as stack:
            with self._as_config_error("cannot be written"):
                root.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((root / _WRITER).open("wb"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(
                        f"{self.name} is being written by another process; wait for its end"
                    ) from None
                for left in root.glob(f".*{_PARTIAL}"):  # by one that was killed
                    left.unlink()
            yield

    @contextlib.contextmanager
    def _as_config_error(self, what: str) -> Generator[None]:
        try:
            yield
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are these
            raise ConfigError(f"{self.name} {what}: {' '.join(str(error).split())}") from error


def _resolved(uri: str, name: str) -> tuple[pfs.FileSystem, str]:
    if "://" not in uri:
        return pfs.LocalFileSystem(), str(Path(uri).absolute())
    try:
        return pfs.FileSystem.from_uri(uri)
    except (OSError, ValueError, NotImplementedError) as error:
        said = " ".join(str(error).replace(uri, name).split())
        raise ConfigError(f"{name} names no folder: {said}") from None  # it has the keys


def _without_secrets(uri: str) -> str:
    """A URI without the keys that it may hold.

    Raises:
        ConfigError: it is not clear where they end. Arrow takes a piece of them for the host, and says so.
    """
    scheme, found, rest = uri.partition("://")
    if not found:
        return uri
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    behind = rest.removeprefix(authority)
    _, at, place = authority.rpartition("@")
    ends = "@" not in behind and (at or place.rpartition(":")[2].isdigit())  # KEY:SECRET@BUCKET, HOST:PORT
    if ":" in authority and not ends and scheme not in _KEYLESS:
        raise ConfigError(
            f"{scheme}://… names no folder: it is not clear where its keys end; it is "
            f"{scheme}://KEY:SECRET@BUCKET/PATH, with / as %2F, @ as %40, ? as %3F, # as %23 inside each"
        )
    return f"{scheme}://{place}{re.split('[?#]', behind, maxsplit=1)[0]}"


def _settle(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
