"""What a check found, and what to change."""

from collections.abc import Sequence
from enum import StrEnum

import msgspec


class Status(StrEnum):
    """How well it is."""

    OK = "ok"
    WARNING = "warning"
    """It works; something is worse than it could be, or will surprise."""
    WRONG = "wrong"
    """A gateway would not start, or not work."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One check: what was `found`, and `advice`, what to change; None where all is well."""

    area: str
    name: str
    status: Status
    found: str
    advice: str | None = None


class Checks:
    """Collects an area's checks."""

    def __init__(self, area: str) -> None:
        self.area = area
        self.found: list[Check] = []

    def ok(self, name: str, found: str) -> None:
        """It is well."""
        self.found.append(Check(area=self.area, name=name, status=Status.OK, found=found))

    def warn(self, name: str, found: str, advice: str) -> None:
        """It works, but."""
        one = Check(area=self.area, name=name, status=Status.WARNING, found=found, advice=advice)
        self.found.append(one)

    def wrong(self, name: str, found: str, advice: str) -> None:
        """It does not work."""
        one = Check(area=self.area, name=name, status=Status.WRONG, found=found, advice=advice)
        self.found.append(one)


def is_well(checks: Sequence[Check]) -> bool:
    """Whether nothing is wrong."""
    return not any(check.status is Status.WRONG for check in checks)


def size(num_bytes: float) -> str:
    """A number of bytes for people."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:,.0f} KiB"
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
