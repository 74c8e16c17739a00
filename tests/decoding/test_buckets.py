"""Batches of any shape in few shapes."""

import dataclasses

import numpy as np
import pytest

from t5x_lite.decoding.buckets import bucket, length_bucket, padded
from t5x_lite.models import TransformerConfig


@pytest.mark.parametrize(
    ("size", "multiple", "wanted"), [(1, 16, 16), (16, 16, 16), (17, 16, 32), (5, 1, 8), (9, 3, 12)]
)
def test_powers_of_two_times_a_multiple(size: int, multiple: int, wanted: int) -> None:
    assert bucket(size, multiple) == wanted


def test_no_longer_than_the_table_of_positions(tiny_config: TransformerConfig) -> None:
    learned = dataclasses.replace(tiny_config, positions="learned", max_positions=40)
    assert [length_bucket(length, learned) for length in (3, 30, 33, 40)] == [16, 32, 40, 40]
    assert length_bucket(33, tiny_config) == 64


def test_padding_is_cut_and_added_by_bucket(tiny_config: TransformerConfig) -> None:
    tokens = np.zeros((3, 50), np.int32)
    tokens[0, :5], tokens[1, :18], tokens[2, :2] = 7, 8, 9
    prompts = np.array([[3, 4, 0], [3, 0, 0], [3, 4, 5]])
    types = np.arange(150).reshape(3, 50)
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": prompts, "encoder_token_types": types}
    out = padded(batch, tiny_config, rows_multiple=2)
    assert {key: value.shape for key, value in out.items()} == {
        "encoder_input_tokens": (4, 32),
        "encoder_segment_ids": (4, 32),
        "encoder_token_types": (4, 32),
        "decoder_input_tokens": (4, 16),
        "decoder_segment_ids": (4, 16),
    }
    np.testing.assert_array_equal(np.sum(out["encoder_segment_ids"], axis=1), [5, 18, 2, 2])
    np.testing.assert_array_equal(np.sum(out["decoder_segment_ids"], axis=1), [2, 1, 3, 3])
    np.testing.assert_array_equal(out["encoder_input_tokens"][:3, :18], tokens[:, :18])
    np.testing.assert_array_equal(out["encoder_token_types"][:3, :18], types[:, :18])
    for value in out.values():  # the added row is the last one again: it ends when that does
        np.testing.assert_array_equal(value[3], value[2])


def test_pads_that_count_as_text_stay(tiny_config: TransformerConfig) -> None:
    given = {"encoder_input_tokens": np.zeros((1, 20), np.int32), "encoder_segment_ids": np.ones((1, 20), np.int32)}
    assert np.sum(padded(given, tiny_config, 1)["encoder_segment_ids"]) == 20


def test_more_padding_on_the_left_than_there_are_positions(tiny_config: TransformerConfig) -> None:
    learned = dataclasses.replace(tiny_config, positions="learned", max_positions=20)
    tokens = np.pad(np.full((1, 10), 7), ((0, 0), (30, 0)))
    out = padded({"encoder_input_tokens": tokens}, learned, 1)
    np.testing.assert_array_equal(out["encoder_input_tokens"], tokens)
