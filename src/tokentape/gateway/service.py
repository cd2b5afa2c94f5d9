"""Serves a gateway over HTTP."""

import contextlib
import gc
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from ipaddress import ip_address

from tokentape.engines.server import serve
from tokentape.errors import ConfigError
from tokentape.gateway.app import make_app, session_named
from tokentape.gateway.parts import Gateway, PartsConfig, parts
from tokentape.gateway.replicas import replicated
from tokentape.stores import is_shared

_SWITCH_S = 0.0005
"""Seconds that the loop and the store's thread wait for each other at most; Python's own 5 ms can be felt."""
_COLLECT = 10_000, 20, 10
"""When garbage is looked for: a turn makes hundreds of objects that stay; Python's 700 cost a fifth of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig(PartsConfig):
    """All that `tokentape serve` can be told: what the gateway is made of, and where it listens.

    `advertise` is the URL at which other gateways on the same store reach this one; None: where it listens.
    """

    host: str = "127.0.0.1"
    port: int = 0
    drain_s: float = 30.0
    advertise: str | None = None


@contextlib.asynccontextmanager
async def running(config: ServiceConfig) -> AsyncGenerator[str]:
    """Run a gateway while the context is open; yields its URL.

    On a store that several share it is one of their replicas, and gives its sessions back on the way out.

    Raises:
        ConfigError: the model, the store or an option cannot be used.
    """
    async with started(config) as (url, _):
        yield url


@contextlib.asynccontextmanager
async def started(config: ServiceConfig) -> AsyncGenerator[tuple[str, Gateway]]:
    """As `running`; yields the gateway, too."""
    if is_shared(config.store) and config.advertise is None and _is_everywhere(config.host):
        raise ConfigError(f"--host {config.host} is no address that others can ask: say --advertise http://…")
    async with parts(config) as gateway:
        if is_shared(config.store):
            async with _replica(config, gateway) as url:
                yield url, gateway
        else:
            async with serve(make_app(gateway), config.host, config.port, drain_s=config.drain_s) as url:
                yield url, gateway


def tune() -> None:
    """Set this process up for serving: how threads wait for each other, and when garbage is looked for."""
    sys.setswitchinterval(_SWITCH_S)
    gc.set_threshold(*_COLLECT)


@contextlib.asynccontextmanager
async def _replica(config: ServiceConfig, gateway: Gateway) -> AsyncGenerator[str]:
    async with replicated(gateway, lambda request: session_named(request, config.http.api_key)) as replicas:
        app, leave = make_app(gateway, replicas.answered), replicas.leave
        async with serve(app, config.host, config.port, drain_s=config.drain_s, leave=leave) as url:
            await replicas.arrive(config.advertise or url)
            yield url


def _is_everywhere(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:  # a name
        return False
