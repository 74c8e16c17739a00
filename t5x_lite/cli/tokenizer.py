"""`t5x-lite tokenizer`: train a SentencePiece tokenizer, or check one on a text."""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from t5x_lite.cli.main import SETTINGS_HELP
from t5x_lite.cli.settings import read_settings
from t5x_lite.data import recipe
from t5x_lite.data.encoders import TextEncoder
from t5x_lite.data.run_tokenizer import TRAINED_TOKENIZERS
from t5x_lite.data.sources import Source, check_columns
from t5x_lite.data.tokenizer_check import check_tokenizer
from t5x_lite.data.tokenizers import ByteTokenizer, load_tokenizer, special_ids, train_sentencepiece
from t5x_lite.errors import InputError


def add_arguments(parser: argparse.ArgumentParser, action: str) -> None:
    """Declares the arguments of `train`, which writes a model for data.path, or `check`, which tries one on it."""
    if action == "train":
        parser.add_argument("output", metavar="OUTPUT.model", help="the file to write")
        parser.add_argument("--type", default="unigram", help=f"one of {', '.join(TRAINED_TOKENIZERS)}")
        parser.add_argument("--vocab-size", type=int, default=8000, help="pieces, sentinels included (default 8000)")
        parser.add_argument("--extra-ids", type=int, default=100, help="sentinels for span corruption (default 100)")
        parser.add_argument("--byte-fallback", action="store_true", help="spell unknown characters as bytes")
    else:
        parser.add_argument(
            "model", metavar="MODEL", help="a .model or tokenizer.json, a directory with one, or `bytes`"
        )
    parser.add_argument("settings", nargs="*", metavar="key=value", help=SETTINGS_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Trains or checks."""
    from t5x_lite.cli.display import show

    data = read_settings(args.settings).config.data
    source = recipe.open_records(data.path, data)
    if not isinstance(source, Source):
        raise InputError(f"'{source}' is a token cache; a tokenizer needs text")
    check_columns(source, (data.text,))
    texts = (text for (text,) in recipe.texts_of(TextEncoder(ByteTokenizer(), data.text), source))
    if args.action == "check":
        tokenizer = load_tokenizer(args.model)
        roles = {f"{name}_id": number for name, number in special_ids(tokenizer).items() if not name.startswith("<")}
        sizes = {"vocab_size": tokenizer.vocab_size, "sentinels": len(tokenizer.sentinels)}
        show(sizes | roles | dataclasses.asdict(check_tokenizer(tokenizer, texts)), args.json)
        return 0
    if args.type not in TRAINED_TOKENIZERS:
        raise InputError(f"--type '{args.type}' is unknown, allowed: {', '.join(TRAINED_TOKENIZERS)}")
    output = Path(args.output)
    if output.is_dir():
        raise InputError(f"'{output}' is a directory; name the .model file to write")
    if not output.parent.is_dir():
        raise InputError(f"there is no directory '{output.parent}' to write {output.name} to")
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        tokenizer = train_sentencepiece(
            texts,
            Path(folder) / output.name,
            args.vocab_size,
            model_type=args.type,
            extra_ids=args.extra_ids,
            byte_fallback=args.byte_fallback,
        )
        (Path(folder) / output.name).replace(output)
    show({"model": str(output), "vocab_size": tokenizer.vocab_size, "sentinels": len(tokenizer.sentinels)}, args.json)
    return 0
