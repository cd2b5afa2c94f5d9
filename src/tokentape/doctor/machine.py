"""The machine: Python, packages against what this version needs, limits, memory, a port."""

import errno
import importlib.metadata
import platform
import re
import resource
import socket
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokentape.doctor.checks import Check, Checks, size

_PYTHON = (3, 11)
_ENOUGH_FILES = 4096
_ENOUGH_BYTES = 2**30
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;.*extra == ['\"]([^'\"]+)['\"])?")
_BOUND = re.compile(r"(>=|<)\s*([0-9.]+)")
_EXTRAS: Mapping[str, str] = {
    "clients": "the SDKs' clients over a session (docs/inprocess.md)",
    "letta": "the adapter for Letta",
    "local": "the embedded engine: tokentape engine, demo",
    "otel": "turns as OpenTelemetry spans",
    "postgres": "--store postgresql://…",
    "ray": "serve --ray, rollouts as Ray tasks",
    "demo": "tokentape demo",
    "train": "the training examples, verify --histogram",
}


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package that is needed, always or by an `extra`, with bounds like ">=3.14,<4"."""

    name: str
    bounds: str
    extra: str | None


def check_machine(host: str, port: int, meminfo: Path = Path("/proc/meminfo")) -> list[Check]:
    """Everything that no model, engine or store is needed for."""
    checks = Checks("machine")
    _python(checks)
    try:
        lines = importlib.metadata.requires("tokentape") or []
    except importlib.metadata.PackageNotFoundError:
        checks.warn(
            "packages",
            "tokentape runs from a folder and is not installed: what it needs is not known",
            "pip install . in the checkout",
        )
    else:
        check_packages(checks, parse(lines), installed())
    _files(checks)
    _memory(checks, meminfo)
    _port(checks, host, port)
    return checks.found


def _python(checks: Checks) -> None:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] < _PYTHON:
        checks.wrong("python", found, f"install Python {'.'.join(map(str, _PYTHON))} or newer")
    else:
        checks.ok("python", found)


def parse(lines: Iterable[str]) -> list[Requirement]:
    """Requirements as a package's metadata has them; those of itself are left out."""
    found = (_REQUIREMENT.match(line) for line in lines)
    return [Requirement(m[1], m[2].strip(), m[3]) for m in found if m is not None and m[1] != "tokentape"]


def installed() -> dict[str, str]:
    """The versions of all packages that are there, by their normalised names."""
    return {_normal(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(version: str) -> tuple[int, ...]:
    digits = re.match(r"[0-9.]*", version)
    return tuple(int(part) for part in (digits[0] if digits else "").split(".") if part)


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version lies within bounds of the forms that our own metadata has: >= and <."""
    have = _release(version)
    return all(
        have >= _release(limit) if sign == ">=" else have < _release(limit)
        for sign, limit in _BOUND.findall(bounds)
    )


def check_packages(checks: Checks, needed: Iterable[Requirement], have: Mapping[str, str]) -> None:
    """What every command needs is wrong where it is not there; an extra is a matter of use."""
    by_extra: dict[str | None, list[Requirement]] = defaultdict(list)
    for one in needed:
        by_extra[one.extra].append(one)
    for extra, requirements in by_extra.items():
        name = "packages" if extra is None else f"extra {extra}"
        install = "pip install --upgrade tokentape" if extra is None else f"pip install 'tokentape[{extra}]'"
        missing = [one.name for one in requirements if _normal(one.name) not in have]
        old = [
            f"{one.name} {version} (needs {one.bounds})"
            for one in requirements
            if (version := have.get(_normal(one.name))) is not None and not satisfies(version, one.bounds)
        ]
        if extra is not None and missing:
            checks.ok(name, f"not installed; for {_EXTRAS.get(extra, extra)}: {install}")
        elif missing:
            checks.wrong(name, f"missing: {', '.join(missing)}", install)
        elif old:
            report = checks.wrong if extra is None else checks.warn
            report(name, f"of another version: {', '.join(old)}", install)
        else:
            versions = (f"{one.name} {have[_normal(one.name)]}" for one in requirements)
            checks.ok(name, ", ".join(versions))


def _files(checks: Checks) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft:,} may be open at a time"
    if 0 <= soft < _ENOUGH_FILES:
        most = "" if hard < 0 or hard >= 65536 else f" (at most {hard:,} here, without root)"
        advice = f"ulimit -n 65536{most}; each agent and each stream of an engine takes one"
        checks.warn("open files", found, advice)
    else:
        checks.ok("open files", found if soft >= 0 else "no limit")


def _memory(checks: Checks, meminfo: Path) -> None:
    try:
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        available = int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        checks.ok("memory", "this system does not say")
        return
    if available < _ENOUGH_BYTES:
        advice = "stop something, or serve with a smaller --max-memory-mb (4096) and --max-requests-mb (2048)"
        checks.warn("memory", f"{size(available)} available", advice)
    else:
        checks.ok("memory", f"{size(available)} available")


def _port(checks: Checks, host: str, port: int) -> None:
    name = "port"
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(address[0], address[1]) as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(address[4])
    except (socket.gaierror, ValueError) as error:  # "a..b" is no name, a NUL no text
        checks.wrong(name, f"{host} is no address: {error}", "serve with --host 127.0.0.1 or 0.0.0.0")
    except OSError as error:
        found = f"{host}:{port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            checks.warn(name, found, "stop what listens there, or serve with --port 0 (a free one)")
        elif error.errno == errno.EADDRNOTAVAIL:
            checks.wrong(
                name, found, "this machine has no such address: --host 0.0.0.0 listens on all it has"
            )
        else:
            checks.wrong(name, found, "serve with a --port of 1024 or more, on an address of this machine")
    else:
        checks.ok(name, f"{host}:{port} is free" if port else "any free one")
