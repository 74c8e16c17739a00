"""What a run leaves to be watched by, and that all of it is documented."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from t5x_lite.config import RunConfig, TrainConfig, resolve
from t5x_lite.errors import InputError
from t5x_lite.models import preset
from t5x_lite.sharding import make_mesh
from t5x_lite.training import loop, watching
from t5x_lite.training.loop import Observer, train
from t5x_lite.training.monitor import EventLog, read_events, read_metrics
from t5x_lite.training.scalars import Scalars
from t5x_lite.training.watching import Watch

PAGE = Path(__file__).parents[2] / "docs" / "watching_a_run.md"


def documented(header: str) -> set[str]:
    """Returns the names in the first column of a table of the page."""
    rows = PAGE.read_text().split(f"| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_every_number_of_a_run_is_documented(trained_run: Path) -> None:
    names = documented("Number")
    written = {
        re.sub(r"/.*", "/MODULE", name)
        for record in read_metrics(trained_run)
        for name in record
        if "split" not in record
    }
    assert written <= names
    # What this run cannot have: another head, float16, devices that are no CPUs.
    assert names - written == {"next_sentence_loss", "loss_scale", "mfu", "device_bytes", "device_peak_bytes"}
    evaluation = next(record for record in read_metrics(trained_run) if "split" in record)
    assert all(f"`{name}`" in PAGE.read_text() for name in evaluation)


def test_every_event_is_documented(trained_run: Path) -> None:
    source = "".join(Path(module.__file__ or "").read_text() for module in (loop, watching))
    written = set(re.findall(r'(?:event|events\.write)\(\s*"(\w+)"', source)) | {"resumed", "started"}
    written |= set(re.findall(r'Error: "(\w+)"|KeyboardInterrupt: "(\w+)"', source)[0]) - {""} | {
        "interrupted",
        "failed",
    }
    assert written == documented("Event")
    for event in read_events(trained_run):
        assert event["event"] in documented("Event")
        (row,) = (row for row in PAGE.read_text().splitlines() if row.startswith("|") and f"`{event['event']}`" in row)
        if event["event"] != "finished":
            assert all(f"`{name}`" in row for name in event.keys() - {"time", "step", "event"})


def test_a_run_tells_what_happened_to_it(trained_run: Path) -> None:
    events = read_events(trained_run)
    assert [event["event"] for event in events if event["event"] != "saved"] == ["started", "counted", "finished"]
    assert [event["step"] for event in events if event["event"] == "saved"] == [4, 8, 12]
    counted = next(event for event in events if event["event"] == "counted")
    # Of so small a model a good part is elementwise.
    assert 1.0 < counted["xla_flops"] / counted["formula_flops"] < 1.25


def test_numbers_of_a_run_agree_with_each_other(trained_run: Path) -> None:
    counted = next(event for event in read_events(trained_run) if event["event"] == "counted")["formula_flops"]
    for record in read_metrics(trained_run):
        if "split" in record:
            continue
        assert record["step_seconds_p50"] <= record["step_seconds_p90"] <= record["step_seconds_max"]
        for kind in ("gradient", "parameter", "update"):
            parts = [value for name, value in record.items() if name.startswith(f"{kind}_norm/")]
            # Six digits of each part are written.
            np.testing.assert_allclose(np.sqrt(np.sum(np.square(parts))), record[f"{kind}_norm"], rtol=1e-4)
        # Every step is logged, so each line is of one step.
        assert record["flops_per_second"] * record["step_seconds_max"] == pytest.approx(counted)
        assert record["tokens_per_second"] * record["step_seconds_max"] == pytest.approx(record["tokens"])
        assert 0 <= record["padding"] < 1
        assert record["resident_bytes"] > 50e6


def small_config(out: Path, **settings: Any) -> RunConfig:
    return RunConfig(model=preset("t5-v1.1-small"), train=TrainConfig(**settings), out=str(out))


def test_peaks_make_mfu_and_unknown_devices_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"step": 1, "tokens": 10.0}
    batch = {"encoder_input_tokens": np.zeros((2, 8)), "decoder_input_tokens": np.zeros((2, 4))}
    monkeypatch.setattr(watching, "peak_flops", lambda kind, dtype, precision: 1e12 if dtype == "bfloat16" else None)
    for dtype in ("bfloat16", "float32"):
        (tmp_path / dtype).mkdir()
        watch = Watch(small_config(tmp_path, dtype=dtype), make_mesh(), tmp_path / dtype, 0, EventLog(tmp_path / dtype))
        watch.step(step, batch, logged=True)
        watch.close()
        (record,) = read_metrics(tmp_path / dtype)
        if dtype == "bfloat16":
            assert record["mfu"] == pytest.approx(record["flops_per_second"] / 8e12)  # eight devices
        else:
            assert "mfu" not in record


def test_processes_other_than_the_first_write_nothing(tmp_path: Path) -> None:
    watch = Watch(small_config(tmp_path, wandb="letters"), make_mesh(), tmp_path, 0, None)
    watch.event("saved", 1)
    watch.write({"step": 1})
    watch.close()
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_is_asked_for_before_anything_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"train\.wandb=letters needs the wandb package"):
        Watch(small_config(tmp_path, wandb="letters"), make_mesh(), tmp_path, 0, EventLog(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_continues_is_not_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"encoder_input_tokens": np.zeros((2, 8)), "decoder_input_tokens": np.zeros((2, 4))}
    calls = []

    def program(batch: Any) -> Any:
        calls.append(batch)
        return batch["encoder_input_tokens"] @ np.ones((8, 8))

    for start in range(3):
        monkeypatch.setattr(watching, "_COUNTED", {})  # another process
        watch = Watch(small_config(tmp_path), make_mesh(), tmp_path, start, EventLog(tmp_path))
        watch.count(start + 1, program, batch)
        watch.count(start + 2, program, batch)
        watch.close()
    counted = [event for event in read_events(tmp_path) if event["event"] == "counted"]
    assert len(calls) == 1
    assert [event["step"] for event in counted] == [1, 2, 3]
    assert {event["xla_flops"] for event in counted} == {2.0 * 2 * 8 * 8}


def test_how_a_run_ends_is_an_event(tmp_path: Path) -> None:
    watch = Watch(small_config(tmp_path), make_mesh(), tmp_path, 0, EventLog(tmp_path))
    for error in (FloatingPointError("step 3:\n the loss is nan"), KeyboardInterrupt(), OSError("the disk is gone")):
        watch.ended(error, 3)
    watch.close()
    ends = [(event["event"], event["error"]) for event in read_events(tmp_path)[1:]]
    assert ends == [
        ("stopped", "FloatingPointError: step 3: the loss is nan"),
        ("interrupted", "KeyboardInterrupt: "),
        ("failed", "OSError: the disk is gone"),
    ]


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_that_skips_a_step_says_where_it_went_wrong_traces_and_tells_others(
    tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run for the profiler, Weights & Biases, and a batch that is not finite, since a run takes its time."""
    logged: list[dict[str, Any]] = []
    wandb = ModuleType("wandb")
    run = type(
        "Run",
        (),
        {"define_metric": lambda *a, **k: None, "log": lambda self, x: logged.append(x), "finish": lambda self: None},
    )
    wandb.init = lambda **settings: run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    put_batch = loop.sharding.put_batch
    calls = iter(range(1000))

    def spoilt(mesh: Any, batch: Any) -> Any:
        # The first batch is of the evaluation that is compiled at the beginning.
        if next(calls) == 3:
            batch = {**batch, "decoder_loss_weights": batch["decoder_loss_weights"] * np.float32(np.nan)}
        return put_batch(mesh, batch)

    monkeypatch.setattr(loop.sharding, "put_batch", spoilt)
    make_train_step = loop.make_train_step

    def spoiling(*args: Any, **kwargs: Any) -> Any:
        step = make_train_step(*args, **kwargs)

        def call(state: Any, batch: Any) -> Any:
            state, metrics = step(state, batch)
            if int(state.step) == 2:  # as if the optimizer had led these two modules too far
                far = dict.fromkeys(("update_norm", "update_norm/head", "update_norm/decoder/layers/mlp"), np.inf)
                metrics = Scalars.of({**metrics, **far, "finite": 0.0})
            return state, metrics

        return call

    monkeypatch.setattr(loop, "make_train_step", spoiling)
    notes = Notes()
    out = tmp_path / "run"
    settings = ["train.steps=4", "train.checkpoint_every=0", "train.nonfinite=skip", "train.wandb=letters"]
    train(resolve(None, [*tiny_settings, *settings, "train.profile=2:3", f"out={out}"]).config, notes)

    far, skipped = (event for event in read_events(out) if event["event"] == "skipped")
    details = {"step": 2, "kind": "update", "module": "decoder/layers/mlp", "value": "inf"}
    assert {name: far[name] for name in details} == details
    assert any(
        "step 2 was skipped: the norm of the update is inf; loss and gradients are finite" in note
        for note in notes.notes
    )
    details = {"step": 3, "kind": "batch", "module": "decoder_loss_weights", "value": "nan"}
    assert {name: skipped[name] for name in details} == details
    assert any(
        "step 3 was skipped" in note and "the batch's decoder_loss_weights holds nan" in note for note in notes.notes
    )
    lines = {record["step"]: record for record in read_metrics(out) if "split" not in record}
    assert (lines[3]["loss"], lines[3]["finite"], lines[4]["finite"], lines[4]["skipped"]) == (None, 0, 1, 1)
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert [event["step"] for event in read_events(out) if event["event"] == "profiled"] == [3]
    assert list((out / "profile").rglob("*.xplane.pb"))
    assert [values["step"] for values in logged if "train/loss" in values] == [1, 2, 3, 4]
