"""How fast a token cache is built, beside the sentencepiece library alone: one JSON line a figure.

    python benchmarks/data.py --tokenizer spiece.model --text 'corpora/*.txt'

The texts are repeated to `--megabytes` and cut into records in two ways: each line is one, or 20 of them are (about as
long as a page of the web). What is timed is `build_cache` from the file to the complete cache: reading, tokenising,
hashing, writing, joining, and starting the processes. Beside it sentencepiece encodes the same records, which it finds
in memory, with one thread, and keeps nothing. Both take turns, A B, B A, ..., so that whatever else the machine does
meets both. A figure is the median of the paired ratios (above 1: the cache is built faster), with the least and the
greatest of them, and the median tokens per second of each. `cpu_ratio` is the same of the processor time that both
took, on all cores; other work on the machine hardly touches it.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import sentencepiece

from t5x_lite.data.encoders import TextEncoder
from t5x_lite.data.sources import open_source, read_records
from t5x_lite.data.token_cache import build_cache
from t5x_lite.data.tokenizers import load_tokenizer

LINES_OF_A_DOCUMENT = 20


@dataclass(frozen=True)
class Cell:
    """How long the records are, how many processes work, and whether each of them has one thread only."""

    records: str
    workers: int
    one_thread: bool = False

    @property
    def name(self) -> str:
        return f"cache/{self.records}/{'1 thread' if self.one_thread else self.workers}"


CELLS = [
    Cell(records, workers, one_thread)
    for records in ("lines", "documents")
    for workers, one_thread in ((1, True), (1, False), (2, False))
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece .model file, such as T5's")
    parser.add_argument("--text", required=True, help="text files, as data.path")
    parser.add_argument("--megabytes", type=int, default=64, help="of text to build a cache of (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs for a figure (default 5)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 megabytes: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.megabytes, args.rounds = 2, 2
    if min(args.megabytes, args.rounds) < 1:
        parser.error("--megabytes and --rounds must be at least 1")
    lines = [record["text"] for record in read_records(args.text, ("text",))]
    with tempfile.TemporaryDirectory() as folder:
        for records in ("lines", "documents"):
            file = Path(folder) / f"{records}.txt"
            texts = write(lines, 1 if records == "lines" else LINES_OF_A_DOCUMENT, args.megabytes * 10**6, file)
            for cell in CELLS:
                if cell.records == records:
                    print(json.dumps(compare(cell, texts, file, args)), flush=True)
    return 0


def write(lines: list[str], joined: int, size: int, file: Path) -> list[str]:
    """Writes records until the file has that size; returns them."""
    once = [" ".join(lines[start : start + joined]) for start in range(0, len(lines), joined)]
    texts: list[str] = []
    written = 0
    with file.open("w", encoding="utf-8") as out:
        while written < size:
            for text in once:
                written += out.write(text + "\n")
                texts.append(text)
    return texts


def compare(cell: Cell, texts: list[str], file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a cell and returns its line."""
    tokenizer = load_tokenizer(args.tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=args.tokenizer)
    # Small enough that the processes end at about the same time.
    source = open_source(str(file), part_bytes=max(file.stat().st_size // 16, 2**16))
    root = file.with_name("caches")
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if cell.one_thread else "true"

    def build() -> int:
        return len(build_cache(source, TextEncoder(tokenizer), root, workers=cell.workers).features["tokens"].flat)

    def encode() -> int:
        chunks = (texts[start : start + 1000] for start in range(0, len(texts), 1000))
        return sum(len(ids) for chunk in chunks for ids in processor.encode(chunk, num_threads=1))

    times: tuple[list[tuple[float, float]], ...] = ([], [])
    counts = set()
    for number in range(args.rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            shutil.rmtree(root, ignore_errors=True)
            count, *seconds = timed((build, encode)[side])
            times[side].append((seconds[0], seconds[1]))
            counts.add(count)
    assert len(counts) == 1, counts  # both made the same tokens
    ratios, cpu_ratios = (sorted(other[n] / mine[n] for mine, other in zip(*times, strict=True)) for n in (0, 1))
    mine, other = (count / median(wall for wall, _ in side) for side in times)
    return {
        "benchmark": "data",
        "cell": cell.name,
        "tokens": count,
        "records": len(texts),
        "rounds": args.rounds,
        "ratio": round(median(ratios), 3),
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "cpu_ratio": round(median(cpu_ratios), 3),
        "tokens_per_second": round(mine),
        "other_tokens_per_second": round(other),
        "other": "sentencepiece, 1 thread",
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("t5x_lite", "sentencepiece", "numpy")},
    }


def timed(run: Callable[[], int]) -> tuple[int, float, float]:
    """Returns what `run` does, the seconds that it takes, and the processor's seconds on all cores."""
    started, spent = time.perf_counter(), processor_seconds()
    result = run()
    return result, time.perf_counter() - started, processor_seconds() - spent


def processor_seconds() -> float:
    """Returns the processor time of this process and of those that it has started and that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def machine() -> dict[str, Any]:
    """Returns what the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
    }


if __name__ == "__main__":
    sys.exit(main())
