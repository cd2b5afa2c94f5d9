"""`make scale` in small: three machines in network namespaces, one cut off from the store while it samples."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCALE = Path(__file__).parents[2] / "chaos" / "scale.py"


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("ip") is None, reason="namespaces need root and ip")
def test_who_is_cut_off_commits_nothing(tmp_path: Path) -> None:
    """Its sessions go on elsewhere; what it had sampled is refused; the export is what was acknowledged."""
    kept = tmp_path / "kept"
    arguments = ["--agents", "6", "--pause", "2", "--acts", "cut_off", "--keep", str(kept)]
    done = subprocess.run(
        [sys.executable, str(SCALE), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 commits: 503 lease_lost" in done.stdout
    assert "nothing lost, nothing invented" in done.stdout
