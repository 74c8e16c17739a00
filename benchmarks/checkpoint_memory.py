"""Host memory of saving and restoring checkpoints, and whether many saves let it grow.

Run it as `python benchmarks/checkpoint_memory.py`; it prints one JSON object a figure. The state is parameters and two
moments of them in float32, on the devices that there are. On a CPU the devices' memory is the host's: figures are what
a save or a restore takes beside the state, while a donated training step goes on. `resident` is what the operating
system counts, sampled every two milliseconds. Growth is from the sixth to tenth save, when every thread has come to
its own memory, to the last five: medians, as now and then buffers are freed a moment later.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_lite import sharding
from t5x_lite.training.checkpoint_files import read_numpy
from t5x_lite.training.checkpoints import Checkpointer
from t5x_lite.training.state import TrainState


def resident() -> float:
    """Returns the megabytes that this process has in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e3
    raise OSError("/proc/self/status has no VmRSS")


@contextmanager
def highest() -> Iterator[list[float]]:
    """Yields a list that holds, at the end, the most megabytes in memory inside of it."""
    peak, stop = [resident()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def make_state(megabytes: float) -> TrainState:
    """Returns a state of about this size, with matrices of very different sizes, as an embedding is among them."""
    mesh = sharding.make_mesh(f"fsdp:{len(jax.devices())}")
    rows = int(megabytes * 1e6 / 3 / 4 / 1024 / 8) * 8
    sizes = {"embedding": rows // 2 // 8 * 8, **{f"layer_{i}": rows // 16 // 8 * 8 for i in range(8)}}
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), sharding.replicated(mesh)

    def draw(seed: int) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        return {
            name: jax.device_put(rng.standard_normal((size, 1024), np.float32), split) for name, size in sizes.items()
        }

    step, skipped = (jax.device_put(jnp.int32(0), whole) for _ in range(2))
    return TrainState(step, draw(0), {"mu": draw(1), "nu": draw(2)}, skipped)


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=260.0, help="of the state (default 260)")
    parser.add_argument("--saves", type=int, default=50, help="how many in a row (default 50)")
    parser.add_argument("--out", help="where to save (default: a temporary directory)")
    args = parser.parse_args()
    out = Path(args.out or tempfile.mkdtemp(prefix="t5x_lite-checkpoints-"))

    state = make_state(args.megabytes)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    layouts = jax.tree.map(lambda x: x.sharding, state)

    def change(state: TrainState) -> TrainState:
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)

    train_step = jax.jit(change, donate_argnums=0, out_shardings=layouts)
    state = jax.block_until_ready(train_step(state))
    before = resident()
    checkpointer = Checkpointer(out, keep=2)
    after, seconds, blocked, processor = [], [], [], time.process_time()
    with highest() as peak:
        for _ in range(args.saves):
            began = time.perf_counter()
            checkpointer.save(state)
            blocked.append(time.perf_counter() - began)
            state = jax.block_until_ready(train_step(state))  # while the old one is written
            checkpointer.wait()
            seconds.append(time.perf_counter() - began)
            after.append(resident())
    figures = {
        "state_mb": size,
        "save_peak_over_state": (peak[0] - before) / size,
        "saves": args.saves,
        "resident_mb_after_the_first": after[0],
        "resident_mb_after_6_to_10": float(np.median(after[5:10])),
        "resident_mb_after_the_last_five": float(np.median(after[-5:])),
        "growth": float(np.median(after[-5:]) / np.median(after[5:10])) - 1,
        "training_blocked_s": float(np.median(blocked)),
        "saved_and_read_back_s": float(np.median(seconds)),
        "cpu_s_per_save": (time.process_time() - processor) / args.saves,
        "disk_over_state": sum(file.stat().st_size for file in out.glob("*/**/*") if file.is_file()) / 2e6 / size,
    }
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    del state
    before = resident()
    with highest() as peak:
        restored, _ = checkpointer.restore(abstract)
        jax.block_until_ready(restored)
    figures["restore_peak_over_state"] = (peak[0] - before) / size
    del restored
    before = resident()
    with highest() as peak:
        read_numpy(out / str(checkpointer.steps()[-1]))
    figures["numpy_peak_over_state"] = (peak[0] - before) / size
    for name, value in figures.items():
        print(json.dumps({"figure": name, "value": round(value, 4), "device": jax.devices()[0].device_kind}))
    if not args.out:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
