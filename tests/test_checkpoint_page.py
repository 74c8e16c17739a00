"""The code on the page about checkpoints, run from top to bottom beside a finished run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(trained_run, folder / "runs" / "first")
    return folder


@pytest.mark.parametrize(("kind", "code"), BLOCKS, ids=range(len(BLOCKS)))
def test_block(kind: str, code: str, folder: Path) -> None:
    argv = ["bash", "-euc", code] if kind == "bash" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        argv, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    assert done.stdout.strip()


def test_a_checkpoint_holds_what_the_page_says(trained_run: Path) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|", PAGE, flags=re.MULTILINE)
    there = {path.name for path in (trained_run / "checkpoints" / "8").iterdir()}
    assert there == set(rows) - {"ema"}
