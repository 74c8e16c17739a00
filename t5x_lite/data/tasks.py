"""A task says how records become text in and text out; a mixture, how often each of several tasks is drawn."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from t5x_lite.data.preprocessors import Preprocessor
from t5x_lite.errors import InputError, nearest

PROPORTIONAL = "proportional"
"""The rate of a task that is drawn by its size: `min(size, limit) ** (1 / temperature)`."""


@dataclass(frozen=True)
class Task:
    """Text to text: where the records are, how they become inputs and targets, and what is measured on them.

    Attributes:
      name: how mixtures, logs and messages call it.
      source: what `sources.open_source` reads for training (`tfds:glue/sst2:train`, a file, a glob, a mapping); None
        for a task that is only evaluated.
      preprocessors: applied to every record in this order (see `preprocessors.apply`); the last gives the texts
        `inputs` and `targets`, and keeps what the metrics need. They have to be picklable, for workers to run them.
      objective: how the pair is trained on; None is text to text.
      metrics: names in `evaluation.task_metrics.METRICS`, or `bleu` and `rouge`, which evaluation cannot compute yet.
      eval_source: what is read for evaluation; None: nothing is set apart for it.
      labels: the classes by their id, for the metrics that count by class (`f1`: the second is the positive one).

    Raises:
      InputError: no name, or neither source nor eval_source.
    """

    name: str
    source: str | Mapping[str, Any] | None
    preprocessors: tuple[Preprocessor, ...] = ()
    objective: Any = None
    metrics: tuple[str, ...] = ()
    eval_source: str | Mapping[str, Any] | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("preprocessors", "metrics", "labels"):  # YAML gives lists
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.name:
            raise InputError("a task needs a name")
        if self.source is None and self.eval_source is None:
            raise InputError(f"task '{self.name}' needs a source or an eval_source")

    def __hash__(self) -> int:
        return hash(self.name)

    def with_source(
        self, source: str | Mapping[str, Any] | None, eval_source: str | Mapping[str, Any] | None = None
    ) -> "Task":
        """Returns this task on other data with the same columns, a local file for one."""
        return dataclasses.replace(self, source=source, eval_source=eval_source)


Members = Mapping["Task | Mixture | str", float | str] | Iterable["Task | Mixture | str"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several tasks, each drawn at its rate (Raffel et al. 2020, section 3.5.2; seqio's `Mixture`).

    A rate is a number, or `"proportional"`: the task's number of examples, at most `limit` of them, to the power
    1 / temperature. Numbers are taken as they are, limit and temperature do not apply to them, and both kinds can stand
    side by side; what counts in the end is each rate's share of the sum. At rate 0 a task is evaluated and never drawn;
    a task without a training source always has rate 0.

    A mixture within a mixture takes a number, which its tasks divide among them by its own rates; a task that is
    reached in several ways gets the sum (seqio's `Mixture.get_rate`).

    Attributes:
      members: `{task: rate}`, or tasks alone, which are then proportional. A task is a `Task`, a `Mixture` or the name
        of a published one.
      name: how logs call it.
      limit: the artificial limit K on a task's size, in examples; 2**21 in the T5 paper.
      temperature: 1 is in proportion to size, larger is more even; the T5 paper tries 2, 4 and 8, mT5 uses 1 / 0.3.

    Raises:
      InputError: no tasks, an unknown name, a task named twice, two different tasks of one name, a rate that is
        negative, not finite or neither a number nor "proportional", rates that are all 0, a limit below 1, a
        temperature that is not positive.
    """

    members: Members
    name: str = ""
    limit: int = 2**21
    temperature: float = 1.0

    def __post_init__(self) -> None:
        members = self.members
        if isinstance(members, str | Task | Mixture):
            members = (members,)
        pairs = members.items() if isinstance(members, Mapping) else ((member, PROPORTIONAL) for member in members)
        resolved: dict[Task | Mixture, float | str] = {}
        for member, rate in pairs:
            found = _resolve(member)
            if found in resolved:
                raise InputError(f"task or mixture{_quoted(found.name)} is named twice; give it one rate")
            resolved[found] = rate
        object.__setattr__(self, "members", resolved)
        if not (isinstance(self.limit, int) and self.limit >= 1):
            raise InputError(f"limit {self.limit!r}: must be at least 1 example")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature {self.temperature}: must be above 0 and finite")
        for member, rate in self._rates():
            _check_rate(member, rate)
        if not self.tasks:
            raise InputError("a mixture needs at least one task")
        if not any(_can_draw(member) and (rate == PROPORTIONAL or float(rate) > 0) for member, rate in self._rates()):
            raise InputError(f"no task of the mixture{_quoted(self.name)} is ever drawn: all its rates are 0")

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Every task once, those of mixtures within included, in the order in which they were first named."""
        tasks: dict[str, Task] = {}
        for member, _ in self._rates():
            for task in member.tasks if isinstance(member, Mixture) else (member,):
                if tasks.setdefault(task.name, task) != task:
                    raise InputError(f"two different tasks are both called '{task.name}'; rename one")
        return tuple(tasks.values())

    def rates(self, sizes: Mapping[str, int] | None = None) -> np.ndarray:
        """Returns the share of each of `tasks`, float64 [tasks], which sum to 1.

        Args:
          sizes: the number of training examples by the name of the task. What has only fixed rates needs none.

        Raises:
          InputError: the size of a proportional task is missing, or a task that is to be drawn has no examples.
        """
        raw = self._raw_rates(sizes or {})
        for name, rate in raw.items():
            if rate > 0 and (sizes or {}).get(name) == 0:
                raise InputError(f"task '{name}' has no examples, but a rate above 0")
        values = np.array([raw[task.name] for task in self.tasks], np.float64)
        return values / values.sum()

    def _rates(self) -> list[tuple["Task | Mixture", float | str]]:
        return list(self.members.items())  # type: ignore[union-attr]

    def _raw_rates(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Returns the rates by task name before they are normalised."""
        raw = dict.fromkeys((task.name for task in self.tasks), 0.0)
        for member, rate in self._rates():
            if isinstance(member, Mixture):
                within = member._raw_rates(sizes)
                total = sum(within.values())
                for name, share in within.items():
                    raw[name] += float(rate) * share / total
            elif rate != PROPORTIONAL:
                raw[member.name] += float(rate)
            elif member.source is not None:
                raw[member.name] += self._by_size(member.name, sizes)
        return raw

    def _by_size(self, name: str, sizes: Mapping[str, int]) -> float:
        if name not in sizes:
            raise InputError(f"task '{name}' is drawn in proportion to its size, which is not known; give it a number")
        if sizes[name] < 1:
            raise InputError(f"task '{name}' has no examples, but a rate above 0")
        return min(sizes[name], self.limit) ** (1 / self.temperature)


def _resolve(member: Any) -> Task | Mixture:
    if isinstance(member, str):
        # Published tasks are made of this module's classes.
        from t5x_lite.data import published_tasks

        return published_tasks.find(member)
    if not isinstance(member, Task | Mixture):
        raise InputError(f"{member!r}: a mixture is made of tasks, mixtures and names of published ones")
    return member


def _can_draw(member: Task | Mixture) -> bool:
    return isinstance(member, Mixture) or member.source is not None


def _check_rate(member: Task | Mixture, rate: Any) -> None:
    what = f"rate {rate!r} of {_quoted(member.name).strip()}"
    if isinstance(rate, str):
        if rate != PROPORTIONAL:
            raise InputError(f"{what}: must be a number or '{PROPORTIONAL}'{nearest(rate, [PROPORTIONAL])}")
        if isinstance(member, Mixture):
            raise InputError(f"{what}: the rate of a mixture within a mixture must be a number")
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.integer | np.floating):
        raise InputError(f"{what}: must be a number or '{PROPORTIONAL}'")
    if not 0 <= rate < math.inf:
        raise InputError(f"{what}: must be at least 0 and finite")
    if rate > 0 and not _can_draw(member):
        raise InputError(f"{what}: must be 0, for the task has no source to train on")


def _quoted(name: str) -> str:
    return f" '{name}'" if name else ""
