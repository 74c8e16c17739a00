"""How much of a device's peak a training step reaches: model FLOPs utilization (MFU) of T5 and GPT.

    python benchmarks/train_mfu.py                                  # all cells, on the first device that JAX finds
    python benchmarks/train_mfu.py --cells=gpt3-1.3b --rows=16 --remat=minimal
    python benchmarks/train_mfu.py --quick                          # does it run? tiny models, also on a CPU

A cell is a published model with fresh float32 parameters, computing in `--dtype`, and the step that `t5x-lite train`
compiles: both passes, the optimizer, and the norms and checks of each step; nothing is clipped. The batch is random
tokens without padding, which stay on the device, so that no reading is measured; dropout is 0, as in the pre-training
of T5 1.1 and GPT-3. Logits come in as many chunks as a device holds well, unless `--loss-chunk` says how many tokens of
each row have theirs at a time. Layers are written out one after the other (`train.scan_layers=false`, which is not the
default of a run); `--layers=scanned` has a loop instead, which compiles sooner and copies what each layer keeps.

A line of JSON per cell. After 3 steps that do not count, `--steps` follow each other, and what one of them took, until
the last has ended, is `seconds_per_step`; then as many are waited for one by one, and `median_seconds` is the median of
those. `model_flops` are a step's by the formula of `t5x_lite/training/flops.py` (3 x forward, nothing for what is
computed twice, causal attention in full), and `mfu` is their share, by `seconds_per_step`, of the published dense peak
of the device for that dtype; `mfu_halved` counts half of the causal attention. Both are null where no peak is
published, as of a CPU. `compiled_bytes` is what the compiled step holds at most by its own estimate, `peak_bytes` what
the device's allocator has given out at most, in this and in earlier cells. `xla_flops`, with `--xla-flops`, is XLA's
count.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from statistics import median
from typing import Any

from train_vs_transformers import random_batch

LEARNING_RATE, WARM_UP = 1e-4, 3


@dataclass(frozen=True)
class Cell:
    """A published model with rows of these lengths; by the compiler's estimate they fit 80 GB without recomputation."""

    name: str
    rows: int
    input_length: int
    target_length: int
    optimizer: str


CELLS = [
    Cell("t5-v1.1-base", 128, 512, 114, "adafactor"),
    Cell("t5-v1.1-large", 64, 512, 114, "adafactor"),
    Cell("gpt3-1.3b", 12, 0, 2048, "adamw"),
]
QUICK = {"vocab_size": 512, "embed_dim": 64, "num_heads": 2, "head_dim": 32, "mlp_dim": 128}


def main() -> int:
    names = [cell.name for cell in CELLS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=",".join(names), help="names, separated by commas; default: all")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed (default 10)")
    parser.add_argument("--rows", type=int, help="rows of the batch; default: each cell's own")
    parser.add_argument("--remat", default="none", help="what the backward pass recomputes, see train.remat")
    parser.add_argument("--layers", choices=("scanned", "unrolled"), default="unrolled", help="default: unrolled")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation (default bfloat16)")
    parser.add_argument("--optimizer", help="default: adafactor for T5, adamw for GPT")
    parser.add_argument("--loss-chunk", type=int, help="tokens of each row with logits at a time, 0: all")
    parser.add_argument("--xla-flops", action="store_true", help="XLA's count as well, which traces the step once more")
    parser.add_argument("--quick", action="store_true", help="tiny models, 2 rows of 16 tokens, 2 steps")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    args = parser.parse_args()
    if args.list:
        print("\n".join(names))
        return 0
    for name in ("steps", "rows"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    wanted = args.cells.split(",")
    for name in wanted:
        if name not in names:
            parser.error(f"--cells '{name}' is none of {', '.join(names)}")
    if args.quick:
        args.steps = min(args.steps, 2)

    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU's memory; JAX takes three quarters
    import jax

    from t5x_lite.errors import InputError

    for cell in CELLS:
        if cell.name in wanted:
            cell = dataclasses.replace(cell, rows=args.rows or cell.rows, optimizer=args.optimizer or cell.optimizer)
            if args.quick:
                lengths = {"input_length": min(cell.input_length, 16), "target_length": 16}
                cell = dataclasses.replace(cell, rows=args.rows or 2, **lengths)
            try:
                line = measure(cell, args, jax.devices()[:1])
            except InputError as error:
                parser.error(str(error))
            print(json.dumps(line), flush=True)
    return 0


@dataclass(frozen=True)
class Step:
    """A training step and what it takes.

    Attributes:
      model: the model.
      tx: its optimizer.
      mesh: of one device.
      abstract: the state, as shapes and layouts.
      function: `(state, batch) -> (state, metrics)`.
    """

    model: Any
    tx: Any
    mesh: Any
    abstract: Any
    function: Any


def make_step(cell: Cell, args: argparse.Namespace, devices: Sequence[Any]) -> Step:
    """Returns the step of a cell for these devices, not yet compiled."""
    import optax

    from t5x_lite.models import build, preset
    from t5x_lite.sharding import make_mesh
    from t5x_lite.training.losses import LossSettings
    from t5x_lite.training.optimizers import make_optimizer
    from t5x_lite.training.state import abstract_state
    from t5x_lite.training.step import make_train_step

    none: dict[str, Any] = {"dropout_rate": 0.0, "attention_dropout_rate": None, "mlp_dropout_rate": None}
    config = dataclasses.replace(preset(cell.name), **none)
    if args.quick:
        layers = {
            f"num_{stack}_layers": min(getattr(config, f"num_{stack}_layers"), 2) for stack in ("encoder", "decoder")
        }
        config = dataclasses.replace(config, **QUICK, **layers, eos_id=1, bos_id=None, decoder_start_id=0)
    model = build(config, args.dtype, args.remat, scan_layers=args.layers == "scanned")
    mesh = make_mesh("data:1", devices)
    tx = make_optimizer(cell.optimizer, LEARNING_RATE, model.logical_axes())
    abstract, schedule = abstract_state(model, tx, mesh), optax.constant_schedule(LEARNING_RATE)
    loss = LossSettings(chunk=args.loss_chunk)
    return Step(model, tx, mesh, abstract, make_train_step(model, tx, schedule, mesh, abstract, loss=loss))


def measure(cell: Cell, args: argparse.Namespace, devices: Sequence[Any]) -> dict[str, Any]:
    """Compiles the step of a cell, runs it and returns the cell's line."""
    import jax

    from t5x_lite.benchmarking import peak_bytes
    from t5x_lite.sharding import put_batch
    from t5x_lite.training.flops import CONVENTION, peak_flops, training_flops, xla_flops
    from t5x_lite.training.state import init_state

    step = make_step(cell, args, devices)
    state = init_state(step.model, step.tx, step.mesh, seed=0)
    config = step.model.config
    batch = random_batch(config.vocab_size, cell.rows, cell.input_length, cell.target_length)
    on_device = put_batch(step.mesh, batch)
    started = time.perf_counter()
    compiled = step.function.lower(state, on_device).compile()
    compile_seconds = time.perf_counter() - started
    metrics: Any = None
    for _ in range(WARM_UP):
        state, metrics = compiled(state, on_device)
    jax.block_until_ready(state)
    started = time.perf_counter()
    for _ in range(args.steps):
        state, metrics = compiled(state, on_device)
    jax.block_until_ready((state, metrics))
    seconds = (time.perf_counter() - started) / args.steps
    each = []
    for _ in range(args.steps):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, on_device))
        each.append(time.perf_counter() - started)
    numbers = metrics.fetch()
    flops, halved = (training_flops(config, batch, causal) for causal in ("full", "halved"))
    peak = peak_flops(devices[0].device_kind, args.dtype)
    stats = devices[0].memory_stats() or {}
    line = {"benchmark": "train_mfu", "cell": cell.name, "rows": cell.rows, "input_length": cell.input_length}
    line |= {"target_length": cell.target_length, "device": devices[0].device_kind, "dtype": args.dtype}
    line |= {"optimizer": cell.optimizer, "remat": args.remat, "layers": args.layers, "loss_chunk": args.loss_chunk}
    line |= {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "steps": args.steps,
        "seconds_per_step": round(seconds, 5),
        "median_seconds": round(median(each), 5),
        "sequences_per_second": round(cell.rows / seconds, 2),
        "tokens_per_second": round(cell.rows * (cell.input_length + cell.target_length) / seconds, 1),
        "model_flops": flops,
        "convention": CONVENTION,
        "peak_flops": peak,
        "mfu": None if peak is None else round(flops / seconds / peak, 4),
        "mfu_halved": None if peak is None else round(halved / seconds / peak, 4),
        "compiled_bytes": peak_bytes(compiled),
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "compile_seconds": round(compile_seconds, 1),
        "loss": round(numbers["loss"], 4),
        "skipped": int(numbers["skipped"]),
    }
    if args.xla_flops:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (step.abstract, on_device))
        line["xla_flops"] = xla_flops(step.function.function, *shapes)
    return line | {
        "quick": args.quick,
        "versions": {name: metadata.version(name) for name in ("t5x_lite", "jax", "jaxlib")},
    }


if __name__ == "__main__":
    sys.exit(main())
