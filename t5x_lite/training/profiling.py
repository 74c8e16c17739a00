"""A trace of some steps, by JAX's profiler."""

import contextlib
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces a window of steps into `RUN/profile/`, which TensorBoard's profile plugin, XProf and Perfetto read.

    The window is of the run's steps, so a run that continues behind it traces nothing, and one that continues within
    it traces the rest. Writing a trace takes about as long as making it, so one that is given up is not written.

    Args:
      directory: the run directory.
      steps: those to trace; none: nothing happens.
    """

    _given_up = False  # of this process: JAX has one trace at a time

    def __init__(self, directory: Path, steps: range):
        self._directory = directory / "profile"
        self._steps = steps
        self._tracing = False

    def step(self, step: int, before: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which a step is to be started, named by its number in the trace.

        Args:
          step: its number, from 1.
          before: what the step before it returned, which is waited for before the trace begins: it is not in it.
        """
        if not self._steps:
            return contextlib.nullcontext()
        if step in self._steps and not self._tracing:
            jax.block_until_ready(before)
            if Profiler._given_up:
                Profiler._given_up = False
                jax.profiler.stop_trace()
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def made(self, step: int, results: Any) -> bool:
        """Ends the trace behind its last step, and returns whether it did.

        Args:
          step: the step that was started.
          results: what it returned; it is waited for if this is the last one.
        """
        if not (self._tracing and step == self._steps[-1]):
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def close(self, give_up: bool = False) -> None:
        """Ends a trace that has not ended; more than once does no harm.

        Args:
          give_up: whether there is no time to write what there is of it. JAX then goes on tracing until the process
            ends; if the process traces again before, the trace is written then.
        """
        if self._tracing:
            self._tracing = False
            if give_up:
                Profiler._given_up = True
            else:
                jax.profiler.stop_trace()
