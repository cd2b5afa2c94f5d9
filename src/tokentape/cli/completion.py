"""`tokentape completion`."""

import click
from click.shell_completion import get_completion_class

from tokentape.errors import ConfigError

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, options and file names.

    \b
    bash   eval "$(tokentape completion bash)"            in ~/.bashrc
    zsh    eval "$(tokentape completion zsh)"             in ~/.zshrc
    fish   tokentape completion fish > ~/.config/fish/completions/tokentape.fish
    """  # noqa: D301  # click's own mark: the lines stay as they are
    root = context.find_root()
    kind = get_completion_class(shell)
    if kind is None:
        raise ConfigError(f"this version of click completes nothing for {shell}: pip install --upgrade click")
    click.echo(kind(root.command, {}, "tokentape", "_TOKENTAPE_COMPLETE").source())
