"""What a compiled training step needs of a device's memory: cross-entropy in chunks, and remat policies.

    python benchmarks/memory.py                      # of this machine's compiler
    python benchmarks/memory.py --topology v5e:2x2   # of the TPU compiler, without a TPU; needs `pip install libtpu`

A line of JSON per cell: a model's step with AdamW, without dropout, on one device; the first of a model is what the
others change. `temporary` is what the program holds besides its arguments and results; `arguments` are the parameters,
the optimizer's state and the batch, and all but the batch is `aliased` to results. In bytes, as the compiler has it
(`memory_analysis`). Nothing is allocated and nothing runs. That gradients stay the same is for
`tests/training/test_losses.py` and `tests/models/test_t5.py` to show.
"""

import argparse
import fnmatch
import json
import os
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

SHAPES = {"t5-base": (8, 512, 114), "gpt2": (8, 0, 1024)}  # rows, lengths of input and target
CHUNKS = {"t5-base": 19, "gpt2": 64}  # tokens of a row whose logits exist at a time, where not all do


@dataclass(frozen=True)
class Cell:
    """A step: its model, the dtype, whether logits come in chunks, and the remat policy."""

    model: str
    dtype: str
    chunked: bool
    remat: str

    @property
    def name(self) -> str:
        return f"{self.model}/{self.dtype}/{'chunked' if self.chunked else 'whole'}/{self.remat}"


def cells(dtype: str) -> list[Cell]:
    return [
        Cell(model, dtype, *rest)
        for model in SHAPES
        for rest in ((False, "none"), (True, "none"), (True, "minimal"), (True, "full"), (True, "offload"))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="", help="a TPU's, such as v5e:2x2; default: this machine's CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--cells", default="*", help="names or patterns with a *, separated by commas; default: all")
    args = parser.parse_args()
    dtype = args.dtype or ("bfloat16" if args.topology else "float32")
    chosen = [c for c in cells(dtype) if any(fnmatch.fnmatchcase(c.name, p) for p in args.cells.split(","))]
    if not chosen:
        parser.error(f"--cells '{args.cells}' is none of {', '.join(cell.name for cell in cells(dtype))}")
    device = _device(args.topology)
    for cell in chosen:
        print(json.dumps(measure(cell, device, args.topology)), flush=True)
    return 0


def _device(topology: str) -> Any:
    import jax

    if not topology:
        return jax.devices()[0]
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology, platform="tpu").devices[0]


def measure(cell: Cell, device: Any, topology: str) -> dict[str, Any]:
    """Compiles a step and returns its line."""
    import jax
    import jax.numpy as jnp
    import optax

    from t5x_lite import sharding
    from t5x_lite.models import build, preset
    from t5x_lite.training import step as steps
    from t5x_lite.training.losses import LossSettings
    from t5x_lite.training.optimizers import make_optimizer
    from t5x_lite.training.state import abstract_state

    rows, inputs, targets = SHAPES[cell.model]
    rates = {"dropout_rate": 0.0, "attention_dropout_rate": None, "mlp_dropout_rate": None}
    model = build(_replaced(preset(cell.model), rates), cell.dtype, cell.remat)
    mesh = sharding.make_mesh(devices=[device])
    tx = make_optimizer("adamw", 1e-4, model.logical_axes())
    state = abstract_state(model, tx, mesh)
    lengths = {"decoder_input_tokens": targets, "decoder_target_tokens": targets, "decoder_loss_weights": targets}
    if inputs:
        lengths["encoder_input_tokens"] = inputs
    batch = {
        name: jax.ShapeDtypeStruct(
            (rows, length),
            jnp.float32 if name.endswith("weights") else jnp.int32,
            sharding=sharding.batch_sharding(mesh, (rows, length)),
        )
        for name, length in lengths.items()
    }
    loss = LossSettings(chunk=CHUNKS[cell.model] if cell.chunked else 0)
    step = steps.make_train_step(model, tx, optax.constant_schedule(1e-4), mesh, state, loss=loss)
    started = time.perf_counter()
    memory = step.lower(state, batch).compile().memory_analysis()
    return {
        "benchmark": "memory",
        "cell": cell.name,
        "rows": rows,
        "input_length": inputs,
        "target_length": targets,
        "chunk": loss.chunk,
        "temporary": memory.temp_size_in_bytes,
        "host_temporary": memory.host_temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - started, 1),
        "device": device.device_kind,
        "topology": topology or None,
        "versions": {name: metadata.version(name) for name in ("t5x_lite", "jax", "jaxlib")},
    }


def _replaced(config: Any, changes: dict[str, Any]) -> Any:
    import dataclasses

    return dataclasses.replace(config, **changes)


if __name__ == "__main__":
    sys.exit(main())
