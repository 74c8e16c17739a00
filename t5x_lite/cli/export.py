"""`t5x-lite export`: a run becomes a directory that transformers loads."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("run", metavar="RUN", help="a run, one of its checkpoints, or a T5X checkpoint")
    parser.add_argument("directory", metavar="HF_DIR", help="the directory to write")
    parser.add_argument("--dtype", default="float32", help="of the weights: float32 or bfloat16 (default float32)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Reads and writes."""
    from t5x_lite.cli.display import show
    from t5x_lite.interop import huggingface
    from t5x_lite.loading import load

    directory = huggingface.new_directory(args.directory)
    lm = load(args.run, dtype=args.dtype)
    huggingface.save(lm.params, lm.config, directory, lm.generation)
    if lm.tokenizer:
        lm.tokenizer.save(directory)
    files = sorted(path.name for path in directory.iterdir())
    show(
        {"directory": str(directory), "checkpoint": str(lm.checkpoint or args.run), "files": ", ".join(files)},
        args.json,
    )
    return 0
