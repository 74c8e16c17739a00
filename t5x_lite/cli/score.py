"""`t5x-lite score`: how likely a model finds targets given their inputs, or texts by themselves."""

import argparse
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from t5x_lite.cli.inputs import (
    add_model_arguments,
    batches,
    check_at_least_one,
    check_fields,
    check_not_empty,
    load_model,
    report_failure,
    status,
)
from t5x_lite.data.lines import Column, LineFile
from t5x_lite.errors import InputError

if TYPE_CHECKING:
    from t5x_lite.language_model import LanguageModel

_INPUTS = ("inputs", "input", "source", "prompt")
_TARGETS = ("targets", "target", "text", "output")

_EPILOG = """A decoder alone continues the input with the target; without an input, the score is that of the whole text.
With an encoder the end of the target counts as a token. A perplexity is exp of the nats per token, the total one over
the tokens of all targets."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.epilog = _EPILOG
    add_model_arguments(parser)
    parser.add_argument("texts", nargs="*", metavar="INPUT TARGET", help="an input and its target, or a text alone")
    parser.add_argument("--input", metavar="FILE", help=".txt (a text a line), .jsonl or .tsv; also with .gz")
    for side, names in (("inputs", _INPUTS), ("targets", _TARGETS)):
        default = f"default: the first of {', '.join(names)}"
        parser.add_argument(f"--{side}-field", metavar="NAME", help=f"of .jsonl and .tsv ({default})")
    parser.add_argument("--json", action="store_true", help="print an object a line, the last with the totals")


def run(args: argparse.Namespace) -> int:
    """Scores, and prints a line for each example in their order, and the totals."""
    _check(args)
    source = _open(args, "") if args.input else None
    if source:
        check_fields(args, source, "targets_field")

    from t5x_lite.batch_inference import scored

    lm = load_model(args, args.run, args.mesh)
    if lm.config.num_encoder_layers and len(args.texts) == 1:
        raise InputError(f"the model in {args.run} has an encoder: give an input and a target, not a text alone")
    if source and lm.config.num_encoder_layers:
        source = _open(args, None)
    count = failed = tokens = 0
    nats = 0.0
    for record in _records(lm, args, source):
        if not count and not args.json:
            print(_row("line", "nats", "tokens", "perplexity"))
        count += 1
        failed += report_failure(record, args.input)
        likelihood = record.get("log_likelihood", 0.0)
        nats += math.nan if likelihood is None else likelihood
        tokens += record.get("num_tokens", 0)
        _print(record, args.json)
    _print({"examples": count - failed, "failed": failed, **scored(nats, tokens)}, args.json)
    return status(failed, count)


def _records(lm: "LanguageModel", args: argparse.Namespace, source: LineFile | None) -> Iterator[dict[str, Any]]:
    from t5x_lite.batch_inference import score_records, scored

    if source:
        for part in batches(source.read(), args.batch_size):
            yield from score_records(lm, part, args.batch_size)
        return
    scores = lm.score(*([text] for text in ("", *args.texts)[-2:]))
    yield {"line": 1, **scored(float(scores.log_likelihood[0]), int(scores.num_tokens[0]))}


def _check(args: argparse.Namespace) -> None:
    """Raises InputError for arguments that mean nothing together, or for a text that is none."""
    check_at_least_one(args, "batch_size")
    check_not_empty(args, "input", "inputs_field", "targets_field")
    if args.input and args.texts:
        raise InputError(f"--input {args.input} and the text {args.texts[0][:40]!r} exclude each other")
    if not args.input and len(args.texts) not in (1, 2):
        raise InputError(f"give an input and a target, or --input FILE, not {len(args.texts)} texts")
    for name in ("inputs_field", "targets_field"):
        if getattr(args, name) and not args.input:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} needs --input")
    for text in args.texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"the text {text[:40]!r} is not valid UTF-8") from None


def _open(args: argparse.Namespace, without_input: str | None) -> LineFile:
    """Opens the file; `without_input` is the input of a line that has none."""
    inputs = Column((args.inputs_field,)) if args.inputs_field else Column(_INPUTS, without_input)
    return LineFile(args.input, [inputs, Column((args.targets_field,) if args.targets_field else _TARGETS)])


def _print(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)
        return
    where = record.get("line", "total")
    if "error" in record:
        print(_row(where, "-", "-", "-"))
        return
    nats, perplexity = (
        "-" if record[name] is None else f"{record[name]:.4f}" for name in ("log_likelihood", "perplexity")
    )
    print(_row(where, nats, record["num_tokens"], perplexity), flush=True)


def _row(*cells: object) -> str:
    return "  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, (8, 14, 8, 14), strict=True))
