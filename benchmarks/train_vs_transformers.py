"""How fast t5x_lite trains beside transformers + torch on the same CPU, in pairs of steps that alternate.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0  # once, in its own environment
    python benchmarks/train_vs_transformers.py --peer-python peer/bin/python

Two processes, one for each library, hold the same shapes with random weights, an optimizer and a batch, and wait; this
one lets them make a step in turn, A B, B A, A B, ..., so that whatever else the machine does meets both. As in
`decode_vs_transformers.py`, every turn waits until the machine is idle, and the pairs that count are those during which
other processes used the least; `others_cores` tells how much. As the steps of a training follow each other, a turn is
two of them, and the second is the one that counts.

A line of JSON per cell: the median of the paired ratios (above 1: t5x_lite trains on more tokens per second), the least
and the greatest of them, the median tokens per second of each (of encoder and decoder), and the seconds of the
processor (`cpu_seconds`) that a step of each took. `matmul_share` is of what each library's own product of two float32
matrices of 2048 x 2048 reaches, measured in the same process right before: the operations of a step by formula (three
times those of the forward pass, attention counted whole, nothing for what is computed twice) over its time.

Both use the same cores, float32, the same batch sizes and lengths, no padding, AdamW with the same settings, and the
same dropout rate, each the way it does dropout: T5's is shared along the length in t5x_lite, as T5X has it, and not in
transformers. The peer runs in eager mode, with its default (fused) attention where it has one for the model. Ours has
what `t5x-lite train` gives a run on a CPU: memory in large pages, which `--large-pages=both` gives the peer too and
`--large-pages=neither` takes away, and logits in as many chunks as a device holds well. Our layers are written out, one
after the other, as torch runs them (`train.scan_layers=false`, not the default); `--layers=scanned` has a loop instead.
"""

import argparse
import fnmatch
import json
import os
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import decode_vs_transformers as pairs_of_runs
from decode_vs_transformers import add_large_pages, disturbed, environments, machine, machine_busy, wait_until_idle

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


@dataclass(frozen=True)
class Cell:
    """A comparison: shapes, rows, lengths, and the dropout rate."""

    model: str
    rows: int
    input_length: int
    target_length: int
    dropout: float

    @property
    def name(self) -> str:
        return f"{self.model}/dropout{self.dropout:g}"

    @property
    def tokens(self) -> int:
        return self.rows * (self.input_length + self.target_length)


CELLS = [
    Cell(model, rows, *lengths, dropout)
    for model, rows, lengths in (("t5-small", 8, (512, 114)), ("bart-base", 8, (512, 114)), ("gpt2", 4, (0, 512)))
    for dropout in (0.1, 0.0)
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="of an environment with torch and transformers")
    parser.add_argument("--cells", default="*", help="names or patterns with a *, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps that count for a cell (default 5)")
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds that a cell waits for idleness (default 120)"
    )
    parser.add_argument("--threads", type=int, default=2, help="cores that both use, in turn (default 2)")
    add_large_pages(parser)
    parser.add_argument("--layers", choices=("unrolled", "scanned"), default="unrolled", help="default: unrolled")
    parser.add_argument("--quick", action="store_true", help="one row of 16 tokens, 2 rounds: does it run?")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.worker:
        serve(WORKERS[args.worker](args))
        return 0
    if args.list:
        print("\n".join(cell.name for cell in CELLS))
        return 0
    patterns = args.cells.split(",")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(cell.name, pattern) for cell in CELLS):
            parser.error(f"--cells '{pattern}' is none of {', '.join(cell.name for cell in CELLS)}")
    if not (args.peer_python and Path(args.peer_python).is_file()):
        parser.error(f"--peer-python must be the interpreter of the peer's environment, not {args.peer_python}")
    if args.quick:
        args.rounds, args.patience = 2, 0.0
    ours_in, peer_in = environments(args.large_pages)
    ours = Process(sys.executable, "ours", args, ours_in)
    peer = Process(args.peer_python, "peer", args, peer_in)
    for cell in CELLS:
        if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns):
            print(json.dumps(compare(cell, ours, peer, args)), flush=True)
    return 0


class Process(pairs_of_runs.Process):
    """A library in a process of its own, which answers one line of JSON with another."""

    script, options = __file__, ("threads", "layers")


def compare(cell: Cell, ours: Process, peer: Process, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a cell and returns its line."""
    if args.quick:
        cell = Cell(cell.model, 1, min(cell.input_length, 16), 16, cell.dropout)
    processes = (ours, peer)
    ready = [process.ask("prepare", cell=vars(cell)) for process in processes]
    pairs: list[
        tuple[float, list[tuple[float, float]]]
    ] = []  # of the cores that others used; seconds, of the processor
    ends = time.monotonic() + args.patience
    while len(pairs) < args.rounds or (disturbed(pairs, args.rounds) and time.monotonic() < ends):
        steps, others = [(0.0, 0.0)] * 2, 0.0
        for side in (0, 1) if len(pairs) % 2 == 0 else (1, 0):
            wait_until_idle(ends)
            started, before = time.monotonic(), machine_busy() - processes[side].busy()
            steps[side] = tuple(processes[side].ask("step"))
            others = max(others, (machine_busy() - processes[side].busy() - before) / (time.monotonic() - started))
        pairs.append((others, steps))
    pairs = sorted(pairs, key=lambda pair: pair[0])[: args.rounds]
    ratios = [theirs[0] / mine[0] for _, (mine, theirs) in pairs]
    lines = {"benchmark": "train_vs_transformers", "cell": cell.name, **vars(cell), "rounds": args.rounds}
    lines |= {"large_pages": args.large_pages, "layers": args.layers}
    lines |= {"ratio": round(median(ratios), 3), "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3)}
    for side, name in enumerate(("", "other_")):
        seconds, cpu = (median(steps[side][index] for _, steps in pairs) for index in (0, 1))
        peak = ready[side]["matmul"]
        lines |= {
            f"{name}tokens_per_second": round(cell.tokens / seconds, 1),
            f"{name}cpu_seconds": round(cpu, 2),
            f"{name}matmul_gigaflops": round(peak / 1e9, 1),
            f"{name}matmul_share": round(ready[0]["operations"] / seconds / peak, 3),
            f"{name}parameters": ready[side]["parameters"],
        }
    for process in processes:
        process.ask("forget")
    lines["others_cores"] = round(pairs[-1][0], 2) if Path("/proc/stat").exists() else None
    return lines | {"machine": machine(args.threads), "versions": ours.versions | peer.versions}


def serve(library: Any) -> None:
    """Answers what comes on stdin, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    training: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        what, answer = message.pop("what"), None
        if what == "versions":
            answer = library.versions()
        elif what == "prepare":
            training, answer = library.prepare(Cell(**message["cell"]))
        elif what == "step":
            training()  # after a pause the host of a virtual machine has taken back the memory that was free
            started, busy = time.perf_counter(), time.process_time()
            training()
            answer = time.perf_counter() - started, time.process_time() - busy
        elif what == "forget":
            training = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def fastest(function: Any, times: int = 5) -> float:
    """Returns the seconds of the fastest of several calls, after one that does not count."""
    function()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


_SIDE = 2048  # of the matrices whose product is a library's peak


class Ours:
    """t5x_lite."""

    def __init__(self, args: argparse.Namespace):
        if hasattr(os, "sched_setaffinity"):  # XLA takes a thread for every core it may use
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        self.scan_layers = args.layers == "scanned"

    def versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("t5x_lite", "jax", "jaxlib")}

    def prepare(self, cell: Cell) -> tuple[Any, dict[str, Any]]:
        import dataclasses

        import jax
        import optax

        from t5x_lite.models import build, preset
        from t5x_lite.sharding import make_mesh, put_batch
        from t5x_lite.training.losses import LossSettings
        from t5x_lite.training.optimizers import make_optimizer
        from t5x_lite.training.state import init_state
        from t5x_lite.training.step import make_train_step

        rates = {"dropout_rate": cell.dropout, "attention_dropout_rate": None, "mlp_dropout_rate": None}
        published = preset(cell.model)
        if published.mlp_dropout_rate == 0.0:
            rates.pop("mlp_dropout_rate")  # the family has none there, and neither has the peer
        config = dataclasses.replace(published, **rates)
        model, mesh = build(config, scan_layers=self.scan_layers), make_mesh()
        tx = make_optimizer("adamw", LEARNING_RATE, model.logical_axes(), weight_decay=WEIGHT_DECAY)
        state = init_state(model, tx, mesh, seed=0)
        schedule, loss = optax.constant_schedule(LEARNING_RATE), LossSettings(chunk=None)
        step = make_train_step(model, tx, schedule, mesh, state, loss=loss)
        batch = random_batch(config.vocab_size, cell.rows, cell.input_length, cell.target_length)
        on_mesh = put_batch(mesh, batch)
        kept = [state]

        def train() -> None:
            kept[0] = jax.block_until_ready(step(kept[0], on_mesh))[0]

        matrix = jax.random.normal(jax.random.key(0), (_SIDE, _SIDE))
        product = jax.jit(lambda a: a @ a)
        peak = 2 * _SIDE**3 / fastest(lambda: product(matrix).block_until_ready())
        train()
        train()
        parameters = sum(leaf.size for leaf in jax.tree.leaves(kept[0].params))
        return train, {"matmul": peak, "operations": operations(config, cell), "parameters": parameters}


def random_batch(vocab_size: int, rows: int, input_length: int, target_length: int) -> dict[str, Any]:
    """Returns rows of random tokens without padding, as NumPy arrays."""
    import numpy as np

    rng = np.random.default_rng(0)

    def tokens(length: int) -> Any:
        return rng.integers(3, vocab_size - 300, (rows, length)).astype(np.int32)

    batch = {
        "decoder_input_tokens": tokens(target_length),
        "decoder_target_tokens": tokens(target_length),
        "decoder_loss_weights": np.ones((rows, target_length), np.float32),
    }
    if input_length:
        batch["encoder_input_tokens"] = tokens(input_length)
    return batch


def operations(config: Any, cell: Cell) -> float:
    """Returns the float operations of a step: three times those of the forward pass's products."""
    width, vocab = config.embed_dim, config.vocab_size
    inputs, targets = cell.rows * cell.input_length, cell.rows * cell.target_length

    def block(is_decoder: bool, tokens: int, length: int) -> float:
        joined = config.heads(is_decoder) * config.stack_head_dim(is_decoder)
        mlp = (3 if config.gated else 2) * width * config.stack_mlp_dim(is_decoder)
        return 2 * tokens * (4 * width * joined + mlp + 2 * length * joined)

    forward = config.num_encoder_layers * block(False, inputs, cell.input_length)
    joined = config.heads(True) * config.stack_head_dim(True)
    crossed = 2 * (2 * (inputs + targets) * width * joined + 2 * targets * cell.input_length * joined)
    layers = config.num_decoder_layers
    forward += layers * (block(True, targets, cell.target_length) + (crossed if cell.input_length else 0))
    return 3.0 * (forward + 2 * targets * width * vocab)


class Peer(pairs_of_runs.Peer):
    """transformers and torch."""

    def prepare(self, cell: Cell) -> tuple[Any, dict[str, Any]]:
        import torch

        model = self._build(cell)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        def tokens(length: int) -> Any:
            return torch.randint(3, model.config.vocab_size - 300, (cell.rows, length))

        labels = tokens(cell.target_length)
        inputs = tokens(cell.input_length) if cell.input_length else labels

        def train() -> None:
            loss = model(input_ids=inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        matrix = torch.randn(_SIDE, _SIDE)
        peak = 2 * _SIDE**3 / fastest(lambda: matrix @ matrix)
        train()
        train()
        return train, {"matmul": peak, "parameters": sum(p.numel() for p in model.parameters())}

    def _build(self, cell: Cell) -> Any:
        import transformers as hf

        rate = cell.dropout
        if cell.model == "gpt2":
            return hf.GPT2LMHeadModel(hf.GPT2Config(resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate))
        if cell.model == "bart-base":
            sizes = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6}
            sizes |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _BART}
            config = hf.BartConfig(**sizes, dropout=rate, attention_dropout=rate, activation_dropout=rate)
            return hf.BartForConditionalGeneration(config)
        sizes = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
        config = hf.T5Config(**sizes, feed_forward_proj="relu", decoder_start_token_id=0, dropout_rate=rate)
        return hf.T5ForConditionalGeneration(config)


_BART = (("ffn_dim", 3072), ("attention_heads", 12))

WORKERS = {"ours": Ours, "peer": Peer}

if __name__ == "__main__":
    sys.exit(main())
