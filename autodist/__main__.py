"""``python -m autodist``: the command line."""

from autodist.cli import main

main()
