"""What a run leaves behind to be watched by."""

import json
import os
from pathlib import Path

from t5x_lite.training.monitor import EventLog, read_events


def test_events_are_appended_and_a_cut_line_costs_only_itself(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("started", 0, mesh="data:8")
    log.write("saved", 4)
    log.close()
    log.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "step": 5, "ev')
    log = EventLog(tmp_path)
    log.write("resumed", 4)
    log.write("saved", 8)
    log.close()
    events = read_events(tmp_path)
    assert [(event["event"], event["step"]) for event in events] == [
        ("started", 0),
        ("saved", 4),
        ("resumed", 4),
        ("saved", 8),
    ]
    assert events[0]["mesh"] == "data:8"
    assert all(abs(event["time"] - os.stat(tmp_path / "events.jsonl").st_mtime) < 60 for event in events)


def test_a_run_without_events_has_none(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []


def test_an_event_is_on_the_disk_when_it_has_been_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("saved", 4)
    assert json.loads((tmp_path / "events.jsonl").read_text())["step"] == 4
    log.close()
