"""What runs left behind, read so that nothing that is cut, odd or missing keeps the rest from being shown."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t5x_lite.errors import InputError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run as its files have it.

    Attributes:
      name: short, and different from the names of the runs beside it.
      path: its directory.
      steps: a record of each logged training step, ascending.
      evaluations: records by the name of their split, ascending.
      events: oldest first.
      config: flat keys and values; empty where there is no readable config.yaml.
      odd_lines: lines of the two logs that are no records.
    """

    name: str
    path: Path
    steps: Sequence[Record] = ()
    evaluations: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    events: Sequence[Record] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    odd_lines: int = 0

    @property
    def status(self) -> str:
        """What the last event says of the run."""
        last = next((event for event in reversed(self.events) if event["event"] in _STATES), None)
        if last is None:
            return "unknown"
        # A process that was killed wrote nothing; and one that still trains looks the same.
        return {"started": "running or killed", "resumed": "running or killed"}.get(last["event"], str(last["event"]))


_STATES = ("started", "resumed", "finished", "stopped", "preempted", "interrupted", "failed")


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads runs.

    Args:
      paths: run directories.

    Raises:
      InputError: one of them is no run directory, or is named twice.
    """
    directories = [Path(path).expanduser() for path in paths]
    for number, directory in enumerate(directories):
        if not any((directory / name).is_file() for name in ("metrics.jsonl", "events.jsonl", "config.yaml")):
            raise InputError(
                f"{directory} is not a run directory: it has no metrics.jsonl, events.jsonl or config.yaml"
            )
        if directory.resolve() in [other.resolve() for other in directories[:number]]:
            raise InputError(f"{directory} is given twice")
    return [_read(directory, name) for directory, name in zip(directories, _names(directories), strict=True)]


def _read(directory: Path, name: str) -> Run:
    metrics, odd_metrics = _objects(directory / "metrics.jsonl")
    events, odd_events = _objects(directory / "events.jsonl")
    records = [record for record in metrics if _is_number(record.get("step"))]
    named = [event for event in events if isinstance(event.get("event"), str) and _is_number(event.get("step"))]
    steps: dict[float, Record] = {}
    evaluations: dict[str, dict[float, Record]] = {}
    for record in records:  # of a step that is there twice, the later line holds
        split = record.get("split")
        (steps if split is None else evaluations.setdefault(str(split), {}))[record["step"]] = record
    odd = odd_metrics + odd_events + len(metrics) - len(records) + len(events) - len(named)
    return Run(
        name=name,
        path=directory,
        steps=[steps[step] for step in sorted(steps)],
        evaluations={split: [found[step] for step in sorted(found)] for split, found in evaluations.items()},
        events=named,
        config=_config(directory / "config.yaml"),
        odd_lines=odd,
    )


def _objects(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the objects of a JSON lines file, and how many lines are none."""
    try:
        file = path.open(errors="replace")
    except OSError:
        return [], 0
    found, odd = [], 0
    with file:
        for line in file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                found.append(value)
            elif line.strip():
                odd += 1
    return found, odd


def _config(path: Path) -> dict[str, str]:
    import yaml

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                yield from walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix, "null" if node is None else str(node)

    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return dict(walk(tree, "")) if isinstance(tree, dict) else {}


def _names(directories: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell all of them apart."""
    parts = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def numbers(records: Sequence[Record], name: str) -> list[tuple[Record, float]]:
    """Returns the records that have a finite number of that name, each with it."""
    return [(record, float(record[name])) for record in records if _is_number(record.get(name))]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
