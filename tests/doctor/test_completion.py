"""`tokentape completion`: a real bash completes with what it prints."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tokentape.cli import main

ASK = """
eval "$(tokentape completion bash)"
COMP_WORDS=({words})
COMP_CWORD={at}
_tokentape_completion tokentape
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p tokentape
"""


def completed(tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    program = tmp_path / "bin" / "tokentape"
    program.parent.mkdir(exist_ok=True)
    run = "from tokentape.cli import main; main(prog_name='tokentape')"  # as what pip installs does
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{run}" "$@"\n')
    program.chmod(0o755)
    listed = " ".join(f"'{word}'" for word in ("tokentape", *words))
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK.format(words=listed, at=len(words))],
        env={"PATH": f"{program.parent}:/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    *offered, registered = done.stdout.splitlines()
    assert "_tokentape_completion tokentape" in registered
    return offered


def test_bash_completes(tmp_path: Path) -> None:
    assert completed(tmp_path, "do") == ["doctor"]
    assert set(main.commands) == set(completed(tmp_path, ""))  # type: ignore[attr-defined]
    assert {"--store", "--model", "--engine"} <= set(completed(tmp_path, "doctor", "--"))
    assert completed(tmp_path, "serve", "--history", "p") == ["preserve"]
    assert completed(tmp_path, "completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert f"_TOKENTAPE_COMPLETE={shell}_complete" in done.output
    assert CliRunner().invoke(main, ["completion", "csh"]).exit_code == 2
