"""The processes that chaos happens to: a supervised gateway, workers, and the disk of the store."""

import asyncio
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000  # linux/sched.h, linux/mount.h
_DISK_BYTES = 256 << 20
_PAUSE_S = 0.1  # of the supervisor, before it starts a gateway again


_ports = iter(range(20_000 + os.getpid() % 10_000, 32_000))  # below those that connections are given


def free_port() -> int:
    """A loopback port that is free, and that this process has not been given before."""
    for port in _ports:
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


class Worker:
    """One engine worker: killed, stopped, restarted, and told what to do wrong."""

    def __init__(self, name: str, directory: Path, *, incremental: bool, host: str = "127.0.0.1") -> None:
        self.host = host
        self.log = directory / f"{name}.jsonl"
        self.port = free_port()
        self.version = "v0"
        self.num_starts = 0
        self._name = name
        self._stderr = directory / f"{name}.stderr"
        self._incremental = incremental
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where it listens, in every life."""
        return f"http://{self.host}:{self.port}"

    async def start(self) -> None:
        """Begin a life; returns when it listens."""
        self.num_starts += 1
        command = [str(HERE / "worker.py"), "--host", self.host, "--port", str(self.port)]
        command += ["--log", str(self.log)]
        command += ["--seed", f"{self._name} {self.num_starts}", "--version", self.version]
        command += ["--incremental"] if self._incremental else []
        pipe = asyncio.subprocess.PIPE
        with self._stderr.open("ab") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *command, stdin=pipe, stdout=pipe, stderr=stderr
            )
        assert self._process.stdout is not None
        await self._process.stdout.readline()

    def tell(self, mode: str, share: float) -> None:
        """Say what goes wrong from now on."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"mode": mode, "share": share}).encode() + b"\n")

    def signal(self, number: signal.Signals) -> None:
        """Stop it, or let it go on."""
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """End its life."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.communicate()


class Gateway:
    """`tokentape serve` under a supervisor: however it ends, it is started again, on the same port and store.

    `options` are more of its command line's. `kills` are the times at which it ended, `starts_s` how long
    each start took until it listened.
    """

    def __init__(
        self, directory: Path, model: Path, store: Path, engines: Sequence[str], options: Sequence[str]
    ) -> None:
        self.port = free_port()
        self.kills: list[float] = []
        self.starts_s: list[float] = []
        self.num_failed_starts = 0
        self.ready = asyncio.Event()
        self.log = directory / "gateway.log"
        self._command = ["-m", "tokentape", "serve", "--model", str(model), "--store", str(store)]
        self._command += ["--port", str(self.port), "--token-timeout", "3", "--first-token-timeout", "5"]
        self._command += ["--connect-timeout", "1", "--timeout", "20"]
        self._command += [word for url in engines for word in ("--engine", url)]
        self._command += options
        self._process: asyncio.subprocess.Process | None = None
        self._ends = False

    @property
    def url(self) -> str:
        """Where it listens, in every life."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process of this life."""
        return None if self._process is None else self._process.pid

    async def supervise(self) -> None:
        """Keep it running until `stop`."""
        while not self._ends:
            started = time.monotonic()
            with self.log.open("ab") as stderr:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, *self._command, stdout=asyncio.subprocess.PIPE, stderr=stderr
                )
            self._process = process
            assert process.stdout is not None
            if await process.stdout.readline():
                self.starts_s.append(time.monotonic() - started)
                self.ready.set()
            await process.wait()
            self.ready.clear()
            if process.returncode != -signal.SIGKILL and not self._ends:
                self.num_failed_starts += 1
                self.kills.append(time.monotonic())
            await asyncio.sleep(_PAUSE_S)

    def kill(self) -> bool:
        """Send SIGKILL, wherever it is; False where it is between two lives."""
        if self._process is None or self._process.returncode is not None:
            return False
        self.kills.append(time.monotonic())
        self._process.kill()
        return True

    async def stop(self) -> int | None:
        """SIGTERM, and its exit code."""
        self._ends = True
        if self._process is None:
            return None
        if self._process.returncode is None:
            self._process.terminate()
        return await asyncio.wait_for(self._process.wait(), 60)


@dataclass(slots=True)
class Disk:
    """Where the store is, and how it gets full.

    As root a tmpfs, filled with a ballast file; only this process and its children see it, and it ends with
    them. Where nothing can be mounted, the gateway's file size limit stands in for it (`RLIMIT_FSIZE` of the
    running process): its writes fail, too.
    """

    path: Path
    is_mounted: bool

    @classmethod
    def make(cls, path: Path) -> "Disk":
        """Mount it, if that is allowed."""
        path.mkdir()
        size = f"size={_DISK_BYTES}".encode()
        libc = ctypes.CDLL(None)
        is_mounted = (
            libc.unshare(_CLONE_NEWNS) == 0
            and libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
            and libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, size) == 0
        )
        return cls(path, is_mounted)

    @property
    def kind(self) -> str:
        """How it is done here."""
        return "a full tmpfs" if self.is_mounted else "RLIMIT_FSIZE (nothing can be mounted here)"

    def fill(self, pid: int | None) -> None:
        """From now on nothing can be written."""
        if self.is_mounted:
            for num_bytes in (1 << 20, 4096):
                with contextlib.suppress(OSError), (self.path / "ballast").open("ab", buffering=0) as file:
                    while True:
                        file.write(bytes(num_bytes))
        elif pid is not None:
            _limit_files(pid, 4096)

    def free(self, pid: int | None) -> None:
        """There is space again."""
        if self.is_mounted:
            (self.path / "ballast").unlink(missing_ok=True)
        elif pid is not None:
            _limit_files(pid, None)

    def remove(self) -> None:
        """Unmount it: its directory can be removed then."""
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=False)


def _limit_files(pid: int, num_bytes: int | None) -> None:
    """Let a running process write no file beyond `num_bytes`; None: as far as it might before."""
    with contextlib.suppress(ProcessLookupError):  # killed meanwhile: the next life has no limit
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))
