"""`t5x-lite import`: a published checkpoint becomes a run directory."""

import argparse
import json
from pathlib import Path

from t5x_lite.config import RunConfig, resolve, save
from t5x_lite.errors import InputError
from t5x_lite.run_directory import has_begun, lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "source", metavar="CHECKPOINT", help="a Hugging Face directory, or a T5X or Mesh TensorFlow checkpoint"
    )
    parser.add_argument("out", metavar="OUT", help="the run directory to write")
    parser.add_argument(
        "settings", nargs="*", metavar="model.FIELD=VALUE", help="what the checkpoint does not say of its model"
    )
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PATTERN",
        help="parameters, such as classifier/*, that the checkpoint may lack; they are drawn afresh",
    )
    parser.add_argument(
        "--allow-unused",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors of the checkpoint, such as cls.*, that the model may leave unread",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Reads and writes."""
    out = Path(args.out).expanduser()
    if (out / "config.yaml").exists() or has_begun(out):
        raise InputError(f"out={out} holds a run already; name another directory")
    if other := [word for word in args.settings if not word.startswith("model.")]:
        raise InputError(f"'{other[0]}' is not a setting of the model, such as model.relative_bias_max_distance=256")

    from t5x_lite.interop import checkpoints

    if not checkpoints.is_foreign(args.source):
        raise InputError(f"'{args.source}' is not {checkpoints.KINDS}")
    with lock(out):
        return _import(args, out)


def _import(args: argparse.Namespace, out: Path) -> int:
    import jax

    from t5x_lite.cli.display import show
    from t5x_lite.loading import load
    from t5x_lite.training.checkpoints import save_params

    model = resolve(None, [f"init_from={args.source}", *args.settings]).config.model
    lm = load(args.source, allow_missing=args.allow_missing, allow_unused=args.allow_unused, config=model)
    save_params(out / "checkpoints" / "0", lm.params)
    if lm.tokenizer:
        lm.tokenizer.save(out / "tokenizer")
    if lm.generation:
        (out / "generation_config.json").write_text(json.dumps(lm.generation, indent=1))
    # Last: it is what makes the directory a run.
    save(RunConfig(model=model, fit_vocabulary=False, out=str(out)), out / "config.yaml")
    count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    show({"out": str(out), "family": model.family, "parameters": count, "tokenizer": bool(lm.tokenizer)}, args.json)
    return 0
