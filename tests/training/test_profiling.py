"""A trace of some steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from t5x_lite.training import profiling
from t5x_lite.training.profiling import Profiler


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the profiler is asked to do, without doing it."""
    made: list[str] = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda path: made.append(f"start {Path(path).name}"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


def run(profiler: Profiler, first: int, last: int, calls: list[str]) -> None:
    for step in range(first, last + 1):
        with profiler.step(step):
            calls.append(str(step))
        if profiler.made(step, jnp.zeros(())):
            calls.append("ended")
    profiler.close()
    profiler.close()


@pytest.mark.parametrize(
    ("window", "first", "last", "expected"),
    [
        (range(0), 1, 2, ["1", "2"]),
        (range(2, 4), 1, 4, ["1", "start profile", "2", "3", "stop", "ended", "4"]),
        (range(2, 4), 3, 4, ["start profile", "3", "stop", "ended", "4"]),  # continued within the window
        (range(2, 4), 4, 5, ["4", "5"]),  # and behind it
        (range(2, 9), 1, 3, ["1", "start profile", "2", "3", "stop"]),  # the run ends first
    ],
)
def test_the_window(
    window: range, first: int, last: int, expected: list[str], calls: list[str], tmp_path: Path
) -> None:
    run(Profiler(tmp_path, window), first, last, calls)
    assert calls == expected


def test_a_trace_that_is_given_up_is_written_when_the_next_begins(calls: list[str], tmp_path: Path) -> None:
    first = Profiler(tmp_path, range(2, 9))
    with first.step(2):
        first.close(give_up=True)
    first.close()
    assert calls == ["start profile"]
    run(Profiler(tmp_path, range(1, 2)), 1, 1, calls)
    run(Profiler(tmp_path, range(1, 2)), 1, 1, calls)
    assert calls == ["start profile", "stop", *2 * ["start profile", "1", "stop", "ended"]]


def test_a_trace_is_written_and_names_the_steps(tmp_path: Path) -> None:
    step = jax.jit(lambda x: x @ x)
    x = jnp.ones((32, 32))
    profiler = Profiler(tmp_path, range(7, 9))
    for number in range(6, 10):
        with profiler.step(number, x):
            x = step(x) / 32
        profiler.made(number, x)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"train" in trace.read_bytes()
    assert b"step_num" in trace.read_bytes()
