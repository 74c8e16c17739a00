"""`t5x-lite report`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_lite.cli.main import main


def test_writes_a_page_about_runs(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert main(["report", str(trained_run), "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(output)
    assert found["logged_steps"] == 12
    page = output.read_text()
    assert '"title":"Training loss"' in page
    assert '"kind":"saved"' in page


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_report_needs_no_jax(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['jax'] = None; from t5x_lite.cli.main import main;"
        " sys.exit(main(['report', sys.argv[1], '--output', sys.argv[2]]))"
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    output = tmp_path / "page.html"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output)
