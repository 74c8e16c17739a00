"""The campaign of random faults (benchmarks/faults.py) in short: a run of each layout, with faults of main kinds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "faults.py"
KINDS = {
    1: ["bit-flipped checkpoint file", "SIGTERM", "full disk", "clock jump"],
    2: ["kill -9 of one process"],
}


@pytest.mark.parametrize("processes", KINDS)
def test_disturbed_runs_go_on_bitwise_or_say_in_a_line_why_not(processes: int) -> None:
    kinds = KINDS[processes]
    command = [sys.executable, str(CAMPAIGN), "--runs", "1", "--faults", str(len(kinds)), "--kinds", ",".join(kinds)]
    done = subprocess.run(
        [*command, "--processes", str(processes)], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (reports, done.stderr)
    assert sorted(report["fault"] for report in reports) == sorted(kinds)
    assert {report["trace"] for report in reports} == {"bitwise equal"}
