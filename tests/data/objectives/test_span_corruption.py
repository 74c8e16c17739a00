"""T5's denoising objectives against T5's own masks, and in numbers; token by token: `tests/data/test_objectives.py`."""

import dataclasses
import pathlib

import numpy as np
import pytest

from t5x_lite.data.objectives import IidDenoising, PrefixLM, SpanCorruption
from t5x_lite.errors import InputError

FIXTURE = pathlib.Path(__file__).parents[2] / "fixtures" / "t5_span_masks.npz"
N = 10_000
SENTINELS_FEW = (999, 998, 997)


@pytest.fixture(scope="module")
def t5():
    with np.load(FIXTURE) as file:
        return dict(file)


def unpack(packed, sizes):
    flat = np.unpackbits(packed)[: sizes.sum()].astype(bool)
    return np.split(flat, np.cumsum(sizes)[:-1])


class Recorded:
    """Stands for a generator, and gives the draws that T5's code got, if it is asked for the same."""

    def __init__(self, shuffles, offset, length):
        self.shuffles, self.offset, self.length = list(shuffles), offset, length

    def permutation(self, values):
        shuffled = self.shuffles.pop(0)
        np.testing.assert_array_equal(np.sort(values), np.sort(shuffled))
        return shuffled

    def integers(self, high):
        assert high == max(self.length, 2)
        return self.offset


def test_masks_equal_those_of_t5_for_a_thousand_seeds(t5):
    noise, nonnoise = unpack(t5["noise_draws"], t5["noise_sizes"]), unpack(t5["nonnoise_draws"], t5["nonnoise_sizes"])
    masks = unpack(t5["masks"], t5["length"])
    assert len(masks) == 1000
    assert t5["random_roll"].sum() > 400
    for i, (length, mask) in enumerate(zip(t5["length"].tolist(), masks, strict=True)):
        density, mean = round(float(t5["noise_density"][i]), 2), float(t5["mean_span_length"][i])
        objective = SpanCorruption(density, mean, random_roll=bool(t5["random_roll"][i]))
        recorded = Recorded((noise[i], nonnoise[i]), int(t5["offset"][i]), length)
        np.testing.assert_array_equal(objective.noise_mask(length, recorded), mask)


def test_prefixes_are_drawn_from_the_range_of_t5(t5, vocabulary):
    for density, ranges in zip(t5["prefix_density"].tolist(), t5["prefix_range"].tolist(), strict=True):
        objective = PrefixLM(round(density, 2))
        # Inputs of `last` tokens and EOS, targets of all but `first` and EOS.
        ours = [objective.sizes(length, vocabulary) for length in range(1, 601)]
        assert ours == [(last + 1, length - first + 1) for length, (first, last) in enumerate(ranges, 1)]


def test_statistics_of_the_spans(draws, fits):
    # 60 tokens: 9 of noise in 3 spans.
    masks = np.stack([SpanCorruption().noise_mask(60, draws(i)) for i in range(N)])
    assert (masks.sum(axis=1) == 9).all()
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    starts = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert (starts.sum(axis=1) == 3).all()
    # All 28 divisions of 9 into three are equally likely: the last span has k tokens in 8 - k of them.
    last = 60 - starts.shape[1] + np.argmax(starts[:, ::-1], axis=1) + 1
    assert fits(np.bincount(last, minlength=8)[1:8], 8 - np.arange(1, 8))
    # And the 1225 divisions of 51 others: the first stretch has k tokens in 50 - k of them.
    assert fits(np.bincount(np.argmax(masks, axis=1), minlength=50)[1:40], 50 - np.arange(1, 40))


def test_rolled_masks_replace_every_token_equally_often(draws, sigmas):
    objective = SpanCorruption(random_roll=True)
    masks = np.stack([objective.noise_mask(60, draws(i)) for i in range(N)])
    assert (masks.sum(axis=1) == 9).all()
    assert sigmas(masks.mean(axis=0), 9 / 60, N) < 5


def test_a_rolled_span_across_the_ends_is_two(vocabulary):
    objective = SpanCorruption(0.5, 3.0, random_roll=True)
    recorded = Recorded([np.array([False, False]), np.array([False, False])], 2, 6)
    mask = objective.noise_mask(6, recorded)
    assert mask.astype(int).tolist() == [1, 1, 0, 0, 0, 1]
    inputs, targets = objective.corrupt(np.arange(10, 16), mask, vocabulary.sentinels)
    assert inputs.tolist() == [999, 12, 13, 14, 998]
    assert targets.tolist() == [10, 11, 999, 15]  # no sentinel before the first
    assert objective.sizes(6, vocabulary) == (6, 6)


def test_check_counts_the_spans_of_the_window(vocabulary):
    SpanCorruption().check(1800, vocabulary)
    with pytest.raises(InputError, match=r"101 spans but the tokenizer has 100 sentinels"):
        SpanCorruption().check(2020, vocabulary)
    with pytest.raises(InputError, match=r"101 spans but the tokenizer has 100 sentinels"):
        SpanCorruption(random_roll=True).check(2000, vocabulary)
    SpanCorruption().check(2000, vocabulary)


@pytest.mark.parametrize(
    ("rows", "raw"),
    [((512, 114), 568), ((512, 113), 563), ((256, None), 284), ((1024, 229), 1137), ((2048, 456), 2274)],
)
def test_window_fits_both_rows(rows, raw, vocabulary):
    assert SpanCorruption().window(*rows, vocabulary) == raw
    with pytest.raises(InputError, match="target_length 2: span corruption needs at least 3"):
        SpanCorruption().window(512, 2, vocabulary)


# --- independent tokens ---------------------------------------------------------------------------------------------


def test_independent_noise_by_hand(vocabulary, monkeypatch):
    mask = np.array([1, 0, 1, 1, 0, 0], bool)
    monkeypatch.setattr(IidDenoising, "noise_mask", lambda *_: mask.copy())
    example = IidDenoising()(np.arange(10, 16), np.random.default_rng(0), vocabulary)
    assert example.inputs.tolist() == [999, 11, 998, 14, 15, 1]
    assert example.targets.tolist() == [10, 999, 12, 13, 998, 1]


def test_statistics_of_independent_noise(draws, sigmas):
    masks = np.stack([IidDenoising().noise_mask(20, draws(i)) for i in range(N)])
    assert sigmas(masks.mean(axis=0), 0.15, N) < 5
    assert sigmas(masks.mean(), 0.15, 20 * N) < 5
    pairs = masks[:, 1:] & masks[:, :-1]  # neighbours do not depend on one another
    assert sigmas(pairs.mean(axis=0), 0.15**2, N) < 5


def test_independent_noise_with_few_sentinels(vocabulary, draws):
    few = dataclasses.replace(vocabulary, sentinels=SENTINELS_FEW)
    with pytest.raises(InputError, match="spans but the tokenizer has 3 sentinels"):
        IidDenoising().check(100, few)
    tokens = np.arange(10, 40)
    for i in range(200):
        example = IidDenoising(0.5)(tokens, draws(i), few)
        # What has no sentinel of its own is kept: no id that is not in the text or a sentinel.
        assert set(example.inputs.tolist()) <= {*tokens.tolist(), *SENTINELS_FEW, 1}
        assert np.isin(example.inputs, SENTINELS_FEW).sum() <= 3
        assert np.isin(example.targets, SENTINELS_FEW).sum() <= 3
        kept = np.isin(tokens, example.inputs)
        assert np.isin(tokens[~kept], example.targets).all()
