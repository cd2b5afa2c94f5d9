"""The command line: configuration and wiring. The only place that prints.

One file a command; `options` has what several of them take.
"""

import errno
import io
import sys
from typing import Any

import click

from tokentape import __version__
from tokentape.cli.audit import audit
from tokentape.cli.completion import completion
from tokentape.cli.demo import demo
from tokentape.cli.doctor import doctor
from tokentape.cli.export import export
from tokentape.cli.report import report
from tokentape.cli.serve import engine, serve
from tokentape.cli.top import top
from tokentape.cli.verify import verify
from tokentape.cli.view import view
from tokentape.errors import TokentapeError
from tokentape.shown import shown

_MOST = 2000  # characters of an error
_IN_USE = "stop what listens there, or give another --port (0 picks a free one)"


class _Group(click.Group):
    """An error becomes one line and exit code 2; `--help` lists commands in the order of use."""

    def main(self, *args: Any, **options: Any) -> Any:
        # A terminal or a pipe that is not UTF-8 gets what it cannot show escaped: no reason to fail.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportUnknownMemberType]
        return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TokentapeError as error:
            _say(error)
            ctx.exit(2)
        except OSError as error:  # an address in use, a directory that cannot be written
            if error.errno == errno.EPIPE:
                raise  # nobody reads on, as in `… | head`: click ends quietly
            _say(error, _IN_USE if error.errno == errno.EADDRINUSE else None)
            ctx.exit(2)


def _say(error: BaseException, advice: str | None = None) -> None:
    """One line; engines' and files' words in it cannot act on the terminal."""
    words = shown(" ".join(str(error).split()), _MOST)
    click.echo(f"tokentape: {words}{'' if advice is None else f': {advice}'}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tokentape")
def main() -> None:
    """Token-exact reinforcement-learning data from any LLM agent.

    Start with `tokentape demo`. Then put `tokentape serve` between your agent and your SGLang server, and
    give the agent the gateway's URL instead of OpenAI's.
    """


for _command in (demo, serve, engine, top, view, export, verify, report, audit, doctor, completion):
    main.add_command(_command)
