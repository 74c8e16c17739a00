"""`t5x-lite data show`: examples as the model sees them."""

import argparse
import tempfile
from pathlib import Path

from t5x_lite.cli.main import SETTINGS_HELP
from t5x_lite.cli.settings import read_settings
from t5x_lite.data import recipe
from t5x_lite.errors import InputError


def add_arguments(parser: argparse.ArgumentParser, action: str) -> None:
    """Declares the arguments of `show`."""
    parser.add_argument("settings", nargs="*", metavar="CONFIG key=value", help=SETTINGS_HELP)
    parser.add_argument("--examples", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--step", type=int, default=0, help="of the batch they are taken from (default 0)")
    parser.add_argument("--json", action="store_true", help="print an object a line, with token ids")


def run(args: argparse.Namespace) -> int:
    """Prints training examples of the batch of one step, and how much of the batch is padding."""
    import json

    if args.examples < 1:
        raise InputError(f"--examples must be at least 1, not {args.examples}")
    config = read_settings(args.settings).config
    recipe.check_objective(config)
    records = recipe.read(config.data)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = recipe.run_tokenizer(config, records.texts(), Path(folder) / "tokenizer")
    config = recipe.with_vocabulary(config, tokenizer)
    dataset, _ = recipe.datasets(records, config.data, config.train, tokenizer, config.model.decoder_start_id)
    batch = dataset.batch(args.step)
    for row in range(min(args.examples, config.train.batch_size)):
        example = {key: value[row] for key, value in batch.items()}
        if args.json:
            print(json.dumps({key: value.tolist() for key, value in example.items()}))
            continue
        print(f"example {row} of step {args.step}")
        for side, tokens, mask in (
            ("encoder sees", "encoder_input_tokens", "encoder_segment_ids"),
            ("decoder sees", "decoder_input_tokens", "decoder_segment_ids"),
            ("and predicts", "decoder_target_tokens", "decoder_loss_weights"),
        ):
            if tokens not in example:  # a decoder alone
                continue
            ids, real = example[tokens], example[mask]
            # Decoding stops at EOS and drops pads, the start token among them; the count says what is there.
            text = tokenizer.decode([i for i in ids[real > 0].tolist() if i != tokenizer.eos_id])
            print(f"  {side} ({int((real > 0).sum())} of {len(ids)} tokens): {text}")
            print(f"    ids  {' '.join(map(str, ids[:16].tolist()))} ...")
            print(f"    mask {' '.join(str(int(m)) for m in real[:16].tolist())} ...")
    if not args.json:
        for side in ("encoder", "decoder") if "encoder_segment_ids" in batch else ("decoder",):
            padding = 1.0 - float((batch[f"{side}_segment_ids"] > 0).mean())
            print(f"padding in the {side}'s rows of this batch: {padding:.1%}")
    return 0
