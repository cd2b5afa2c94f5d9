"""Serves a gateway over HTTP."""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from tokentape.engines.server import serve
from tokentape.gateway.app import make_app
from tokentape.gateway.parts import PartsConfig, parts


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig(PartsConfig):
    """All that `tokentape serve` can be told: what the gateway is made of, and where it listens."""

    host: str = "127.0.0.1"
    port: int = 0
    drain_s: float = 30.0


@contextlib.asynccontextmanager
async def running(config: ServiceConfig) -> AsyncGenerator[str]:
    """Run a gateway while the context is open; yields its URL.

    Raises:
        ConfigError: the model, the store or an option cannot be used.
    """
    async with (
        parts(config) as gateway,
        serve(make_app(gateway), config.host, config.port, drain_s=config.drain_s) as url,
    ):
        yield url
