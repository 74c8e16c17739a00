"""What a run leaves behind to be watched by: metrics.jsonl and TensorBoard files."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Where records may go besides the files."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Hears a record, see `MetricsLog.write`."""

    def close(self) -> None:
        """Hears that there are no more."""


class MetricsLog:
    """Appends records to `metrics.jsonl` and mirrors their numbers to `tensorboard/`.

    Args:
      directory: the run directory.
      step: the step training continues from. Records after it come from steps that will be run again; they are
        dropped, and so is a last line that a crash cut short.
      trackers: who else hears each record.
    """

    def __init__(self, directory: Path, step: int, trackers: Sequence[Tracker] = ()):
        self._path = directory / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.rename(self._path)
        self._file = self._path.open("a")
        self._board = _Board(directory / "tensorboard", step + 1)
        self._trackers = trackers

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record; it has a `step`, and a `split` if it is an evaluation. It is given the `time`.

        A number that is not finite is `null` in the file, because JSON knows no such number.
        """
        record = {"time": round(time.time(), 3), **record}
        self._file.write(json.dumps({name: _finite(value) for name, value in record.items()}) + "\n")
        self._file.flush()
        prefix = record.get("split", "train")
        numbers = {f"{prefix}/{name}": value for name, value in record.items() if name not in ("step", "split", "time")}
        self._board.write(record["step"], numbers)
        for tracker in self._trackers:
            tracker.write(record)

    def close(self) -> None:
        """Flushes everything to disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._board.close()
        for tracker in self._trackers:
            tracker.close()


class _Board:
    """Writes scalars for TensorBoard, each step's in one event and by the caller itself.

    The writer that tensorboardX has for this hands them to a thread. When the disk is full or the clock is set back,
    that thread dies with a traceback, and the training waits for ever for room in its queue.
    """

    def __init__(self, directory: Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        events: Any = event_pb2  # their classes are made at the import, which no type checker sees
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        directory.mkdir(exist_ok=True)
        self._file = EventsWriter(str(directory / "events"))
        start = events.SessionLog(status=events.SessionLog.START)  # what is there from this step on is void
        self._write(self._event(step=first_step, session_log=start))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=float(number)) for name, number in numbers.items()]
        self._write(self._event(step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)
        self._file.flush()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


class EventLog:
    """Appends what happens to a run to `events.jsonl`, which is never cut: steps that are made twice show twice.

    A line is `{"time": UNIX SECONDS, "step": n, "event": name, ...}` and is written by a single call of the operating
    system, so that a process which is killed leaves whole lines, or one cut line at the very end.

    Args:
      directory: the run directory.
    """

    _file = -1

    def __init__(self, directory: Path):
        path = directory / "events.jsonl"
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        # What a full disk or a crash left of a line would swallow the next one.
        self._cut = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"

    def write(self, event: str, step: int, **details: Any) -> None:
        """Writes one event and brings it to the disk.

        Args:
          event: its name, such as `saved`.
          step: the step that it belongs to.
          details: numbers and texts that say more, JSON values.
        """
        line = json.dumps({"time": round(time.time(), 3), "step": step, "event": event, **details}) + "\n"
        os.write(self._file, (("\n" if self._cut else "") + line).encode())
        self._cut = False
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file; more than once does no harm."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        # The saving thread may have something to write until the very end of a run, however that ends.
        self.close()


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Returns the events of a run, oldest first; lines that are cut are left out."""
    path = directory / "events.jsonl"
    return _objects(path.read_text(errors="replace")) if path.exists() else []


def _objects(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
