"""What `generate` and `score` have in common: a model, inputs one by one, and those that fail."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from t5x_lite.data.lines import Line, LineFile, bare, read_line
from t5x_lite.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from t5x_lite.language_model import LanguageModel


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the model, how it is loaded, and how many inputs it takes at once."""
    parser.add_argument("run", metavar="RUN", help="a run, one of its checkpoints, or a Hugging Face directory")
    parser.add_argument("--batch-size", type=int, default=32, help="inputs in one batch (default 32)")
    parser.add_argument(
        "--dtype", default="float32", help="of the model: float32, bfloat16 or float16 (default float32)"
    )
    parser.add_argument("--quantization", choices=["int8"], help="of the weights, a draft model's too; default: none")
    parser.add_argument("--mesh", default="", help="such as model:8; default: one device")


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises InputError for an argument below 1; one that is None was not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def check_not_empty(args: argparse.Namespace, *names: str) -> None:
    """Raises InputError for an argument that is an empty text; one that is None was not given."""
    for name in names:
        if getattr(args, name) == "":
            raise InputError(f"--{name.replace('_', '-')} must not be empty")


def check_fields(args: argparse.Namespace, source: LineFile, *names: str) -> None:
    """Raises InputError for the name of a field where the lines of the file have none."""
    for name in names:
        if getattr(args, name) and not source.has_fields:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise InputError(f"{flag} needs a .jsonl or .tsv file; --input {args.input} has a text a line")


def load_model(args: argparse.Namespace, run: str, mesh: "str | Mesh") -> "LanguageModel":
    """Loads a model as the arguments say; raises InputError if it cannot predict texts."""
    from t5x_lite.loading import load

    lm = load(run, args.dtype, mesh, quantization=args.quantization)
    lm.require_tokenizer()
    if not lm.config.num_decoder_layers:
        raise InputError(f"the model in {run} has no decoder: it cannot predict what comes next")
    return lm


def given_lines(texts: Sequence[str]) -> list[Line]:
    """Returns the texts as they are, or without any the lines of stdin; raises InputError if none can be used."""
    raw = [os.fsencode(text) for text in texts] or [bare(*line) for line in enumerate(sys.stdin.buffer, 1)]
    lines = [read_line(number, line, lambda text: (text,)) for number, line in enumerate(raw, 1)]
    if not lines:
        raise InputError("there is no input: give texts as arguments, or one a line on stdin")
    if all(line.error for line in lines):
        raise InputError(f"input 1 is {lines[0].error}")
    return lines


def batches(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    """Yields lists of `size` lines, the last perhaps shorter."""
    rest = iter(lines)
    while part := list(islice(rest, size)):
        yield part


def report_failure(record: Mapping[str, Any], path: str | None) -> bool:
    """Says on stderr where and why, if the record is that of a line that failed; returns whether it is."""
    if "error" not in record:
        return False
    where = f"{path}:{record['line']}" if path else f"input {record['line']}"
    print(f"t5x-lite: {where}: {record['error']}", file=sys.stderr)
    return True


def status(failed: int, count: int) -> int:
    """Returns the exit status; 1, and a line on stderr, if any input failed."""
    if failed:
        print(f"t5x-lite: {failed} of {count} inputs failed", file=sys.stderr)
    return 1 if failed else 0
