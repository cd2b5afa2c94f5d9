"""What may be shown of a PostgreSQL store's DSN."""

import re

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tokentape.errors import ConfigError

_URI = ("postgresql://", "postgres://")
_NO_PORT = re.compile(r"[^0-9,]")
_UNCLEAR = (
    "--store postgresql://…: its parts cannot be told apart; it is "
    "postgresql://USER:PASSWORD@HOST:5432/DATABASE, with / as %2F, @ as %40, ? as %3F, % as %25 inside each"
)


def without_password(dsn: str) -> str:
    """A DSN that may be shown, and so may libpq's errors of it: it is clear where the password is.

    Raises:
        ConfigError: it is not. libpq may take a piece of the password for the host, the port or the database,
            and its errors repeat these.
    """
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.Error:
        raise ConfigError(_UNCLEAR) from None  # its error repeats what it could not read
    host, port, database = (str(given.get(name, "")) for name in ("host", "port", "dbname"))
    rest = dsn.partition("://")[2] if dsn.startswith(_URI) else ""
    user, at, place = rest.partition("@")
    if not at or "/" in user:  # as libpq reads it: then nothing is before the host
        place = rest
    if "@" in place.partition("?")[0] or _NO_PORT.search(port):
        raise ConfigError(_UNCLEAR)
    return f"postgresql://{host}{port and f':{port}'}/{database}"
