"""Which store a name means: a file is SQLite's, a DSN is PostgreSQL's, nothing is memory."""

from collections.abc import Callable
from pathlib import Path

from tokentape.errors import ConfigError
from tokentape.store import SQLiteStore, Store

LEASE_S = 10.0
"""Seconds for which a replica's sessions stay its own after it was last heard of."""
_DSN = ("postgresql://", "postgres://")


def is_shared(where: Path | str | None) -> bool:
    """Whether gateways on several machines share such a store."""
    return isinstance(where, str) and where.startswith(_DSN)


def open_store(
    where: Path | str | None,
    *,
    exclusive: bool = False,
    readonly: bool = False,
    tokenizer: str | None = None,
    lease_s: float = LEASE_S,
    on_transaction: Callable[[float, int, bool], None] = lambda seconds, changes, ok: None,
) -> Store:
    """Open the store of this name; the arguments are `SQLiteStore`'s, as far as another kind has them.

    Raises:
        ConfigError: it cannot be used.
    """
    if where is None or not is_shared(where):
        path = ":memory:" if where is None else where
        return SQLiteStore(
            path, exclusive=exclusive, readonly=readonly, tokenizer=tokenizer, on_transaction=on_transaction
        )
    try:
        from tokentape.postgres import PostgresStore
    except ImportError as error:
        raise ConfigError(
            f"--store postgresql://… needs its extra: pip install 'tokentape[postgres]' ({error})"
        ) from error
    return PostgresStore(
        str(where), readonly=readonly, tokenizer=tokenizer, lease_s=lease_s, on_transaction=on_transaction
    )
