"""What commands print: results to stdout, notes and progress bars to stderr."""

import json
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from t5x_lite.training.loop import Observer

SECONDS_BETWEEN_LINES = 10.0


def show(values: Mapping[str, Any], as_json: bool) -> None:
    """Prints named results: one JSON object, or a line each."""
    if as_json:
        print(json.dumps(dict(values)))
        return
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


class ProgressObserver(Observer):
    """Shows training on stderr: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, description: str = "training"):
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s  ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._description = description
        self._task: Any = None
        self._last_line = 0.0

    def __enter__(self) -> "ProgressObserver":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def building(self, name: str, done: int, total: int, tokens: int) -> None:
        """Prints a line if the last is a while ago; of what is built at once, nothing."""
        now = time.monotonic()
        if total > 1 and (done == total or now - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = now
            self.note(f"{name}: {done} of {total} parts are tokens, {tokens:,} of them")

    def step(self, record: Mapping[str, Any], last: int) -> None:
        """Moves the bar, or prints a line if the last is a while ago."""
        fields = {"loss": record["loss"], "speed": record["tokens_per_second"]}
        if self._task is None:
            self._task = self._progress.add_task(self._description, total=last, completed=record["step"], **fields)
        self._progress.update(self._task, completed=record["step"], **fields)
        now = time.monotonic()
        if self._progress.disable and (now - self._last_line > SECONDS_BETWEEN_LINES or record["step"] == last):
            self._last_line = now
            self.note(
                f"{self._description}: step {record['step']}/{last}  loss {record['loss']:.3f}"
                f"  {record['tokens_per_second']:,.0f} tokens/s"
            )

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Prints a line."""
        self.note(
            f"step {record['step']}: {record['split']} loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}"
        )
