"""A run's sessions have names that say whose they are: RUN.TASK.MEMBER.ATTEMPT-RANDOM."""

import hashlib
import re
import secrets
from typing import Any

import msgspec

from tokentape.errors import ConfigError

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_~-]{0,63}")
_SESSION = re.compile(r"\.([0-9]{6,})\.([0-9]+)\.[0-9]+-[0-9a-f]{8}")


def new_run() -> str:
    """A name for a run that nobody will resume."""
    return f"run-{secrets.token_hex(6)}"


def checked_run(run: str) -> str:
    """The name of a run, if its sessions can have it.

    Raises:
        ConfigError: it has other characters, or a dot: `a.b` would be a part of `a`.
    """
    if not _RUN.fullmatch(run):
        raise ConfigError(f"run {run!r}: 1 to 64 letters, digits or _~-, the first a letter or digit")
    return run


def group_id(run: str, index: int) -> str:
    """The group of a task."""
    return f"{run}.{index:06d}"


def session_id(group: str, member: int, attempt: int) -> str:
    """A new attempt's session.

    No two attempts have the same, not even of two drivers: what an abandoned agent still says reaches no one.
    """
    return f"{group}.{member}.{attempt}-{secrets.token_hex(4)}"


def read(run: str, session: str) -> tuple[int, int] | None:
    """The task's index and the member that a session of this run is of; None for any other session."""
    found = _SESSION.fullmatch(session.removeprefix(run))
    return (int(found[1]), int(found[2])) if found else None


def digest(task: Any) -> str | None:
    """What a task is recognised by after a restart; None where it cannot be written as JSON."""
    try:
        text = msgspec.json.encode(task, order="deterministic")
    except (TypeError, ValueError, RecursionError):
        return None
    return hashlib.blake2b(text, digest_size=8).hexdigest()
