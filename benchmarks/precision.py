"""Whether a run in bfloat16, or in float16 with a scaled loss, ends where float32 ends.

    python benchmarks/precision.py --text tiny_stories.txt

A small T5 v1.1 is trained by span corruption three times, with nothing but `train.dtype` different: the same data in
the same order, the same initial weights, float32 parameters. What is compared is the mean training loss of the last 100
steps, and the loss on the held-out data.

A line of JSON per dtype. The exit status is 1 if bfloat16 is further than 2 % from float32 or had a step that was not
finite, or if float16 is further than 3 % away. Float16 may have such steps: an overflow is how it finds its loss scale.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

LIMITS = {"float32": 0.0, "bfloat16": 0.02, "float16": 0.03}
LAST = 100
SETTINGS = (
    "model=t5-v1.1-small",
    "model.embed_dim=64",
    "model.num_heads=4",
    "model.head_dim=16",
    "model.mlp_dim=128",
    "model.num_encoder_layers=2",
    "model.num_decoder_layers=2",
    "model.dropout_rate=0.0",
    "tokenizer=unigram:1000",
    "data.objective=span_corruption",
    "train.batch_size=16",
    "train.input_length=48",
    "train.log_every=1",
    "train.eval_batches=0",
    "train.eval_every=0",
    "train.checkpoint_every=0",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a text file to train on, a megabyte or so")
    parser.add_argument("--steps", type=int, default=2000, help="updates of each run (default 2000)")
    parser.add_argument("--dtypes", default=",".join(LIMITS), help="float32 and what to compare with it; default: all")
    args = parser.parse_args()
    if not (args.text and Path(args.text).is_file()):
        parser.error(f"--text must be a file, not {args.text}")
    if args.steps < LAST:
        parser.error(f"--steps must be at least {LAST}, not {args.steps}")
    dtypes = args.dtypes.split(",")
    if dtypes[0] != "float32" or not set(dtypes) <= set(LIMITS):
        parser.error(f"--dtypes must begin with float32 and be of {', '.join(LIMITS)}, not {args.dtypes}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    reference: dict[str, Any] = {}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            line = run(dtype, Path(folder) / dtype, args)
            reference = reference or line
            apart = {name: line[name] / reference[name] - 1 for name in ("last_losses", "held_out_loss")}
            line |= {f"{name}_from_float32": round(value, 5) for name, value in apart.items()}
            failed |= max(map(abs, apart.values())) > LIMITS[dtype]
            failed |= dtype != "float16" and line["skipped"] > 0
            print(json.dumps(line), flush=True)
    return int(failed)


def run(dtype: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains in `dtype` and returns the line about it."""
    from t5x_lite.config import resolve
    from t5x_lite.training.loop import train
    from t5x_lite.training.monitor import read_metrics

    began = time.process_time()
    settings = [*SETTINGS, f"data.path={args.text}", f"train.steps={args.steps}", f"train.dtype={dtype}", f"out={out}"]
    result = train(resolve(None, settings).config)
    steps = [record for record in read_metrics(out) if "split" not in record]
    last = [record["loss"] for record in steps[-LAST:]]
    scales = [record["loss_scale"] for record in steps if "loss_scale" in record]
    return {
        "benchmark": "precision",
        "dtype": dtype,
        "steps": args.steps,
        "text": Path(args.text).name,
        "optimizer": "adafactor",
        "first_loss": round(steps[0]["loss"], 4),
        "last_losses": round(sum(last) / len(last), 5),
        "held_out_loss": round(float(result.metrics["loss"]), 5),
        "skipped": int(result.state.skipped),
        **({"loss_scale_first": scales[0], "loss_scale_last": scales[-1]} if scales else {}),
        "cpu_seconds": round(time.process_time() - began, 1),
        "versions": {name: metadata.version(name) for name in ("t5x_lite", "jax", "jaxlib", "optax")},
    }


if __name__ == "__main__":
    sys.exit(main())
