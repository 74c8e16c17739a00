"""From examples to batches: the batch of a step is a function of (seed, step), and so is every random draw in it."""

import dataclasses
import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from t5x_lite.data import order
from t5x_lite.data.examples import ExampleSet, InMemory, Records, examples_of
from t5x_lite.data.objectives import Example, Objective, TextToText, Vocabulary
from t5x_lite.data.packing import Batch, Layout, first_fit
from t5x_lite.data.tokenizers import Tokenizer
from t5x_lite.data.tokens import tokenize
from t5x_lite.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """One of the things that a dataset is made of; of a mixture each task is one.

    Attributes:
        examples: what there is.
        rate: how often examples are drawn from here, beside the other components.
        name: how messages call it.
    """

    examples: ExampleSet
    rate: float = 1.0
    name: str = "data"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in a shuffled order without end, read by step.

    Each epoch of a component is a permutation of its own, so that every example comes exactly once in it; a batch may
    hold the end of one epoch and the start of the next. The draws of an example depend on (seed, epoch, component,
    example) alone: not on the batch size, the number of hosts, or what was read before.

    With `packed`, examples share rows. Which do is drawn once for a seed, first-fit over all examples in a shuffled
    order; what is shuffled anew in every epoch is the order of the rows. A row holds examples of one component.

    With `buckets`, a batch has examples of like lengths, in rows that are as long as the bucket they belong to. Of each
    bucket the last batch of an epoch is filled up with rows of padding.

    Attributes:
        components: what the examples are drawn from.
        layout: of rows; L and T are its lengths.
        batch_size: rows B of a global batch.
        seed: of the order and of the draws; an integer in [0, 2**64).
        packed: whether examples share rows.
        buckets: shares of the full lengths, ascending, each in (0, 1]; the full length is always there.
    """

    components: tuple[Component, ...]
    layout: Layout
    batch_size: int
    seed: int
    packed: bool = False
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size}: must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed {self.seed}: must be an integer from 0 to 2**64 - 1")
        for component in self.components:
            if not len(component.examples):
                raise InputError(f"there are no examples in {component.name}: too little data for rows of this length")
        if self.buckets and (self.packed or len(self.components) > 1):
            other = "packing" if self.packed else "a mixture"
            raise InputError(f"length buckets and {other} exclude each other; packing leaves less padding than buckets")
        if not all(0 < share <= 1 for share in self.buckets) or sorted(set(self.buckets)) != list(self.buckets):
            raise InputError(f"buckets {self.buckets}: must be ascending shares of the row, above 0 and at most 1")
        if self.packed and "next_sentence" in self.layout.extras:
            raise InputError("next-sentence prediction has one label a row, so that examples cannot be packed")
        object.__setattr__(self, "layout", dataclasses.replace(self.layout, positions=self.packed))

    @property
    def input_length(self) -> int:
        """Tokens of a row on the encoder's side; 0 for a decoder alone."""
        return self.layout.input_length

    @property
    def target_length(self) -> int:
        """Tokens of a row on the decoder's side; 0 for an encoder alone."""
        return self.layout.target_length

    @property
    def num_examples(self) -> int:
        """Examples of all components together."""
        return sum(len(component.examples) for component in self.components)

    @property
    def num_rows(self) -> int:
        """Rows of all components together, once each."""
        return sum(self._rows_of(index) for index in range(len(self.components)))

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """Returns the rows of one host for a step: rows [i B/n, (i + 1) B/n) of the global batch for host i of n.

        The keys are those of `Layout`; B/n rows. Equal arguments give equal arrays.

        Raises:
            InputError: for a negative step, or a batch size that the hosts cannot share evenly.
        """
        if not 0 <= step < 2**63 // self.batch_size:
            raise InputError(f"step {step}: must be 0 or more, and below {2**63 // self.batch_size}")
        share = self._share(process_index, process_count)
        if self.buckets:
            return self._bucket_batch(step, share)
        components, places = self._mixing(step * self.batch_size + np.arange(share.start, share.stop), self.seed)
        rows: list[list[Example]] = [[] for _ in share]
        for index in np.unique(components).tolist():
            here = np.flatnonzero(components == index)
            count = self._rows_of(index)
            epochs, within = np.divmod(places[here], count)
            for epoch in np.unique(epochs).tolist():
                this = epochs == epoch
                images = order.permute(within[this], count, (self.seed, epoch), component=index)
                for at, row in zip(here[this].tolist(), images.tolist(), strict=True):
                    rows[at] = self._row(index, row, epoch, order.TRAIN)
        return self.layout(rows)

    def loader(self, start: int, process_index: int = 0, process_count: int = 1) -> Callable[[int], Batch]:
        """Returns `batch` for one host; a `StreamingDataset` has to know where to start."""
        return functools.partial(self.batch, process_index=process_index, process_count=process_count)

    def eval_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yields every example exactly once, in order, with draws that are the same for every seed and every call.

        The last batch is filled up with rows of padding, whose loss weights are 0.
        """
        share = self._share(process_index, process_count)
        places = ((index, row) for index in range(len(self.components)) for row in range(self._rows_of(index)))
        while batch := list(itertools.islice(places, self.batch_size)):
            mine = batch[share.start : share.stop]
            yield self.layout([self._row(index, row, 0, order.EVAL) for index, row in mine], len(share))

    def component(self, index: int) -> "Dataset":
        """Returns the dataset of one component alone."""
        return dataclasses.replace(self, components=self.components[index : index + 1])

    @functools.cached_property
    def _mixing(self) -> order.Mixing:
        # Rates are of examples, and what is drawn are rows.
        rates = [
            component.rate * self._rows_of(index) / len(component.examples)
            for index, component in enumerate(self.components)
        ]
        return order.Mixing.of(rates)

    @functools.cached_property
    def _packings(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Order and starts of the examples in rows, for each component; see `first_fit`."""
        capacity = (self.layout.input_length, self.layout.target_length)
        packings = []
        for index, component in enumerate(self.components):
            sizes = component.examples.sizes()
            shuffled = order.permute(np.arange(len(sizes)), len(sizes), (self.seed, 0), order.PACK, index)
            taken, starts = first_fit(sizes[shuffled], capacity)
            packings.append((shuffled[taken], starts))
        return tuple(packings)

    def _rows_of(self, index: int) -> int:
        return len(self._packings[index][1]) - 1 if self.packed else len(self.components[index].examples)

    def _row(self, index: int, row: int, epoch: int, purpose: int) -> list[Example]:
        numbers = [row]
        if self.packed:
            taken, starts = self._packings[index]
            numbers = taken[starts[row] : starts[row + 1]].tolist()
        seed = self.seed if purpose == order.TRAIN else 0
        examples = self.components[index].examples
        return [
            example
            for number in numbers
            for example in examples(number, order.generator(seed, epoch, number, purpose, index))
        ]

    @functools.cached_property
    def _members(self) -> tuple[tuple[Layout, np.ndarray], ...]:
        """The layout and the examples of each bucket that has any."""
        sizes = self.components[0].examples.sizes()
        members = []
        left = np.ones(len(sizes), bool)
        for share in (*self.buckets, 1.0):
            # Rounded up, but a share of a whole number of tokens may be a hair above it: 25 * (7 / 25) > 7.
            lengths = [
                math.ceil(length * share - 1e-6) for length in (self.layout.input_length, self.layout.target_length)
            ]
            fits = left & (sizes <= lengths).all(axis=1)
            left &= ~fits
            if fits.any():
                layout = dataclasses.replace(self.layout, input_length=lengths[0], target_length=lengths[1])
                members.append((layout, np.flatnonzero(fits)))
        return tuple(members)

    def _bucket_batch(self, step: int, share: range) -> Batch:
        batches = np.array([-(-len(numbers) // self.batch_size) for _, numbers in self._members])
        epoch, place = divmod(step, int(batches.sum()))
        image = int(order.permute(np.array([place]), int(batches.sum()), (self.seed, epoch), order.BUCKETS)[0])
        bucket = int(np.searchsorted(np.cumsum(batches), image, "right"))
        layout, numbers = self._members[bucket]
        start = (image - int(batches[:bucket].sum())) * self.batch_size
        within = np.arange(start + share.start, min(start + share.stop, len(numbers)))
        chosen = numbers[order.permute(within, len(numbers), (self.seed, epoch), component=bucket)]
        return layout([self._row(0, number, epoch, order.TRAIN) for number in chosen.tolist()], len(share))

    def _share(self, process_index: int, process_count: int) -> range:
        if not 0 <= process_index < process_count:
            raise InputError(f"process_index {process_index}: must be from 0 to {process_count - 1}")
        if self.batch_size % process_count:
            raise InputError(f"batch_size {self.batch_size}: must be a multiple of the {process_count} processes")
        share = self.batch_size // process_count
        return range(process_index * share, (process_index + 1) * share)


def text_dataset(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    objective: Objective,
    input_length: int,
    target_length: int | None,
    batch_size: int,
    seed: int,
    decoder_start_id: int | None = None,
    *,
    packed: bool = False,
) -> Dataset:
    """Builds a dataset of running text in memory, corrupted afresh every epoch.

    Args:
        texts: documents.
        tokenizer: what makes tokens of them.
        objective: what is asked; it decides whether windows may cross from one document to the next.
        input_length: tokens of the encoder's rows; of a decoder alone those of its rows.
        target_length: tokens of the decoder's rows; None: as many as the objective needs.
        batch_size: rows of a global batch.
        seed: of order and draws.
        decoder_start_id: the first decoder input; None means the pad id, as T5 has it.
        packed: see `Dataset`; documents are then kept apart.

    Raises:
        InputError: rows too short for the objective, or too little text.
    """
    source, vocabulary = InMemory({"tokens": tokenize(texts, tokenizer)}), Vocabulary.of(tokenizer)
    size, layout = plan_rows(objective, input_length, target_length, vocabulary, decoder_start_id)
    kept = np.ones(len(source.features["tokens"]), bool)
    examples = examples_of(source, kept, objective, size, vocabulary, packed=packed)
    return Dataset((Component(examples),), layout, batch_size, seed, packed)


def text_to_text_dataset(
    pairs: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    input_length: int,
    target_length: int,
    batch_size: int,
    seed: int,
    decoder_start_id: int | None = None,
    *,
    packed: bool = False,
) -> Dataset:
    """Builds a dataset of (inputs, targets) texts in memory; see `text_dataset`.

    Each side is cut to its length, in its special tokens (T5: an EOS).

    Raises:
        InputError: for no pairs, or a length below 2.
    """
    objective, vocabulary = TextToText(input_length, target_length), Vocabulary.of(tokenizer)
    if not pairs:
        raise InputError("no pairs of inputs and targets to train on")
    source = InMemory(
        {name: tokenize((pair[n] for pair in pairs), tokenizer) for n, name in enumerate(objective.arrays)}
    )
    _, layout = plan_rows(objective, input_length, target_length, vocabulary, decoder_start_id)
    examples = Records(source, np.arange(len(pairs)), objective, vocabulary)
    return Dataset((Component(examples),), layout, batch_size, seed, packed)


def plan_rows(
    objective: Objective,
    input_length: int,
    target_length: int | None,
    vocabulary: Vocabulary,
    decoder_start_id: int | None = None,
) -> tuple[int, Layout]:
    """Returns the tokens of running text that an example takes, and the layout of the rows it goes into.

    Raises:
        InputError: rows too short for the objective.
    """
    decoder_row = input_length if objective.sides == "decoder" else target_length
    size = objective.window(input_length, decoder_row, vocabulary)
    if objective.sides == "encoder_decoder" and target_length is None:
        decoder_row = objective.sizes(size, vocabulary)[1]
    extras = ("input_targets", "input_weights") if objective.sides == "encoder" else ()
    if "other" in objective.arrays:  # a pair of texts
        extras = (*extras, "input_types", "next_sentence")
    return size, Layout(
        extras=extras,
        input_length=0 if objective.sides == "decoder" else input_length,
        target_length=0 if objective.sides == "encoder" else decoder_row or 0,
        pad_id=vocabulary.pad_id,
        decoder_start_id=vocabulary.pad_id if decoder_start_id is None else decoder_start_id,
    )


@dataclasses.dataclass(frozen=True)
class _Failure:
    error: BaseException


@dataclasses.dataclass(frozen=True)
class _Load:
    """Loads a step, and brings an exception home as a value: one that crosses processes loses its type."""

    load: Callable[[int], Any]

    def __call__(self, step: int) -> tuple[int, Any]:
        try:
            return step, self.load(step)
        except Exception as error:
            return step, _Failure(error)


def prefetch(
    load: Callable[[int], T], start: int, stop: int, *, workers: int = 0, depth: int = 2
) -> Iterator[tuple[int, T]]:
    """Yields (step, load(step)) for the steps from `start` up to `stop`, loaded ahead by Grain.

    Args:
        load: of a step; for `workers` it has to be picklable.
        start: the first step.
        stop: behind the last.
        workers: processes that load, each every n-th step; 0: a thread of this process. What is yielded is the same. A
            program that uses processes needs `if __name__ == "__main__":` around what it does.
        depth: results that wait, for each worker.

    Raises:
        Exception: what `load` raised, at its step.
    """
    import grain
    from absl import flags

    # grain.MapDataset has no notion of an end that moves, and none is needed: the steps of a run are known.
    dataset = grain.MapDataset.range(start, stop).map(_Load(load))
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(depth, 1)))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's processes read a flag of its own
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(depth, 1)))
    iterator = iter(batches)
    try:
        for step, result in iterator:
            if isinstance(result, _Failure):
                raise result.error
            yield step, _copied(result) if workers else result
    finally:
        iterator.close()
        if workers:
            # What was read ahead is held by cycles, and its shared memory would be missed at the end of the program.
            iterator = batches = result = None
            gc.collect()


def _copied(result: Any) -> Any:
    """Returns a result whose arrays are in this process's own memory, which may be kept without end."""
    if isinstance(result, dict):
        return {name: _copied(value) for name, value in result.items()}
    return np.array(result) if isinstance(result, np.ndarray) else result
