"""How far the lines of a file are done, on stderr: a bar in a terminal, a line now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from t5x_lite.batch_inference import Observer

SECONDS_BETWEEN_LINES = 10.0


class LineProgress(Observer):
    """Shows the progress of a file, and the lines of it that fail."""

    def __init__(self, description: str, path: str) -> None:
        """Takes a verb and the file."""
        self._console = Console(stderr=True, highlight=False, emoji=False)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(description, total=None)
        self._description, self._path = description, path
        self._last_line = time.monotonic()

    def __enter__(self) -> "LineProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(f"t5x-lite: {text}", markup=False, soft_wrap=True)

    def failed(self, line: int, reason: str) -> None:
        """Prints where and why."""
        self.note(f"{self._path}:{line}: {reason}")

    def progress(self, done: int, total: int) -> None:
        """Moves the bar, or prints a line if the last is a while ago."""
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = now
            self.note(f"{self._description} {done}/{total} lines")
