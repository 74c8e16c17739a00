"""All that watches a run, joined: the log of its numbers, its events, its pace, the profiler, and others it tells."""

import contextlib
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from t5x_lite.config import RunConfig, flatten
from t5x_lite.training.flops import peak_flops, training_flops, xla_flops
from t5x_lite.training.monitor import EventLog, MetricsLog, Tracker, read_events
from t5x_lite.training.pace import Pace, Work, memory, positions
from t5x_lite.training.profiling import Profiler

_COUNTED: dict[tuple[Any, ...], float] = {}  # XLA's counts of the programs of this process


class Watch:
    """Watches one start of a run. Only process 0 has `events`, and only it writes; the others measure in vain.

    Args:
      config: of the run.
      mesh: its devices.
      directory: the run directory.
      step: what the run continues from; 0: it begins.
      events: where events go; None: not here.

    Raises:
      InputError: the configuration names a project of Weights & Biases, which is not to be had.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, directory: Path, step: int, events: EventLog | None):
        self._config, self._events = config, events
        device = mesh.devices.flat[0].device_kind
        settings: Any = jax.config
        peak = peak_flops(device, config.train.dtype, settings.jax_default_matmul_precision)
        self.pace = Pace(None if peak is None else peak * mesh.size)
        self.profiler = Profiler(directory, config.train.profiled_steps())
        self._started = False
        self._earlier = [event for event in read_events(directory) if "xla_flops" in event] if step else []
        self.log: MetricsLog | None = None
        if events is None:
            return
        trackers: list[Tracker] = []
        if config.train.wandb:
            from t5x_lite.training.weights_and_biases import WandbRun

            trackers.append(WandbRun(config.train.wandb, directory, flatten(config)))
        self.log = MetricsLog(directory, step, trackers)
        where = {"device": device, "devices": mesh.size, "mesh": dict(mesh.shape), "processes": jax.process_count()}
        self.event("resumed" if step else "started", step, **where, peak_flops_per_second=peak)

    def event(self, name: str, step: int, **details: Any) -> None:
        """Writes an event; see `EventLog.write`."""
        if self._events is not None:
            self._events.write(name, step, **details)

    def write(self, record: Any) -> None:
        """Writes a record of an evaluation; see `MetricsLog.write`."""
        if self.log is not None:
            self.log.write(record)

    def count(self, step: int, program: Any, *args: Any) -> None:
        """Has XLA count the operations of the first step of this start, while the devices are busy with it.

        Args:
          step: its number.
          program: the forward and backward pass, to be traced outside of the mesh; its last argument is the batch.
          args: its arguments, or their shapes.
        """
        if self._started or self._events is None:
            return
        self._started = True
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        formula = training_flops(self._config.model, shapes[-1])
        # Counting takes a second or more. A start of this run, or a run like it in this process, may have done it.
        earlier = next((event["xla_flops"] for event in self._earlier if event.get("formula_flops") == formula), None)
        train = self._config.train
        layout = tuple((name, shapes[-1][name].shape) for name in sorted(shapes[-1]))
        key = (self._config.model, train.dtype, train.remat, train.microbatches, train.loss_chunk, layout)
        if key not in _COUNTED:
            _COUNTED[key] = earlier or xla_flops(program, *shapes)
        self.event("counted", step, formula_flops=formula, xla_flops=_COUNTED[key])

    def step(self, record: dict[str, Any], batch: Any, logged: bool) -> dict[str, Any]:
        """Hears that a step has ended, and returns its record with what is known of its speed.

        Args:
          record: the step's numbers.
          batch: the global batch, for its shapes.
          logged: whether this step has a line in the log, which is written here.
        """
        flops = training_flops(self._config.model, batch)
        speed = self.pace.step(Work(record["tokens"], positions(batch), flops))
        if logged:
            line = {**record, **self.pace.line(), **memory()}
            # Norms of modules, of which there are many, come last; and six digits of them are enough.
            whole = {name: value for name, value in line.items() if "/" not in name}
            self.write(whole | {name: float(f"{line[name]:.6g}") for name in line if name not in whole})
        return {**record, **speed}

    def ended(self, error: BaseException, step: int) -> None:
        """Writes the event that a run ends with when it does not finish; a full disk may leave no room for it."""
        name = {FloatingPointError: "stopped", KeyboardInterrupt: "interrupted"}.get(type(error), "failed")
        with contextlib.suppress(OSError):
            self.event(name, step, error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000])

    def close(self, hurried: bool = False) -> None:
        """Brings everything to the disk, but for a trace that is not complete if that has to be done soon."""
        self.profiler.close(give_up=hurried)
        if self.log is not None:
            self.log.close()
