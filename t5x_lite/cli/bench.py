"""`t5x-lite bench`: how fast a model generates here, and how fast it could; how fast its data is made."""

import argparse
import json
from itertools import product
from pathlib import Path

from t5x_lite.cli import bench_data
from t5x_lite.errors import InputError, nearest

_EPILOG = """Presets have random weights. No row ends early, and the time of a run includes reading the input. The
roofline is what memory would allow: the bytes that a step must read (weights of decoder and head, caches as full as
they are on average) at the speed of a copy, which is measured first and counts bytes read and bytes written."""

# Title of a column: key of the report, width, format, and what the number is divided by.
_COLUMNS = {
    "strategy": ("strategy", 8, "", 0),
    "batch": ("batch_size", 5, "d", 1),
    "tokens/s": ("tokens_per_second", 9, ",.1f", 1),
    "ms/token": ("ms_per_token", 8, ".2f", 1),
    "compile s": ("compile_seconds", 9, ".1f", 1),
    "weights MB": ("weights_bytes", 10, ",.1f", 1e6),
    "cache MB": ("cache_bytes", 8, ",.1f", 1e6),
    "peak MB": ("peak_bytes", 8, ",.1f", 1e6),
    "step MB": ("step_bytes", 8, ",.1f", 1e6),
    "roofline": ("roofline_tokens_per_second", 9, ",.1f", 1),
    "reached": ("roofline_share", 7, ".0%", 1),
}


def add_arguments(parser: argparse.ArgumentParser, action: str) -> None:
    """Declares the arguments of `decode`, or of `data`."""
    if action == "data":
        bench_data.add_arguments(parser)
        return
    parser.epilog = _EPILOG
    parser.add_argument(
        "models",
        nargs="*",
        default=["t5-small"],
        metavar="MODEL",
        help="presets, runs, checkpoints or Hugging Face directories (default t5-small)",
    )
    parser.add_argument("--batch-size", default="1,8", help="examples decoded together, a list (default 1,8)")
    parser.add_argument("--input-length", type=int, default=128, help="tokens of an input or prompt (default 128)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument(
        "--strategies",
        default="greedy,beam4,sample",
        help="greedy, sample, beam2, ... (default greedy,beam4,sample)",
    )
    parser.add_argument(
        "--dtype", default="float32", help="of everything: float32, bfloat16 or float16 (default float32)"
    )
    parser.add_argument("--mesh", default="", help="such as model:8; default: one device")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the median counts (default 5)")
    parser.add_argument("--json", action="store_true", help="print an object a line")


def run(args: argparse.Namespace) -> int:
    """Measures every model, strategy and batch size, and prints each as soon as it is there; or the data."""
    if args.action == "data":
        return bench_data.run(args)
    sizes = _sizes(args.batch_size)
    if args.repeats < 1:
        raise InputError(f"--repeats must be at least 1, not {args.repeats}")

    from t5x_lite.benchmarking import Cell, copy_bandwidth, measure, open_model
    from t5x_lite.models.registry import PRESETS

    cells = [Cell(s, b, args.input_length, args.new_tokens) for s, b in product(args.strategies.split(","), sizes)]
    for name in args.models:  # all of them, before the first is measured
        if name in PRESETS:
            for cell in cells:
                cell.check(PRESETS[name])
        elif not Path(name).is_dir():
            raise InputError(f"there is no preset and no directory '{name}'{nearest(name, PRESETS)}")
    for name in args.models:
        lm = open_model(name, args.dtype, args.mesh)
        for cell in cells:
            cell.check(lm.config)
        devices = list(lm.mesh.devices.flat)
        bandwidth = copy_bandwidth(devices)
        if not args.json:
            print(
                f"{name}: {args.dtype}, {args.input_length} tokens read and {args.new_tokens} generated on"
                f" {len(devices)} x {devices[0].device_kind}, copies {bandwidth / 1e9:.1f} GB/s read + written"
            )
            print("  ".join(f"{title:>{width}}" for title, (_, width, _, _) in _COLUMNS.items()))
        for cell in cells:
            report = {"model": name, "device": devices[0].device_kind, **measure(lm, cell, args.repeats, bandwidth)}
            print(json.dumps(report) if args.json else _row(report), flush=True)
    return 0


def _row(report: dict) -> str:
    values = ((report[key], *rest) for key, *rest in _COLUMNS.values())
    return "  ".join(f"{value / unit if unit > 1 else value:>{width}{form}}" for value, width, form, unit in values)


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise InputError(f"--batch-size must be whole numbers such as 1,8, not '{text}'") from None
