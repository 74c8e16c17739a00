"""The program `t5x-lite`, which `python -m t5x_lite` is too."""

import sys

from t5x_lite import large_pages


def start() -> int:
    """Runs the command of `sys.argv` and returns the exit status."""
    if sys.argv[1:2] in (["train"], ["demo"]):
        large_pages.restart()  # before anything large is imported
    from t5x_lite.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
