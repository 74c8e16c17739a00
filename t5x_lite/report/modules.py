"""Which part of the model moves: a small curve of each module's gradient norm, and how much a step changes it."""

import math
from collections.abc import Sequence
from html import escape

from t5x_lite.report.runs import Record, Run, numbers

_WIDTH, _HEIGHT, _POINTS = 150, 26, 75


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Returns a row of HTML cells for each module that any run has logged: its name, then a cell for each run.

    The curves of a row share one logarithmic scale, so that runs compare.
    """
    named = {
        name.partition("/")[2]: None
        for run in runs
        for record in (*run.steps[:1], *run.steps[-1:])
        for name in record
        if name.startswith("gradient_norm/")
    }
    return [[f"<code>{escape(module)}</code>", *_cells(runs, module)] for module in named]


def _cells(runs: Sequence[Run], module: str) -> list[str]:
    curves = [_curve(run.steps, f"gradient_norm/{module}") for run in runs]
    every = [value for curve in curves for value in curve]
    low, high = min(every, default=0.0), max(every, default=0.0)
    cells = []
    for index, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        last = numbers(run.steps[-1:], f"gradient_norm/{module}")
        text = [f"{last[0][1]:.3g}" if last else "&ndash;"]
        if ratio := _ratio(run.steps, module):
            text.append(f'<span class="soft">{ratio:.1e}</span>')
        cells.append(_drawn(curve, low, high, index, module) + " ".join(f"<span>{part}</span>" for part in text))
    return cells


def _curve(records: Sequence[Record], name: str) -> list[float]:
    """Returns logarithms of the means of some groups of neighbours."""
    values = [value for _, value in numbers(records, name) if value > 0]
    size = max(math.ceil(len(values) / _POINTS), 1)
    groups = (values[start : start + size] for start in range(0, len(values), size))
    return [math.log10(sum(group) / len(group)) for group in groups]


def _ratio(records: Sequence[Record], module: str) -> float | None:
    """Returns the median of the update's norm as a share of the parameters', over the second half of the run."""
    half = records[len(records) // 2 :]
    found = sorted(
        update / parameter
        for record, update in numbers(half, f"update_norm/{module}")
        for _, parameter in numbers([record], f"parameter_norm/{module}")
        if parameter
    )
    return found[len(found) // 2] if found else None


def _drawn(curve: Sequence[float], low: float, high: float, index: int, module: str) -> str:
    if len(curve) < 2:
        return ""
    reach = (high - low) or 1.0
    points = " ".join(
        f"{place / (len(curve) - 1) * (_WIDTH - 4) + 2:.1f},{_HEIGHT - 3 - (value - low) / reach * (_HEIGHT - 6):.1f}"
        for place, value in enumerate(curve)
    )
    label = f"gradient norm of {module}, from {10 ** curve[0]:.3g} to {10 ** curve[-1]:.3g}"
    return (
        f'<svg class="spark c{index % 8}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )
