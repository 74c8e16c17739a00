"""Checkpoints of several processes: saved together, restored by any number, and no error leaves one waiting."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_lite.run_directory import complete_steps
from t5x_lite.training.checkpoint_files import read_numpy

# A process: argv is the coordinator's port, its number, how many there are, the directory, and what to do there.
PROCESS = """
import json, os, sys
from pathlib import Path
port, index, count, directory, what = sys.argv[1:]
index, count, directory = int(index), int(count), Path(directory)
import jax
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from t5x_lite import sharding
from t5x_lite.training import checkpoint_writing as writing
from t5x_lite.training.checkpoints import Checkpointer
from t5x_lite.training.state import TrainState

mesh = sharding.make_mesh("fsdp:2,model:2")

def put(value, *names):
    value = np.asarray(value)
    return jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, PartitionSpec(*names)), lambda part: value[part])

def make_state(step):
    rng = np.random.default_rng(step)
    kernel = rng.normal(size=(8, 12)).astype(np.float32)
    return TrainState(
        step=put(np.int32(step)),
        params={"kernel": put(kernel, "fsdp", "model"), "whole": put(kernel[0])},
        opt_state={"moment": put(kernel.astype(jnp.bfloat16), None, "model")},
        skipped=put(np.int32(1)),
    )

def same(a, b):
    # Each process compares what it holds.
    return all(
        np.array_equal(x.data, y.data)
        for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        for x, y in zip(p.addressable_shards, q.addressable_shards, strict=True))

abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0))
saved = []
checkpointer = Checkpointer(directory, keep=2, timeout=20, saved=saved.append)

def answer(**values):
    print(json.dumps(values), flush=True)

if what == "save":
    for step in (1, 2, 3):
        checkpointer.save(make_state(step), loss=float(step))
    checkpointer.close()
    state, notes = checkpointer.restore(abstract)
    answer(steps=checkpointer.steps(), same=same(state, make_state(3)), notes=notes, saved=saved)
elif what == "restore":
    state, notes = checkpointer.restore(abstract)
    answer(step=int(state.step), same=same(state, make_state(int(state.step))), notes=notes)
elif what == "fail":
    start = writing.start_writing
    def failing(partial, items):
        if index == 1:
            raise OSError(28, "No space left on device")
        return start(partial, items)
    writing.start_writing = failing
    errors = []
    try:
        checkpointer.save(make_state(4))
        checkpointer.wait()
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
    writing.start_writing = start
    wait = writing.wait_for
    def failing_wait(*args):
        wait(*args)
        if index == 1:
            1 / 0
    writing.wait_for = failing_wait
    try:
        checkpointer.save(make_state(5))
        checkpointer.wait()
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
    answer(errors=errors, steps=checkpointer.steps(), left=[path.name for path in directory.glob(".*")])
elif what == "alone":
    checkpointer = Checkpointer(directory, keep=2, timeout=2)
    try:
        if index == 0:
            checkpointer.save(make_state(6))
        answer(error="")
    except TimeoutError as error:
        answer(error=str(error))
    os._exit(0)  # the other has not met the barrier at which a process ends
"""


def run(count: int, directory: Path, what: str) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(index), str(count), str(directory), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for index in range(count)
    ]
    answers = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            answers.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return answers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A directory in which two processes of two devices have saved, and what each of them says."""
    directory = tmp_path_factory.mktemp("processes") / "checkpoints"
    return directory, run(2, directory, "save")


def test_two_processes_save_and_restore_together(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, answers = saved
    assert [answer["same"] for answer in answers] == [True, True]
    assert [answer["steps"] for answer in answers] == [[1, 2, 3], [1, 2, 3]]  # the last two, and the best
    assert [answer["saved"] for answer in answers] == [[1, 2, 3], []]
    assert not list(directory.glob(".*"))


def test_one_process_restores_what_two_have_saved(saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    directory, _ = saved
    (answer,) = run(1, directory, "restore")
    assert answer == {"step": 3, "same": True, "notes": []}
    kernel = np.random.default_rng(3).normal(size=(8, 12)).astype(np.float32)
    np.testing.assert_array_equal(read_numpy(directory / "3")["params"]["kernel"], kernel)


def test_an_error_in_one_process_is_raised_in_all(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, _ = saved
    answers = run(2, directory, "fail")
    for answer in answers:
        full, other = answer["errors"]
        assert full.startswith("InputError: could not save the checkpoint of step 4")
        assert "the disk is full; the one of step 3 is kept" in full
        assert "division by zero" in other
        assert answer["steps"] == [1, 2, 3]
    assert answers[0]["left"] == []  # process 0 cleans up
    assert complete_steps(directory) == [1, 2, 3]


def test_a_process_that_is_missing_is_named(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, _ = saved
    first, _ = run(2, directory, "alone")
    assert first["error"] == "process 1 of 2 did not get to 'room' within 2 s"
