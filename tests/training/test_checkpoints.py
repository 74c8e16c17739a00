"""Checkpoints: what was saved comes back, on any mesh; what is damaged is noticed, named and passed over."""

import asyncio
import math
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_lite import sharding
from t5x_lite.errors import InputError
from t5x_lite.run_directory import complete_steps
from t5x_lite.training import checkpoints, integrity
from t5x_lite.training.checkpoints import Checkpointer
from t5x_lite.training.state import TrainState


def make_state(step: int, mesh_text: str = "data:4,model:2") -> TrainState:
    """A small state, split over a mesh, that differs from step to step."""
    mesh = sharding.make_mesh(mesh_text)
    kernel = jax.random.normal(jax.random.key(step), (64, 128))
    return TrainState(
        step=jax.device_put(jnp.int32(step), sharding.replicated(mesh)),
        params={"kernel": jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("fsdp", "model")))},
        opt_state={"moment": jax.device_put(kernel.sum(0), NamedSharding(mesh, PartitionSpec("model")))},
        skipped=jax.device_put(jnp.int32(step // 2), sharding.replicated(mesh)),
    )


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_all(directory: Path, steps: list[int], keep: int = 3, losses: dict[int, float] | None = None) -> None:
    checkpointer = Checkpointer(directory, keep)
    for step in steps:
        checkpointer.save(make_state(step), (losses or {}).get(step))
    checkpointer.close()


def largest_file(path: Path) -> Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def assert_same(found: TrainState, expected: TrainState) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("mesh", ["data:8", "data:2,model:4", "fsdp:8"])
def test_restores_bit_for_bit_onto_another_mesh(tmp_path: Path, mesh: str) -> None:
    save_all(tmp_path, [7])
    wanted = abstract(make_state(7, mesh))
    state, notes = Checkpointer(tmp_path).restore(wanted)
    assert notes == []
    assert state is not None
    assert_same(state, make_state(7))
    assert state.params["kernel"].sharding == wanted.params["kernel"].sharding


def test_keeps_the_latest_and_the_best(tmp_path: Path) -> None:
    save_all(tmp_path, [1, 2, 3, 4, 5], keep=2, losses={1: 3.0, 2: 1.0, 3: 2.0})
    assert complete_steps(tmp_path) == [2, 4, 5]


def test_no_checkpoint_is_no_state(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "new").restore(abstract(make_state(1))) == (None, [])


def flip_a_bit(path: Path) -> None:
    file = largest_file(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def truncate(path: Path) -> None:
    file = largest_file(path)
    file.write_bytes(file.read_bytes()[:100])


def remove_a_file(path: Path) -> None:
    largest_file(path).unlink()


def remove_an_item(path: Path) -> None:
    shutil.rmtree(path / "optimizer")


def truncate_unsealed(path: Path) -> None:
    (path / integrity.SEAL).unlink()
    truncate(path)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, remove_a_file, remove_an_item, truncate_unsealed])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path, damage) -> None:
    save_all(tmp_path, [1, 2])
    damage(tmp_path / "2")
    checkpointer = Checkpointer(tmp_path)
    state, notes = checkpointer.restore(abstract(make_state(1)))
    assert state is not None
    assert_same(state, make_state(1))
    assert len(notes) == 1
    assert "/2 " in notes[0]
    assert "set aside as 2.unreadable" in notes[0]
    assert "\n" not in notes[0]
    assert (tmp_path / "2.unreadable").is_dir()
    # The step can be reached and saved again.
    checkpointer.save(make_state(2))
    checkpointer.close()
    state, notes = Checkpointer(tmp_path).restore(abstract(make_state(1)))
    assert state is not None
    assert notes == []
    assert_same(state, make_state(2))


def test_a_checkpoint_without_its_seal_is_not_trusted(tmp_path: Path) -> None:
    save_all(tmp_path, [1, 2])
    (tmp_path / "2" / integrity.SEAL).unlink()
    state, notes = Checkpointer(tmp_path).restore(abstract(make_state(1)))
    assert state is not None
    assert_same(state, make_state(1))
    assert "checksums.json is missing; set aside as 2.unreadable" in notes[0]


def test_whatever_ends_the_saving_thread_is_raised(tmp_path: Path) -> None:
    def leave(step: int) -> None:
        raise SystemExit(f"after step {step}")

    checkpointer = Checkpointer(tmp_path, saved=leave)
    checkpointer.save(make_state(1))
    with pytest.raises(SystemExit, match="after step 1"):
        checkpointer.wait()
    checkpointer.close()  # once


def test_all_damaged_is_an_error_that_names_them(tmp_path: Path) -> None:
    save_all(tmp_path, [1, 2])
    flip_a_bit(tmp_path / "1")
    truncate(tmp_path / "2")
    for _ in range(2):  # asking again is no way to lose them
        with pytest.raises(InputError, match=r"no readable checkpoint is left .*/2 .*/1 "):
            Checkpointer(tmp_path).restore(abstract(make_state(1)))
        assert complete_steps(tmp_path) == [1, 2]


def test_nothing_begins_anew_over_checkpoints_that_were_set_aside(tmp_path: Path) -> None:
    save_all(tmp_path / "checkpoints", [1])
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "1.unreadable")
    with pytest.raises(InputError, match="no readable checkpoint is left"):
        Checkpointer(tmp_path / "checkpoints").restore(abstract(make_state(1)))


def test_a_fault_that_is_not_in_the_files_sets_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_all(tmp_path, [1, 2])

    def busy(*args: object, **kwargs: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: try again")

    monkeypatch.setattr(checkpoints.ocp.PyTreeCheckpointHandler, "restore", busy)
    with pytest.raises(RuntimeError, match="try again"):
        Checkpointer(tmp_path).restore(abstract(make_state(1)))
    assert complete_steps(tmp_path) == [1, 2]


def test_a_checkpoint_has_its_name_only_when_it_is_sealed(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(make_state(1))
    deadline = time.monotonic() + 60
    while not (tmp_path / "1").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (tmp_path / "1" / integrity.SEAL).exists()
    checkpointer.close()


def test_a_half_written_directory_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_all(tmp_path, [1])
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "2.orbax-checkpoint-tmp" / "optimizer")
    state, notes = Checkpointer(tmp_path).restore(abstract(make_state(1)))
    assert notes == []
    assert state is not None
    assert_same(state, make_state(1))


def test_another_model_is_an_error_not_damage(tmp_path: Path) -> None:
    save_all(tmp_path, [1])
    other = abstract(make_state(1))
    other.params["bias"] = other.opt_state["moment"]
    with pytest.raises(InputError, match=r"does not fit the model: params/bias is absent there and \(128,\) here"):
        Checkpointer(tmp_path).restore(other)
    assert complete_steps(tmp_path) == [1]


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(make_state(1))
    checkpointer.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    with pytest.raises(InputError, match=r"checkpoint of step 2 .* the one of step 1 is kept"):
        checkpointer.save(make_state(2))
    assert complete_steps(tmp_path) == [1]


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_checkpoints import make_state
from t5x_lite.errors import InputError
from t5x_lite.training.checkpoints import Checkpointer
checkpointer = Checkpointer(Path(sys.argv[1]))
checkpointer.save(make_state(1))
checkpointer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
try:
    checkpointer.save(make_state(2))
    checkpointer.wait()
except InputError as error:
    print("InputError:", error)
"""


def test_a_disk_that_fills_up_during_a_save_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    # A limit on the size of files stands for the full disk: writes fail half-way through, with real system errors.
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft in (resource.RLIM_INFINITY, -1) or soft > 1_000_000
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "InputError: could not save" in done.stdout, done.stdout + done.stderr
    assert "the one of step 1 is kept" in done.stdout
    state, notes = Checkpointer(tmp_path).restore(abstract(make_state(1)))
    assert notes == []
    assert state is not None
    assert_same(state, make_state(1))


def test_loss_absent_never_makes_the_best(tmp_path: Path) -> None:
    save_all(tmp_path, [1, 2, 3], keep=1, losses={1: math.pi})
    assert complete_steps(tmp_path) == [1, 3]


def test_saves_and_restores_where_an_event_loop_runs(tmp_path: Path) -> None:
    async def cell() -> None:  # of a notebook
        save_all(tmp_path, [1])
        state, notes = Checkpointer(tmp_path).restore(abstract(make_state(1)))
        assert notes == []
        assert state is not None
        assert_same(state, make_state(1))

    asyncio.run(cell())
