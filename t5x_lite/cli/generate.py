"""`t5x-lite generate`: text from a trained model, for texts of the command line, of stdin or of a file."""

import argparse
import dataclasses
import inspect
import json
import re
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from t5x_lite.cli.inputs import (
    add_model_arguments,
    batches,
    check_at_least_one,
    check_fields,
    check_not_empty,
    given_lines,
    load_model,
    report_failure,
    status,
)
from t5x_lite.data.lines import Column, LineFile
from t5x_lite.errors import InputError

if TYPE_CHECKING:
    from t5x_lite.batch_inference import Output
    from t5x_lite.language_model import LanguageModel

_FIELDS = ("input", "inputs", "prompt", "text", "source")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_model_arguments(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="inputs; without any, one a line from stdin")
    parser.add_argument("--draft", metavar="RUN", help="a smaller model that proposes tokens, to save time")
    parser.add_argument("--stream", action="store_true", help="print the answer to one text as it comes")
    parser.add_argument("--json", action="store_true", help="print an object a line, with input, output and score")
    files = parser.add_argument_group("files")
    files.add_argument("--input", metavar="FILE", help=".txt (a text a line), .jsonl or .tsv; also with .gz")
    files.add_argument("--field", help=f"of .jsonl and .tsv (default: the first of {', '.join(_FIELDS)})")
    where = "results as JSON lines, in one file or in shards; the same command goes on where it was stopped"
    files.add_argument("--output", metavar="FILE.jsonl|DIR/", help=where)
    files.add_argument("--shard-size", type=int, help="inputs written together to --output (default 1000)")
    _add_generation_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generates, and prints one output a line, in the order of the inputs, or writes them to files."""
    _check(args)
    source = LineFile(args.input, [Column((args.field,) if args.field else _FIELDS)]) if args.input else None
    if source:
        check_fields(args, source, "field")
    given = [] if source else given_lines(args.texts)
    if args.stream and len(given) > 1:
        raise InputError(f"--stream takes one text, not {len(given)}")

    from t5x_lite.batch_inference import Output, generate_records

    output = Output(args.output) if args.output else None
    lm = load_model(args, args.run, args.mesh)
    draft = load_model(args, args.draft, lm.mesh) if args.draft else None
    settings = _settings(args)
    lm.check_draft(draft, **settings)
    sequences = lm.generation_config(**settings).num_return_sequences
    if source and output:
        return _write_file(args, source, output, lm, draft, settings)
    if len(given) == 1:
        lm.check_input(given[0].values[0], draft=draft, **settings)
    if args.stream:
        for piece in lm.stream(given[0].values[0], **settings):
            print(piece, end="", flush=True)
        print()
        return 0
    failed = count = 0
    # The draws for texts are those of Python, whose rows begin at 0; for a file they go by the number of the line.
    first_row = 1 if source else 0
    for part in batches(source.read() if source else given, args.batch_size):
        for record in generate_records(lm, part, args.batch_size, settings, draft, first_row=first_row):
            count += 1
            failed += report_failure(record, args.input)
            _print(record, args.json, sequences)
    return status(failed, count)


def _check(args: argparse.Namespace) -> None:
    """Raises InputError for arguments that mean nothing together."""
    check_at_least_one(args, "batch_size", "shard_size")
    check_not_empty(args, "input", "field", "output", "draft")
    for name in ("output", "field"):
        if getattr(args, name) and not args.input:
            raise InputError(f"--{name} {getattr(args, name)} needs --input")
    for name, needed in {"shard_size": "output", "num_assistant_tokens": "draft"}.items():
        if getattr(args, name) is not None and not getattr(args, needed):
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} needs --{needed}")
    if args.input and args.texts:
        raise InputError(f"--input {args.input} and the text {args.texts[0][:40]!r} exclude each other")
    for name in ("input", "draft", "json"):
        if args.stream and getattr(args, name):
            raise InputError(f"--stream and --{name} exclude each other")
    if args.json and args.output:
        raise InputError(f"--json and --output {args.output}, which is JSON always, exclude each other")


def _write_file(
    args: argparse.Namespace,
    source: LineFile,
    output: "Output",
    lm: "LanguageModel",
    draft: "LanguageModel | None",
    settings: dict[str, Any],
) -> int:
    from t5x_lite.batch_inference import generate_file
    from t5x_lite.cli.line_progress import LineProgress

    described = {"field": args.field or "", "dtype": args.dtype, "quantization": args.quantization}
    with LineProgress("generate", args.input) as observer:
        failed, count = generate_file(
            lm,
            source,
            output,
            described={"path": str(lm.checkpoint or args.run), **described},
            settings=settings,
            batch_size=args.batch_size,
            shard_size=args.shard_size or 1000,
            draft=draft,
            observer=observer,
        )
    return status(failed, count)


def _print(record: dict[str, Any], as_json: bool, sequences: int) -> None:
    if as_json:
        print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)
        return
    outputs = [""] * sequences if "error" in record else record.get("outputs") or [record["output"]]
    # One output a line, also where there is none, or where a model of bytes has written a line break.
    for output in outputs:
        print(output.replace("\\", "\\\\").replace("\n", "\\n") if "\n" in output else output, flush=True)


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Declares an option for every field of `GenerationConfig`."""
    from t5x_lite.decoding.generation_config import GenerationConfig

    about = "the defaults are the checkpoint's own settings, and without any those of GenerationConfig; what is sampled"
    about += " depends on the seed and the number of the text: its line in a file from 1, otherwise counted from 0"
    group = parser.add_argument_group("how to generate", about)
    texts = _attributes(inspect.getdoc(GenerationConfig) or "")
    for field in dataclasses.fields(GenerationConfig):
        flag, text = f"--{field.name.replace('_', '-')}", texts.get(field.name, "").replace("%", "%%")
        group.add_argument(flag, default=None, help=text, **_parsing(field.name, field.type))


def _parsing(name: str, kind: Any) -> dict[str, Any]:
    """Returns how argparse reads a field of this name and type."""
    kinds = {part for part in get_args(kind) or (kind,) if part is not type(None)}
    words = [word for part in (kind, *kinds) if get_origin(part) is Literal for word in get_args(part)]
    if kinds == {bool}:
        return {"action": argparse.BooleanOptionalAction}
    if bool in kinds:
        switch = {"true": True, "false": False}
        return {"metavar": "|".join([*switch, *words]), "type": lambda text: switch.get(text, text)}
    if words:
        return {"metavar": "|".join(words)}
    if kinds == {int}:
        return {"metavar": "N", "type": int}
    if kinds == {float}:
        return {"metavar": "X", "type": float}
    if str in kinds:
        return {"metavar": "TEXT", "action": "append"}
    return {"metavar": "ID,ID", "type": _ids} | ({"action": "append"} if name == "bad_words_ids" else {})


def _ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")] if text else []
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' must be ids such as 7 or 7,12") from None


def _attributes(docstring: str) -> dict[str, str]:
    """Returns what the Attributes section of a docstring says about each of them."""
    section = docstring.partition("Attributes:")[2]
    found = re.findall(r"^ {2}(\w+): (.*(?:\n {4}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in found}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the command line says about how to generate."""
    from t5x_lite.decoding.generation_config import GenerationConfig

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(GenerationConfig)}
    return {name: value for name, value in given.items() if value is not None}
