"""The report: what of a run's files is on the page, and that odd files do not keep the rest from being there."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from t5x_lite.errors import InputError
from t5x_lite.report.charts import MOST_EVENTS, MOST_POINTS, downsampled, draw, marks, sentence
from t5x_lite.report.page import duration, prefixed, render, write_report
from t5x_lite.report.runs import read_runs

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


def run_directory(path: Path, steps: int = 20, **config: Any) -> Path:
    """Makes a run that was interrupted at step 10 and finished."""
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            numbers = {"loss": 5 / step, "learning_rate": 0.1, "tokens_per_second": 1000.0 if step > 1 else 1.0}
            numbers |= {"gradient_norm": 2.0, "update_norm": 0.5, "parameter_norm": 10.0, "resident_bytes": 5_000_000}
            numbers |= {
                "step_seconds_p50": 0.5,
                "step_seconds_p99": 0.6,
                "step_seconds_max": 40.0 if step == 1 else 0.7,
            }
            file.write(json.dumps({"time": 1000.0 + 36 * step, "step": step, **numbers}) + "\n")
            if step % 10 == 0:
                record = {"time": 1001.0 + 36 * step, "step": step, "split": "validation", "loss": 4 + 1 / step}
                file.write(json.dumps(record) + "\n")
    events = [
        (0, "started", {"device": "TPU v4", "devices": 8}),
        (1, "counted", {"formula_flops": 2e12, "xla_flops": 2.1e12}),
        (10, "saved", {}),
        (10, "resumed", {"device": "TPU v4", "devices": 16}),
        (15, "skipped", {"kind": "activation", "module": "encoder/layers/mlp/up", "layer": 3, "value": "inf"}),
        (steps, "finished", {}),
    ]
    with (path / "events.jsonl").open("w") as file:
        for step, name, details in events:
            file.write(json.dumps({"time": 1000.0 + 36 * step, "step": step, "event": name, **details}) + "\n")
    lines = [f"out: {path}", "train:", *(f"  {key}: {value}" for key, value in {"steps": steps, **config}.items())]
    (path / "config.yaml").write_text("\n".join(lines))
    return path


def charts(*paths: Path) -> dict[str, Any]:
    return {chart["title"]: chart for chart in draw(read_runs([str(path) for path in paths]))}


def page_data(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_curves_are_the_numbers_of_the_log(tmp_path: Path) -> None:
    drawn = charts(run_directory(tmp_path / "a"))
    (loss,) = drawn["Training loss"]["series"]
    assert loss["x"] == list(range(1, 21))
    assert loss["y"] == pytest.approx([5 / step for step in range(1, 21)], rel=1e-5)  # six digits are kept
    assert loss["t"] == pytest.approx([step / 100 for step in range(1, 21)])  # hours since the first event
    (evaluated,) = drawn["Evaluation loss"]["series"]
    assert evaluated["x"] == [10, 20]
    assert drawn["Update / parameter norm"]["series"][0]["y"][0] == 0.05
    assert [one["label"] for one in drawn["Step time"]["series"]] == ["median", "99th percentile"]
    assert "MFU" not in drawn  # a run without the number has no empty chart


def test_compiling_is_not_drawn_as_speed(tmp_path: Path) -> None:
    (speed,) = charts(run_directory(tmp_path / "a"))["Throughput"]["series"]
    assert speed["x"][0] == 2
    assert set(speed["y"]) == {1000.0}


def test_several_runs_are_drawn_over_each_other_under_names_that_differ(tmp_path: Path) -> None:
    paths = [run_directory(tmp_path / "first" / "run"), run_directory(tmp_path / "second" / "run", seed=1)]
    runs = read_runs([str(path) for path in paths])
    assert [run.name for run in runs] == ["first/run", "second/run"]
    assert [one["run"] for one in draw(runs)[0]["series"]] == [0, 1]
    page = render(runs)
    assert [run["name"] for run in page_data(page)["runs"]] == ["first/run", "second/run"]
    differences = page[page.index('id="differences"') : page.index("<h2>Configuration</h2>")]
    assert re.findall(r'<th scope="row"><code>(.*?)</code>', differences) == ["train.seed"]  # not out, not steps


def test_events_are_marks_with_a_sentence(tmp_path: Path) -> None:
    (run,) = read_runs([str(run_directory(tmp_path / "a"))])
    found = marks(run)
    assert [mark["kind"] for mark in found] == ["started", "saved", "resumed", "skipped", "finished"]
    assert found[2] == {"kind": "resumed", "x": 10, "t": 0.1, "text": "resumed at step 10 on 16 x TPU v4"}
    assert found[3]["text"] == "skipped, step 15: activation encoder/layers/mlp/up, layer 3 is inf"
    stopped = {"event": "stopped", "step": 7, "error": "FloatingPointError: step 7: the loss is nan"}
    assert sentence(stopped) == "stopped, step 7: FloatingPointError: step 7: the loss is nan"


def test_final_numbers(tmp_path: Path) -> None:
    page = render(read_runs([str(run_directory(tmp_path / "a"))]))
    cells = dict(re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>', page))
    assert cells["State"] == "finished"
    assert cells["Training loss, last line"] == "0.2500"
    assert cells["Evaluation loss, best"] == "4.0500 (step 20)"
    assert cells["Tokens per second, median"] == "1 ktokens/s"
    assert cells["First step, compiling"] == "40 s"
    assert cells["Operations of a step, XLA"] == "2.1 TFLOP"
    assert cells["Process memory, most"] == "5 MB"
    assert (cells["Starts"], cells["Skipped steps"], cells["Devices"]) == ("2", "1", "16 x TPU v4")


def test_modules_have_a_curve_each(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "a")
    with (path / "metrics.jsonl").open("a") as file:
        for step in range(21, 31):
            norms = {"gradient_norm/head": 0.1 * step, "update_norm/head": 0.5, "parameter_norm/head": 5.0}
            file.write(json.dumps({"step": step, "loss": 1.0, **norms, "gradient_norm/<b>": 0.0}) + "\n")
    page = render(read_runs([str(path), str(run_directory(tmp_path / "b"))]))
    (row,) = re.findall(r'<tr><th scope="row"><code>head</code></th>(.*?)</tr>', page)
    first, second = re.findall("<td>(.*?)</td>", row)
    assert "from 2.1 to 3" in first
    assert first.count(",") >= 10  # points
    assert "<span>3</span>" in first
    assert "1.0e-01" in first
    assert "&ndash;" in second
    assert "<code>&lt;b&gt;</code>" in page


def test_cut_and_odd_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "a")
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n"text"\n{"loss": 1.0}\n{"step": "x", "loss": 1}\n{"step": true}\n\xff\xfe\n\n')
        file.write(b'{"step": 21, "loss": null, "accuracy": "high", "gradient_norm": NaN}\n')
        file.write(b'{"step": 20, "loss": 7.5}\n{"step": 22, "lo')
    with (path / "events.jsonl").open("a") as file:
        file.write('{"step": 3}\n{"event": "saved"}\n{"event": ["x"], "step": 4}\n' + "[" * 100_000 + "\n")
    (run,) = read_runs([str(path)])
    assert run.odd_lines == 7 + 4
    (loss,) = charts(path)["Training loss"]["series"]
    assert (loss["x"][-1], loss["y"][-1]) == (20, 7.5)  # the later of two lines
    assert "11 lines of its logs are no records" in render([run])


@pytest.mark.parametrize("missing", ["metrics.jsonl", "events.jsonl", "config.yaml"])
def test_a_missing_file_costs_only_what_is_in_it(missing: str, tmp_path: Path) -> None:
    path = run_directory(tmp_path / "a")
    (path / missing).unlink()
    page = render(read_runs([str(path)]))
    assert ("has logged no step yet" in page) == (missing == "metrics.jsonl")
    assert bool(page_data(page)["runs"][0]["marks"]) == (missing != "events.jsonl")


def test_a_configuration_that_is_no_yaml_is_as_if_it_were_missing(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "a")
    (path / "config.yaml").write_text("a: [1\nb: {")
    (run,) = read_runs([str(path)])
    assert run.config == {}


def test_huge_runs_are_joined_to_what_can_be_seen_without_losing_a_spike() -> None:
    values: list[Any] = [
        ({"step": step, "time": float(step)}, 9.0 if step == 77_777 else 1.0) for step in range(100_000)
    ]
    found = downsampled(values, 0.0)
    assert len(found["y"]) <= MOST_POINTS
    assert {len(found[name]) for name in ("x", "t", "low", "high")} == {len(found["y"])}
    assert max(found["high"]) == 9.0
    assert max(found["y"]) < 1.1
    assert found["x"][-1] == 99_999


def test_very_many_events_are_thinned_out_and_the_last_one_stays(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "a")
    with (path / "events.jsonl").open("a") as file:
        for step in range(5000):
            file.write(json.dumps({"time": 2000.0, "step": step, "event": "saved"}) + "\n")
    saved = [mark for mark in marks(read_runs([str(path)])[0]) if mark["kind"] == "saved"]
    assert len(saved) <= MOST_EVENTS
    assert saved[-1]["x"] == 4999


class Outside(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag in ("link", "iframe", "img"):
            self.found.append(tag)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = render(read_runs([str(run_directory(tmp_path / "a"))]))
    parser = Outside()
    parser.feed(page)
    assert parser.found == []
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)
    assert "{{" not in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.skipif(not BROWSER, reason="there is no browser")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    paths = [run_directory(tmp_path / name) for name in ("a", "b")]
    page = write_report(read_runs([str(path) for path in paths]), tmp_path / "page.html")
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    command = [str(BROWSER), *arguments, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    drawn = len(draw(read_runs([str(path) for path in paths])))
    assert dom.count("<h3>") == drawn
    for run in (0, 1):
        assert len(re.findall(rf'<path d="M[^"]*" stroke="var\(--c{run}\)"', dom)) >= drawn
    assert "NaN" not in dom[dom.index("<main>") :].split("<script")[0]


def test_names_and_texts_are_no_markup(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "<b>&x", note="'</script><script>alert(1)</script>'")
    with (path / "events.jsonl").open("a") as file:
        error = "</script><script>alert(2)</script><!--"
        file.write(json.dumps({"step": 3, "event": "failed", "error": error}) + "\n")
    page = render(read_runs([str(path)]))
    assert page.count("<script") == 2 == page.count("</script>")
    assert "<b>" not in page
    assert page_data(page)["runs"][0]["name"] == "<b>&x"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "a")
    with pytest.raises(InputError, match=r"nothing is not a run directory: it has no metrics\.jsonl"):
        read_runs([str(path), str(tmp_path / "nothing")])
    with pytest.raises(InputError, match="a is given twice"):
        read_runs([str(path), f"{path}/../a"])
    with pytest.raises(InputError, match=r"--output=.* cannot be written: No such file"):
        write_report(read_runs([str(path)]), tmp_path / "missing" / "report.html")


def test_texts_for_people() -> None:
    assert [prefixed(value, "B") for value in (0, 999, 1234, 2.5e9, 1e20)] == [
        "0 B", "999 B", "1.23 kB", "2.5 GB", "1e+05 PB",
    ]  # fmt: skip
    assert [duration(value) for value in (0.0138, 59, 600, 7260, 3 * 86400)] == [
        "13.8 ms", "59 s", "10 min", "2 h 01 min", "3.0 days",
    ]  # fmt: skip
    assert math.isfinite(float(prefixed(5e18, "").split()[0]))
