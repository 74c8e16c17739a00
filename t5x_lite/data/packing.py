"""Examples to rows, and rows to the arrays of a batch: which share a row, and where in it each of them lies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from t5x_lite.data.objectives import Example
from t5x_lite.errors import InputError

Batch = dict[str, np.ndarray]

# Attribute of an example to key, dtype and filling (None: the pad id) of an array of the batch.
_EXTRAS: Mapping[str, tuple[str, type, int | None]] = {
    "input_targets": ("encoder_target_tokens", np.int32, None),
    "input_weights": ("encoder_loss_weights", np.float32, 0),
    "input_types": ("encoder_token_types", np.int32, 0),
}

OPEN_ROWS = 256  # rows that first-fit packing looks at; of more than these the oldest is closed


def first_fit(sizes: np.ndarray, capacity: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Puts each example, in the order given, into the first open row that has room for it.

    Args:
        sizes: int [n, sides], tokens of each example on each side.
        capacity: tokens that a row has on each side.

    Returns:
        int64 `order` [n] and `starts` [rows + 1]: row r holds the examples `order[starts[r]:starts[r + 1]]`, in the
        order in which they were put there. Rows are in the order in which they were opened.

    Raises:
        InputError: an example that is larger than a row.
    """
    sizes, room = np.asarray(sizes, np.int64), np.asarray(capacity, np.int64)
    if (too_large := np.flatnonzero((sizes > room).any(axis=1))).size:
        example = sizes[too_large[0]].tolist()
        raise InputError(f"an example of {example} tokens does not fit in a row of {room.tolist()}")
    # Where the two smallest do not fit together, none do: of a decoder's windows, each a row, there may be millions.
    if len(sizes) < 2 or (np.partition(sizes, 1, axis=0)[:2].sum(axis=0) > room).any():
        return np.arange(len(sizes)), np.arange(len(sizes) + 1)
    row_of = np.empty(len(sizes), np.int64)
    # One column a row, used as a ring: what is open stands in the columns of the last OPEN_ROWS rows.
    free = np.full((len(room), OPEN_ROWS), -1, np.int64)
    opened = 0
    for index, size in enumerate(sizes):
        fits = np.flatnonzero((free >= size[:, None]).all(axis=0))
        if fits.size:
            # The column of the oldest open row is the one that would be used next.
            column = fits[np.argmin((fits - opened) % OPEN_ROWS)]
            row_of[index] = opened - OPEN_ROWS + (column - opened) % OPEN_ROWS
        else:
            column = opened % OPEN_ROWS
            free[:, column] = room
            row_of[index] = opened
            opened += 1
        free[:, column] -= size
    order = np.argsort(row_of, kind="stable")
    return order, np.searchsorted(row_of[order], np.arange(opened + 1))


@dataclass(frozen=True)
class Layout:
    """The shape of rows.

    Attributes:
        input_length: tokens of the encoder's side; 0: there is no encoder.
        target_length: tokens of the decoder's side; 0: there is no decoder.
        pad_id: fills rows after their end.
        decoder_start_id: the first decoder input of an example that names none.
        positions: whether the batch has the position of each token in its example; without them a model counts for
            itself, from the segment ids.
        extras: which of the arrays below that only some objectives have the batch has, as attributes of `Example`.
    """

    input_length: int
    target_length: int
    pad_id: int
    decoder_start_id: int
    positions: bool = False
    extras: tuple[str, ...] = ()

    def __call__(self, rows: Sequence[Sequence[Example]], count: int | None = None) -> Batch:
        """Lays rows of examples out as a batch.

        The examples of a row follow each other without a gap and are told apart by segment ids 1, 2, ...; 0 is padding.
        The decoder reads each example's targets one place later, behind a start token of its own.

        Args:
            rows: the examples of each row.
            count: rows of the batch; those after the last of `rows` are padding. By default there are none.

        Returns:
            int32 arrays [count, length], weights float32. With an encoder `encoder_input_tokens` and
            `encoder_segment_ids`, and for the `extras` `encoder_target_tokens`, `encoder_loss_weights`,
            `encoder_token_types`, and `next_sentence_labels` [count]. With a decoder `decoder_input_tokens`,
            `decoder_target_tokens`, `decoder_segment_ids` and `decoder_loss_weights`. With `positions`
            `encoder_positions` and `decoder_positions`.

        Raises:
            InputError: examples that do not fit in a row.
        """
        count = len(rows) if count is None else count
        batch: Batch = {}
        if self.input_length:
            side = self._side("encoder", [[example.inputs for example in row] for row in rows], count)
            inputs = side.pop("tokens")
            batch |= {"encoder_input_tokens": inputs, **side}
            batch |= self._extras(rows, count)
        if self.target_length:
            side = self._side("decoder", [[example.targets for example in row] for row in rows], count)
            targets = side.pop("tokens")
            shifted = np.full((count, self.target_length), self.pad_id, np.int32)
            weights = np.zeros((count, self.target_length), np.float32)
            for index, start, end, example in self._places(rows, "targets"):
                if start == end:  # nothing to say, and so no place for a start token
                    continue
                shifted[index, start] = self.decoder_start_id if example.start is None else example.start
                shifted[index, start + 1 : end] = targets[index, start : end - 1]
                weights[index, start:end] = 1.0 if example.target_weights is None else example.target_weights
            batch |= {
                "decoder_input_tokens": shifted,
                "decoder_target_tokens": targets,
                **side,
                "decoder_loss_weights": weights,
            }
        return batch

    def _side(self, side: str, rows: Sequence[Sequence[np.ndarray | None]], count: int) -> Batch:
        length = self.input_length if side == "encoder" else self.target_length
        if any(ids is None for row in rows for ids in row):
            raise InputError(f"an example has nothing for the {side}'s rows of {length} tokens")
        tokens, segments, positions = fill_rows(cast(Any, rows), count, length, self.pad_id)
        arrays = {"tokens": tokens, f"{side}_segment_ids": segments}
        return arrays | {f"{side}_positions": positions} if self.positions else arrays

    def _extras(self, rows: Sequence[Sequence[Example]], count: int) -> Batch:
        batch: Batch = {}
        for name, (key, dtype, fill) in _EXTRAS.items():
            if name not in self.extras:
                continue
            batch[key] = np.full((count, self.input_length), self.pad_id if fill is None else fill, dtype)
            for index, start, end, example in self._places(rows, "inputs"):
                batch[key][index, start:end] = getattr(example, name)
        if "next_sentence" in self.extras:
            labels = [row[0].next_sentence for row in rows]
            batch["next_sentence_labels"] = np.array([*labels, *[0] * (count - len(rows))], np.int32)
        return batch

    def _places(self, rows: Sequence[Sequence[Example]], side: str) -> Iterator[tuple[int, int, int, Example]]:
        for index, row in enumerate(rows):
            start = 0
            for example in row:
                end = start + len(getattr(example, side))
                yield index, start, end, example
                start = end


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
    whole = [[np.array([*prompt, *continuation], np.int32)] for prompt, continuation in examples]
    tokens, segments, _ = fill_rows(whole, rows, length, pad_id)
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


def fill_rows(
    rows: Sequence[Sequence[np.ndarray]], count: int, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns int32 tokens, segment ids and positions [count, length] of rows of sequences, one after the other.

    Raises:
        InputError: for sequences that do not fit in a row.
    """
    tokens = np.full((count, length), pad_id, np.int32)
    segments, positions = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    for index, row in enumerate(rows):
        place = 0
        for segment, ids in enumerate(row, 1):
            end = place + len(ids)
            if end > length:
                what = f"{segment} examples of {end}" if place else f"an example of {len(ids)}"
                raise InputError(f"{what} tokens does not fit in a row of {length}")
            tokens[index, place:end] = ids
            segments[index, place:end] = segment
            positions[index, place:end] = np.arange(len(ids))
            place = end
    return tokens, segments, positions
