"""A store in PostgreSQL, looked at in transactions that cannot write."""

from importlib.resources import files
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from tokentape.doctor.checks import Check, Checks
from tokentape.errors import ConfigError, one_line
from tokentape.postgres_dsn import without_password

_OLDEST = 120000
_CONNECTIONS = 17  # a gateway's pool
_ADVICE = "start it, or correct the DSN: postgresql://USER:PASSWORD@HOST:5432/DATABASE"


def check_postgres(dsn: str, fingerprint: str | None) -> list[Check]:
    """Everything about a database that is, or would be, a store."""
    checks = Checks("store")
    try:
        name = without_password(dsn)
    except ConfigError as error:
        checks.wrong("reachable", str(error), _ADVICE)
        return checks.found
    try:
        conninfo = make_conninfo(dsn, connect_timeout=5, application_name="tokentape doctor")
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("SET default_transaction_read_only = on")
            checks.ok("reachable", name)
            _server(checks, connection)
            _durable(checks, connection)
            is_there = _rights(checks, connection)
            if is_there:
                _contents(checks, connection, fingerprint)
    except psycopg.Error as error:
        checks.wrong("reachable", f"{name}: {one_line(error)}", _ADVICE)
    return checks.found


def _one(connection: "psycopg.Connection[Any]", statement: str) -> tuple[Any, ...]:
    row = connection.execute(statement.encode()).fetchone()
    return row if row is not None else ()


def _server(checks: Checks, connection: "psycopg.Connection[Any]") -> None:
    number, shown = connection.info.server_version, connection.info.parameter_status("server_version")
    if number < _OLDEST:
        checks.wrong("server", f"PostgreSQL {shown}", "update PostgreSQL: 12 is the oldest, 15 is tested")
    else:
        checks.ok("server", f"PostgreSQL {shown}")
    if _one(connection, "SELECT pg_is_in_recovery()")[0]:
        checks.wrong("primary", "it is a standby: it takes no changes", "name the primary in --store")
    [limit, used] = _one(
        connection,
        "SELECT current_setting('max_connections')::int, (SELECT count(*) FROM pg_stat_activity)::int",
    )
    if limit - used < _CONNECTIONS:
        advice = f"raise max_connections: each gateway takes up to {_CONNECTIONS}"
        checks.warn("connections", f"{used} of {limit} are taken", advice)
    else:
        checks.ok("connections", f"{used} of {limit} are taken")


def _durable(checks: Checks, connection: "psycopg.Connection[Any]") -> None:
    """Whether a committed turn outlives a crash. The store asks for synchronous_commit itself."""
    off = [
        setting
        for setting in ("fsync", "full_page_writes")
        if _one(connection, f"SELECT current_setting('{setting}')")[0] == "off"
    ]
    if off:
        advice = f"set {' and '.join(f'{setting} = on' for setting in off)} in postgresql.conf and reload"
        checks.wrong("durable", f"{', '.join(off)} off: a crash can lose committed turns", advice)
        return
    commit = _one(connection, "SELECT current_setting('synchronous_commit')")[0]
    if commit == "off":
        checks.ok("durable", "synchronous_commit is off here; the store turns it on for itself")
    else:
        checks.ok("durable", f"fsync on, synchronous_commit {commit}")


def _rights(checks: Checks, connection: "psycopg.Connection[Any]") -> bool:
    """Whether the store's tables are there; if not, whether they may be made."""
    [schema, may_create, is_there] = _one(
        connection,
        "SELECT current_schema(), has_schema_privilege(current_schema(), 'CREATE'), "
        "to_regclass('tokentape') IS NOT NULL",
    )
    if is_there:
        [may_write] = _one(
            connection,
            "SELECT bool_and(has_table_privilege(name, 'SELECT') AND has_table_privilege(name, 'INSERT') "
            "AND has_table_privilege(name, 'UPDATE') AND has_table_privilege(name, 'DELETE')) "
            "FROM unnest(ARRAY['sessions', 'turns', 'failures', 'weights', 'replicas']) AS name "
            "WHERE to_regclass(name) IS NOT NULL",
        )
        if may_write:
            checks.ok("rights", "its tables may be read and written")
        else:
            advice = "GRANT ALL ON ALL TABLES IN SCHEMA … TO this user; the tables' owner may do it"
            checks.wrong("rights", "its tables are there, and this user may not write all of them", advice)
        return True
    if schema is None or not may_create:
        advice = "GRANT CREATE ON SCHEMA public TO this user, or give it a database of its own"
        checks.wrong("rights", f"this user may make no tables in schema {schema}", advice)
    else:
        checks.ok("rights", f"no store yet; its tables may be made in schema {schema}")
    return False


def _contents(checks: Checks, connection: "psycopg.Connection[Any]", fingerprint: str | None) -> None:
    known = dict(connection.execute("SELECT name, value FROM tokentape").fetchall())
    steps = sum(s.name.endswith(".sql") for s in files("tokentape").joinpath("migrations").iterdir())
    version = int(known.get("schema", "0"))
    if version > steps:
        found = f"version {version}, this tokentape knows {steps}"
        checks.wrong("schema", found, "use the tokentape that wrote it, or name another database")
    elif version < steps:
        checks.ok("schema", f"version {version}: the next gateway brings it to {steps}")
    else:
        [count] = _one(connection, "SELECT count(*) FROM sessions")
        checks.ok("schema", f"version {version}, {count:,} sessions")
    recorded = known.get("tokenizer")
    if recorded is None:
        checks.ok("tokenizer", "none recorded yet")
    elif fingerprint is not None and recorded != fingerprint:
        advice = "ids of two tokenizers do not mix: name another database for this --model"
        checks.wrong("tokenizer", f"{recorded[:12]}…, the model's is {fingerprint[:12]}…", advice)
    else:
        same = "the model's" if fingerprint is not None else f"{recorded[:12]}…; with --model it is compared"
        checks.ok("tokenizer", same)
