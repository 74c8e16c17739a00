"""The page: one HTML file that needs nothing else, neither a network nor a server."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from t5x_lite import __version__
from t5x_lite.errors import InputError
from t5x_lite.report import modules
from t5x_lite.report.charts import draw, marks
from t5x_lite.report.runs import Run, numbers


def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Writes the page about some runs, completely or not at all.

    Args:
      runs: from `read_runs`.
      output: the HTML file.

    Returns:
      The file.

    Raises:
      InputError: it cannot be written there.
    """
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(render(runs), encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        raise InputError(f"--output={output} cannot be written: {error.strerror}") from None
    return output


def render(runs: Sequence[Run]) -> str:
    """Returns the page."""
    data = {
        "runs": [{"name": run.name, "marks": marks(run)} for run in runs],
        "charts": draw(runs),
    }
    # Within a script element nothing may look like the end of it.
    script = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    names = ", ".join(run.name for run in runs)
    parts = {
        "title": escape(f"{names[:80]} - training report"),
        "subtitle": escape(f"t5x_lite {__version__}, made {time.strftime('%Y-%m-%d %H:%M')}"),
        "summary": _summary(runs),
        "differences": _differences(runs),
        "modules": _modules(runs),
        "configurations": _configurations(runs),
        "notes": _notes(runs),
        "data": script,
    }
    page = files("t5x_lite.report").joinpath("page.html").read_text(encoding="utf-8")
    head, *rest = page.split("{{")
    pieces = (piece.partition("}}") for piece in rest)
    return head + "".join(parts[name] + text for name, _, text in pieces)


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Returns a table of cells that are HTML already; the first of each row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _run_label(index: int, run: Run) -> str:
    return f'<span class="swatch c{index % 8}" aria-hidden="true"></span>{escape(run.name)}'


def _summary(runs: Sequence[Run]) -> str:
    """Returns the table of final numbers: a row for each number that any run has, a column for each run."""
    rows = []
    for name, get in _NUMBERS.items():
        cells = [get(run) for run in runs]
        if any(cells):
            rows.append([escape(name), *(escape(cell) or "&ndash;" for cell in cells)])
    return _table(["", *(_run_label(index, run) for index, run in enumerate(runs))], rows, "numbers")


def _last(name: str, form: str = "{:,.4f}") -> Callable[[Run], str]:
    def get(run: Run) -> str:
        found = numbers(run.steps, name)
        return form.format(found[-1][1]) if found else ""

    return get


def _median(name: str, form: Callable[[float], str]) -> Callable[[Run], str]:
    def get(run: Run) -> str:
        compiled = {event["step"] for event in run.events if event["event"] == "counted"}
        found = numbers([record for record in run.steps if record["step"] not in compiled], name)
        return form(statistics.median(value for _, value in found)) if found else ""

    return get


def _evaluated(best: bool) -> Callable[[Run], str]:
    def get(run: Run) -> str:
        cells = []
        for split, records in run.evaluations.items():
            found = [(value, record["step"]) for record, value in numbers(records, "loss")]
            if found:
                loss, step = min(found) if best else found[-1]
                cells.append(f"{loss:,.4f} (step {step:,})" + (f" {split}" if len(run.evaluations) > 1 else ""))
        return "; ".join(cells)

    return get


def _events(*kinds: str) -> Callable[[Run], str]:
    def get(run: Run) -> str:
        count = sum(event["event"] in kinds for event in run.events)
        return str(count) if count else ""

    return get


def _first_step(run: Run) -> str:
    compiled = {event["step"] for event in run.events if event["event"] == "counted"}
    found = numbers([record for record in run.steps if record["step"] in compiled], "step_seconds_max")
    return duration(found[0][1]) if found else ""


def _hours(run: Run) -> str:
    times = [value for _, value in (*numbers(run.events, "time"), *numbers(run.steps, "time"))]
    return duration(max(times) - min(times)) if times else ""


def _device(run: Run) -> str:
    started = [event for event in run.events if event["event"] in ("started", "resumed") and "device" in event]
    return f"{started[-1].get('devices', '?')} x {started[-1]['device']}" if started else ""


def _flops(name: str) -> Callable[[Run], str]:
    def get(run: Run) -> str:
        found = numbers([event for event in run.events if event["event"] == "counted"], name)
        return prefixed(found[-1][1], "FLOP") if found else ""

    return get


def _most(name: str) -> Callable[[Run], str]:
    def get(run: Run) -> str:
        found = numbers(run.steps, name)
        return prefixed(max(value for _, value in found), "B") if found else ""

    return get


def prefixed(value: float, unit: str) -> str:
    """Returns a number with a decimal prefix: 1.23 GB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or prefix == "P":
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return ""


def duration(seconds: float) -> str:
    """Returns seconds as a person would say them."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


_NUMBERS: dict[str, Callable[[Run], str]] = {
    "State": lambda run: run.status,
    "Last logged step": _last("step", "{:,.0f}"),
    "Training loss, last line": _last("loss"),
    "Evaluation loss, last": _evaluated(best=False),
    "Evaluation loss, best": _evaluated(best=True),
    "Tokens per second, median": _median("tokens_per_second", lambda value: prefixed(value, "tokens/s")),
    "MFU, median": _median("mfu", "{:.1%}".format),
    "Step time, median": _median("step_seconds_p50", duration),
    "Waiting for data, median": _median("data_wait", "{:.2%}".format),
    "Padding, median": _median("padding", "{:.1%}".format),
    "Operations of a step, formula": _flops("formula_flops"),
    "Operations of a step, XLA": _flops("xla_flops"),
    "First step, compiling": _first_step,
    "Device memory, peak": _most("device_peak_bytes"),
    "Process memory, most": _most("resident_bytes"),
    "Devices": _device,
    "Starts": _events("started", "resumed"),
    "Skipped steps": _events("skipped"),
    "Unreadable checkpoints": _events("checkpoint_unreadable"),
    "First to last event": _hours,
}


def _differences(runs: Sequence[Run]) -> str:
    known = [run for run in runs if run.config]
    if len(known) < 2:
        return ""
    keys = list(dict.fromkeys(key for run in known for key in run.config))
    rows = [
        [f"<code>{escape(key)}</code>", *(f"<code>{escape(run.config.get(key, ''))}</code>" for run in runs)]
        for key in keys
        if key != "out" and len({run.config.get(key) for run in known}) > 1
    ]
    header = ["", *(_run_label(index, run) for index, run in enumerate(runs))]
    table = _table(header, rows, "settings") if rows else "<p>There are none: the runs have one configuration.</p>"
    return f'<section><h2 id="differences">Differences in configuration</h2>{table}</section>'


def _modules(runs: Sequence[Run]) -> str:
    rows = modules.rows(runs)
    if not rows:
        return ""
    table = _table(["", *(_run_label(index, run) for index, run in enumerate(runs))], rows, "modules")
    note = (
        "The curve is the norm of the gradient over the run, logarithmic, on one scale for the runs of a row. Its last"
        " value follows, and the median share of itself by which a step changed the module in the run's second half."
    )
    return f'<section><h2>Modules</h2><p class="soft">{note}</p>{table}</section>'


def _configurations(runs: Sequence[Run]) -> str:
    blocks = []
    for index, run in enumerate(runs):
        rows = [[f"<code>{escape(key)}</code>", f"<code>{escape(value)}</code>"] for key, value in run.config.items()]
        if rows:
            table = _table(["Key", "Value"], rows, "settings")
            blocks.append(f"<details><summary>{_run_label(index, run)}</summary>{table}</details>")
    return f"<section><h2>Configuration</h2>{''.join(blocks)}</section>" if blocks else ""


def _notes(runs: Sequence[Run]) -> str:
    notes = [
        f"{run.name}: {run.odd_lines} lines of its logs are no records and were left out"
        for run in runs
        if run.odd_lines
    ]
    notes += [f"{run.name} has logged no step yet" for run in runs if not run.steps]
    return "".join(f'<p class="warning">{escape(note)}.</p>' for note in notes)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns what a command may say about the page's content: runs, logged steps and events."""
    return {
        "runs": len(runs),
        "logged_steps": sum(len(run.steps) for run in runs),
        "events": sum(len(run.events) for run in runs),
    }
