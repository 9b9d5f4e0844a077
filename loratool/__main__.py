"""`python -m loratool`."""

from loratool.cli.main import main

main()
