"""What a run leaves behind to be watched by: metrics.jsonl and TensorBoard files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to `metrics.jsonl` and mirrors their numbers to `tensorboard/`.

    Args:
      directory: the run directory.
      step: the step training continues from. Records after it come from steps that will be run again; they are
        dropped, and so is a last line that a crash cut short.
    """

    def __init__(self, directory: Path, step: int):
        import tensorboardX

        self._path = directory / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.rename(self._path)
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record; it has a `step`, and a `split` if it is an evaluation."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        prefix = record.get("split", "train")
        for name, value in record.items():
            if name not in ("step", "split"):
                self._board.add_scalar(f"{prefix}/{name}", value, record["step"])

    def close(self) -> None:
        """Flushes everything to disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._board.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
