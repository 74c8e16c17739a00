import itertools

import numpy as np
import pytest

from t5x_lite.data import packing
from t5x_lite.data.objectives import Example
from t5x_lite.data.packing import Layout, first_fit
from t5x_lite.errors import InputError


def example(inputs=None, targets=None, **fields):
    arrays = {"inputs": inputs, "targets": targets, **fields}
    return Example(
        **{name: value if value is None or np.isscalar(value) else np.array(value) for name, value in arrays.items()}
    )


# --- first-fit ------------------------------------------------------------------------------------------------------


def plain_first_fit(sizes, capacity, open_rows):
    """First-fit as one would write it down."""
    rows = []
    for number, size in enumerate(sizes):
        for row in rows[-open_rows:]:
            if all(sum(sizes[member][side] for member in row) + size[side] <= capacity[side] for side in (0, 1)):
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


@pytest.mark.parametrize("open_rows", [3, 256])
def test_first_fit_is_first_fit(monkeypatch, open_rows):
    monkeypatch.setattr(packing, "OPEN_ROWS", open_rows)
    rng = np.random.default_rng(0)
    drawn = [np.stack([rng.integers(0, 30, count), rng.integers(1, 12, count)], axis=1) for count in (0, 1, 7, 300)]
    # And a decoder's windows, with the last of them as long as fits beside none, or beside another short one.
    for sizes in (*drawn, np.array([[0, 16]] * 9 + [[0, 3]]), np.array([[0, 16]] * 9 + [[0, 3], [0, 13]])):
        order, starts = first_fit(sizes, (40, 16))
        rows = [order[a:b].tolist() for a, b in itertools.pairwise(starts)]
        assert rows == plain_first_fit(sizes.tolist(), (40, 16), open_rows)


def test_first_fit_fills_rows():
    rng = np.random.default_rng(1)
    sizes = np.stack([rng.integers(5, 200, 5000), rng.integers(2, 50, 5000)], axis=1)
    _, starts = first_fit(sizes, (512, 114))
    used = sizes.sum(axis=0) / (512, 114) / (len(starts) - 1)
    assert used.max() > 0.97  # the side that is short; 0.98 was seen


def test_what_is_larger_than_a_row_is_an_error():
    with pytest.raises(InputError, match=r"an example of \[5, 9\] tokens does not fit in a row of \[5, 8\]"):
        first_fit(np.array([[1, 1], [5, 9]]), (5, 8))


# --- rows -----------------------------------------------------------------------------------------------------------


def test_layout_of_a_batch():
    examples = [[example([5, 6, 1], [7, 1])], [example([8, 1], [9, 10, 1])]]
    batch = Layout(4, 3, pad_id=0, decoder_start_id=42)(examples, 3)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "encoder_input_tokens": [[5, 6, 1, 0], [8, 1, 0, 0], [0, 0, 0, 0]],
        "encoder_segment_ids": [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
        "decoder_input_tokens": [[42, 7, 0], [42, 9, 10], [0, 0, 0]],
        "decoder_target_tokens": [[7, 1, 0], [9, 10, 1], [0, 0, 0]],
        "decoder_segment_ids": [[1, 1, 0], [1, 1, 1], [0, 0, 0]],
        "decoder_loss_weights": [[1, 1, 0], [1, 1, 1], [0, 0, 0]],
    }
    assert {key: value.dtype for key, value in batch.items() if value.dtype != np.int32} == {
        "decoder_loss_weights": np.float32
    }


def test_examples_of_a_row_have_segments_positions_and_a_start_token_each():
    row = [example([5, 6, 1], [7, 1]), example([8, 1], [9, 10, 1], target_weights=[0, 0.5, 1])]
    batch = Layout(6, 6, pad_id=9, decoder_start_id=42, positions=True)([row])
    assert {key: value[0].tolist() for key, value in batch.items()} == {
        "encoder_input_tokens": [5, 6, 1, 8, 1, 9],
        "encoder_segment_ids": [1, 1, 1, 2, 2, 0],
        "encoder_positions": [0, 1, 2, 0, 1, 0],
        "decoder_input_tokens": [42, 7, 42, 9, 10, 9],
        "decoder_target_tokens": [7, 1, 9, 10, 1, 9],
        "decoder_segment_ids": [1, 1, 2, 2, 2, 0],
        "decoder_positions": [0, 1, 0, 1, 2, 0],
        "decoder_loss_weights": [1, 1, 0, 0.5, 1, 0],
    }


def test_layout_for_an_encoder_alone():
    fields = {"input_targets": [4, 5, 6], "input_weights": [0, 1, 0], "input_types": [0, 1, 1], "next_sentence": 1}
    layout = Layout(4, 0, 0, 0, extras=("input_targets", "input_weights", "input_types", "next_sentence"))
    batch = layout([[example([4, 3, 6], **fields)]], 2)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "encoder_input_tokens": [[4, 3, 6, 0], [0, 0, 0, 0]],
        "encoder_segment_ids": [[1, 1, 1, 0], [0, 0, 0, 0]],
        "encoder_target_tokens": [[4, 5, 6, 0], [0, 0, 0, 0]],
        "encoder_loss_weights": [[0, 1, 0, 0], [0, 0, 0, 0]],
        "encoder_token_types": [[0, 1, 1, 0], [0, 0, 0, 0]],
        "next_sentence_labels": [1, 0],
    }
    # The share of a host that has only padding has the same keys.
    assert layout([], 2).keys() == batch.keys()


def test_padding_is_known_by_position_not_by_id():
    # Token id 0 inside a text is a token like any other, and the pad id need not be 0.
    batch = Layout(3, 3, pad_id=9, decoder_start_id=9)([[example([0, 1], [0, 1])]])
    assert batch["encoder_input_tokens"].tolist() == [[0, 1, 9]]
    assert batch["encoder_segment_ids"].tolist() == [[1, 1, 0]]
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([example(np.ones(5), [1])], "an example of 5 tokens does not fit in a row of 4"),
        ([example([1, 1, 1], [1]), example([1, 1], [1])], "2 examples of 5 tokens does not fit in a row of 4"),
        ([example([1])], "nothing for the decoder's rows of 3 tokens"),
    ],
)
def test_rows_that_do_not_fit(row, message):
    with pytest.raises(InputError, match=message):
        Layout(4, 3, 0, 0)([row])
