"""`loratool` and `python -m loratool`."""

from typing import NoReturn

from loratool.cli.process import prepare_imports


def start() -> NoReturn:
    """Run the command line. Ctrl-C is heard from here on, also while the rest is imported."""
    prepare_imports()
    from loratool.cli.main import main

    main()


if __name__ == "__main__":
    start()
