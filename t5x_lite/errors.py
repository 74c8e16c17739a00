"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the bad value and what is allowed. The command line prints it to stderr and
    exits with status 2; library callers catch it as a `ValueError`.
    """


class CheckpointMismatch(RuntimeError):
    """A checkpoint's tensors are not the model's parameters; the message lists them."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the allowed name closest to `name`, or `""` when none is close."""
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
