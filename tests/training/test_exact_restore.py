"""A restored state is the saved one, every leaf to the bit, wherever it is restored; a save that went wrong shows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite import sharding
from t5x_lite.run_directory import complete_steps
from t5x_lite.training import checkpoint_writing as writing
from t5x_lite.training.checkpoint_files import Record, read_numpy, read_record, stored_arrays, why_kept
from t5x_lite.training.checkpoints import Checkpointer, load_params, save_params
from t5x_lite.training.integrity import UnreadableCheckpoint
from t5x_lite.training.precision import LossScale
from t5x_lite.training.state import TrainState

MESHES = {"4x2": "fsdp:4,model:2", "2x4": "fsdp:2,model:4"}


def mesh_of(name: str) -> Mesh:
    return sharding.make_mesh("data:1", jax.devices()[:1]) if name == "one" else sharding.make_mesh(MESHES[name])


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 160, 136)).astype(np.float32)  # large enough that Adafactor factors it
    kernel[0, 3, 7], kernel[1, 0, 0], kernel[1, 1, 1] = np.nan, -0.0, 1e-42
    return {
        "layers": {"kernel": kernel, "scale": rng.normal(size=(2, 8)).astype(np.float32)},
        "frozen": {"table": rng.normal(size=(16, 8)).astype(np.float32)},
    }


TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(optax.linear_schedule(1.0, 0.0, 10), mu_dtype=jnp.bfloat16),
    "adafactor": lambda: optax.adafactor(1e-3),
    "sgd": lambda: optax.sgd(1e-3),  # whose state holds no array
    "frozen": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"train": optax.lion(1e-3), "leave": optax.set_to_zero()}, {"layers": "train", "frozen": "leave"}
        ),
    ),
}


def state_of(name: str, mesh: Mesh, step: int = 5) -> TrainState:
    """A state as after some steps, where every leaf has values of its own."""
    split = {2: PartitionSpec("fsdp", "model"), 3: PartitionSpec(None, "fsdp", "model")}

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        even = all(size % 8 == 0 for size in x.shape[-2:])
        return jax.device_put(x, NamedSharding(mesh, split.get(x.ndim, PartitionSpec()) if even else PartitionSpec()))

    def fill(x: jax.Array) -> np.ndarray:
        values = np.random.default_rng(x.size).normal(size=x.shape) * 100
        return values.astype(x.dtype)

    tree = params()
    finite = jax.tree.map(np.nan_to_num, tree)
    return TrainState(
        step=put(np.int32(step)),
        params=jax.tree.map(put, tree),
        opt_state=jax.tree.map(lambda x: put(fill(x)), TRANSFORMATIONS[name]().init(finite)),
        skipped=put(np.int32(2)),
        loss_scale=LossScale(scale=put(np.float32(2**13)), good_steps=put(np.int32(77))),
        ema=jax.tree.map(lambda x: put(x / 3), tree),
    )


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_identical(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(directory: Path, state: TrainState, loss: float | None = None) -> None:
    checkpointer = Checkpointer(directory)
    checkpointer.save(state, loss)
    checkpointer.close()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_from_mesh_to_mesh_to_one_device_to_numpy(name: str, tmp_path: Path) -> None:
    state, places = state_of(name, mesh_of("4x2")), ["2x4", "one"]
    for place in places:
        save(tmp_path / place, state)  # what was restored in the round before, but the first
        wanted = state_of(name, mesh_of(place))
        state, notes = Checkpointer(tmp_path / place).restore(abstract(wanted))
        assert notes == []
        assert state is not None
        assert_identical(state, wanted)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, wanted)
    found = read_numpy(tmp_path / "one" / "5")
    assert_identical(found["params"], params())
    assert_identical(found["ema"], jax.tree.map(lambda x: x / 3, params()))
    assert_identical(found["progress"]["loss_scale"], {"scale": np.float32(2**13), "good_steps": np.int32(77)})
    assert found["progress"]["skipped"] == 2
    stored = dict(writing.named({"optimizer": state.opt_state}))
    assert {n for n in stored_arrays(tmp_path / "one" / "5") if n.startswith("optimizer/")} == stored.keys()


READ_NUMPY = """
import sys
import numpy as np
from t5x_lite.training.checkpoint_files import read_numpy
tree = read_numpy(sys.argv[1])
assert tree["params"]["layers"]["kernel"].dtype == np.float32
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was touched"
"""


def test_numpy_needs_no_device(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints", state_of("adamw", mesh_of("4x2")))
    env = {**os.environ, "JAX_PLATFORMS": "none_such"}
    done = subprocess.run(
        [sys.executable, "-c", READ_NUMPY, str(tmp_path / "run")], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_running_mean_is_what_is_loaded(tmp_path: Path) -> None:
    state = state_of("sgd", mesh_of("2x4"))
    save(tmp_path / "checkpoints", state)
    wanted = abstract(state).params
    loaded, checkpoint, notes = load_params(tmp_path, wanted)
    assert (checkpoint, notes) == (tmp_path / "checkpoints" / "5", [])
    assert_identical(loaded, state.ema)
    save(tmp_path / "without" / "checkpoints", replace(state, ema=None))
    assert_identical(load_params(tmp_path / "without", wanted)[0], state.params)


def test_parameters_alone_in_another_dtype(tmp_path: Path) -> None:
    state = state_of("sgd", mesh_of("2x4"))
    save_params(tmp_path / "0", state.params)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), state.params)
    loaded, _, _ = load_params_of(tmp_path / "0", wanted)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state.params), strict=True):
        assert a.dtype == jnp.bfloat16
        # As float32, where NumPy knows that NaN equals NaN.
        np.testing.assert_array_equal(np.float32(a), np.float32(np.asarray(b).astype(jnp.bfloat16)))


def load_params_of(path: Path, wanted: Any) -> Any:
    run = path.parent / "run" / "checkpoints"
    run.mkdir(parents=True)
    path.rename(run / path.name)
    return load_params(run / path.name, wanted)


def test_a_checkpoint_from_before_there_was_progress(tmp_path: Path) -> None:
    state = replace(state_of("adamw", mesh_of("4x2")), ema=None)
    with ocp.CheckpointManager(tmp_path) as manager:  # as it was written then
        for step in (3, 4):
            args = ocp.args.Composite(
                params=ocp.args.StandardSave(state.params), optimizer=ocp.args.StandardSave(state.opt_state)
            )
            manager.save(step, args=args)
    assert read_record(tmp_path / "3") == Record()
    wanted = replace(state_of("adamw", mesh_of("2x4")), ema=None)
    restored, notes = Checkpointer(tmp_path).restore(abstract(wanted))
    assert notes == []
    assert restored is not None
    assert restored.loss_scale is not None
    assert_identical((restored.params, restored.opt_state), (wanted.params, wanted.opt_state))
    assert (int(restored.step), int(restored.skipped), float(restored.loss_scale.scale)) == (4, 0, 2**16)
    assert_identical(load_params_of(tmp_path / "3", abstract(wanted).params)[0], wanted.params)


def test_what_is_read_back_must_be_what_was_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of("adamw", mesh_of("4x2"))
    save(tmp_path, state)
    start = writing.start_writing

    def wrong(partial: Path, items: dict[str, Any]) -> list[Any]:
        kernel = items["params"]["layers"]["kernel"]
        bad = {"layers": {**items["params"]["layers"], "kernel": kernel.at[1, 2, 3].multiply(1.0000001)}}
        return start(partial, {**items, "params": {**items["params"], **bad}})

    monkeypatch.setattr(writing, "start_writing", wrong)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(replace(state, step=state.step + 1))
    with pytest.raises(RuntimeError, match=r"params/layers/kernel, as read back from .* is not what was saved"):
        checkpointer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_what_comes_into_memory_must_be_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of("adamw", mesh_of("4x2"))
    save(tmp_path, state)
    restore = ocp.PyTreeCheckpointHandler.restore

    def wrong(self: Any, directory: Any, **options: Any) -> Any:
        tree = restore(self, directory, **options)
        if directory.name == "ema":
            tree["layers"]["scale"] = -tree["layers"]["scale"]
        return tree

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", wrong)
    with pytest.raises(RuntimeError, match=r"ema/layers/scale of checkpoint .*/5 is not what was saved"):
        Checkpointer(tmp_path).restore(abstract(state))
    assert complete_steps(tmp_path) == [5]


def test_numpy_refuses_what_is_damaged(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", state_of("sgd", mesh_of("one")))
    (tmp_path / "checkpoints" / "5" / "ema" / "_METADATA").write_text("{}")
    with pytest.raises(UnreadableCheckpoint, match="ema/_METADATA has changed"):
        read_numpy(tmp_path)


def test_a_file_that_does_not_belong_there_is_told_and_left_alone(tmp_path: Path) -> None:
    state = state_of("sgd", mesh_of("one"))
    save(tmp_path, state)
    (tmp_path / "5" / "params" / "notes.txt").write_text("mine")
    restored, notes = Checkpointer(tmp_path).restore(abstract(state))
    assert_identical(restored, state)
    assert len(notes) == 1
    assert "5/params/notes.txt is no part of the checkpoint" in notes[0]
    assert (tmp_path / "5" / "params" / "notes.txt").exists()


def test_why_each_is_kept() -> None:
    losses = {10: float("nan"), 20: 1.0, 25: 3.0, 30: 1.0, 40: None, 45: 2.0, 47: None}
    assert why_kept(losses, keep=2, keep_every=20) == {
        10: [],
        20: ["every 20"],
        25: [],
        30: ["best"],  # of two as good, the later
        40: ["every 20"],
        45: ["last 2"],
        47: ["latest"],
    }
    assert why_kept({}, 3, 0) == {}


def test_keeps_every_nth_for_good(tmp_path: Path) -> None:
    state = replace(state_of("sgd", mesh_of("one")), ema=None)
    saved: list[int] = []
    checkpointer = Checkpointer(tmp_path, keep=1, keep_every=4, saved=saved.append)
    for step in range(2, 13, 2):
        checkpointer.save(replace(state, step=jnp.int32(step)), loss={6: 0.5}.get(step, 1.0))
    checkpointer.close()
    assert complete_steps(tmp_path) == [4, 6, 8, 12]
    assert saved == [2, 4, 6, 8, 10, 12]
    assert read_record(tmp_path / "6").loss == 0.5
    assert read_record(tmp_path / "6").fingerprints.keys() == stored_arrays(tmp_path / "6").keys()


def test_what_was_cut_short_is_removed_at_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, state_of("sgd", mesh_of("one")))
    for name in (".6.partial", ".4.deleted", "7.orbax-checkpoint-tmp-123"):
        (tmp_path / name / "params").mkdir(parents=True)
    Checkpointer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_memory_of_saves_and_restores(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent.parent / "benchmarks" / "checkpoint_memory.py"
    command = [sys.executable, str(script), "--megabytes", "150", "--saves", "12", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    figures = {line["figure"]: line["value"] for line in map(json.loads, done.stdout.splitlines())}
    assert figures["save_peak_over_state"] <= 1.5
    assert figures["growth"] < 0.05
    assert figures["restore_peak_over_state"] <= 2  # the restored state itself among it
    assert figures["disk_over_state"] < 1.05  # which the look at free space counts on
