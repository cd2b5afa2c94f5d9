"""Live tests run only when asked for (`make live`); the servers that tests need: SGLang, PostgreSQL."""

import secrets
import sys
from collections.abc import Callable, Iterator

import pytest
from postgres import Postgres, postgres

from livekit import LiveServer, LiveServers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "live" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="needs a real SGLang server: make live")
    for item in items:
        if "live" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def sglang_servers() -> Iterator[LiveServers]:
    """Real SGLang servers; those of the test before are used again where they fit, else stopped."""
    servers = LiveServers()
    yield servers
    servers.stop()


@pytest.fixture(scope="session")
def sglang_server(sglang_servers: LiveServers) -> Callable[[str], LiveServer]:
    """The real SGLang for a model of `LIVE_MODELS`; one runs at a time."""
    return lambda name: sglang_servers.of(name, 1)[0]


@pytest.fixture(autouse=True)
def _applications_end() -> Iterator[None]:
    """aiohttp remembers the last 1,024 handlers, and with them whole gateways: 15 MB each."""
    yield
    if (web_app := sys.modules.get("aiohttp.web_app")) is not None:
        web_app._cached_build_middleware.cache_clear()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """One PostgreSQL for the whole run; whoever stops it starts it again."""
    with postgres() as server:
        yield server


@pytest.fixture
def database(postgres_server: Postgres) -> Iterator[str]:
    """The DSN of a new database."""
    import psycopg  # other virtual environments that run some of the tests have none

    name = f"t{secrets.token_hex(8)}"
    with psycopg.connect(postgres_server.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    yield postgres_server.dsn_of(name)
    with psycopg.connect(postgres_server.dsn, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
