"""Weights & Biases, or what stands in its place: the package itself is never installed for tests."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from t5x_lite.config import resolve
from t5x_lite.errors import InputError
from t5x_lite.training.loop import train
from t5x_lite.training.weights_and_biases import WandbRun, check_installed


class FakeRun:
    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.metrics: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Puts a module in the package's place, and returns the runs that were begun with it."""
    begun: list[FakeRun] = []
    wandb = ModuleType("wandb")

    def init(**settings: Any) -> FakeRun:
        begun.append(FakeRun(settings))
        return begun[-1]

    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return begun


def test_records_go_to_the_project_under_tensorboard_s_names(runs: list[FakeRun], tmp_path: Path) -> None:
    out = tmp_path / "first"
    out.mkdir()
    run = WandbRun("letters", out, {"train.steps": 3})
    run.write({"time": 5.0, "step": 2, "loss": 1.5, "gradient_norm/head": 0.1})
    run.write({"step": 2, "split": "validation", "loss": 1.25})
    run.close()
    (fake,) = runs
    assert fake.settings["project"] == "letters"
    assert fake.settings["name"] == "first"
    assert fake.settings["config"] == {"train.steps": 3}
    assert fake.metrics == [("step", None), ("*", "step")]
    assert fake.logged == [
        {"step": 2, "train/time": 5.0, "train/loss": 1.5, "train/gradient_norm/head": 0.1},
        {"step": 2, "validation/loss": 1.25},
    ]
    assert fake.finished


def test_a_run_that_continues_goes_on_under_its_id(runs: list[FakeRun], tmp_path: Path) -> None:
    for _ in range(2):
        WandbRun("letters", tmp_path, {}).close()
    first, second = (run.settings for run in runs)
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"


def test_a_missing_package_is_one_line_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_installed("")
    for begin in (lambda: check_installed("letters"), lambda: WandbRun("letters", tmp_path, {})):
        with pytest.raises(InputError, match=r"train\.wandb=letters needs the wandb package: pip install"):
            begin()


def test_a_run_asks_for_the_package_before_it_reads_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = ["train.wandb=letters", "data.path=nowhere.txt", f"out={tmp_path / 'run'}"]
    with pytest.raises(InputError, match="needs the wandb package"):
        train(resolve(None, settings).config)
    assert not (tmp_path / "run").exists()


def test_what_the_package_complains_of_is_one_line_too(
    runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def init(**settings: Any) -> None:
        raise RuntimeError("no API key configured.\n  Use wandb login")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(InputError) as caught:
        WandbRun("letters", tmp_path, {})
    assert "(no API key configured. Use wandb login); WANDB_MODE=offline" in str(caught.value)
    assert "\n" not in str(caught.value)
