"""`t5x-lite generate`: text from a trained model."""

import argparse
import json
import sys

from t5x_lite.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("run", metavar="RUN", help="a run, one of its checkpoints, or a Hugging Face directory")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="inputs; without any, one a line from stdin")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to generate at most (default 64)")
    parser.add_argument("--batch-size", type=int, default=32, help="inputs decoded together (default 32)")
    parser.add_argument("--mesh", default="", help="such as model:8; default: one device")
    parser.add_argument("--json", action="store_true", help="print an object a line, with input and output")


def run(args: argparse.Namespace) -> int:
    """Generates, and prints one output a line, in the order of the inputs."""
    texts = args.texts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise InputError("there is no input: give texts as arguments, or one a line on stdin")
    for number, text in enumerate(texts, 1):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"input {number} is not valid UTF-8: {text[:40]!r}") from None
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {args.batch_size}")

    from t5x_lite.language_model import load

    lm = load(args.run, mesh=args.mesh)
    for start in range(0, len(texts), args.batch_size):
        part = texts[start : start + args.batch_size]
        for text, output in zip(part, lm.generate(part, max_new_tokens=args.max_new_tokens), strict=True):
            # One output a line, also where a model of bytes has written a line break.
            line = output.replace("\\", "\\\\").replace("\n", "\\n") if "\n" in output else output
            print(json.dumps({"input": text, "output": output}, ensure_ascii=False) if args.json else line)
    return 0
