"""How fast t5x_lite generates beside transformers + torch on the same CPU or GPU, in pairs of runs that alternate.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0  # once, in its own environment
    python benchmarks/decode_vs_transformers.py --peer-python peer/bin/python
    python benchmarks/decode_vs_transformers.py --peer-python peer/bin/python --device gpu

Two processes, one for each library, hold the same shapes with random weights and wait; this one lets them generate in
turn, A B, B A, A B, ..., so that whatever else the machine does meets both. It does not slow both alike, though: torch
waits at a barrier after every product, so where other processes want the cores it loses several times more than
t5x_lite: with two cores and five processes that want them, 10 times instead of 2 was seen. So every run waits until
the machine is idle, and the pairs that count are those during which other processes used the least, which
`others_cores` tells: the cores they took, on average, in the worst of those pairs. Without /proc it is null. A turn is
two calls, of which the second counts: while the other library had its turn, the host of a virtual machine may have
taken back memory, and the first call waits for it.

A line of JSON per cell: the median of the paired ratios (above 1: t5x_lite generates more tokens per second), the least
and the greatest of them, and the median tokens per second of each, B * N / time of the whole call, reading the input
included. Beams count once.

Both use the same cores, float32, a cache, and as many steps. The peer runs in eager mode at its best:
`torch.inference_mode`, its default (fused) attention, and no end token, so that nothing is checked for one. Ours has
what `t5x-lite generate` gives itself on a CPU, memory in large pages, which `--large-pages=both` gives the peer too and
`--large-pages=neither` takes away. Cells whose name ends in bfloat16 compare t5x_lite with bfloat16 weights to itself
in float32. `roofline_share` is of t5x_lite's tokens per second; see `t5x_lite/benchmarking.py`.

On a GPU both compute in bfloat16, a decoder of 1.2 billion parameters beside the others. The peer then has a static
cache and, for greedy decoding, `generate`'s own `torch.compile`, for this shape alone and into CUDA graphs (it compiles
no beam search); where its eager mode is faster, or compiling fails, that is what counts: `other` tells.
"""

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

SHAPES = ("t5-small", "gpt2")
LARGE = "llama-3.2-1b"


@dataclass(frozen=True)
class Cell:
    """A comparison: shapes, strategy, batch size, and whether it is with bfloat16 weights to float32 or to the peer."""

    model: str
    strategy: str
    batch_size: int
    bfloat16: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}/{self.strategy}/{self.batch_size}" + ("/bfloat16" if self.bfloat16 else "")


_BOTH = [Cell(model, how, rows) for model in SHAPES for how in ("greedy", "beam4") for rows in (1, 8)]
CELLS = {
    "cpu": [*_BOTH, *(Cell(model, "greedy", 1, bfloat16=True) for model in SHAPES)],
    "gpu": [*_BOTH, Cell(LARGE, "greedy", 1)],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer-python", help="of an environment with torch and transformers; cells of ours alone need none"
    )
    parser.add_argument("--device", choices=tuple(CELLS), default="cpu", help="of both (default cpu)")
    parser.add_argument("--cells", default="*", help="names or patterns with a *, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs that count for a cell (default 7)")
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds that a cell waits for idleness (default 60)"
    )
    parser.add_argument("--input-length", type=int, default=128, help="tokens of an input or prompt (default 128)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--threads", type=int, default=2, help="cores that both use, in turn (default 2)")
    add_large_pages(parser)
    parser.add_argument("--quick", action="store_true", help="2 rounds, 16 tokens read and 8 generated: does it run?")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.input_length, args.new_tokens = 2, 16, 8
    for name in ("rounds", "input_length", "new_tokens", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.input_length + args.new_tokens > 1024:
        parser.error(f"--input-length and --new-tokens together must be at most 1024, the positions of {SHAPES[1]}")
    if args.worker:
        serve(WORKERS[args.worker](args))
        return 0
    known = CELLS[args.device]
    if args.list:
        print("\n".join(cell.name for cell in known))
        return 0
    patterns = args.cells.split(",")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(cell.name, pattern) for cell in known):
            parser.error(f"--cells '{pattern}' is none of {', '.join(cell.name for cell in known)}")
    cells = [cell for cell in known if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns)]
    with_peer = not all(cell.bfloat16 for cell in cells)
    if with_peer and not (args.peer_python and Path(args.peer_python).is_file()):
        parser.error(f"--peer-python must be the interpreter of the peer's environment, not {args.peer_python}")
    ours_in, peer_in = environments(args.large_pages)
    ours = Process(sys.executable, "ours", args, ours_in)
    peer = Process(args.peer_python, "peer", args, peer_in) if with_peer else None
    for cell in cells:
        print(json.dumps(compare(cell, ours, ours if cell.bfloat16 else peer, args)), flush=True)
    return 0


def add_large_pages(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--large-pages`, of which `environments` makes something."""
    choices = ("ours", "both", "neither")
    parser.add_argument("--large-pages", choices=choices, default="ours", help="whose memory is in them; default: ours")


def environments(choice: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the variables that give large pages, or do not, to the process of ours and to that of the peer."""
    from t5x_lite import large_pages  # which the peer's environment has not

    pages = large_pages.environment()
    return pages if choice != "neither" else {}, pages if choice == "both" else {}


def compare(cell: Cell, ours: "Process", other: "Process | None", args: argparse.Namespace) -> dict[str, Any]:
    """Runs a cell and returns its line."""
    assert other is not None
    shape = {"model": cell.model, "strategy": cell.strategy, "batch_size": cell.batch_size}
    other_dtype = "bfloat16" if args.device == "gpu" else "float32"
    sides = [
        (ours, ours.ask("prepare", **shape, dtype="bfloat16" if cell.bfloat16 else other_dtype)),
        (other, other.ask("prepare", **shape, dtype=other_dtype)),
    ]
    pairs: list[tuple[float, list[float]]] = []  # of the cores that others used, and the times
    ends = time.monotonic() + args.patience
    while len(pairs) < args.rounds or (disturbed(pairs, args.rounds) and time.monotonic() < ends):
        seconds, others = [0.0, 0.0], 0.0
        for side in (0, 1) if len(pairs) % 2 == 0 else (1, 0):
            process, key = sides[side]
            wait_until_idle(ends)
            started, before = time.monotonic(), machine_busy() - process.busy()
            seconds[side] = process.ask("run", key=key)
            others = max(others, (machine_busy() - process.busy() - before) / (time.monotonic() - started))
        pairs.append((others, seconds))
    pairs = sorted(pairs, key=lambda pair: pair[0])[: args.rounds]
    times = list(zip(*(seconds for _, seconds in pairs), strict=True))
    tokens = cell.batch_size * args.new_tokens
    ratios = [theirs / mine for mine, theirs in zip(*times, strict=True)]
    mine, theirs = (tokens / median(seconds) for seconds in times)
    report, other_report = (process.ask("report", key=key, seconds=median(times[0])) for process, key in sides)
    for process, key in sides:
        process.ask("forget", key=key)
    return {
        "benchmark": "decode_vs_transformers",
        "cell": cell.name,
        "input_length": args.input_length,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "large_pages": args.large_pages,
        "ratio": round(median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "tokens_per_second": round(mine, 2),
        "other_tokens_per_second": round(theirs, 2),
        "other": "t5x_lite float32" if cell.bfloat16 else f"transformers, {other_report['settings']}",
        "others_cores": round(pairs[-1][0], 2) if Path(_STAT).exists() else None,
        **{key: report[key] for key in ("compile_seconds", "step_bytes", "copy_bytes_per_second", "roofline_share")},
        "dtype": report["dtype"],
        "device": report["device"],
        "machine": machine(args.threads),
        "versions": ours.versions | other.versions,
    }


_STAT = "/proc/stat"
_IDLE = 0.1  # cores: as much as a machine that does nothing else takes now and then


def disturbed(pairs: Sequence[tuple[float, Any]], rounds: int) -> bool:
    return sorted(others for others, _ in pairs)[rounds - 1] > _IDLE


def machine_busy() -> float:
    """Returns the seconds that all cores were busy since the machine started; 0 where nothing tells."""
    if not Path(_STAT).exists():
        return 0.0
    ticks = [int(number) for number in Path(_STAT).read_text().splitlines()[0].split()[1:]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk


def wait_until_idle(ends: float) -> None:
    while Path(_STAT).exists() and time.monotonic() < ends:
        before = machine_busy()
        time.sleep(0.2)
        if machine_busy() - before <= 0.2 * 2 * _IDLE:
            return


def machine(threads: int) -> dict[str, Any]:
    """Returns what the numbers were measured on."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


class Process:
    """A library in a process of its own, which answers one line of JSON with another."""

    script, options = __file__, ("device", "input_length", "new_tokens", "threads")

    def __init__(self, python: str, worker: str, args: argparse.Namespace, environment: Mapping[str, str]):
        words = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in self.options]
        alone = {"HF_HUB_OFFLINE": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if getattr(args, "device", "cpu") == "cpu":
            alone |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._worker = worker
        self._process = subprocess.Popen(
            [python, self.script, "--worker", worker, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | alone | dict(environment),
        )
        self.versions = self.ask("versions")

    def busy(self) -> float:
        """Returns the seconds of a core that it has used; 0 where nothing tells."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return 0.0
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # its own and the system's for it

    def ask(self, what: str, **arguments: Any) -> Any:
        """Returns the answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"what": what, **arguments}) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            sys.exit(f"the process of {self._worker} has ended; what it said last is above")
        return json.loads(answer)


def serve(library: Any) -> None:
    """Answers what comes on stdin, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    prepared: dict[int, Any] = {}
    for line in sys.stdin:
        message = json.loads(line)
        what, key = message.pop("what"), message.pop("key", None)
        answer: Any = None
        if what == "versions":
            answer = library.versions()
        elif what == "prepare":
            answer = max(prepared, default=0) + 1
            prepared[answer] = library.prepare(**message)
        elif what == "run":
            prepared[key].seconds()
            answer = prepared[key].seconds()
        elif what == "report":
            answer = library.report(prepared[key], **message)
        elif what == "forget":
            del prepared[key]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Ours:
    """t5x_lite."""

    def __init__(self, args: argparse.Namespace):
        if hasattr(os, "sched_setaffinity"):  # XLA takes a thread for every core it may use
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        import jax

        from t5x_lite import benchmarking

        if args.device == "gpu" and jax.default_backend() != "gpu":
            sys.exit("--device gpu: JAX finds none")
        self._library, self._args, self._models, self._bandwidth = benchmarking, args, {}, None

    def versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("t5x_lite", "jax", "jaxlib")}

    def report(self, decoding: Any, seconds: float) -> dict[str, Any]:
        import jax

        device = jax.devices()[0]
        if self._bandwidth is None or device.platform == "cpu":  # that of a host is what others leave of it
            self._bandwidth = self._library.copy_bandwidth([device])
        return {"device": device.device_kind, **decoding.report(seconds, self._bandwidth)}

    def prepare(self, model: str, strategy: str, batch_size: int, dtype: str) -> Any:
        cell = self._library.Cell(strategy, batch_size, self._args.input_length, self._args.new_tokens)
        if (model, dtype) not in self._models:
            self._models[model, dtype] = self._library.open_model(model, dtype)
        return self._library.Decoding(self._models[model, dtype], cell)


class Peer:
    """transformers and torch."""

    def __init__(self, args: argparse.Namespace):
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        transformers.logging.set_verbosity_error()
        self._args, self._models = args, {}

    def versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("torch", "transformers")}

    def report(self, decoding: "PeerDecoding", seconds: float) -> dict[str, Any]:
        return {"settings": decoding.settings}

    def prepare(self, model: str, strategy: str, batch_size: int, dtype: str) -> Any:
        import torch

        on_gpu = self._args.device == "gpu"
        if model not in self._models:
            with torch.device("cuda" if on_gpu else "cpu"):
                self._models[model] = self._build(model).to(getattr(torch, dtype))
        beams = 1 if strategy == "greedy" else int(strategy.removeprefix("beam"))
        choices = (_COMPILED if beams == 1 else _STATIC, _EAGER) if on_gpu else (_EAGER,)
        made = [PeerDecoding(self._models[model], beams, batch_size, self._args, choice) for choice in choices]
        return min(made, key=lambda decoding: decoding.fastest)

    def _build(self, name: str) -> Any:
        import transformers as hf

        if name == "gpt2":
            model = hf.GPT2LMHeadModel(hf.GPT2Config())
        elif name == LARGE:
            sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
            heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, max_position_embeddings=4096))
        else:
            sizes = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
            config = hf.T5Config(**sizes, feed_forward_proj="relu", decoder_start_token_id=0)
            model = hf.T5ForConditionalGeneration(config)
        model.eval()
        model.generation_config.eos_token_id = None  # nothing ends early, and nothing looks for an end
        model.generation_config.pad_token_id = 0
        return model


_EAGER, _STATIC, _COMPILED = "eager", "static cache", "static cache and torch.compile"


class PeerDecoding:
    """A cell of the peer, ready to be timed.

    Attributes:
      settings: eager, with a static cache, or with that and a forward pass that `torch.compile` made.
      fastest: seconds of the faster of two calls, those that compile not counted; infinite if one fails.
    """

    def __init__(self, model: Any, beams: int, batch_size: int, args: argparse.Namespace, settings: str):
        import torch
        from transformers import CompileConfig

        self._model, self._beams, self._new_tokens, self.settings = model, beams, args.new_tokens, settings
        self._tokens = torch.randint(2, model.config.vocab_size, (batch_size, args.input_length), device=model.device)
        self._mask = torch.ones_like(self._tokens)
        self._options: dict[str, Any] = {}
        if settings != _EAGER:
            self._options["cache_implementation"] = "static"
        if settings == _COMPILED:
            torch._dynamo.reset()  # or it would count the shapes seen before, and stop compiling after a few
            model.__dict__.pop("_compiled_call", None)
            self._options["compile_config"] = CompileConfig(mode="reduce-overhead", dynamic=False)
        try:
            for _ in range(2 if settings == _COMPILED else 0):  # it compiles, and records
                self.seconds()
            self.fastest = min(self.seconds() for _ in range(2))
        except Exception as error:
            if settings == _EAGER:
                raise
            print(f"{settings}: {error}", file=sys.stderr)
            self.fastest = float("inf")

    def seconds(self) -> float:
        """Generates once and returns how long it took."""
        import torch

        started = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                self._tokens,
                attention_mask=self._mask,
                do_sample=False,
                num_beams=self._beams,
                max_new_tokens=self._new_tokens,
                use_cache=True,
                **self._options,
            )
        if self._tokens.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        read = 1 if self._model.config.is_encoder_decoder else self._tokens.shape[1]
        assert out.shape == (len(self._tokens), read + self._new_tokens), out.shape
        return seconds


WORKERS = {"ours": Ours, "peer": Peer}

if __name__ == "__main__":
    sys.exit(main())
