"""The README's code blocks and table, run from top to bottom as a reader would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()

BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
TABLE = [line.split("|") for line in TEXT.splitlines() if line.startswith("| ") and "`" in line]
COMMANDS = [command.strip().strip("`") for *_, command, _ in TABLE]

# Not from inside the test suite: `.ci/run` runs these two as they stand.
INSTALL = ("pip install . && t5x-lite demo", "pip install '.[test]' && pytest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def run(kind: str, code: str, folder: Path) -> str:
    argv = ["bash", "-euc", code] if kind == "bash" else [sys.executable, "-c", code]
    # The reader has one device, not the eight that the tests ask for, and `t5x-lite` on the path.
    flags = {"XLA_FLAGS": "", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        argv, cwd=folder, env={**os.environ, **flags}, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_begins_with_the_two_commands() -> None:
    assert tuple(code.strip() for _, code in BLOCKS[:2]) == INSTALL
    for line in INSTALL:
        install, then = line.split(" && ")
        for command in (install.replace("pip install", "pip install --quiet"), then):
            assert f"\n{command}" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("index", range(2, len(BLOCKS)))
def test_block(index: int, folder: Path) -> None:
    # In order: later blocks use what earlier ones have made.
    assert run(*BLOCKS[index], folder).strip()


def test_the_tasks_of_one_s_own_on_the_page_about_data(folder: Path) -> None:
    page = (ROOT / "docs" / "training_data.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    run("python", code, folder)  # on the file that a block above has written
    assert "question: " not in (folder / "sums.jsonl").read_text()
    assert (folder / "runs" / "mine" / "checkpoints" / "2").is_dir()


def test_the_first_model_has_learned_something(folder: Path) -> None:
    (results,) = (folder / "runs" / "first" / "eval").glob("*.json")
    metrics = json.loads(results.read_text())
    assert metrics["loss"] < metrics["unigram_entropy"]


@pytest.mark.parametrize("command", COMMANDS)
def test_table(command: str, folder: Path) -> None:
    if command.startswith("pytest "):
        # The suite runs these itself; here it matters that they are there.
        assert all((ROOT / path).exists() for path in command.split()[1:])
    elif command != "t5x-lite demo":
        assert run("bash", command, folder).strip()
