"""Live tests run only when asked for (`make live`); the real SGLang server that they need."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from postgres import Postgres, postgres

from tokentape.model import TINY_MODEL

LIVE_DIR = Path(os.environ.get("TOKENTAPE_LIVE_DIR", Path.home() / ".cache/tokentape/live"))
ENGINES = Path(os.environ.get("TOKENTAPE_ENGINES", Path(__file__).parent.parent.parent / "shared/engines"))
LIVE_MODELS = {"smollm2": LIVE_DIR / "smollm2", "tiny": TINY_MODEL}
_START_S = 300.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "live" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="needs a real SGLang server: make live")
    for item in items:
        if "live" in item.keywords:
            item.add_marker(skip)


@dataclass(frozen=True)
class LiveServer:
    """A real SGLang server, and the model that it serves."""

    url: str
    model_dir: Path


@pytest.fixture(scope="session")
def sglang_server() -> Iterator[Callable[[str], LiveServer]]:
    """Start the real SGLang for a model of `LIVE_MODELS`: 30 to 70 s, about 3 GB; one runs at a time."""
    with contextlib.ExitStack() as stack:
        running: dict[str, LiveServer] = {}

        def start(name: str) -> LiveServer:
            if name not in running:
                running.clear()
                stack.close()
                running[name] = stack.enter_context(_served(LIVE_MODELS[name]))
            return running[name]

        yield start


@contextlib.contextmanager
def _served(model_dir: Path) -> Iterator[LiveServer]:
    """A free loopback port, a process group of its own, its log in a temporary file."""
    if not list(model_dir.glob("*.safetensors")):
        pytest.fail(f"{model_dir} has no weights: `make live` installs what live tests need")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile("w", prefix="sglang-", suffix=".log") as log:
        command = [str(ENGINES / "run_sglang_cpu.sh"), str(LIVE_DIR / "sglang"), str(model_dir), str(port)]
        process = subprocess.Popen(
            ["bash", *command], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _await_health(f"http://127.0.0.1:{port}", process, Path(log.name))
            yield LiveServer(f"http://127.0.0.1:{port}", model_dir)
        finally:
            for signum in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)


def _await_health(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"SGLang ended with {process.returncode}; {log} ends:\n{log.read_text()[-2000:]}")
        with (
            contextlib.suppress(OSError),  # refused, or 503 until the model is loaded
            urllib.request.urlopen(f"{url}/health", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(1)
    pytest.fail(f"SGLang was not ready after {_START_S:g} s; {log} ends:\n{log.read_text()[-2000:]}")


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
