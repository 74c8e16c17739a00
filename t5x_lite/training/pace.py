"""How fast training goes and what it occupies, between two lines of the log."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Work:
    """What one step has to do, on all devices together.

    Attributes:
      tokens: real ones, of encoder and decoder.
      positions: places for tokens, padding included.
      flops: operations by `flops.training_flops`.
    """

    tokens: float
    positions: int
    flops: float


@dataclass(frozen=True)
class _Step:
    seconds: float
    waited: float
    work: Work


class Pace:
    """Measures the time between the ends of steps, and sums it up for each line of the log.

    What lies between `pause` and the next step (an evaluation, a checkpoint) is nobody's step. The first step after
    the start is compiled, which is no step's time either: the first line of the log, where there is nothing else,
    shows it, later ones do not.

    Args:
      peak: operations per second that all devices can do together; None where that is not known.
      clock: seconds, for tests.
    """

    def __init__(self, peak: float | None = None, clock: Any = time.perf_counter):
        self._peak = peak
        self._clock = clock
        self._steps: list[_Step] = []
        self._compiled = False
        self.pause()

    def pause(self) -> None:
        """Leaves out what happened since the last step."""
        self._since, self._waited = self._clock(), 0.0

    def waited(self, seconds: float) -> None:
        """Hears that for so long there was no batch to go on with."""
        self._waited += seconds

    def step(self, work: Work) -> dict[str, float]:
        """Hears that a step has ended, and returns what is known of this one.

        Args:
          work: what it did.

        Returns:
          `tokens_per_second` and `data_wait`, see `line`.
        """
        now = self._clock()
        seconds = max(now - self._since, 1e-9)  # a clock may be too coarse
        step = _Step(seconds, self._waited, work)
        if self._compiled or not self._steps:
            self._steps.append(step)
        else:
            self._steps, self._compiled = [step], True
        self._since, self._waited = now, 0.0
        return {"tokens_per_second": work.tokens / seconds, "data_wait": step.waited / seconds}

    def line(self) -> dict[str, float]:
        """Returns the numbers of the steps since the last line, and begins anew.

        Returns:
          `tokens_per_second`: real tokens of encoder and decoder, on all devices together;
          `padding`: share of the rows that holds no token;
          `flops_per_second`: by the formula of `flops.training_flops`, on all devices together;
          `mfu`: its share of what the devices can do, where that is known;
          `data_wait`: share of the time in which there was no batch to go on with;
          `step_seconds_p50`, `_p90`, `_p99`, `_max`: of the steps, each a time that was measured (nearest rank).
        """
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        self._compiled = True
        seconds = [step.seconds for step in steps]
        total = sum(seconds)
        tokens = sum(step.work.tokens for step in steps)
        flops = sum(step.work.flops for step in steps) / total
        ranks = np.percentile(seconds, PERCENTILES, method="inverted_cdf").tolist()
        return {
            "tokens_per_second": tokens / total,
            "padding": 1 - tokens / max(sum(step.work.positions for step in steps), 1),
            "flops_per_second": flops,
            **({"mfu": flops / self._peak} if self._peak else {}),
            "data_wait": sum(step.waited for step in steps) / total,
            **{f"step_seconds_p{percent}": value for percent, value in zip(PERCENTILES, ranks, strict=True)},
            "step_seconds_max": max(seconds),
        }


def positions(batch: Mapping[str, Any]) -> int:
    """Returns how many tokens the rows of a batch have room for."""
    return sum(int(np.prod(x.shape)) for name, x in batch.items() if name.endswith("_input_tokens"))


def memory() -> dict[str, int]:
    """Returns what is occupied, in bytes.

    Returns:
      `device_bytes` and `device_peak_bytes`, the most on any of this process's devices, where the devices say so (a
      CPU does not); and `resident_bytes`, what the operating system holds in memory for this process.
    """
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    found = {}
    if stats:
        found["device_bytes"] = max(int(each.get("bytes_in_use", 0)) for each in stats)
        found["device_peak_bytes"] = max(int(each.get("peak_bytes_in_use", 0)) for each in stats)
    return {**found, "resident_bytes": resident_bytes()}


def resident_bytes() -> int:
    """Returns the bytes that the operating system holds in memory for this process; where it does not say, the most."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
