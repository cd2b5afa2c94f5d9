"""`tokentape audit`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from tokentape.audit import audit as audit_model
from tokentape.audit.show import tables
from tokentape.cli.options import format_options, template_argument
from tokentape.formatfile import read_formats
from tokentape.model import model_directory


@click.command()
@click.option("--model", required=True, help="Model directory or hub id: tokenizer and chat template.")
@format_options
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object instead of tables; see docs/models.md."
)
def audit(
    model: str,
    history: Any,
    tool_format: str,
    reasoning_format: str,
    formats: Path | None,
    template_args: Sequence[str],
    as_json: bool,
) -> None:
    """Say before a run where this chat template lets a turn be extended, and where not.

    Exit code 0: multi-turn tool use is exact. 1: it is not; the report says why and what to do. 2: the model
    or an option is wrong.
    """
    report = audit_model(
        model_directory(model),
        model=model,
        history=history,
        tool_format=tool_format,
        reasoning_format=reasoning_format,
        formats=() if formats is None else read_formats(formats),
        arguments=dict(map(template_argument, template_args)),
    )
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        Console().print(tables(report))
    if not report.exact:
        sys.exit(1)
