"""A store in a SQLite file, looked at without touching it: nothing is created, written or locked for long."""

import contextlib
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from tokentape.doctor.checks import Check, Checks, size
from tokentape.errors import one_line
from tokentape.schema import SCHEMA_VERSION

_ENOUGH_BYTES = 2**30
_TOO_FEW_BYTES = 64 * 2**20
# WAL needs memory that all processes share, which a network does not give (sqlite.org/wal.html).
_NETWORKED = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs")


def check_sqlite(
    path: Path, fingerprint: str | None, mounts: Path = Path("/proc/self/mounts")
) -> list[Check]:
    """Everything about a file that is, or would be, a store; `fingerprint` is the model's tokenizer's."""
    checks = Checks("store")
    folder = path.absolute().parent
    if not folder.is_dir():
        checks.wrong("folder", f"{folder} does not exist", f"mkdir -p {folder}")
        return checks.found
    if not os.access(folder, os.W_OK | os.X_OK):
        found = f"{folder} cannot be written by uid {os.getuid()}"
        checks.wrong("folder", found, "give this user the right to write there, or name another --store")
    else:
        checks.ok("folder", f"{folder} can be written")
    _space(checks, folder)
    _filesystem(checks, folder, mounts)
    if not path.exists():
        checks.ok("file", f"{path} is not there yet: a gateway makes it")
        return checks.found
    if path.is_dir():
        checks.wrong("file", f"{path} is a directory", f"--store {path / 'tokentape.sqlite'}")
        return checks.found
    if not os.access(path, os.R_OK | os.W_OK):
        checks.wrong(
            "file", f"{path} cannot be read and written by uid {os.getuid()}", f"chown or chmod {path}"
        )
        return checks.found
    _lock(checks, path)
    _contents(checks, path, fingerprint)
    return checks.found


def _space(checks: Checks, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    found = f"{size(free)} free"
    advice = f"make room in {folder}, or name a --store elsewhere: a full disk is a 507 for every turn"
    if free < _TOO_FEW_BYTES:
        checks.wrong("disk", found, advice)
    elif free < _ENOUGH_BYTES:
        checks.warn("disk", found, advice)
    else:
        checks.ok("disk", found)


def _filesystem(checks: Checks, folder: Path, mounts: Path) -> None:
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return
    real = folder.resolve()
    under = [
        (line[1], line[2]) for line in lines if len(line) > 2 and real.is_relative_to(_unescaped(line[1]))
    ]
    if not under:
        return
    kind = max(under, key=lambda each: len(each[0]))[1]
    if kind.startswith(_NETWORKED):
        advice = "SQLite's WAL needs a local disk: name a --store on one, or postgresql://… (docs/scale.md)"
        checks.wrong("file system", f"{kind}: over a network", advice)
    elif kind in ("tmpfs", "ramfs"):
        checks.warn("file system", f"{kind}: gone after a restart", "name a --store on a disk")
    else:
        checks.ok("file system", kind)


def _unescaped(mount: str) -> str:
    return mount.replace("\\040", " ")


def _lock(checks: Checks, path: Path) -> None:
    """The gateway's own lock. A shared one is asked for and given back at once."""
    lock = path.with_name(f"{path.name}.lock")
    if not lock.exists():
        checks.ok("lock", "no gateway has it")
        return
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        advice = "stop it before another one starts, or name another --store; export and verify may go on"
        checks.warn("lock", "a gateway has it open", advice)
    except OSError as error:
        checks.wrong("lock", one_line(error), f"give this user the right to read {lock}")
    else:
        checks.ok("lock", "no gateway has it")


def _contents(checks: Checks, path: Path, fingerprint: str | None) -> None:
    # A reader of a file in WAL mode makes -wal and -shm where they are not: only where both are there is the
    # log read, else the file alone, which nobody can be writing then.
    logged = all(path.with_name(f"{path.name}{end}").exists() for end in ("-wal", "-shm"))
    mode = "mode=ro" if logged else "immutable=1"
    uri = f"{path.absolute().as_uri()}?{mode}"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=2.0)) as connection:
            version: int = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            known: Sequence[tuple[str]] = (
                connection.execute("SELECT fingerprint FROM tokenizer").fetchall()
                if "tokenizer" in tables
                else []
            )
            count: int = (
                connection.execute("SELECT count(*) FROM sessions").fetchone()[0]
                if "sessions" in tables
                else 0
            )
    except sqlite3.Error as error:
        advice = "name another --store; if this was one, take its backup"
        checks.wrong("file", f"{path}: {one_line(error)}", advice)
        return
    if tables and "sessions" not in tables:
        checks.wrong("file", f"{path} is a SQLite file of something else", "name another --store")
        return
    checks.ok("file", f"{path}: {count:,} sessions, {size(path.stat().st_size)}")
    _schema(checks, version)
    _fingerprint(checks, known[0][0] if known else None, fingerprint)


def _schema(checks: Checks, version: int) -> None:
    if version in (0, SCHEMA_VERSION):
        checks.ok("schema", f"version {SCHEMA_VERSION}" if version else "none yet")
        return
    found = f"version {version}, this tokentape writes {SCHEMA_VERSION}"
    checks.wrong("schema", found, "use the tokentape that wrote it, or name another --store")


def _fingerprint(checks: Checks, known: str | None, fingerprint: str | None) -> None:
    if known is None:
        checks.ok("tokenizer", "none recorded yet")
    elif fingerprint is None:
        checks.ok("tokenizer", f"{known[:12]}…; with --model it is compared")
    elif known != fingerprint:
        advice = "ids of two tokenizers do not mix: name another --store for this --model"
        checks.wrong("tokenizer", f"{known[:12]}…, the model's is {fingerprint[:12]}…", advice)
    else:
        checks.ok("tokenizer", "the model's")
