"""Finds the command, runs it, and turns what went wrong into one line and an exit status."""

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from t5x_lite import __version__
from t5x_lite.errors import CheckpointMismatch, InputError, nearest

# Command to module of this package and what `--help` says. A module has `add_arguments(parser)` and `run(args)`, or,
# where the command has `ACTIONS`, a second word, `add_arguments(parser, action)`.
COMMANDS = {
    "demo": ("demo", "train, evaluate and use a small T5 on the embedded corpus, in about two minutes"),
    "train": ("train", "pre-train or fine-tune, or continue a run"),
    "report": ("report", "a page about one run or several: curves, events, final numbers, differences"),
    "eval": ("evaluate", "loss, perplexity and bits per byte of a run on held-out data"),
    "generate": ("generate", "text from a trained model"),
    "score": ("score", "how likely a model finds targets given their inputs, or texts by themselves"),
    "import": ("import_checkpoint", "a Hugging Face or T5X checkpoint into a run directory"),
    "export": ("export", "a run into a Hugging Face directory"),
    "bench": ("bench", "how fast a model generates and memory would let it, or how fast its data is made"),
    "tokenizer": ("tokenizer", "train a SentencePiece tokenizer, or check one on a text"),
    "data": ("data", "show examples as the model sees them"),
    "config": ("config", "show every setting and where its value comes from"),
    "checkpoint": ("checkpoint", "list the checkpoints of a run, verify them, or compare two"),
    "doctor": ("doctor", "versions, devices, memory, and what is missing"),
}

ACTIONS = {
    "bench": ("decode", "data"),
    "tokenizer": ("train", "check"),
    "data": ("show",),
    "config": ("show",),
    "checkpoint": ("list", "verify", "diff"),
}

SETTINGS_HELP = "a YAML file or a run directory, then key=value settings such as train.steps=100"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help; a text that begins with '-' goes after '--')")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `t5x-lite argv` and returns its exit status: 0 success, 1 failure while running, 2 bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in argv
    try:
        return _run([arg for arg in argv if arg != "--traceback"])
    except (Exception, KeyboardInterrupt) as error:
        line, status = explain(error)
        if isinstance(error, BrokenPipeError):
            # Whoever read stdout has seen enough; Python would complain once more while closing it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif traceback and not isinstance(error, KeyboardInterrupt):
            raise
        else:
            print(f"t5x-lite: {line}", file=sys.stderr)
        return status


def explain(error: BaseException) -> tuple[str, int]:
    """Returns what to say about an error that ends a command, and the exit status."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, CheckpointMismatch):  # a list: what is in the file, and what is in the model
        return str(error), 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; free some space and run again", 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, BrokenPipeError):
        return "", 0
    line = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {line} (--traceback shows where)", 1


def _print_unraisable(unraisable: Any) -> None:
    # When a save has failed, TensorStore reports the other writes that end, from threads of its own, to an event loop
    # that Orbax has closed by then. The failure itself is raised, and said in a line.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _print_warning(message: Warning | str, *details: Any) -> None:
    print(f"t5x-lite: {message}", file=sys.stderr)


def _run(argv: list[str]) -> int:
    parser = _Parser(
        prog="t5x-lite",
        description="Transformer language models in JAX.",
        epilog="\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"t5x-lite {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below; `t5x-lite COMMAND --help` for each")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    if args.command not in COMMANDS:
        raise InputError(
            f"unknown command '{args.command}'{nearest(args.command, COMMANDS)} (one of {', '.join(COMMANDS)})"
        )
    module_name, text = COMMANDS[args.command]
    words, rest = [args.command], args.rest
    if actions := ACTIONS.get(args.command):
        if not rest or (rest[0] not in actions and rest[0] not in ("-h", "--help")):
            given = f", not '{rest[0]}'{nearest(rest[0], actions)}" if rest else ""
            raise InputError(f"`t5x-lite {args.command}` needs one of the words {', '.join(actions)}{given}")
        words.append(rest[0] if rest[0] in actions else "|".join(actions))
        rest = rest[1:] if rest[0] in actions else rest
    module = import_module(f"t5x_lite.cli.{module_name}")
    command = _Parser(prog=f"t5x-lite {' '.join(words)}", description=text)
    command.add_argument("--traceback", action="store_true", help="show where an error came from")
    command.set_defaults(action=words[-1])
    module.add_arguments(command, *words[1:])
    # Libraries underneath log and warn about matters of their own; ours are in notes and errors. Orbax logs what it
    # raises as well, with a traceback, such as that a disk is full; and asyncio, if a second write of a save fails.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore", module="(jax|orbax|tensorboardX|flax)")
    warnings.showwarning = _print_warning
    sys.unraisablehook = _print_unraisable
    return module.run(command.parse_intermixed_args(rest))
