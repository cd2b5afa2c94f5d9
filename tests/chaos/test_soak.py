"""What the soak calls flat, and what not."""

import subprocess
import sys
from pathlib import Path

import pytest
from soak import LIMITS, Seen, growth, is_flat

ROOT = Path(__file__).parents[2]


def seen(name: str, values: list[float]) -> list[Seen]:
    return [Seen(10.0 * at, at, at, 0.0, 0.0, {name: value}) for at, value in enumerate(values)]


@pytest.mark.parametrize("name", LIMITS)
def test_what_grows_is_seen(name: str) -> None:
    level = 100.0
    warming_up = [level / 2, level * 0.9, level, level]
    noisy = [level + (at % 2) / 10 for at in range(40)]
    assert is_flat(seen(name, warming_up + noisy), name)
    share, least = LIMITS[name]
    slope = 2 * max(share * level, least) / 30
    growing = seen(name, [level + slope * at for at in range(41)])
    assert growth(growing, name)[0] == pytest.approx(slope * 30)
    assert not is_flat(growing, name)


def test_a_short_soak_runs() -> None:
    command = [sys.executable, str(ROOT / "chaos" / "soak.py"), "--minutes", "0.1", "--sessions", "4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "trend" in run.stdout, run.stdout + run.stderr  # six seconds say nothing of what is flat
