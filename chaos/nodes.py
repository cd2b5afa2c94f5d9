"""A Ray cluster of several machines on one: each node in a network namespace with two cables.

One cable goes to the other nodes and the engines, one to the store: that can be pulled alone. Needs root.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

_RAY = ("--disable-usage-stats", "--object-store-memory=80000000", "--log-style=record", "--log-color=false")


def _run(*command: str, **given: object) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **given)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout.decode()[-2000:]}")


def _try(*command: str) -> None:
    with contextlib.suppress(RuntimeError):
        _run(*command)


class Network:
    """Two bridges: `address` of this machine on the one of the nodes, `store` on the one of the store."""

    def __init__(self) -> None:
        self._tag = f"tt{os.getpid() % 10_000}"
        self._third = os.getpid() % 250  # so that two runs do not meet
        self.address, self.store = self._host("77", 1), self._host("78", 1)
        self.nodes: list[Node] = []

    def _host(self, net: str, number: int) -> str:
        return f"10.{net}.{self._third}.{number}"

    def up(self) -> None:
        """Lay both."""
        for name, address in ((f"{self._tag}r", self.address), (f"{self._tag}s", self.store)):
            _run("ip", "link", "add", name, "type", "bridge")
            _run("ip", "addr", "add", f"{address}/24", "dev", name)
            _run("ip", "link", "set", name, "up")

    def add(self) -> "Node":
        """Another machine."""
        number = len(self.nodes) + 11
        node = Node(f"{self._tag}n{number}", self._host("77", number))
        _run("ip", "netns", "add", node.name)
        for kind, net in (("r", "77"), ("s", "78")):
            here, there = f"{self._tag}{kind}{number}", f"{kind}0"
            _run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", node.name)
            _run("ip", "link", "set", here, "master", f"{self._tag}{kind}", "up")
            node.run("ip", "addr", "add", f"{self._host(net, number)}/24", "dev", there)
            node.run("ip", "link", "set", there, "up")
        node.run("ip", "link", "set", "lo", "up")
        self.nodes.append(node)
        return node

    def down(self) -> None:
        """Take all of it away, with whatever runs there."""
        for number, node in enumerate(self.nodes, 11):
            node.kill()
            _try("ip", "netns", "del", node.name)
            for kind in "rs":
                _try("ip", "link", "del", f"{self._tag}{kind}{number}")
        for kind in "rs":
            _try("ip", "link", "del", f"{self._tag}{kind}")


class Node:
    """One machine: a namespace, and the processes in it."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def run(self, *command: str) -> None:
        """Run a command there, to its end."""
        _run("ip", "netns", "exec", self.name, *command)

    def cut(self) -> None:
        """Pull the cable to the store."""
        self.run("ip", "link", "set", "s0", "down")

    def mend(self) -> None:
        """Plug it in again."""
        self.run("ip", "link", "set", "s0", "up")

    def kill(self, name: str = "") -> int:
        """Kill the processes whose title begins so; how many they were."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.name], stdout=subprocess.PIPE, check=False, text=True
        ).stdout.split()
        killed = 0
        for pid in map(int, found):
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                if title.startswith(name.encode()):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        return killed


@contextlib.contextmanager
def ray_cluster(directory: Path, num_nodes: int) -> Generator[tuple[Network, str]]:
    """Ray on that many machines, and its head on this one, which runs nothing; yields Ray's address."""
    ray = str(Path(sys.executable).with_name("ray"))
    network = Network()
    # Short, for its sockets; not where another Ray of this machine is.
    temp = Path(f"/tmp/tt-ray-{os.getpid()}")
    os.environ["RAY_TMPDIR"] = str(temp)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else is on these cables
    address = f"{network.address}:6399"
    try:
        network.up()
        where = f"--temp-dir={temp}"
        with (directory / "ray.log").open("ab") as log:
            head = ["start", "--head", f"--node-ip-address={network.address}", "--port=6399", "--num-cpus=0"]
            head += ["--include-dashboard=false", where, *_RAY]
            subprocess.run([ray, *head], stdout=log, stderr=log, check=True)
            for _ in range(num_nodes):
                node = network.add()
                worker = ["start", f"--address={address}", f"--node-ip-address={node.address}"]
                worker += ["--num-cpus=4", *_RAY]
                subprocess.run(
                    ["ip", "netns", "exec", node.name, ray, *worker], stdout=log, stderr=log, check=True
                )
        yield network, address
    finally:
        network.down()
        _end_head(temp)
        shutil.rmtree(temp, ignore_errors=True)


def _end_head(temp: Path) -> None:
    """Kill the head's processes: those that name its directory."""
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(process.name)
            if pid != os.getpid() and str(temp).encode() in (process / "cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
