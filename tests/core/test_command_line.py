"""What holds for every command: errors of one line that act on no terminal, outputs that cannot be."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from rich.console import Console

from tokentape import cli
from tokentape.cli import main
from tokentape.errors import ConfigError
from tokentape.model import TINY_MODEL
from tokentape.schema import SAMPLES
from tokentape.verify import Report
from tokentape.verify.figures import Figures
from tokentape.verify.report import Summary
from tokentape.verify.show import tables


def test_an_error_is_one_line_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ConfigError("the engine said \x1b[31mno\n\x1b]0;pwned\x07" + 10_000 * "x")

    monkeypatch.setattr("click.Group.invoke", fails)
    done = CliRunner().invoke(main, ["audit", "--model", "m"])
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("tokentape: the engine said ⟨U+001B⟩[31mno ")
    assert len(done.stderr) < 2200


@pytest.mark.parametrize("command", ["serve", "view"])
def test_a_taken_port_says_what_to_do(command: str, tmp_path: Path) -> None:
    pq.write_table(SAMPLES.empty_table(), tmp_path / "f")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        args = ["--port", str(taken.getsockname()[1])]
        args += ["f"] if command == "view" else ["--model", str(TINY_MODEL), "--engine", "http://127.0.0.1:9"]
        done = tokentape(command, *args, cwd=tmp_path)
    assert done.returncode == 2
    assert "give another --port" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["serve", "view", "engine"])
def test_a_host_that_is_none(command: str, tmp_path: Path) -> None:
    args = {"view": [str(tmp_path)], "serve": ["--model", "m", "--engine", "http://h"]}.get(command, [])
    done = CliRunner().invoke(main, [command, *args, "--host", "a..b"])
    assert done.exit_code == 2
    assert "give 127.0.0.1" in done.stderr or command == "view"


def test_a_terminal_that_is_not_utf_8() -> None:
    done = tokentape("doctor", "--port", "0", "--host", "192.0.2.1", PYTHONIOENCODING="ascii")
    assert "\\u2192 " in done.stdout, done.stderr
    assert "Traceback" not in done.stderr


def test_nobody_reads_on() -> None:
    command = [sys.executable, "-m", "tokentape", "--help"]
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert done.stderr == b""


def tokentape(*args: str, cwd: Path | None = None, **env: str) -> "subprocess.CompletedProcess[str]":
    source = str(Path(cli.__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "tokentape", *args],
        env={**os.environ, "PYTHONPATH": source, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_a_file_says_is_text() -> None:
    """Ids and versions of a stranger's file, in what `verify` prints."""
    bad = "[red]x[/] \x1b]0;pwned\x07"
    one = Summary.of(Figures(1.0), bad, judged=True)
    report = Report(
        path=bad,
        engine_version=bad,
        tolerance=1.0,
        max_share=0.0,
        num_samples=1,
        num_trained=1,
        num_violations=1,
        violations=(bad,),
        violation_text=bad,
        not_compared={bad: 1},
        whole=one,
        versions=(one,),
        unscaled=None,
        first_offence=None,
        drift=None,
    )
    console = Console(record=True, width=200)
    console.print(tables(report), highlight=False)
    shown = console.export_text()
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert shown.count("[red]x[/]") >= 5
