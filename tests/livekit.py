"""Real SGLang servers, and a real router in front of them, for the tests of `make live`."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from tokentape.model import TINY_MODEL

LIVE_DIR = Path(os.environ.get("TOKENTAPE_LIVE_DIR", Path.home() / ".cache/tokentape/live"))
ENGINES = Path(os.environ.get("TOKENTAPE_ENGINES", Path(__file__).parent.parent.parent / "shared/engines"))
LIVE_MODELS = {"smollm2": LIVE_DIR / "smollm2", "tiny": TINY_MODEL}
ROUTER = LIVE_DIR / "router/bin/sglang-router"
_START_S = 300.0
_ROUTER_START_S = 30.0


def free_port() -> int:
    """Below those that the kernel hands out: SGLang binds it half a minute later (seen: taken by then)."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@dataclass
class LiveProcess:
    """A server as a process group of its own, its log in a temporary file."""

    name: str
    command: Sequence[str]
    url: str
    log: IO[str]
    process: "subprocess.Popen[bytes]"

    @classmethod
    def start(cls, name: str, command: Sequence[str], url: str) -> "LiveProcess":
        log = tempfile.NamedTemporaryFile("w", prefix=f"{name}-", suffix=".log")  # noqa: SIM115  # see `stop`
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        return cls(name, command, url, log, process)

    def await_answer(self, path: str, timeout_s: float = _START_S) -> None:
        """Wait for a 200 on `path`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"{self.name} ended with {self.process.returncode}; {self._end_of_log()}")
            with (
                contextlib.suppress(OSError),  # refused, or 503 until it is ready
                urllib.request.urlopen(self.url + path, timeout=5) as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.5)
        pytest.fail(f"{self.name} was not ready after {timeout_s:g} s; {self._end_of_log()}")

    def kill(self) -> None:
        """As a crash: nothing is said to anybody."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=20)

    def stop(self) -> None:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=20)
        self.log.close()

    def _end_of_log(self) -> str:
        return f"{self.log.name} ends:\n{Path(self.log.name).read_text()[-2000:]}"


@dataclass(frozen=True)
class LiveServer:
    """A real SGLang server, and the model that it serves."""

    process: LiveProcess
    model_dir: Path

    @property
    def url(self) -> str:
        return self.process.url


@dataclass
class LiveServers:
    """The servers that run: of one model, as many as the last test asked for."""

    running: list[LiveServer] = field(default_factory=list[LiveServer])

    def of(self, name: str, num: int) -> list[LiveServer]:
        """`num` servers of a model of `LIVE_MODELS`, started together: 30 to 70 s, about 3 GB each."""
        model_dir = LIVE_MODELS[name]
        if not list(model_dir.glob("*.safetensors")):
            pytest.fail(f"{model_dir} has no weights: `make live` installs what live tests need")
        kept = [s for s in self.running if s.model_dir == model_dir and s.process.process.poll() is None]
        for server in [s for s in self.running if s not in kept[:num]]:
            server.process.stop()
        self.running = kept[:num]
        while len(self.running) < num:
            self.running.append(_start(model_dir))
        for server in self.running:
            server.process.await_answer("/health")
        return list(self.running)

    def stop(self) -> None:
        while self.running:
            self.running.pop().process.stop()


def _start(model_dir: Path) -> LiveServer:
    port = free_port()
    command = [str(ENGINES / "run_sglang_cpu.sh"), str(LIVE_DIR / "sglang"), str(model_dir), str(port)]
    process = LiveProcess.start("sglang", ["bash", *command], f"http://127.0.0.1:{port}")
    return LiveServer(process, model_dir)


def workers_of(router_url: str) -> list[str]:
    """The URLs that a trainer gives its new weights to."""
    with urllib.request.urlopen(f"{router_url}/workers", timeout=5) as answer:
        return [worker["url"] for worker in json.load(answer)["workers"]]


@contextlib.contextmanager
def routed(worker_urls: Sequence[str]) -> Iterator[str]:
    """The URL of a real router that has taken all of these in, as docs/engines.md starts it."""
    if not ROUTER.exists():
        pytest.fail(f"{ROUTER} is missing: `make live` installs what live tests need")
    port = free_port()
    command = [
        *(str(ROUTER), "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", *worker_urls, "--policy", "manual", "--assignment-mode", "min_group"),
        *("--cb-failure-threshold", "3", "--cb-timeout-duration-secs", "10"),
        *("--health-check-interval-secs", "2", "--health-failure-threshold", "2"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
        *("--worker-startup-check-interval", "1", "--shutdown-grace-period-secs", "1"),
    ]
    process = LiveProcess.start("router", command, f"http://127.0.0.1:{port}")
    try:
        process.await_answer("/readiness", _ROUTER_START_S)  # with the first of them
        while len(workers_of(process.url)) < len(worker_urls):
            time.sleep(0.1)
        yield process.url
    finally:
        process.stop()
