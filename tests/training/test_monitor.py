"""What a run leaves behind to be watched by."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from t5x_lite.training.monitor import EventLog, MetricsLog, read_events, read_metrics


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


class Heard:
    def __init__(self) -> None:
        self.records: list[Any] = []

    def write(self, record: Any) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.records.append("closed")


def test_a_record_goes_to_the_file_to_tensorboard_and_to_whoever_listens(tmp_path: Path) -> None:
    heard = Heard()
    log = MetricsLog(tmp_path, 0, [heard])
    log.write({"step": 1, "loss": 2.5, "gradient_norm/head": 0.5})
    log.write({"step": 1, "split": "validation", "loss": float("nan")})
    log.close()
    first, second = read_metrics(tmp_path)
    assert abs(first.pop("time") - time.time()) < 60
    assert first == {"step": 1, "loss": 2.5, "gradient_norm/head": 0.5}
    assert second["loss"] is None  # JSON has no NaN
    assert [record["step"] for record in heard.records[:2]] == [1, 1]
    assert heard.records[2:] == ["closed"]
    board = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/gradient_norm/head" in board
    assert b"validation/loss" in board
    assert b"train/time" not in board  # TensorBoard keeps its own


def test_a_log_that_continues_drops_what_will_be_made_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "lo\xff')
    MetricsLog(tmp_path, 2).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_log_of_events_that_nobody_closes_lets_go_of_its_file(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        EventLog(tmp_path)
    with pytest.raises(FileNotFoundError):
        EventLog(tmp_path / "missing")
    assert len(os.listdir("/proc/self/fd")) < before + 10
