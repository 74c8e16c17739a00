"""The processes of a run: how they find each other, wait for each other, and end together.

Every process runs the same program, so the places where all meet come in the same order for all of them. `tick` counts
those at which a run can end, a step or a batch of an evaluation: after a signal to any process, the foremost one's
count is where all of them stop. `waiting` marks what a process waits for others in, `gather` is the one thing they do
together without JAX.

Nothing here imports JAX before it is known that there are several processes, and it is told of them before any of its
backends is touched.
"""

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from t5x_lite.config import DistributedConfig, RunConfig, flatten
from t5x_lite.errors import InputError
from t5x_lite.training.channel import COMPILING, Channel, Message, beat_interval

T = TypeVar("T")

# What launchers set for each of the processes they start. Where none of it is, JAX need not be asked.
LAUNCHED = ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES")
# Keys that may differ between the processes of a run.
OWN_KEYS = ("distributed.process_id", "data.cache_dir", "data.workers")
PATIENCE = 5.0  # seconds that a program has to end of its own accord before it is ended


class EndedEarly(SystemExit):
    """A signal came before the first step, when there is nothing to save yet.

    Attributes:
      status: with which the process ends.
      line: what the first of the processes says; empty in the others.
    """

    def __init__(self, group: "Group"):
        self.status = group.asked_status
        self.line = "" if group.index else f"{group.asked}: ended before the first step; the same command begins again"
        super().__init__(self.status)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of a run.

    Attributes:
      coordinator: HOST:PORT of process 0.
      count: of processes.
      index: of this one.
      local_devices: which of the machine's devices are this process's; None: all.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def find_place(settings: DistributedConfig) -> Place | None:
    """Returns where this process stands, as configured or as its launcher says; None: it is alone.

    SLURM, Open MPI, GKE and Cloud TPU are recognised as `jax.distributed` does.

    Raises:
      InputError: the launcher does not say where process 0 is.
    """
    if settings.num_processes is not None and settings.process_id is not None:
        if settings.num_processes == 1:
            return None
        return Place(settings.coordinator, settings.num_processes, settings.process_id)
    if not any(name in os.environ for name in LAUNCHED) and importlib.util.find_spec("libtpu") is None:
        return None
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or not cluster.is_env_present():
            continue
        count = cluster.get_process_count()
        if count == 1:
            return None
        seconds = int(max(settings.timeout, 1))
        coordinator = cluster.get_coordinator_address(seconds, os.environ.get("JAX_COORDINATOR_PORT"))
        local = None if running_in_cloud_tpu_vm else cluster.get_local_process_id()
        devices = (local,) if local is not None and _shares_its_machine() else None
        return Place(coordinator, count, cluster.get_process_id(), devices)
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise InputError(
            "this Open MPI does not say where process 0 is; give distributed.coordinator=HOST:PORT"
            " distributed.num_processes=$OMPI_COMM_WORLD_SIZE distributed.process_id=$OMPI_COMM_WORLD_RANK"
        )
    return None


def _shares_its_machine() -> bool:
    """Returns whether each process of this machine takes one of its devices, unless its launcher saw to that."""
    if len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
        return False
    here = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "2"
    return here.split("(")[0].split(",")[0] != "1"


class Group:
    """The processes of a run, as one of them sees them; also where it is the only one.

    Attributes:
      index: of this process. Process 0 prints and writes the files that all share.
      count: of processes.
      asked: the signal that has asked one of them to end, such as `SIGTERM`; empty while none has.
    """

    def __init__(self, place: Place | None = None, timeout: float = 600.0, unfinished_status: int = 0):
        self.index, self.count = (place.index, place.count) if place else (0, 1)
        self.asked = ""
        self._timeout, self._unfinished_status = timeout, unfinished_status
        self._lock = threading.Lock()
        self._ticks, self._doing, self._waiting, self._compiling = 0, "starting", False, False
        self._fresh, self._stop_at = True, threading.Event()
        self._stop_tick = 0
        self._leaving = self._left = self._together = False
        self._verdict: Message | None = None
        self._failing = False
        self._channel: Channel | None = None
        if place:
            host, _, port = place.coordinator.rpartition(":")
            self._channel = Channel(
                host.strip("[]"), int(port), place.index, place.count, timeout, self._state, self._hear
            )

    @property
    def asked_status(self) -> int:
        """The exit status after a signal: what a shell expects after Ctrl-C, else success, or what was given."""
        return 130 if self.asked == "SIGINT" else self._unfinished_status

    # --- together -----------------------------------------------------------------------------------------------

    def gather(self, name: str, value: Any = None) -> list[Any]:
        """Returns the values (of JSON) that all processes give, in their order; waits for all of them.

        Args:
          name: the same in all processes, and used once at a time.
          value: this process's.
        """
        if not self._channel:
            return [value]
        with self.waiting(name):
            values = self._channel.gather(name, value)
        self._together = True
        return values

    def first(self, name: str, make: Callable[[], T], then: Callable[[], T]) -> T:
        """Lets process 0 do something before the others: returns `make()` there and `then()` elsewhere."""
        made = make() if self.index == 0 else None
        self.gather(name)
        return then() if self.index else made  # type: ignore[return-value]

    def check_same(self, config: RunConfig) -> None:
        """Checks that all processes were started with the same settings.

        Raises:
          InputError: naming the first key that differs, and in which process.
        """
        texts = {key: str(value) for key, value in flatten(config).items() if key not in OWN_KEYS}
        for index, theirs in enumerate(self.gather("comparing settings", texts)):
            for key, value in theirs.items():
                if texts.get(key) != value and index != self.index:
                    raise InputError(
                        f"process {index} was started with {key}={value}, and process {self.index} with"
                        f" {texts.get(key)}; all need the same settings"
                    )

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Marks that what is inside does not end before the other processes have come to it."""
        with self._lock:
            before, self._waiting, self._doing = (self._waiting, self._doing), True, what
        try:
            yield
        finally:
            with self._lock:
                self._waiting, self._doing = before

    def working(self, what: str) -> None:
        """Says what this process does now, while others may wait for it."""
        with self._lock:
            self._doing = what

    def tick(self, doing: str) -> bool:
        """Returns whether all processes end here, because one was asked to; else goes on to `doing`."""
        with self._lock:
            if not self.asked:
                self._ticks, self._doing = self._ticks + 1, doing
                return False
        with self.waiting(f"agreeing where to end ({doing})"):
            while not self._stop_at.wait(3600.0):
                pass
        with self._lock:
            if self._ticks >= self._stop_tick:
                return True
            self._ticks, self._doing = self._ticks + 1, doing
            return False

    def settled(self) -> None:
        """Says that a step has been made: from now on there may be something to save."""
        self._fresh = False

    # --- ends ---------------------------------------------------------------------------------------------------

    def ask(self, why: str) -> None:
        """Asks all processes to end at the same place; called in another thread than the main one."""
        if self._channel:
            self._channel.send({"kind": "asked", "why": why})
            if not self._together:
                self.asked = why
                self._leave()
            return
        with self._lock:
            first, self.asked = not self.asked, self.asked or why
            self._stop_tick = self._ticks
            self._stop_at.set()
        if first and self._fresh:
            self._leave()

    def failed(self, line: str, status: int) -> None:
        """Tells the others why this process ends."""
        self._failing = True
        if self._channel:
            self._channel.send({"kind": "failed", "line": f"process {self.index} has ended: {line}", "status": status})
            time.sleep(0.5)  # until it is sent

    def explanation(self, error: BaseException) -> Message | None:
        """Returns why an error may have come about in another process; None: it is this one's own.

        Collectives fail within moments when a process dies, a little before or after the channel says which.
        """
        if not self._channel or isinstance(error, InputError | FloatingPointError | KeyboardInterrupt):
            return None
        deadline = time.monotonic() + 2.0 + 2 * beat_interval(self._timeout)
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._verdict

    def close(self) -> None:
        """Ends together with the others, and JAX's part of it too."""
        if self._channel:
            self.gather("the end")
            import jax

            with self.waiting("the end of jax.distributed"):
                jax.distributed.shutdown()
            self.gather("good-bye")
            self._channel.close()

    def _state(self) -> Message:
        with self._lock:
            doing = COMPILING if self._compiling else self._doing
            return {"ticks": self._ticks, "doing": doing, "waiting": self._waiting and not self._compiling}

    def _hear(self, message: Message) -> None:
        if message["kind"] == "report":
            with self._lock:
                self.asked = message["why"]
                report = {"kind": "report", "why": self.asked, "ticks": self._ticks, "fresh": self._fresh}
            if self._channel:
                self._channel.send(report)
        elif message["kind"] == "stop":
            self._stop_tick = message["at"]
            self._stop_at.set()
        elif message["kind"] == "leave" and not self._leaving:
            self.asked, self._leaving = self.asked or message["why"], True
            threading.Thread(target=self._leave, daemon=True).start()
        elif message["kind"] == "end" and self._verdict is None and not self._leaving:
            self._verdict = message
            threading.Thread(target=self._last_words, args=(message,), daemon=True).start()

    def _last_words(self, message: Message) -> None:
        # A process that fails at the same time for a reason of its own says that instead.
        deadline = time.monotonic() + message["patience"]
        while time.monotonic() < deadline and not self._failing:
            time.sleep(0.02)
        if self._failing:
            time.sleep(PATIENCE)
        if self.index == 0:
            time.sleep(0.3)  # the others hear it from this process
        end_now(message["status"], message["line"])

    def _leave(self) -> None:
        self._leaving = True
        main = threading.main_thread().ident
        deadline = time.monotonic() + PATIENCE
        while not self._left and time.monotonic() < deadline:
            if main is not None:
                signal.pthread_kill(main, signal.SIGTERM)  # the handler raises EndedEarly
            time.sleep(1.0)
        if not self._left:  # it is in a library that does not come back, such as XLA when it compiles
            early = EndedEarly(self)
            end_now(early.status, early.line)

    # --- signals and JAX ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT as wishes to end; a second SIGINT ends this process at once.

        They are read in a thread, since the main one may be in a library for a long time, where Python's handlers wait.
        """
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        handled = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._on_signal) for number in handled}
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read_signals, args=(ours,), daemon=True, name="signals").start()
        try:
            yield
        finally:
            self._left = self._leaving
            signal.set_wakeup_fd(wakeup)
            if not self._leaving:  # else one more signal may be on its way
                for number, handler in before.items():
                    signal.signal(number, handler)
            theirs.close()

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        if self._leaving and not self._left and not _exceptions_are_ignored(frame):
            raise EndedEarly(self)

    def _read_signals(self, source: socket.socket) -> None:
        interrupts = 0
        with source:
            while data := source.recv(64):
                for number in data:
                    interrupts += number == signal.SIGINT
                    if interrupts > 1:
                        end_now(130, "interrupted")
                    if number in (signal.SIGTERM, signal.SIGINT) and not self._leaving:
                        self.ask(signal.Signals(number).name)

    def start_jax(self, place: Place) -> None:
        """Tells JAX of the processes; to be called before any of its backends is touched."""
        import jax

        assert self._channel
        _hear_of_compiling(self)
        # It would take the signals that are taken here.
        jax.config.update("jax_enable_preemption_service", False)
        jax.config.update("jax_check_proxy_envs", False)  # for the one below
        # JAX reaches process 0 through this machine, where no proxy is needed.
        own = os.environ.get("no_grpc_proxy", "")  # noqa: SIM112
        os.environ["no_grpc_proxy"] = f"{own},127.0.0.1".lstrip(",")  # noqa: SIM112
        later = int(self._timeout) + 60  # what JAX does when it misses somebody is no use to anyone
        with self.waiting("starting jax.distributed"):
            jax.distributed.initialize(
                self._channel.jax_address,
                place.count,
                place.index,
                local_device_ids=place.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=later,
                heartbeat_timeout_seconds=10 * later,
                shutdown_timeout_seconds=later,
                coordinator_bind_address=self._channel.jax_address,
            )


def _exceptions_are_ignored(frame: types.FrameType | None) -> bool:
    """Returns whether Python is collecting garbage: what is raised there is printed, and then forgotten."""
    while frame is not None:
        if frame.f_code.co_name in ("__del__", "_xla_gc_callback"):
            return True
        frame = frame.f_back
    return False


def end_now(status: int, line: str = "") -> NoReturn:
    """Ends this process and those it has started, whatever its threads are doing, after one line on stderr."""
    if line:
        show_cursor = "\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{show_cursor}t5x-lite: {line}\n".encode())
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)


def _hear_of_compiling(group: Group) -> None:
    import jax

    def hear(event: str, duration_secs: float, **more: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            if event.endswith("jaxpr_to_mlir_module_duration"):
                group._compiling = True
            elif event.endswith("backend_compile_duration"):
                group._compiling = False

    jax.monitoring.register_event_duration_secs_listener(hear)


_joined: Group | None = None


def current() -> Group:
    """Returns the group that this process has joined, or one of itself alone.

    Raises:
      InputError: JAX was told of several processes, but not by `join`.
    """
    if _joined:
        return _joined
    import jax

    if jax.process_count() > 1:
        raise InputError(
            "several processes train together inside `with t5x_lite.training.processes.join(config.distributed):`,"
            " without a jax.distributed.initialize() of your own"
        )
    return Group()


@contextlib.contextmanager
def join(settings: DistributedConfig, unfinished_status: int = 0) -> Iterator[Group]:
    """Joins the other processes of a run, if there are any, and ends with them.

    After an exception, tell the others (`failed`) and end this process without waiting for them (`end_now`).

    Args:
      settings: which processes there are; by default as their launcher says.
      unfinished_status: exit status of a process that SIGTERM ends before its run is complete.

    Raises:
      InputError: as `find_place`, or this is process 0 and cannot listen where it should.
    """
    global _joined
    place = find_place(settings)
    group = Group(place, settings.timeout, unfinished_status)
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(group.hearing_signals())
        _joined = group
        try:
            if place:
                group.gather("all processes")
                group.start_jax(place)
            yield group
            group.close()
        finally:
            _joined = None
