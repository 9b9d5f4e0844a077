"""`loratool` and `python -m loratool`."""

import sys
from typing import NoReturn

from loratool.cli.process import prepare_imports


def start() -> NoReturn:
    """Run the command line. Ctrl-C is heard from here on, also while the rest is imported."""
    prepare_imports()
    if "--version" in sys.argv:
        from loratool.cli.versions import answer_versions

        answer_versions(sys.argv[1:])
    from loratool.cli.main import main

    main()


if __name__ == "__main__":
    start()
