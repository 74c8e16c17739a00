"""The program `t5x-lite`, which `python -m t5x_lite` is too."""

import sys

from t5x_lite import large_pages

# Commands that compute for long.
_LONG = ("bench", "demo", "eval", "generate", "score", "train")


def start() -> int:
    """Runs the command of `sys.argv` and returns the exit status."""
    if sys.argv[1:2] and sys.argv[1] in _LONG:
        large_pages.restart()  # before anything large is imported
    from t5x_lite.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
