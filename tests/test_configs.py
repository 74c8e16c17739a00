"""Every recipe in configs/ is complete: it resolves, and says how to run it and what to expect. So do launch files."""

import argparse
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from t5x_lite.cli import train
from t5x_lite.cli.settings import read_settings
from t5x_lite.config import RunConfig, resolve

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "configs" / "launch"
CONFIGS = sorted(path for path in (ROOT / "configs").glob("**/*.yaml") if path.parent != LAUNCH)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_resolves_and_explains_itself(path: Path) -> None:
    resolve(path)
    text = path.read_text()
    assert text.startswith("# ")
    assert f"t5x-lite train configs/{path.name}" in text
    assert "# Expected:" in text


def test_there_are_some() -> None:
    assert CONFIGS


def settings_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Returns the configuration that the words after `t5x-lite train` ask for; what a shell puts in is left out."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    monkeypatch.chdir(ROOT)
    args = parser.parse_intermixed_args([word for word in words if "$" not in word])
    assert args.unfinished_status == 75
    return read_settings(args.settings).config


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_run_a_command_that_resolves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert f"configs/launch/{path.name}" in text.split("set -euo pipefail")[0]  # how to use it, on top
    command = text.split("set -euo pipefail")[1].replace("\\\n", " ").split("t5x-lite train ")[1].splitlines()[0]
    words = shlex.split(command.split("||")[0].rstrip().removesuffix('$*"').removesuffix('"$@"'))
    assert settings_of(words, monkeypatch).out.startswith(("/shared/", "/mnt/shared/"))


def test_the_launch_file_for_gke_runs_a_command_that_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (LAUNCH / "gke.yaml").read_text()
    assert "#   kubectl apply -f configs/launch/gke.yaml" in text
    spec = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["completions"] == spec["parallelism"] == 4
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75],
    }
    assert container["command"][:2] == ["t5x-lite", "train"]
    config = settings_of(container["command"][2:], monkeypatch)
    assert config.out.startswith(container["volumeMounts"][0]["mountPath"])
