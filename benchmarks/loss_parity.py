"""Whether training here and in transformers + torch are the same training: loss curves beside each other.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0  # once, in its own environment
    python benchmarks/loss_parity.py --peer-python peer/bin/python --text tiny_stories.txt

A T5-small-like and a GPT-2-like model, small enough for minutes on two cores, are trained on real text: span corruption
and language modelling by `data.recipe`, as `t5x-lite train` reads them. Both sides get the same batches (an npz file),
the same initial weights (written by `interop.huggingface.save`, read by `from_pretrained`), and the same optimizer:

* `adamw`: `torch.optim.AdamW`, gradients clipped by `clip_grad_norm_`, weight decay on matrices alone;
* `adafactor`: `transformers.optimization.Adafactor(relative_step=False)`, which factors every matrix, so ours does too
  here (`min_dim_size_to_factor=1`). GPT-2 has none, because its query, key and value are one matrix there and have one
  RMS.

The learning rates of every step are handed over as numbers; no dropout, float32. The peer's loss is the one its model
computes itself from `labels`; ours is the `loss` of `make_train_step`.

A line of JSON per cell: the largest relative difference over all steps, at which step, and both curves every 20 steps.
The exit status is 1 if any is above `--limit`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

B1, B2, WEIGHT_DECAY, CLIP = 0.9, 0.98, 0.1, 1.0
WARMUP = 20
PEAK = {"t5/adamw": 5e-4, "t5/adafactor": 5e-3, "gpt2/adamw": 5e-4}
SHAPE = ("model.embed_dim=128", "model.num_heads=4", "model.head_dim=32", "model.mlp_dim=512", "model.dropout_rate=0.0")
MODELS = {
    "t5": (
        "model=t5-small",
        "model.num_encoder_layers=3",
        "model.num_decoder_layers=3",
        "train.batch_size=8",
        "train.input_length=96",
    ),
    "gpt2": (
        "model=gpt2",
        "model.attention_dropout_rate=0.0",
        "model.num_decoder_layers=4",
        "model.max_positions=65",
        "train.batch_size=8",
        "train.input_length=64",
    ),
}
CELLS = ("t5/adamw", "t5/adafactor", "gpt2/adamw")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="of an environment with torch and transformers")
    parser.add_argument("--text", help="a text file to train on, a megabyte or so")
    parser.add_argument("--cells", default=",".join(CELLS), help="some of them, separated by commas; default: all")
    parser.add_argument("--steps", type=int, default=200, help="updates of each run (default 200)")
    parser.add_argument("--limit", type=float, default=0.005, help="largest relative difference (default 0.005)")
    parser.add_argument("--threads", type=int, default=2, help="cores that either uses (default 2)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        peer(Path(args.worker), args.threads)
        return 0
    if not (args.peer_python and Path(args.peer_python).is_file()):
        parser.error(f"--peer-python must be the interpreter of the peer's environment, not {args.peer_python}")
    if not (args.text and Path(args.text).is_file()):
        parser.error(f"--text must be a file, not {args.text}")
    if args.steps <= WARMUP:
        parser.error(f"--steps must be more than {WARMUP}, the warm-up, not {args.steps}")
    cells = args.cells.split(",")
    if not set(cells) <= set(CELLS):
        parser.error(f"--cells must be of {', '.join(CELLS)}, not {args.cells}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    worst = 0.0
    for name in cells:
        model, optimizer = name.split("/")
        with tempfile.TemporaryDirectory() as folder:
            line = cell(model, optimizer, Path(folder), args)
        worst = max(worst, line["max_relative_difference"])
        print(json.dumps(line), flush=True)
    return int(worst > args.limit)


def cell(model: str, optimizer: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains on both sides and returns the line."""
    mine, about = ours(model, optimizer, folder, args)
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    command = [args.peer_python, __file__, "--worker", str(folder), f"--threads={args.threads}"]
    subprocess.run(command, check=True, env=os.environ | offline, stdout=sys.stderr)
    answer = json.loads((folder / "peer.json").read_text())
    theirs = np.array(answer["losses"])
    difference = np.abs(mine - theirs) / theirs
    return {
        "benchmark": "loss_parity",
        "model": model,
        "optimizer": optimizer,
        "steps": args.steps,
        "text": Path(args.text).name,
        **about,
        "max_relative_difference": float(f"{difference.max():.3g}"),
        "at_step": int(difference.argmax()) + 1,
        "mean_relative_difference": float(f"{difference.mean():.3g}"),
        "every": 20,
        "losses": [round(float(x), 5) for x in mine[::20]] + [round(float(mine[-1]), 5)],
        "peer_losses": [round(float(x), 5) for x in theirs[::20]] + [round(float(theirs[-1]), 5)],
        "versions": {name: metadata.version(name) for name in ("t5x_lite", "jax", "jaxlib", "optax")}
        | answer["versions"],
    }


def ours(name: str, optimizer: str, folder: Path, args: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    """Trains here; leaves the batches, the initial weights and the recipe in `folder`. Returns the losses."""
    import jax
    import optax

    from t5x_lite import sharding
    from t5x_lite.config import resolve
    from t5x_lite.data import recipe
    from t5x_lite.data.run_tokenizer import run_tokenizer, with_vocabulary
    from t5x_lite.interop import huggingface
    from t5x_lite.models import build
    from t5x_lite.training.optimizers import adafactor, make_optimizer, stacked
    from t5x_lite.training.schedules import make_schedule
    from t5x_lite.training.state import init_state
    from t5x_lite.training.step import make_train_step

    settings = [
        *MODELS[name],
        *SHAPE,
        "tokenizer=unigram:2000",
        f"data.path={args.text}",
        f"train.steps={args.steps}",
        f"out={folder / 'run'}",
    ]
    config = resolve(None, settings).config
    data = recipe.open_data(config.data)
    tokenizer = run_tokenizer(config, recipe.training_texts(data, config.data))
    config = with_vocabulary(config, tokenizer)
    dataset = recipe.datasets(data, config, tokenizer).train
    load = dataset.loader(0)
    batches = [load(step) for step in range(args.steps)]
    np.savez(folder / "batches.npz", **{key: np.stack([batch[key] for batch in batches]) for key in batches[0]})

    model, mesh = build(config.model), sharding.make_mesh("", jax.devices()[:1])
    axes = model.logical_axes()
    schedule = make_schedule("cosine", PEAK[f"{name}/{optimizer}"], WARMUP, args.steps, final_share=0.1)
    if optimizer == "adamw":
        decay = {"weight_decay": WEIGHT_DECAY, "b1": B1, "b2": B2}
        tx = make_optimizer("adamw", schedule, axes, clip_norm=CLIP, **decay)
    else:
        unfactored = adafactor(schedule, stacked(axes), min_dim_size_to_factor=1)
        tx = optax.chain(optax.clip_by_global_norm(CLIP), unfactored)
    state = init_state(model, tx, mesh, seed=0)
    huggingface.save(jax.tree.map(np.asarray, state.params), config.model, folder / "initial")
    rates = [float(schedule(step)) for step in range(args.steps)]
    plan = {"model": name, "optimizer": optimizer, "rates": rates}
    (folder / "plan.json").write_text(json.dumps(plan))

    step = make_train_step(model, tx, schedule, mesh, state)
    losses = []
    for batch in batches:
        state, metrics = step(state, sharding.put_batch(mesh, batch))
        losses.append(float(metrics["loss"]))
    tokens = np.mean([batch["decoder_loss_weights"].sum() for batch in batches])
    about = {"parameters": sum(x.size for x in jax.tree.leaves(state.params)), "target_tokens": round(float(tokens))}
    return np.array(losses), about


def peer(folder: Path, threads: int) -> None:
    """Trains with torch and transformers on what `ours` left in `folder`, and leaves the losses there."""
    import torch
    import transformers
    from transformers.optimization import Adafactor

    torch.set_num_threads(threads)
    plan = json.loads((folder / "plan.json").read_text())
    batches = dict(np.load(folder / "batches.npz"))
    auto = transformers.AutoModelForCausalLM if plan["model"] == "gpt2" else transformers.AutoModelForSeq2SeqLM
    model = auto.from_pretrained(folder / "initial", dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()

    if plan["optimizer"] == "adamw":

        def decays(name: str, p: Any) -> bool:
            return p.ndim > 1 and "relative_attention_bias" not in name

        named = list(model.named_parameters())
        groups = [
            {"params": [p for name, p in named if decays(name, p)], "weight_decay": WEIGHT_DECAY},
            {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        ]
        optimizer: Any = torch.optim.AdamW(groups, lr=1.0, betas=(B1, B2), eps=1e-8)
    else:
        optimizer = Adafactor(model.parameters(), lr=1.0, scale_parameter=True, relative_step=False)

    losses = []
    for step, rate in enumerate(plan["rates"]):
        inputs = {
            key: torch.from_numpy(np.ascontiguousarray(value))
            for key, value in peer_inputs(plan["model"], {key: array[step] for key, array in batches.items()}).items()
        }
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (folder / "peer.json").write_text(json.dumps({"losses": losses, "versions": versions}))


def peer_inputs(model: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a batch as the peer's model takes it; it leaves out of its loss what is labelled -100."""
    targets = batch["decoder_target_tokens"].astype(np.int64)
    labels = np.where(batch["decoder_loss_weights"] > 0, targets, -100)
    if model == "gpt2":
        # The peer's own loss shifts the labels: each of its inputs is to predict the next, the last one nothing.
        first = batch["decoder_input_tokens"][:, :1].astype(np.int64)
        return {
            "input_ids": np.concatenate([first, targets], axis=1),
            "labels": np.concatenate([np.full_like(first, -100), labels], axis=1),
        }
    return {
        "input_ids": batch["encoder_input_tokens"].astype(np.int64),
        "attention_mask": (batch["encoder_segment_ids"] > 0).astype(np.int64),
        "decoder_input_ids": batch["decoder_input_tokens"].astype(np.int64),
        "labels": labels,
    }


if __name__ == "__main__":
    sys.exit(main())
