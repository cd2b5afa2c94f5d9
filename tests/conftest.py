"""Live tests run only when asked for (`make live`); the real SGLang servers that they need."""

from collections.abc import Callable, Iterator

import pytest

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
