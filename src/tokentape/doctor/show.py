"""Checks as a table for a terminal."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokentape.doctor.checks import Check, Status
from tokentape.shown import shown

_MOST = 600  # characters
_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.WRONG: "bold red"}


def table(checks: Sequence[Check]) -> RenderableType:
    """All checks, area by area; what to change stands below what was found. The verdict is last."""
    return Group(*_parts(checks))


def _parts(checks: Sequence[Check]) -> Iterator[RenderableType]:
    for area in dict.fromkeys(check.area for check in checks):
        rows = Table(
            title=Text(shown(area)), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        rows.add_column(no_wrap=True)
        rows.add_column(style="bold", no_wrap=True)
        rows.add_column()
        for check in (check for check in checks if check.area == area):
            words = Text(shown(check.found, _MOST))
            if check.advice is not None:
                words.append(f"\n→ {shown(check.advice, _MOST)}", style=_STYLES[check.status])
            rows.add_row(Text(check.status.value, style=_STYLES[check.status]), check.name, words)
        yield rows
        yield Text()
    wrong = sum(check.status is Status.WRONG for check in checks)
    warnings = sum(check.status is Status.WARNING for check in checks)
    if wrong:
        yield Text(f"{wrong} wrong, {warnings} to look at", style="bold red")
    else:
        yield Text(f"nothing is wrong, {warnings} to look at", style="bold green")
