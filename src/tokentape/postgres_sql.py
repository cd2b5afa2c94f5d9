"""What the PostgreSQL store says to its database, and how the tables come to be.

The statements take their values by name; a session's holder and fence are told in `postgres`.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TypeAlias

from psycopg import AsyncConnection
from psycopg.rows import DictRow

from tokentape.errors import ConfigError
from tokentape.schema import SESSIONS, TURNS, Column

# ruff: noqa: S608  # the names are ours, the values are bound
Connection: TypeAlias = AsyncConnection[DictRow]

_LOCK = 0x746F6B656E  # of those who migrate
_TYPES: Mapping[str, str] = {
    "text": "text",
    "json": "text",
    "ids": "bytea",
    "floats": "bytea",
    "packed": "bytea",
    "int": "bigint",
    "real": "float8",
    "bool": "boolean",
}


def _names(columns: Sequence[Column]) -> str:
    return ", ".join(c.name for c in columns)


def _values(columns: Sequence[Column], suffix: object = "") -> str:
    return ", ".join(f"%({c.name}{suffix})s::{_TYPES[c.kind]}" for c in columns)


_MINE = "session_id = %(session_id)s AND fence = %(fence)s"
REPLACE = f"UPDATE sessions SET ({_names(SESSIONS)}) = ROW({_values(SESSIONS)}) WHERE {_MINE} RETURNING fence"
CREATE = f"""
INSERT INTO sessions ({_names(SESSIONS)}, holder, fence) VALUES ({_values(SESSIONS)}, %(me)s, %(first)s)
ON CONFLICT (session_id) DO UPDATE SET {", ".join(f"{c.name} = EXCLUDED.{c.name}" for c in SESSIONS)}
WHERE sessions.holder = %(me)s RETURNING fence
"""
TAKE = """
UPDATE sessions SET holder = %(me)s, fence = fence + 1 WHERE session_id = %(session_id)s AND (
    holder IS NULL OR holder = %(me)s
    OR NOT EXISTS (SELECT 1 FROM replicas WHERE replica_id = holder AND expires_at > now())
) RETURNING *
"""
HOLDER = """
SELECT url, holder FROM sessions LEFT JOIN replicas ON replica_id = holder AND NOT is_leaving
WHERE session_id = %(session_id)s
"""
HELD_BY = "SELECT state, fence FROM sessions WHERE session_id = %(session_id)s"
RELEASE = f"UPDATE sessions SET holder = NULL WHERE {_MINE}"
RELEASE_ALL = """
UPDATE sessions SET holder = NULL WHERE holder = %(me)s AND session_id <> ALL(%(busy)s) RETURNING session_id
"""
DELETE = """
WITH gone AS (
    DELETE FROM sessions WHERE session_id = %(session_id)s AND holder = %(me)s RETURNING session_id
),
of_turns AS (DELETE FROM turns USING gone WHERE turns.session_id = gone.session_id),
of_failures AS (DELETE FROM failures USING gone WHERE failures.session_id = gone.session_id)
SELECT count(*) AS there FROM sessions
WHERE session_id = %(session_id)s AND NOT EXISTS (SELECT 1 FROM gone)
"""
LOAD: Mapping[str, str] = {
    "session": "SELECT * FROM sessions WHERE session_id = %(session_id)s",
    "turns": f"SELECT {_names(TURNS)} FROM turns WHERE session_id = %(session_id)s ORDER BY seq",
    "failures": "SELECT * FROM failures WHERE session_id = %(session_id)s ORDER BY seq",
}
_LISTED = f"SELECT {_names(SESSIONS)} FROM sessions WHERE session_id > %(after)s"
LIST = f"{_LISTED} ORDER BY session_id LIMIT %(limit)s"
LIST_STATE = f"{_LISTED} AND state = %(state)s ORDER BY session_id LIMIT %(limit)s"
FAILED = """
INSERT INTO failures (session_id, kind, message, num_tokens, created_at)
SELECT session_id, %(kind)s, %(message)s, %(num_tokens)s, %(created_at)s
FROM sessions WHERE session_id = %(session_id)s
"""
ARE_THERE = """
SELECT count(*) AS there FROM turns WHERE session_id = %(session_id)s AND turn_id = ANY(%(turn_ids)s)
"""
PUT_VERSION = """
INSERT INTO weights (version, first_seen_at, said_by) VALUES (%(version)s, %(now)s, %(said_by)s)
ON CONFLICT (version) DO UPDATE
SET seq = DEFAULT, said_by = EXCLUDED.said_by WHERE EXCLUDED.said_by = 'caller'
"""
VERSIONS = "SELECT version, said_by FROM weights ORDER BY seq"
RENEW = """
WITH had AS (SELECT 1 FROM replicas WHERE replica_id = %(me)s AND expires_at > now())
INSERT INTO replicas (replica_id, url, is_leaving, expires_at)
VALUES (%(me)s, %(url)s, %(is_leaving)s, now() + %(lease_s)s * interval '1 second')
ON CONFLICT (replica_id) DO UPDATE
SET url = EXCLUDED.url, is_leaving = EXCLUDED.is_leaving, expires_at = EXCLUDED.expires_at
RETURNING NOT EXISTS (SELECT 1 FROM had) AS has_lapsed
"""
FORGET = "DELETE FROM replicas WHERE expires_at < now() - interval '1 day'"
DISMISS = "DELETE FROM replicas WHERE replica_id = %(replica_id)s"
REPLICAS = """
SELECT replica_id, url, is_leaving FROM replicas
WHERE expires_at > now() AND url IS NOT NULL ORDER BY replica_id
"""
_REMEMBER = """
INSERT INTO tokentape VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value
"""


def put_turns(count: int, *, again: bool) -> str:
    """Insert turns if the fence still stands, and say whether it does.

    The lock on the session's row makes whoever takes it wait for them. `again`: some may be there already.
    """
    rows = ", ".join(f"({_values(TURNS, index)})" for index in range(count))
    return f"""
WITH held AS MATERIALIZED (SELECT 1 FROM sessions WHERE {_MINE} FOR SHARE),
put AS (
    INSERT INTO turns ({_names(TURNS)}) SELECT row.* FROM held, (VALUES {rows}) AS row
    {"ON CONFLICT (turn_id) DO NOTHING" if again else ""}
)
SELECT count(*) AS held FROM held
"""


async def migrate(connection: Connection, tokenizer: str | None, *, readonly: bool) -> None:
    """Bring the tables up to date; several replicas may start at once.

    Raises:
        ConfigError: they are newer, or hold the ids of another tokenizer.
    """
    folder = files("tokentape").joinpath("migrations")
    steps = sorted(step.name for step in folder.iterdir() if step.name.endswith(".sql"))
    async with connection.transaction():
        if not readonly:
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS tokentape (name TEXT PRIMARY KEY, value TEXT NOT NULL)"
            )
        [there] = await (await connection.execute("SELECT to_regclass('tokentape') AS name")).fetchall()
        if there["name"] is None:
            raise ConfigError(
                "there is no tokentape store in this database: is it the one that a gateway writes?"
            )
        rows = await (await connection.execute("SELECT name, value FROM tokentape")).fetchall()
        known = {row["name"]: row["value"] for row in rows}
        version = int(known.get("schema", "0"))
        if version > len(steps) or (readonly and version != len(steps)):
            raise ConfigError(
                f"schema version {version}, but this tokentape knows {len(steps)}: "
                f"use the tokentape that wrote it{', or open it once to write' if readonly else ''}"
            )
        if tokenizer is not None and known.get("tokenizer", tokenizer) != tokenizer:
            raise ConfigError(
                "its sessions were recorded with another tokenizer: use another --store for this --model"
            )
        if readonly:
            return
        for step in steps[version:]:
            await connection.execute(folder.joinpath(step).read_bytes())
        known = {"schema": str(len(steps))} | ({} if tokenizer is None else {"tokenizer": tokenizer})
        for name, value in known.items():
            await connection.execute(_REMEMBER, (name, value))
