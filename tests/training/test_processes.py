"""Several processes of one run: the same numbers as one, ends that all agree on, and names for whoever is missing."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from t5x_lite.config import DistributedConfig, resolve
from t5x_lite.errors import InputError
from t5x_lite.run_directory import complete_steps
from t5x_lite.training import processes
from t5x_lite.training.channel import Server
from t5x_lite.training.loop import train
from t5x_lite.training.monitor import read_metrics
from t5x_lite.training.processes import EndedEarly, Group, Place, find_place

SMALLER = (
    "tokenizer=bytes",
    "model.num_heads=4",
    "model.num_encoder_layers=1",
    "model.num_decoder_layers=1",
    "train.eval_every=4",
    "train.checkpoint_every=3",
)
STEPS = 6
LONG = 300.0  # seconds that no process of these takes, even on a machine that does much else


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Team:
    """Processes that are started together; what they print is kept apart."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []

    def start(self, command: Callable[[int, int], list[str]], count: int, only: tuple[int, ...] = ()) -> None:
        port = free_port()
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
        env = {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.running = [
            subprocess.Popen([sys.executable, *command(index, port)], env=env, **pipes)
            for index in only or range(count)
        ]

    def wait(self, skip: tuple[int, ...] = ()) -> list[tuple[int, str, str]]:
        """Returns status, stdout and stderr of the processes; nothing of those that are skipped."""
        found = []
        for index, process in enumerate(self.running):
            if index in skip:
                found.append((0, "", ""))
                continue
            out, err = process.communicate(timeout=LONG)
            found.append((process.returncode, out, err))
        return found

    def end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def team() -> Iterator[Team]:
    found = Team()
    yield found
    found.end()


# --- training -------------------------------------------------------------------------------------------------------


def training(settings: list[str], count: int, out: Path) -> Callable[[int, int], list[str]]:
    def command(index: int, port: int) -> list[str]:
        place = [f"distributed.coordinator=127.0.0.1:{port}", f"distributed.num_processes={count}"]
        place += [f"distributed.process_id={index}", "distributed.timeout=60"]
        return ["-m", "t5x_lite", "train", *settings, *SMALLER, f"out={out}", *place]

    return command


def trace(out: Path) -> dict[tuple[str, int], float]:
    return {(record.get("split", "train"), record["step"]): record["loss"] for record in read_metrics(out)}


def together(team: Team, settings: list[str], count: int, out: Path) -> dict[tuple[str, int], float]:
    team.start(training(settings, count, out), count)
    found = team.wait()
    assert [status for status, _, _ in found] == [0] * count, found
    assert all(not out and not err for _, out, err in found[1:]), found  # the first alone prints
    return trace(out)


@pytest.fixture(scope="module")
def alone(tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], float]:
    """The trace of one process, on all eight devices."""
    out = tmp_path_factory.mktemp("alone")
    train(resolve(None, [*tiny_settings, *SMALLER, f"train.steps={STEPS}", f"out={out}"]).config)
    return trace(out)


@pytest.fixture(scope="module")
def two(
    tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[tuple[str, int], float]]:
    """Run directory and trace of two processes."""
    pair, out = Team(), tmp_path_factory.mktemp("two") / "run"
    try:
        return out, together(pair, [*tiny_settings, f"train.steps={STEPS}"], 2, out)
    finally:
        pair.end()


def test_two_processes_train_as_one(two: tuple[Path, Any], alone: dict[tuple[str, int], float]) -> None:
    out, found = two
    # Sums over the batch are taken in another order: some roundings of float32.
    assert found == pytest.approx(alone, rel=1e-5)
    evaluation = next(record for record in read_metrics(out) if record.get("split") == "validation")
    assert 0 < evaluation["bits_per_byte"] < 12  # of all rows' bytes; of one process's it would be twice as much


def test_four_save_and_two_and_one_go_on(
    team: Team, tiny_settings: list[str], tmp_path: Path, alone: dict[tuple[str, int], float]
) -> None:
    mesh = ["mesh=data:2,fsdp:2", "train.steps=3", "train.eval_every=0"]
    together(team, [*tiny_settings, *mesh], 4, tmp_path / "run")
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3]
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    longer = [*tiny_settings, "mesh=fsdp:-1", f"train.steps={STEPS}"]
    for steps in (
        together(team, longer, 2, tmp_path / "run"),
        # In this process, on its eight devices.
        train(resolve(None, [*longer, *SMALLER, f"out={tmp_path / 'one'}"]).config) and trace(tmp_path / "one"),
    ):
        losses = {key: loss for key, loss in steps.items() if key[0] == "train"}
        assert losses == pytest.approx({key: alone[key] for key in losses}, rel=1e-5)  # as above
        assert len(losses) == STEPS


def test_a_signal_to_one_ends_both_and_the_next_start_is_bitwise_the_same(
    team: Team, tiny_settings: list[str], tmp_path: Path, two: tuple[Path, dict[tuple[str, int], float]]
) -> None:
    out = tmp_path / "run"
    # Many steps are asked for, so that the signal comes in their midst, and as many as before in the end.
    team.start(training([*tiny_settings, "train.steps=5000"], 2, out), 2)
    wait_for(lambda: (out / "metrics.jsonl").exists() and '"step": 2,' in (out / "metrics.jsonl").read_text())
    team.running[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    found = team.wait()
    assert time.monotonic() - began < 30
    assert [status for status, _, _ in found] == [0, 0], found
    assert "SIGTERM: ended after step" in found[0][2]
    step = complete_steps(out / "checkpoints")[-1]
    assert re.search(r"ended_by +SIGTERM", found[0][1])
    assert max(number for _, number in trace(out)) == step
    wanted = max(STEPS, step + 2)
    assert (
        together(team, [*tiny_settings, f"train.steps={wanted}"], 2, out).items()
        >= {
            key: loss
            for key, loss in two[1].items()
            if key[1] < STEPS  # the last step of a run has an evaluation more
        }.items()
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- whoever is missing ---------------------------------------------------------------------------------------------

# A program of a process without JAX: what is said about the others does not depend on what they do.
PROGRAM = """
import sys, time
from t5x_lite.training.processes import Group, Place
index, port, count, timeout = map(int, sys.argv[1:5])
group = Group(Place(f"127.0.0.1:{port}", count, index), timeout)
group.gather("all")
print("together", flush=True)
"""


def program(body: str, count: int, timeout: int = 30) -> Callable[[int, int], list[str]]:
    return lambda index, port: ["-c", PROGRAM + body, str(index), str(port), str(count), str(timeout)]


def said(found: tuple[int, str, str], status: int = 1) -> str:
    """Returns the one line on stderr of a process that has ended with this status."""
    assert found[0] == status, found
    (line,) = found[2].splitlines()
    return line


@pytest.mark.parametrize("absent", [0, 1])
def test_a_process_that_never_starts_is_named(team: Team, absent: int) -> None:
    team.start(program("", 3, timeout=4), 3, only=tuple({0, 1, 2} - {absent}))
    began = time.monotonic()
    for found in team.wait():
        assert f"process {absent} of 3" in said(found)
    assert time.monotonic() - began < 4 + 8  # the deadline, and the start of Python on a machine that does much else


FOREVER = """
while True:
    group.gather("again", group.tick("a step"))
    time.sleep(0.01)
"""


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_is_killed_is_named_at_once(team: Team, victim: int) -> None:
    team.start(program(FOREVER, 3, timeout=60), 3)
    for process in team.running:
        assert process.stdout
        assert process.stdout.readline() == "together\n"
    team.running[victim].kill()
    began = time.monotonic()
    for index, found in enumerate(team.wait(skip=(victim,))):
        if index != victim:
            assert f"process {victim}" in said(found)
            assert "has died" in said(found)
    assert time.monotonic() - began < 20  # a third of the deadline


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_is_stopped_is_named_within_the_deadline(team: Team, victim: int) -> None:
    team.start(program(FOREVER, 3, timeout=8), 3)
    for process in team.running:
        assert process.stdout
        assert process.stdout.readline() == "together\n"
    team.running[victim].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    for index, found in enumerate(team.wait(skip=(victim,))):
        if index != victim:
            assert f"process {victim} of 3 did not answer" in said(found)
    assert time.monotonic() - began < 8 + 2


def test_a_process_that_was_stopped_for_a_moment_is_waited_for(team: Team) -> None:
    team.start(program("for _ in range(300): group.gather('again'); time.sleep(0.01)", 2, timeout=8), 2)
    assert team.running[0].stdout
    assert team.running[0].stdout.readline() == "together\n"
    team.running[0].send_signal(signal.SIGSTOP)
    time.sleep(1)
    team.running[0].send_signal(signal.SIGCONT)
    # Nobody says good-bye here: whoever ends first is missed by the other.
    assert any(status == 0 for status, _, _ in team.wait())


def test_a_process_that_is_somewhere_else_is_named_with_where_it_is(team: Team) -> None:
    body = "group.working('looking for its keys')\ntime.sleep(60) if index == 1 else group.gather('leaving')"
    team.start(program(body, 3, timeout=6), 3)
    for found in team.wait():
        line = said(found)
        assert "process 1 of 3 did not come" in line
        assert "(leaving)" in line
        assert "'looking for its keys'" in line


def test_a_process_that_gets_on_is_waited_for_beyond_the_deadline(team: Team) -> None:
    body = """
if index == 1:
    for part in range(8):
        group.working(f"part {part}")
        time.sleep(1)
group.gather("leaving")
time.sleep(1)
"""
    team.start(program(body, 2, timeout=6), 2)
    assert any(status == 0 for status, _, _ in team.wait())


def test_a_failure_ends_all_with_its_line_and_status(team: Team) -> None:
    body = "group.failed('no such file', 2) if index == 1 else group.gather('leaving')"
    team.start(program(body + "\nif index == 1: sys.exit(2)", 3), 3)
    found = team.wait()
    for index in (0, 2):
        assert said(found[index], status=2) == "t5x-lite: process 1 has ended: no such file"


def test_two_that_take_the_same_place_are_told(team: Team) -> None:
    command = program("time.sleep(60)", 2)
    team.start(lambda index, port: command(min(index, 1), port), 3)
    wait_for(lambda: any(process.poll() is not None for process in team.running[1:]))
    refused = next(process for process in team.running[1:] if process.poll() is not None)
    assert refused.returncode == 2
    assert refused.stderr
    assert refused.stderr.read() == "t5x-lite: two processes were started as process 1 of 2\n"


def test_who_is_refused_hears_why_although_it_writes_before_it_reads() -> None:
    async def heard(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for message in (b'{"hello": "process", "index": 1, "count": 3}\n', b"{}\n", b"{}\n"):
            writer.write(message)
            time.sleep(0.3)  # its event loop stands still: so it is where a machine has no time for this process
        line = await reader.readline()
        writer.close()
        return line

    async def refuse() -> bytes:
        port = free_port()
        async with await Server(2, 30.0, 0).listen(port):
            return await asyncio.to_thread(lambda: asyncio.run(heard(port)))

    assert b"process 1 was told of 3 processes, and process 0 of 2" in asyncio.run(refuse())


def test_other_settings_are_named(team: Team) -> None:
    body = """
import dataclasses
from t5x_lite.config import RunConfig
from t5x_lite.errors import InputError
config = RunConfig()
try:
    group.check_same(dataclasses.replace(config, out="elsewhere") if index else config)
except InputError as error:
    print(error, flush=True)
time.sleep(1)
"""
    team.start(program(body, 2), 2)
    assert "process 1 was started with out=elsewhere, and process 0 with runs/latest" in team.wait()[0][1]


def test_all_stop_at_the_same_tick(team: Team) -> None:
    body = """
group.settled()
with group.hearing_signals():
    print("ready", flush=True)
    step = 0
    while not group.tick(f"step {step}"):
        step += 1
        if index == 0: time.sleep(0.002)
        group.gather("the step")
print(group.asked, step, flush=True)
group.gather("leaving")
time.sleep(1)
"""
    team.start(program(body, 3), 3)
    for process in team.running:
        assert process.stdout
        assert process.stdout.readline() == "together\n"
        assert process.stdout.readline() == "ready\n"
    team.running[2].send_signal(signal.SIGTERM)
    lines = {out.strip() for _, out, _ in team.wait()}
    assert len(lines) == 1
    assert re.fullmatch(r"SIGTERM \d+", lines.pop())


# --- one process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back the handlers of signals, which a process that ends early leaves as they are."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_before_the_first_step_a_signal_ends_at_once() -> None:
    group = Group(unfinished_status=75)
    with group.hearing_signals():
        assert not group.tick("step 1")
        with pytest.raises(EndedEarly) as early:  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LONG)
    assert early.value.code == 75


@pytest.mark.usefixtures("handlers")
def test_what_garbage_collection_swallows_is_asked_again() -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.5)  # the wish comes meanwhile

    group = Group()
    with group.hearing_signals(), pytest.raises(EndedEarly):  # noqa: PT012
        assert not group.tick("step 1")
        Swallows()
        time.sleep(LONG)


def test_after_a_step_a_signal_is_heard_at_the_next() -> None:
    group = Group()
    with group.hearing_signals():
        assert not group.tick("step 1")
        group.settled()
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: bool(group.asked))
        assert group.tick("step 2")
    assert group.asked == "SIGINT"
    assert group.asked_status == 130


def test_a_signal_while_a_token_cache_is_built_or_a_step_compiled_ends_with_status_0(
    team: Team, tiny_settings: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    team.start(lambda index, port: ["-m", "t5x_lite", "train", *tiny_settings, *SMALLER, f"out={out}"], 1)
    wait_for((out / ".lock").exists)
    team.running[0].send_signal(signal.SIGTERM)
    ((status, _, err),) = team.wait()
    assert status == 0, err
    assert "t5x-lite: SIGTERM: ended before the first step" in err


def test_a_signal_during_an_evaluation_saves_the_step_and_the_next_start_evaluates_it(
    tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t5x_lite.training import loop

    settings = [*tiny_settings, *SMALLER, f"train.steps={STEPS}"]
    config = resolve(None, [*settings, f"out={tmp_path / 'whole'}"]).config
    train(config)
    group, config = Group(), resolve(None, [*settings, f"out={tmp_path / 'parts'}"]).config
    evaluate = loop.evaluate

    def asked_while_evaluating(*args: Any, **kwargs: Any) -> Any:
        group.ask("SIGTERM")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", asked_while_evaluating)
    assert train(config, group=group).ended_by == "SIGTERM"
    monkeypatch.undo()
    assert complete_steps(tmp_path / "parts" / "checkpoints") == [3, 4]
    assert max(trace(tmp_path / "parts")) == ("train", 4)
    assert train(config).ended_by == ""
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")


# --- launchers ------------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (SLURM, Place("node003:61443", 4, 2, (0,))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, Place("node003:61443", 4, 2)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Place("node003:61443", 4, 2)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (OPEN_MPI, Place("10.96.0.1:62624", 3, 1, (1,))),
    ],
)
def test_launchers_say_where_a_process_stands(
    environment: dict[str, str], place: Place | None, plain: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        plain.setenv(name, value)
    assert find_place(DistributedConfig()) == place


def test_gke_says_where_a_process_stands(plain: pytest.MonkeyPatch) -> None:
    from jax._src.clusters import cloud_tpu_cluster

    plain.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    plain.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    plain.setattr(cloud_tpu_cluster.GceTpuCluster, "is_env_present", classmethod(lambda cls: False))
    plain.setenv("TPU_WORKER_HOSTNAMES", "localhost,other")
    plain.setenv("TPU_WORKER_ID", "1")
    plain.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)
    assert find_place(DistributedConfig()) == Place("localhost:8482", 2, 1)


def test_open_mpi_5_has_to_be_told_where_process_0_is(plain: pytest.MonkeyPatch) -> None:
    plain.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"give distributed.coordinator=HOST:PORT"):
        find_place(DistributedConfig())


def test_settings_come_before_launchers(plain: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        plain.setenv(name, value)
    assert find_place(DistributedConfig("here:1", 2, 0)) == Place("here:1", 2, 0)
    assert find_place(DistributedConfig("here:1", 1, 0)) is None


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"process 0 cannot listen at port {port}"):
            Group(Place(f"127.0.0.1:{port}", 2, 0), 5)


def test_joining_a_group_of_one_imports_no_jax() -> None:
    code = """
import sys
from t5x_lite.config import DistributedConfig
from t5x_lite.training.processes import join
with join(DistributedConfig()) as group:
    assert group.count == 1
assert "jax" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert processes._joined is None
