"""What is drawn of the runs: charts of series, with no more points than can be seen."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from t5x_lite.report.runs import Record, Run, numbers

MOST_POINTS = 800
MOST_EVENTS = 300


@dataclass(frozen=True)
class Line:
    """A number that is drawn.

    Attributes:
      name: in metrics.jsonl.
      label: in the legend of the chart, where it has several.
      dashed: whether it is a dashed line.
      divisor: name of another number, which it is divided by.
    """

    name: str
    label: str = ""
    dashed: bool = False
    divisor: str = ""


@dataclass(frozen=True)
class Chart:
    """What is drawn in one frame.

    Attributes:
      title: over it.
      unit: of the vertical axis: empty, `s`, `B`, `FLOP/s`, `tokens/s`, or `%` of numbers that are shares.
      lines: of every run.
      note: what is to be known about it.
      log: whether the axis is logarithmic at first.
      zero: whether it begins at zero.
      split: draw evaluations instead of training steps.
      pace: leave out the line that measured compiling.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    note: str = ""
    log: bool = False
    zero: bool = False
    split: bool = False
    pace: bool = False


CHARTS = (
    Chart("Training loss", "nats", (Line("loss"),), "cross-entropy per real target token"),
    Chart("Evaluation loss", "nats", (Line("loss"),), "on held-out data", split=True),
    Chart("Accuracy", "%", (Line("accuracy"),), "training batches; most likely token is the target"),
    Chart("Evaluation accuracy", "%", (Line("accuracy"),), "on held-out data", split=True),
    Chart("Learning rate", "", (Line("learning_rate"),), zero=True),
    Chart("Gradient norm", "", (Line("gradient_norm"),), "before clipping, all parameters", log=True),
    Chart(
        "Update / parameter norm",
        "",
        (Line("update_norm", divisor="parameter_norm"),),
        "how much of itself a step changes",
        log=True,
    ),
    Chart("Parameter norm", "", (Line("parameter_norm"),)),
    Chart("z-loss", "nats", (Line("z_loss"),), "with its coefficient"),
    Chart("Loss scale", "", (Line("loss_scale"),), "of float16", log=True),
    Chart("Throughput", "tokens/s", (Line("tokens_per_second"),), "real tokens, all devices", zero=True, pace=True),
    Chart("Model operations", "FLOP/s", (Line("flops_per_second"),), "by formula, all devices", zero=True, pace=True),
    Chart("MFU", "%", (Line("mfu"),), "share of the devices' published peak", zero=True, pace=True),
    Chart(
        "Step time",
        "s",
        (Line("step_seconds_p50", "median"), Line("step_seconds_p99", "99th percentile", dashed=True)),
        "of the steps between two lines of the log",
        log=True,
        pace=True,
    ),
    Chart("Waiting for data", "%", (Line("data_wait"),), "share of the time", zero=True, pace=True),
    Chart("Padding", "%", (Line("padding"),), "share of the batch that is no token", zero=True),
    Chart("Device memory", "B", (Line("device_bytes", "in use"), Line("device_peak_bytes", "peak", True)), zero=True),
    Chart("Process memory", "B", (Line("resident_bytes"),), "resident, process 0", zero=True),
)


def draw(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the charts that have anything to show, as JSON values."""
    drawn = []
    for chart in CHARTS:
        series = [one for index, run in enumerate(runs) for one in _series(chart, run, index)]
        if any(any(one["y"]) for one in series):  # a number that never was anything else than 0 needs no chart
            settings = {"title": chart.title, "unit": chart.unit, "note": chart.note, "log": chart.log}
            drawn.append({**settings, "zero": chart.zero, "series": series})
    return drawn


def _series(chart: Chart, run: Run, index: int) -> Iterator[dict[str, Any]]:
    compiled = {event["step"] for event in run.events if event["event"] == "counted"}
    began = _began(run)
    sources = run.evaluations if chart.split else {"": run.steps}
    for number, (split, records) in enumerate(sources.items()):
        kept = [record for record in records if not (chart.pace and record["step"] in compiled)]
        for line in chart.lines:
            values = numbers(kept, line.name)
            if line.divisor:
                values = [
                    (record, value / below)
                    for record, value in values
                    for _, below in numbers([record], line.divisor)
                    if below
                ]
            if values:
                label = " ".join(part for part in (split if len(sources) > 1 else "", line.label) if part)
                yield {
                    "run": index,
                    "label": label,
                    "dashed": line.dashed or number > 0,
                    "dots": chart.split,
                    **downsampled(values, began),
                }


def _began(run: Run) -> float:
    times = [value for _, value in (*numbers(run.events[:1], "time"), *numbers(run.steps[:1], "time"))]
    return min(times, default=0.0)


def downsampled(values: Sequence[tuple[Record, float]], began: float, most: int = MOST_POINTS) -> dict[str, Any]:
    """Returns at most so many points: of neighbours their mean, and beside it the least and the greatest of them.

    Args:
      values: records and the number of each.
      began: seconds, which `t` counts from.
      most: how many points there may be.

    Returns:
      `x` steps, `t` hours since the run began, `y` means, and, if anything was joined, `low` and `high`.
    """
    size = math.ceil(len(values) / most)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    hours = [_mean([value for _, value in numbers([group[0][0], group[-1][0]], "time")]) for group in groups]
    found: dict[str, Any] = {
        "x": [group[-1][0]["step"] for group in groups],
        "t": [None if time is None else _short((time - began) / 3600) for time in hours],
        "y": [_short(_mean([value for _, value in group])) for group in groups],
    }
    if size > 1:
        found["low"] = [_short(min(value for _, value in group)) for group in groups]
        found["high"] = [_short(max(value for _, value in group)) for group in groups]
    return found


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def marks(run: Run) -> list[dict[str, Any]]:
    """Returns what happened to a run: kind, step, hours since it began, and a sentence; of very many, some."""
    began, found = _began(run), []
    by_kind: dict[str, list[Record]] = {}
    for event in run.events:
        if event["event"] != "counted":
            by_kind.setdefault(event["event"], []).append(event)
    for kind, events in by_kind.items():
        stride = math.ceil(len(events) / MOST_EVENTS)
        for event in events[:: -stride or None][::-1]:
            times = numbers([event], "time")
            hours = _short((times[0][1] - began) / 3600) if times else None
            found.append({"kind": kind, "x": event["step"], "t": hours, "text": sentence(event)})
    return sorted(found, key=lambda mark: mark["x"])


def sentence(event: Record) -> str:
    """Returns an event as a short text."""
    kind, step = event["event"].replace("_", " "), event["step"]
    if event["event"] in ("started", "resumed"):
        return f"{kind} at step {step} on {event.get('devices', '?')} x {event.get('device', '?')}"
    details = (event.get(name) for name in ("error", "by", "note"))
    text = next((str(detail) for detail in details if detail), "")
    if event.get("module"):
        layer = f", layer {event['layer']}" if "layer" in event else ""
        text = f"{event.get('kind', '')} {event['module']}{layer} is {event.get('value', 'not finite')}".strip()
    return f"{kind}, step {step}" + (f": {text[:200]}" if text else "")
