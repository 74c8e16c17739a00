"""From token ids to batches: the order of the data, and every random draw in it, is a function of (seed, step)."""

import dataclasses
import hashlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from t5x_lite.data.objectives import Example, SpanCorruption, TextToText, check_sentinels
from t5x_lite.data.tokenizers import Tokenizer, require_eos
from t5x_lite.errors import InputError

T = TypeVar("T")
Batch = dict[str, np.ndarray]

_SHUFFLE, _TRAIN, _EVAL = range(3)  # what a stream of random numbers is for
_ROUNDS = 64


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of many texts in one array: `flat` [total], uint16 where the vocabulary allows, else int32.

    `offsets` int64 [texts + 1]: text i is `flat[offsets[i]:offsets[i + 1]]`.
    """

    flat: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each text, int64 [texts]."""
        return np.diff(self.offsets)


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """Encodes texts, without EOS, a thousand at a time."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    parts, lengths = [np.zeros(0, dtype)], [0]
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, 1000)):
        encoded = tokenizer.encode_batch(chunk)
        lengths += map(len, encoded)
        parts.append(np.fromiter(itertools.chain.from_iterable(encoded), dtype))
    return Tokens(np.concatenate(parts), np.cumsum(lengths, dtype=np.int64))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in a shuffled order without end, read by step; a library user builds one with the functions below.

    Each epoch is a permutation of its own, so that every example comes exactly once in it; a batch may hold the end of
    one epoch and the start of the next. The draws of an example depend on (seed, epoch, example) alone: not on the
    batch size, the number of hosts, or what was read before.

    Attributes:
        example: (index, generator) -> (inputs, targets), the example with that index in [0, num_examples).
        num_examples: examples in an epoch.
        input_length, target_length: the lengths L and T of the rows; L is 0 for a decoder alone.
        batch_size: rows B of a global batch.
        seed: of the order and of the draws; an integer in [0, 2**64).
        tokenizer: of the ids; its pad id fills the rows after their end.
        decoder_start_id: the first decoder input; None means the pad id, as T5 has it.
        truncated_inputs, truncated_targets: how many examples were cut to fit the lengths.
    """

    example: Callable[[int, np.random.Generator], Example]
    num_examples: int
    input_length: int
    target_length: int
    batch_size: int
    seed: int
    tokenizer: Tokenizer
    decoder_start_id: int | None = None
    truncated_inputs: int = 0
    truncated_targets: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size}: must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed {self.seed}: must be an integer from 0 to 2**64 - 1")

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """Returns the rows of one host for a step: rows [i B/n, (i + 1) B/n) of the global batch for host i of n.

        The keys and shapes are those of `encoder_decoder_batch`; B/n rows. Equal arguments give equal arrays.

        Raises:
            InputError: for a negative step, or a batch size that the hosts cannot share evenly.
        """
        if not 0 <= step < 2**63 // self.batch_size:
            raise InputError(f"step {step}: must be 0 or more, and below {2**63 // self.batch_size}")
        rows = self._rows(process_index, process_count)
        position = step * self.batch_size + np.arange(rows.start, rows.stop)
        epochs, places = np.divmod(position, self.num_examples)
        examples: list[Example] = []
        for epoch in np.unique(epochs).tolist():
            indices = permute(places[epochs == epoch], self.num_examples, (self.seed, epoch))
            examples += [self.example(i, _generator(self.seed, epoch, i, _TRAIN)) for i in indices.tolist()]
        return self._collate(examples, len(rows))

    def eval_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yields every example exactly once, in order, with draws that are the same for every seed and every call.

        The last batch is filled up with rows of padding, whose loss weights are 0.
        """
        rows = self._rows(process_index, process_count)
        for start in range(0, self.num_examples, self.batch_size):
            indices = range(start + rows.start, min(start + rows.stop, self.num_examples))
            yield self._collate([self.example(i, _generator(0, 0, i, _EVAL)) for i in indices], len(rows))

    def _rows(self, process_index: int, process_count: int) -> range:
        if not 0 <= process_index < process_count:
            raise InputError(f"process_index {process_index}: must be from 0 to {process_count - 1}")
        if self.batch_size % process_count:
            raise InputError(f"batch_size {self.batch_size}: must be a multiple of the {process_count} processes")
        share = self.batch_size // process_count
        return range(process_index * share, (process_index + 1) * share)

    def _collate(self, examples: Sequence[Example], rows: int) -> Batch:
        pad_id = self.tokenizer.pad_id
        batch = encoder_decoder_batch(
            examples,
            rows=rows,
            input_length=self.input_length,
            target_length=self.target_length,
            pad_id=pad_id,
            decoder_start_id=pad_id if self.decoder_start_id is None else self.decoder_start_id,
        )
        return {key: value for key, value in batch.items() if self.input_length or not key.startswith("encoder")}


def encoder_decoder_batch(
    examples: Sequence[Example],
    *,
    rows: int,
    input_length: int,
    target_length: int,
    pad_id: int,
    decoder_start_id: int,
) -> Batch:
    """Lays examples out as a batch of constant shape, the rows after the last example being padding.

    Returns:
        int32 `encoder_input_tokens`, `encoder_segment_ids` [rows, input_length]; int32 `decoder_input_tokens` (the
        targets shifted right by one behind `decoder_start_id`), `decoder_target_tokens`, `decoder_segment_ids` and
        float32 `decoder_loss_weights` [rows, target_length]. Segment ids and weights are 1 on tokens, 0 on padding.

    Raises:
        InputError: if an example is longer than its row.
    """
    inputs, input_segments = _pad([example[0] for example in examples], rows, input_length, pad_id)
    targets, target_segments = _pad([example[1] for example in examples], rows, target_length, pad_id)
    shifted = np.concatenate([np.full((rows, 1), decoder_start_id, np.int32), targets[:, :-1]], axis=1)
    return {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": input_segments,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_segment_ids": target_segments,
        "decoder_loss_weights": target_segments.astype(np.float32),
    }


def decoder_batch(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]], *, rows: int, length: int, pad_id: int
) -> Batch:
    """Lays (prompt, continuation) pairs out for a decoder alone, the rows after the last example being padding.

    Returns:
        int32 `decoder_input_tokens` (prompt and continuation), `decoder_target_tokens` (the same, a place to the left),
        `decoder_segment_ids`, and float32 `decoder_loss_weights`, 1 where the target is of the continuation; all
        [rows, length].

    Raises:
        InputError: if an example is longer than its row.
    """
    whole = [np.array([*prompt, *continuation], np.int32) for prompt, continuation in examples]
    tokens, segments = _pad(whole, rows, length, pad_id)
    targets = np.concatenate([tokens[:, 1:], np.full((rows, 1), pad_id, np.int32)], axis=1)
    weights = np.zeros((rows, length), np.float32)
    for row, (prompt, continuation) in enumerate(examples):
        if continuation:
            weights[row, len(prompt) - 1 : len(prompt) + len(continuation) - 1] = 1.0
    return {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": targets,
        "decoder_segment_ids": segments,
        "decoder_loss_weights": weights,
    }


def _pad(sequences: Sequence[np.ndarray], rows: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((rows, length), pad_id, np.int32)
    segments = np.zeros((rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        if len(sequence) > length:
            raise InputError(f"an example of {len(sequence)} tokens does not fit in a row of {length}")
        tokens[row, : len(sequence)] = sequence
        segments[row, : len(sequence)] = 1
    return tokens, segments


def span_corruption_dataset(
    texts_or_tokens: Iterable[str] | Tokens,
    tokenizer: Tokenizer,
    objective: SpanCorruption,
    input_length: int,
    target_length: int | None,
    batch_size: int,
    seed: int,
    decoder_start_id: int | None = None,
) -> Dataset:
    """Builds the pre-training dataset of T5: texts end to end, cut into windows, corrupted afresh every epoch.

    As in T5, nothing stands between two texts and windows cross from one to the next. A window has
    `objective.raw_length(input_length)` tokens; the last one has what is left, if that is at least 2.
    `target_length` None means `objective.target_length(input_length)`.

    Raises:
        InputError: for a `target_length` the targets do not fit in, more spans than the tokenizer has sentinels, or
            fewer than 2 tokens of text.
    """
    raw = objective.raw_length(input_length)
    needed = objective.target_length(input_length)
    if target_length is not None and target_length < needed:
        raise InputError(f"target_length {target_length}: input_length {input_length} needs at least {needed}")
    check_sentinels(objective.num_spans(raw), len(tokenizer.sentinels))
    tokens = texts_or_tokens if isinstance(texts_or_tokens, Tokens) else tokenize(texts_or_tokens, tokenizer)
    whole, left = divmod(len(tokens.flat), raw)
    num_examples = whole + (left >= 2)
    if not num_examples:
        raise InputError(f"tokens in the corpus: {left}; span corruption needs at least 2")

    def example(index: int, rng: np.random.Generator) -> Example:
        return objective(tokens.flat[index * raw : (index + 1) * raw], rng, tokenizer)

    return Dataset(
        example=example,
        num_examples=num_examples,
        input_length=input_length,
        target_length=needed if target_length is None else target_length,
        batch_size=batch_size,
        seed=seed,
        tokenizer=tokenizer,
        decoder_start_id=decoder_start_id,
    )


def causal_lm_dataset(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    length: int,
    batch_size: int,
    seed: int,
    decoder_start_id: int | None = None,
) -> Dataset:
    """Builds the pre-training dataset of a decoder alone: texts end to end, an EOS after each, cut into windows.

    A row is a window of `length` tokens, all of them targets; the decoder reads them one place later, behind the start
    token. The last window has what is left.

    Raises:
        InputError: for a length below 1, no text, or a vocabulary without EOS.
    """
    if length < 1:
        raise InputError(f"length {length}: must be at least 1")
    tokens, eos_id = tokenize(texts, tokenizer), require_eos(tokenizer)
    if not len(tokens.flat):
        raise InputError("no text to train on")
    flat = np.insert(tokens.flat, tokens.offsets[1:], eos_id)
    nothing = np.zeros(0, np.int32)

    def example(index: int, rng: np.random.Generator) -> Example:
        return nothing, flat[index * length : (index + 1) * length].astype(np.int32)

    return Dataset(
        example=example,
        num_examples=-(-len(flat) // length),
        input_length=0,
        target_length=length,
        batch_size=batch_size,
        seed=seed,
        tokenizer=tokenizer,
        decoder_start_id=decoder_start_id,
    )


def text_to_text_dataset(
    pairs: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    input_length: int,
    target_length: int,
    batch_size: int,
    seed: int,
    decoder_start_id: int | None = None,
) -> Dataset:
    """Builds a dataset of (inputs, targets) texts, each side cut to its length, in its special tokens (T5: an EOS).

    The result's `truncated_inputs` and `truncated_targets` count what was cut.

    Raises:
        InputError: for no pairs, or a length below 2.
    """
    objective = TextToText(input_length, target_length)
    if not pairs:
        raise InputError("no pairs of inputs and targets to train on")
    inputs = tokenize((pair[0] for pair in pairs), tokenizer)
    targets = tokenize((pair[1] for pair in pairs), tokenizer)

    special = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)

    def example(index: int, rng: np.random.Generator) -> Example:
        return objective(inputs[index], targets[index], tokenizer)

    return Dataset(
        example=example,
        num_examples=len(pairs),
        input_length=input_length,
        target_length=target_length,
        batch_size=batch_size,
        seed=seed,
        tokenizer=tokenizer,
        decoder_start_id=decoder_start_id,
        truncated_inputs=int((inputs.lengths > input_length - special).sum()),
        truncated_targets=int((targets.lengths > target_length - special).sum()),
    )


def _generator(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    # Philox is counter-based: key and counter name a stream, and no stream reaches the next index within 2**64 draws.
    # As uint64 arrays: a list with an integer above 2**63 passes through float64, which merges neighbouring seeds.
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, index, purpose, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def permute(places: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """Returns int64 images of `places` in [0, size) under the permutation that `key` names.

    The swap-or-not shuffle (Hoang, Morris and Rogaway 2012): each round pairs every number with another and swaps the
    pair or not by a hash, so any one image is computed without the others, in constant time and memory.
    """
    rng = _generator(*key, 0, _SHUFFLE)
    pivots = rng.integers(size, size=_ROUNDS)
    salts = rng.integers(2**64, size=_ROUNDS, dtype=np.uint64)
    images = np.asarray(places, np.int64)
    for pivot, salt in zip(pivots, salts, strict=True):
        partners = (pivot - images) % size
        swap = _hash_bit(np.maximum(images, partners).astype(np.uint64) ^ salt)
        images = np.where(swap, partners, images)
    return images


def _hash_bit(values: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64; products wrap modulo 2**64.
    values = (values ^ (values >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> 27)) * np.uint64(0x94D049BB133111EB)
    return (values >> 63).astype(bool)


@dataclasses.dataclass(frozen=True)
class _Failure:
    error: BaseException


def prefetch(load: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[tuple[int, T]]:
    """Yields (step, load(step)) for the steps from `start` up to `stop`, loading ahead in a thread.

    At most `depth` finished results wait (and one more is being made). An exception in `load` is raised here, at its
    step. The thread ends when the iterator is closed or collected, after the `load` it is in.
    """
    ready: queue.Queue[T | _Failure] = queue.Queue(maxsize=max(depth, 1))
    stopped = threading.Event()

    def produce() -> None:
        for step in range(start, stop):
            if stopped.is_set():
                return
            try:
                ready.put(load(step))
            except BaseException as error:
                ready.put(_Failure(error))
                return

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        for step in range(start, stop):
            result = ready.get()
            if isinstance(result, _Failure):
                raise result.error
            yield step, result
    finally:
        stopped.set()
        # Room for the one result that the thread may still put: it looks at `stopped` before it makes another.
        while not ready.empty():
            ready.get_nowait()
        thread.join()


def hold_out(
    records: Sequence[T], fraction: float, seed: int = 0, key: Callable[[T], object] = lambda record: record
) -> tuple[list[T], list[T]]:
    """Divides records into (train, validation), about `fraction` of them for validation, each side in the given order.

    The side follows from a hash of the record's `key`, by default all of it: equal records are on one side, and records
    added later do not move the others. Neither side is left empty.

    Raises:
        InputError: for a `fraction` outside (0, 1) or fewer than two different records.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation fraction {fraction}: must be above 0 and below 1")
    hashes = np.array([content_hash(key(record), seed) for record in records], np.uint64)
    if len(np.unique(hashes)) < 2:
        raise InputError(
            f"cannot hold out a validation set: {len(records)} records, fewer than 2 different ones;"
            " give data.eval_path"
        )
    held = hashes < np.uint64(int(fraction * 2**64))
    if not held.any():
        held = hashes == hashes.min()
    elif held.all():
        held = hashes != hashes.max()
    train = [record for record, out in zip(records, held, strict=True) if not out]
    return train, [record for record, out in zip(records, held, strict=True) if out]


def content_hash(record: object, seed: int = 0) -> int:
    """Returns a 64-bit hash of a record's content (its `repr`; for a mapping, in the order of its keys' names)."""
    content = repr(sorted(record.items()) if isinstance(record, dict) else record)
    digest = hashlib.blake2b(
        content.encode(errors="surrogatepass"), digest_size=8, salt=(seed % 2**64).to_bytes(8, "little")
    )
    return int.from_bytes(digest.digest(), "little")
