"""`t5x-lite data show`: examples as the model sees them."""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from t5x_lite.cli.main import SETTINGS_HELP
from t5x_lite.cli.settings import read_settings
from t5x_lite.data import recipe
from t5x_lite.data.run_tokenizer import run_tokenizer, with_vocabulary
from t5x_lite.data.tokenizers import Tokenizer
from t5x_lite.errors import InputError

# Title, tokens, and what tells which of them count.
_SIDES = (
    ("encoder sees", "encoder_input_tokens", "encoder_segment_ids"),
    ("and predicts", "encoder_target_tokens", "encoder_loss_weights"),
    ("decoder sees", "decoder_input_tokens", "decoder_segment_ids"),
    ("and predicts", "decoder_target_tokens", "decoder_loss_weights"),
)
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")  # of the segments of a row, in turn
_IDS_SHOWN = 16


def add_arguments(parser: argparse.ArgumentParser, action: str) -> None:
    """Declares the arguments of `show`."""
    parser.add_argument("settings", nargs="*", metavar="CONFIG key=value", help=SETTINGS_HELP)
    parser.add_argument("--examples", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--step", type=int, default=0, help="of the batch they are taken from (default 0)")
    parser.add_argument("--json", action="store_true", help="print an object a line, with token ids")


def run(args: argparse.Namespace) -> int:
    """Prints training examples of the batch of one step, and how much of the batch is padding."""
    if args.examples < 1:
        raise InputError(f"--examples must be at least 1, not {args.examples}")
    config = read_settings(args.settings).config
    data = recipe.open_data(config.data)
    recipe.check_objectives(config, data)
    with tempfile.TemporaryDirectory() as folder:
        texts = recipe.training_texts(data, config.data)
        tokenizer = run_tokenizer(config, texts, Path(folder) / "tokenizer")
    config = with_vocabulary(config, tokenizer)
    batch = recipe.datasets(data, config, tokenizer).train.loader(args.step)(args.step)
    for row in range(min(args.examples, config.train.batch_size)):
        example = {key: value[row] for key, value in batch.items()}
        if args.json:
            print(json.dumps({key: value.tolist() for key, value in example.items()}))
        else:
            _show(f"row {row} of step {args.step}", example, tokenizer)
    if not args.json:
        for side in ("encoder", "decoder"):
            if (segments := batch.get(f"{side}_segment_ids")) is not None:
                print(f"padding in the {side}'s rows of this batch: {1 - float((segments > 0).mean()):.1%}")
    return 0


def _show(title: str, example: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(title)
    for what, tokens, counts in _SIDES:
        if tokens not in example:
            continue
        ids, counted = example[tokens], example[counts] > 0
        segments = example[f"{tokens.split('_')[0]}_segment_ids"]
        text = Text(f"  {what} ({int(counted.sum())} of {len(ids)} tokens): ")
        for segment in range(1, int(segments.max()) + 1):
            if segment > 1:
                text.append(" | ", "dim")
            # Decoding stops at EOS, and drops pads and the start token among them; the count says what is there.
            shown = ids[(segments == segment) & (counted | tokens.endswith("input_tokens"))].tolist()
            style = _COLOURS[(segment - 1) % len(_COLOURS)]
            text.append(tokenizer.decode([i for i in shown if i != tokenizer.eos_id]), style)
        console.print(text)
        console.print(f"    ids      {' '.join(map(str, ids[:_IDS_SHOWN].tolist()))} ...", style="dim")
        console.print(f"    segments {' '.join(map(str, segments[:_IDS_SHOWN].tolist()))} ...", style="dim")
        console.print(f"    counted  {' '.join(map(str, counted[:_IDS_SHOWN].astype(int).tolist()))} ...", style="dim")
    if "next_sentence_labels" in example:
        console.print(f"  the second text follows the first: {'no' if example['next_sentence_labels'] else 'yes'}")
