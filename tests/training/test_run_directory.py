"""What may differ between two starts of a run, and what may not."""

from pathlib import Path

import pytest

from t5x_lite import run_directory
from t5x_lite.config import RunConfig, resolve
from t5x_lite.errors import InputError


@pytest.fixture
def begun(tmp_path: Path):
    """A function that says whether a run with some settings goes on with others, on the same data."""

    def config(*settings: str) -> RunConfig:
        return resolve(None, ["model=t5-small", f"out={tmp_path}", *settings]).config

    def check(first: list[str], then: list[str]) -> None:
        run_directory.record(tmp_path, config(*first), "the data")
        run_directory.check_same_run(tmp_path, config(*first, *then), "the data")

    return check


@pytest.mark.parametrize(
    "setting",
    ["data.cache_dir=elsewhere", "data.data_dir=there", "data.workers=2", "data.path=moved.txt", "mesh=data:2"],
)
def test_what_has_no_part_in_the_order_of_training_may_change(begun, setting: str) -> None:
    begun([], [setting])


def test_the_files_of_a_task_may_move_and_nothing_else_of_it(begun) -> None:
    tasks = "data.tasks=[{{path: {}, rate: {}, name: a}}, {{path: b.jsonl, eval_path: {}}}]"
    begun([tasks.format("a.txt", 2, "c.jsonl")], [tasks.format("moved.txt", 2, "d.jsonl")])
    with pytest.raises(InputError, match=r"holds a run with data\.tasks="):
        begun([tasks.format("a.txt", 2, "c.jsonl")], [tasks.format("a.txt", 3, "c.jsonl")])


def test_what_training_follows_from_may_not_change(begun) -> None:
    for setting in ("data.packing=true", "data.prefix=x", "train.batch_size=8", "data.on_error=skip"):
        with pytest.raises(InputError, match=f"holds a run with {setting.split('=')[0]}="):
            begun([], [setting])


def test_what_cannot_be_a_run_directory(tmp_path: Path) -> None:
    def refused(out: Path) -> str:
        with pytest.raises(InputError) as error, run_directory.lock(out):
            pass
        return str(error.value)

    (tmp_path / "file").touch()
    (tmp_path / "config.yaml").touch()
    assert refused(tmp_path / "file") == f"out={tmp_path}/file cannot be a run directory: File exists"
    assert "cannot be a run directory: " in refused(Path("/proc/nowhere/run"))
    assert f"holds the checkpoints of the run '{tmp_path}'" in refused(tmp_path / "checkpoints")
