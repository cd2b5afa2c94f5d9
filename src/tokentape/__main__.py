"""Run the command line: `python -m tokentape`."""

from tokentape.cli import main

main()
