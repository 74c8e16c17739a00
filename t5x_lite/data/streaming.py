"""Data that is read as it comes and never kept: for corpora too large for a token cache.

The order is a function of (seed, step) here too, but to be at a step all that came before has to be read again (only
read and tokenised, nothing is made of it). Each epoch takes the parts of the source in an order of its own, and
examples are shuffled within stretches of `WINDOW`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from t5x_lite.data import order
from t5x_lite.data.encoders import Encoder, in_batches
from t5x_lite.data.examples import shortest
from t5x_lite.data.objectives import Example, Objective, Vocabulary
from t5x_lite.data.packing import Batch, Layout
from t5x_lite.data.sources import Record, Source
from t5x_lite.errors import InputError

WINDOW = 4096  # examples that are shuffled together


@dataclasses.dataclass(frozen=True, eq=False)
class StreamComponent:
    """One of the sources of a `StreamingDataset`.

    Attributes:
        source: of the records.
        encoder: what makes tokens of them.
        objective: what is asked.
        size: tokens of running text that an example takes.
        name: how messages call it.
        rate: how often examples are drawn from here, beside the other components.
    """

    source: Source
    encoder: Encoder
    objective: Objective
    size: int
    name: str = "data"
    rate: float = 1.0

    def __post_init__(self) -> None:
        if "other" in self.objective.arrays:
            raise InputError("next-sentence prediction needs other documents at any time: data.streaming has none")

    def examples(self, seed: int, component: int, vocabulary: Vocabulary) -> Iterator[Callable[[], Example]]:
        """Yields, without end, functions that make one example each."""
        for epoch in itertools.count():
            arrays = self._arrays(seed, epoch, component, vocabulary)
            number = 0
            while stretch := list(itertools.islice(arrays, WINDOW)):
                key = (seed, epoch * 2**32 + number)
                for place in order.permute(np.arange(len(stretch)), len(stretch), key, component=component).tolist():
                    rng = order.generator(seed, epoch, number + place, order.TRAIN, component)
                    yield _Make(self.objective, stretch[place], rng, vocabulary)
                number += len(stretch)
            if not number:
                raise InputError(f"there are no examples in {self.name}: too little data for rows of this length")

    def _arrays(
        self, seed: int, epoch: int, component: int, vocabulary: Vocabulary
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the arrays of the examples of an epoch, in the order in which they are read."""
        records = self._records(seed, epoch, component)
        features = (
            tuple(np.asarray(ids, np.int32) for ids in encoded.features)
            for batch in in_batches(
                self.encoder, records, None if self.source.reading.on_error == "raise" else _pass_over
            )
            for encoded in batch
        )
        if self.objective.arrays != ("tokens",):
            yield from features
            return
        separator = np.array(self.objective.separator(vocabulary), np.int32)
        left = np.zeros(0, np.int32)
        for (tokens,) in features:
            left = np.concatenate([left, tokens, separator]) if self.objective.joined else tokens
            whole = len(left) // self.size if self.objective.joined else -(-len(left) // self.size)
            for start in range(0, whole * self.size, self.size):
                yield (left[start : start + self.size],)
            left = left[whole * self.size :]
        if len(left) >= shortest(self.objective):
            yield (left,)

    def _records(self, seed: int, epoch: int, component: int) -> Iterator[tuple[str, Record]]:
        parts = np.arange(len(self.source.parts))
        for part in order.permute(parts, len(parts), (seed, epoch), order.PARTS, component).tolist():
            yield from self.source.read(part, columns=self.encoder.columns)


def _pass_over(where: str, reason: str) -> None:
    """Says nothing of a record that cannot be used: it comes again in every epoch."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Make:
    objective: Objective
    arrays: tuple[np.ndarray, ...]
    rng: np.random.Generator
    vocabulary: Vocabulary

    def __call__(self) -> Example:
        return self.objective(*self.arrays, self.rng, self.vocabulary)


@dataclasses.dataclass(frozen=True, eq=False)
class StreamingDataset:
    """Examples without end, read one batch after the other; see the top of this file.

    Attributes:
        components: where they come from.
        layout: of rows.
        batch_size: rows B of a global batch.
        seed: of the order and of the draws.
        vocabulary: for the objectives.
    """

    components: tuple[StreamComponent, ...]
    layout: Layout
    batch_size: int
    seed: int
    vocabulary: Vocabulary

    def loader(self, start: int, process_index: int = 0, process_count: int = 1) -> Callable[[int], Batch]:
        """Returns a function that gives the batches of the steps from `start` on, which must be asked for in order.

        Every host reads all of the data, and keeps its rows.
        """
        if self.batch_size % process_count:
            raise InputError(f"batch_size {self.batch_size}: must be a multiple of the {process_count} processes")
        batches = self._batches(start, process_index, process_count)
        return lambda step: next(batches)

    def _batches(self, start: int, process_index: int, process_count: int) -> Iterator[Batch]:
        mixing = order.Mixing.of([component.rate for component in self.components])
        streams = [
            component.examples(self.seed, index, self.vocabulary) for index, component in enumerate(self.components)
        ]
        share = self.batch_size // process_count
        for step in itertools.count():
            components, _ = mixing(step * self.batch_size + np.arange(self.batch_size), self.seed)
            made = [next(streams[index]) for index in components.tolist()]
            if step >= start:
                yield self.layout([[make()] for make in made[process_index * share : (process_index + 1) * share]])
