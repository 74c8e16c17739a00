"""The demo's verdict. That it trains for real, and how well, is shown by running it, which CI does."""

from pathlib import Path

import pytest

from t5x_lite.cli import demo
from t5x_lite.cli.main import main

GOOD = {
    "heldout_loss": 4.4,
    "unigram_entropy": 5.2,
    "bits_per_byte": 3.0,
    "topic_accuracy": 0.7,
    "majority_accuracy": 1 / 6,
    "reloaded_equals_trained": True,
}


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, 0), ({"heldout_loss": 4.9}, 1), ({"topic_accuracy": 0.3}, 1), ({"reloaded_equals_trained": False}, 1)],
)
def test_fails_unless_everything_is_clearly_beaten(
    change: dict, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "demonstrate", lambda out, overrides: ({**GOOD, **change}, ["a line"]))
    assert main(["demo"]) == status
    out = capsys.readouterr().out
    assert "a line" in out
    assert ("both baselines are clearly beaten" in out) == (status == 0)


def test_does_not_write_over_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_settings_are_valid() -> None:
    from t5x_lite.config import resolve

    resolve(None, demo.PRETRAIN)
    resolve(None, demo.FINETUNE)
