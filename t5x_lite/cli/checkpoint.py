"""`t5x-lite checkpoint`: which checkpoints a run has, whether they are sound, and how two of them differ."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from t5x_lite.config import TrainConfig, resolve
from t5x_lite.errors import InputError
from t5x_lite.run_directory import UNREADABLE, complete_steps
from t5x_lite.training import checkpoint_inspection as inspection
from t5x_lite.training.checkpoint_files import find_checkpoint
from t5x_lite.training.integrity import UnreadableCheckpoint

_COLUMNS = ("array", "shape", "dtype", "differ", "largest", "at", "relative", "norm of a", "of b")
_ARRAYS_SHOWN = 5  # of those that a damaged file has taken with it


def add_arguments(parser: argparse.ArgumentParser, action: str) -> None:
    """Declares the arguments of `list`, `verify` and `diff`."""
    if action == "list":
        parser.add_argument("run", metavar="RUN", help="a run directory")
    elif action == "verify":
        parser.add_argument("path", metavar="RUN|CHECKPOINT", help="a run directory, or one of its checkpoints")
    else:
        for name in ("a", "b"):
            parser.add_argument(name, metavar=name.upper(), help="a checkpoint, or a run directory for its latest")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Lists, verifies or compares."""
    try:
        return {"list": _list, "verify": _verify, "diff": _diff}[args.action](args)
    except UnreadableCheckpoint as error:
        return _failed(f"{error}; `t5x-lite checkpoint verify` says more")


def _list(args: argparse.Namespace) -> int:
    run = Path(args.run).expanduser()
    settings = resolve(run / "config.yaml").config.train if (run / "config.yaml").is_file() else TrainConfig()
    entries, others = inspection.list_checkpoints(run, settings.keep_checkpoints, settings.keep_every)
    if args.json:
        print(json.dumps({"checkpoints": [dataclasses.asdict(entry) for entry in entries], "others": others}))
        return 0
    rows: list[tuple[str, ...]] = [("step", "saved", "size", "loss", "kept as", "sealed", "holds")]
    for entry in entries:
        saved = "?" if entry.time is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        loss = "-" if entry.loss is None else f"{entry.loss:.4f}"
        kept, sealed = ", ".join(entry.kept) or "-", "yes" if entry.sealed else "no"
        rows.append((str(entry.step), saved, _megabytes(entry.bytes), loss, kept, sealed, " ".join(entry.items)))
    _table(rows)
    for name in others:
        why = "was damaged and set aside" if name.endswith(UNREADABLE) else "is being written, or was cut short"
        print(f"{name} {why}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    path = Path(args.path).expanduser()
    single = path.parent.name == "checkpoints" or not (path / "checkpoints").is_dir()
    paths = [find_checkpoint(path)] if single else []
    if not single:
        paths = [path / "checkpoints" / str(step) for step in complete_steps(path / "checkpoints")]
        if not paths:
            raise InputError(f"'{path}' holds no checkpoint")
    verdicts = []
    for checkpoint in paths:
        verdict = inspection.verify(checkpoint)
        verdicts.append(verdict)
        if args.json:
            continue
        print(f"{verdict.path}: {verdict.files} files, {_megabytes(verdict.bytes)}: {_state(verdict)}")
        for phrase in verdict.damage:
            print(f"  {phrase}")
        if verdict.arrays:
            shown = ", ".join(verdict.arrays[:_ARRAYS_SHOWN])
            more = f" and {len(verdict.arrays) - _ARRAYS_SHOWN} more" if len(verdict.arrays) > _ARRAYS_SHOWN else ""
            print(f"  arrays that are lost: {shown}{more}")
    bad = [verdict for verdict in verdicts if verdict.damage or verdict.arrays]
    if args.json:
        print(json.dumps({"intact": not bad, "checkpoints": [dataclasses.asdict(verdict) for verdict in verdicts]}))
    if bad:
        first = bad[0].damage[0] if bad[0].damage else f"{bad[0].arrays[0]} cannot be read"
        return _failed(f"{len(bad)} of {len(verdicts)} checkpoints are damaged; {bad[0].path}: {first}")
    return 0


def _failed(line: str) -> int:
    print(f"t5x-lite: {line}", file=sys.stderr)
    return 1


def _state(verdict: inspection.Verdict) -> str:
    if verdict.damage or verdict.arrays:
        return "damaged"
    return "intact" if verdict.sealed else "all arrays can be read, but there is no seal to compare them with"


def _diff(args: argparse.Namespace) -> int:
    found = inspection.diff(args.a, args.b)
    if args.json:
        print(json.dumps(dataclasses.asdict(found)))
        return 0
    same = sum(array.same for array in found.arrays)
    print(f"a: {found.a}\nb: {found.b}")
    print(
        f"{same} arrays are the same, {len(found.arrays) - same} differ,"
        f" {len(found.only_a)} are only in a, {len(found.only_b)} only in b"
    )
    for side, names in (("a", found.only_a), ("b", found.only_b)):
        for name in names:
            print(f"only in {side}: {name}")
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for array in found.arrays:
        if not array.same:
            rows.append(_row(array))
    if len(rows) > 1:
        _table(rows)
    return 0


def _row(array: inspection.Difference) -> tuple[str, ...]:
    shape, dtype = (_both(pair) for pair in (tuple(map(_axes, array.shapes)), array.dtypes))
    if array.differing is None:
        return (array.name, shape, dtype, *("-" for _ in range(6)))
    where = ",".join(map(str, array.where)) or "-"
    numbers = (f"{array.largest:.3g}", where, f"{array.relative:.3g}", *(f"{norm:.6g}" for norm in array.norms))
    return (array.name, shape, dtype, str(array.differing), *numbers)


def _both(pair: Sequence[str]) -> str:
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} / {pair[1]}"


def _axes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
