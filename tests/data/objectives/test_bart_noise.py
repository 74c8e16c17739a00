import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from t5x_lite.data.objectives import (
    Bart,
    DocumentRotation,
    SentencePermutation,
    TextInfilling,
    TokenDeletion,
    TokenMasking,
    sentence_bounds,
    sentence_windows,
)
from t5x_lite.errors import InputError

N = 10_000
TOKENS = np.array([10, 11, 5, 12, 5, 13, 15, 17], np.uint16)  # three sentences; the words are 10 11 5 | 12 5 13 15 17


class Fixed:
    """Stands for a generator, and gives what it is told."""

    def __init__(self, *values):
        self.values = list(values)

    def __getattr__(self, name):
        return lambda *arguments: np.array(self.values.pop(0))


def noised(noise, rng, vocabulary):
    example = Bart((noise,))(TOKENS, rng, vocabulary)
    assert example.targets.tolist() == [3, *TOKENS, 1]
    assert example.inputs[0] == 3
    assert example.inputs[-1] == 1
    assert example.inputs.dtype == example.targets.dtype == np.int32
    return example.inputs[1:-1].tolist()


# --- by hand --------------------------------------------------------------------------------------------------------


def test_masking_and_deletion_by_hand(vocabulary):
    order = [3, 0, 7, 1, 2, 4, 5, 6]  # 3 of 8 tokens are 30 %, rounded up
    assert noised(TokenMasking(0.3), Fixed(order), vocabulary) == [4, 11, 5, 4, 5, 13, 15, 4]
    assert noised(TokenDeletion(0.3), Fixed(order), vocabulary) == [11, 5, 5, 13, 15]
    assert noised(TokenMasking(0.5, whole_words=True), Fixed([1, 0]), vocabulary) == [10, 11, 5, 4, 4, 4, 4, 4]
    assert noised(TokenDeletion(0.5, whole_words=True), Fixed([0, 1]), vocabulary) == [12, 5, 13, 15, 17]


def test_a_special_token_parts_words(vocabulary):
    tokens = np.array([10, 11, 1, 13, 15, 12])  # 10 11 | 13 15 | 12
    masked = TokenMasking(0.3, whole_words=True)(tokens, Fixed([1, 0, 2]), vocabulary)
    assert masked.tolist() == [10, 11, 1, 4, 4, 12]
    # A span across it leaves it where it is.
    filled = TextInfilling(0.6, whole_words=True)(tokens, Fixed([2, 0], [0, 1]), vocabulary)
    assert filled.tolist() == [4, 1, 12]


def test_infilling_by_hand(vocabulary):
    # 4 tokens: spans of 2, 0 and, cut to what is left, 2; beside 4 kept tokens they are the 2nd, 4th and 7th things.
    rng = Fixed([2, 0, 5, 1], [1, 3, 6, 0, 2, 4, 5])
    assert noised(TextInfilling(0.5), rng, vocabulary) == [10, 4, 12, 4, 5, 13, 4]
    # One span on all of the text; and one of nothing, at its end, before which all tokens were asked for.
    assert noised(TextInfilling(1.0), Fixed([8] * 8, [0]), vocabulary) == [4]
    assert noised(TextInfilling(0.1), Fixed([0], [7, 0, 1, 2, 3, 4, 5, 6]), vocabulary) == [*TOKENS[:7], 4]
    # Spans of one word and of none, before the other.
    words = TextInfilling(0.5, whole_words=True)
    assert noised(words, Fixed([1], [1, 0]), vocabulary) == [10, 11, 5, 4]


def test_a_span_of_nothing_at_either_end(vocabulary):
    assert noised(TextInfilling(0.25), Fixed([0, 2], [0, 7, 1, 2, 3, 4, 5, 6]), vocabulary) == [4, *TOKENS[:6], 4]
    assert noised(TextInfilling(0.25), Fixed([0, 2], [6, 7, 0, 1, 2, 3, 4, 5]), vocabulary) == [*TOKENS[:6], 4, 4]


def test_permutation_and_rotation_by_hand(vocabulary):
    assert noised(SentencePermutation(), Fixed([2, 0, 1]), vocabulary) == [13, 15, 17, 10, 11, 5, 12, 5]
    assert noised(DocumentRotation(), Fixed(3), vocabulary) == [12, 5, 13, 15, 17, 10, 11, 5]
    assert noised(DocumentRotation(), Fixed(0), vocabulary) == TOKENS.tolist()


def test_noises_follow_one_another_in_the_order_given(vocabulary):
    delete, rotate = TokenDeletion(0.1), DocumentRotation()
    one = Bart((delete, rotate))(TOKENS, Fixed([0], 1), vocabulary)
    assert one.inputs[1:-1].tolist() == [5, 12, 5, 13, 15, 17, 11]
    other = Bart((rotate, delete))(TOKENS, Fixed(1, [0]), vocabulary)
    assert other.inputs[1:-1].tolist() == [5, 12, 5, 13, 15, 17, 10]


def test_the_recipe_of_the_paper(vocabulary, draws):
    assert Bart().noises == (SentencePermutation(), TextInfilling(0.3, 3.0))
    tokens = np.arange(100, 200)
    tokens[9::10] = 5
    example = Bart()(tokens, draws(0), vocabulary)
    kept = example.inputs[~np.isin(example.inputs, (1, 3, 4))]
    assert len(kept) == 70
    assert np.isin(kept, tokens).all()
    assert (np.diff(kept[kept != 5]) < 0).any()  # permuted


def test_sentences(vocabulary):
    def bounds(*tokens):
        return sentence_bounds(np.array(tokens, int), vocabulary).tolist()

    assert bounds(10, 5, 11, 5) == [0, 2, 4]
    assert bounds(10, 5, 5, 5, 11) == [0, 4, 5]
    assert bounds(5) == [0, 1]
    assert bounds() == [0]


def test_windows_of_whole_sentences(vocabulary):
    tokens = np.array([10, 5, 11, 12, 5, 13, 5, *range(20, 29), 5, 14])
    assert sentence_windows(tokens, 5, vocabulary).tolist() == [0, 5, 7, 12, 17, 18]
    assert sentence_windows(tokens, 8, vocabulary).tolist() == [0, 7, 15, 18]
    assert sentence_windows(tokens[:0], 8, vocabulary).tolist() == [0]
    assert np.diff(sentence_windows(np.tile(tokens, 50), 30, vocabulary)).max() <= 30


def test_special_tokens_stay(vocabulary, draws):
    tokens = np.array([10, 11, 1, 12, 13, 14, 4, 15, 16, 999, 17])
    special = [1, 4, 999]
    for noise, i in itertools.product((TokenMasking(1.0), TokenDeletion(0.9), TextInfilling(0.9)), range(100)):
        inputs = Bart((noise,))(tokens, draws(i), vocabulary).inputs[1:-1]
        assert inputs[np.isin(inputs, (1, 999))].tolist() == [1, 999]
        assert (inputs == 4).sum() >= 1
    deleted = TokenDeletion(1.0)(tokens, draws(0), vocabulary)
    assert deleted.tolist() == special


# --- in numbers -----------------------------------------------------------------------------------------------------


def test_the_number_chosen_is_rounded_up_and_no_further(vocabulary, draws):
    tokens = np.arange(100, 200)
    # 0.07 times 100 is 7.000000000000001.
    for rate, number in ((0.07, 7), (0.29, 29), (0.3, 30), (0.301, 31), (0.0, 0), (1.0, 100)):
        assert len(TokenDeletion(rate)(tokens, draws(0), vocabulary)) == 100 - number


@pytest.mark.parametrize("noise", [TokenMasking(0.3), TokenDeletion(0.3)])
def test_every_token_is_chosen_equally_often(noise, vocabulary, draws, sigmas):
    tokens = np.arange(100, 120)
    left = np.stack([np.isin(tokens, noise(tokens, draws(i), vocabulary)) for i in range(N)])
    assert (left.sum(axis=1) == 14).all()
    assert sigmas(left.mean(axis=0), 0.7, N) < 5


def test_spans_follow_a_poisson_distribution(draws, fits):
    lengths = []
    for i in range(N):
        starts, drawn = TextInfilling().spans(200, draws(i))
        assert drawn.sum() == 60
        assert (starts[1:] >= starts[:-1] + drawn[:-1]).all()
        assert starts[0] >= 0
        assert starts[-1] + drawn[-1] <= 200
        # The last is cut, and how many there are depends on their lengths: the first five do not.
        lengths.append(drawn[:5])
    counts = np.bincount(np.concatenate(lengths), minlength=12)
    expected = stats.poisson.pmf(np.arange(11), 3.0)
    assert fits([*counts[:11], counts[11:].sum()], [*expected, 1 - expected.sum()])


def test_spans_lie_anywhere(draws, fits):
    # One span of one token among ten; and, of two spans among four tokens to keep, every pair of places.
    starts = [TextInfilling(0.1).spans(10, draws(i))[0] for i in range(N)]
    assert fits(np.bincount(np.concatenate(starts), minlength=10), 1)
    twos = TextInfilling(1 / 3, 1e-9)  # no span is drawn longer than nothing: the second takes both tokens
    places = [tuple(twos.spans(6, draws(i))[0]) for i in range(N)]
    expected = [(a, b - 1) for a, b in itertools.combinations(range(6), 2)]
    assert fits([places.count(place) for place in expected], 1)
    assert set(places) == set(expected)


def test_masked_fraction_and_masks_of_infilling(vocabulary, draws):
    tokens = np.arange(100, 160)
    masks = 0
    for i in range(N):
        inputs = TextInfilling()(tokens, draws(i), vocabulary)
        masks += (inputs == 4).sum()
        assert (inputs != 4).sum() == 42
        assert (np.diff(inputs[inputs != 4]) > 0).all()
    # Renewal theory: lengths are drawn until they come to 18; the expected number is the sum of the probabilities
    # that those before come to less. At most 18 of them.
    expected = sum(stats.poisson.cdf(17, 3.0 * before) for before in range(18))
    assert abs(masks / N - expected) < 5 * 2.5 / np.sqrt(N)  # a standard deviation is below 2.5 spans


def test_sentences_are_permuted_uniformly(vocabulary, draws, fits):
    tokens = np.array([10, 5, 11, 5, 12])
    orders = []
    for i in range(N):
        permuted = SentencePermutation()(tokens, draws(i), vocabulary)
        orders.append(tuple(permuted[permuted != 5]))
        assert sorted(permuted) == sorted(tokens)
    expected = list(itertools.permutations((10, 11, 12)))
    assert fits([orders.count(order) for order in expected], 1)


def test_rotation_is_uniform(vocabulary, draws, fits):
    tokens = np.arange(100, 120)
    rotated = np.stack([DocumentRotation()(tokens, draws(i), vocabulary) for i in range(N)])
    assert fits(np.bincount(rotated[:, 0] - 100, minlength=20), 1)
    assert (np.diff(rotated, axis=1) % 20 == 1).all()


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noises", "lacking", "message"),
    [
        ((TokenMasking(),), "mask_id", "no mask token; name one as mask_token"),
        ((TextInfilling(),), "mask_id", "no mask token"),
        ((SentencePermutation(),), "sentence_ends", "no token of a full stop"),
        ((TokenDeletion(whole_words=True),), "word_starts", "does not show where a word begins"),
    ],
)
def test_check(noises, lacking, message, vocabulary):
    Bart(noises).check(100, vocabulary)
    with pytest.raises(InputError, match=message):
        Bart(noises).check(100, dataclasses.replace(vocabulary, **{lacking: None}))


def test_settings_out_of_range(vocabulary):
    for noise in (TokenMasking, TokenDeletion, TextInfilling):
        with pytest.raises(InputError, match=r"rate 1.5: must be from 0 to 1"):
            noise(1.5)
    with pytest.raises(InputError, match="mean_span_length 0: must be above 0"):
        TextInfilling(mean_span_length=0)
    with pytest.raises(InputError, match="rows of 2 and None tokens: need at least 3 and 3"):
        Bart().window(2, None, vocabulary)
