"""`t5x-lite bench data`: how fast text becomes tokens and tokens become batches, and how long a step waits for them."""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from t5x_lite.cli.main import SETTINGS_HELP
from t5x_lite.cli.settings import read_settings
from t5x_lite.data import recipe
from t5x_lite.data.run_tokenizer import run_tokenizer, with_vocabulary
from t5x_lite.data.throughput import batch_rate, cache_rate
from t5x_lite.errors import InputError

_EPILOG = """Batches are made on one core, whose own time is what counts, and their tokens are those of both sides.
Caches are built with all cores, from the files on, by the clock. `cache_ratio` compares that with the tokenizer alone,
which gets the same texts from memory, one after the other on one core. `data_wait` is the share of the time between two
steps that the loop waits for a batch, in a run of some steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.epilog = _EPILOG
    parser.add_argument("settings", nargs="*", metavar="CONFIG key=value", help=SETTINGS_HELP)
    parser.add_argument("--batches", type=int, default=50, help="batches to make (default 50)")
    parser.add_argument("--steps", type=int, default=0, help="training steps to wait in; 0 (the default): none")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measures, and prints."""
    for name, least in (("batches", 1), ("steps", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    config = read_settings(args.settings).config
    data = recipe.open_data(config.data)
    recipe.check_objectives(config, data)
    from t5x_lite.cli.display import show

    with tempfile.TemporaryDirectory() as folder:
        # A cache that is there already would take no time.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=f"{folder}/cache"))
        texts = recipe.training_texts(data, config.data)
        tokenizer = run_tokenizer(config, texts, Path(folder) / "tokenizer")
        fitted = with_vocabulary(config, tokenizer)
        report = cache_rate(data, fitted, tokenizer)
        report |= batch_rate(recipe.datasets(data, fitted, tokenizer).train, args.batches)
        if args.steps:
            report["data_wait"] = _data_wait(config, Path(folder), args.steps)
    show(report, args.json)
    return 0


def _data_wait(config: recipe.RunConfig, folder: Path, steps: int) -> float:
    from t5x_lite.training.loop import train

    # The first step compiles, and what is asked of the data in that time is ready long before.
    train_config = dataclasses.replace(config.train, steps=steps + 1, log_every=1, eval_batches=1, eval_every=0)
    train(dataclasses.replace(config, train=train_config, tokenizer=f"{folder}/tokenizer", out=f"{folder}/run"))
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    waits = [record["data_wait"] for record in records if record.get("step", 0) > 1 and "data_wait" in record]
    return sum(waits) / len(waits)
