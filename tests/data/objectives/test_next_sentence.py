import dataclasses

import numpy as np
import pytest

from t5x_lite.data.objectives import Masking, NextSentence
from t5x_lite.data.objectives.next_sentence import _truncate
from t5x_lite.errors import InputError

N = 10_000
PLAIN = NextSentence(Masking(mask=0.0, random=0.0), short_rate=0.0)
WINDOW = np.array([10, 5, 11, 12, 5, 13, 5], np.uint16)  # three sentences
OTHER = np.array([20, 5, 21, 22, 5, 23, 24, 25, 5], np.uint16)


class Fixed:
    """Stands for a generator: `integers` and `random` give what they are told, the rest does what it does."""

    def __init__(self, integers, random, fronts=()):
        self._integers, self._random, self._fronts = list(integers), list(random), list(fronts)
        self.permutation = np.random.default_rng(0).permutation

    def integers(self, *_, size=None):
        return np.zeros(size, int) if size is not None else self._integers.pop(0)

    def random(self, size=None):
        return np.ones(size) if size is not None else self._random.pop(0)

    def binomial(self, n, p):
        assert p == 0.5
        return self._fronts.pop(0) if n else 0


def test_the_next_by_hand(vocabulary):
    example = PLAIN(WINDOW, OTHER, Fixed([1], [1.0, 0.5]), vocabulary)
    assert example.inputs.tolist() == [3, 10, 5, 1, 11, 12, 5, 13, 5, 1]
    assert example.input_types.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert example.next_sentence == 0
    assert example.input_targets.tolist() == example.inputs.tolist()
    assert example.input_weights.sum() == 2  # 15 % of 10
    assert example.inputs.dtype == example.input_types.dtype == np.int32
    example = PLAIN(WINDOW, OTHER, Fixed([2], [1.0, 0.5]), vocabulary)
    assert example.input_types.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_another_by_hand(vocabulary):
    # From the first sentence of the other document until there are 5 tokens.
    example = PLAIN(WINDOW, OTHER, Fixed([1, 0], [1.0, 0.49]), vocabulary)
    assert example.inputs.tolist() == [3, 10, 5, 1, 20, 5, 21, 22, 5, 1]
    assert example.next_sentence == 1
    # From the last, which is all there is.
    example = PLAIN(WINDOW, OTHER, Fixed([1, 2], [1.0, 0.0]), vocabulary)
    assert example.inputs.tolist() == [3, 10, 5, 1, 23, 24, 25, 5, 1]
    # From the second: 3 tokens are too few, 7 too many; the longer side loses one at its front and one at its back.
    example = PLAIN(WINDOW, OTHER, Fixed([1, 1], [1.0, 0.0], [1]), vocabulary)
    assert example.inputs.tolist() == [3, 10, 5, 1, 22, 5, 23, 24, 25, 1]


def test_a_window_of_one_sentence_gets_another_document(vocabulary):
    # Both sides lose tokens: of 4 and at least 2 there is room for 4, two each.
    example = PLAIN(np.array([10, 11, 12, 5]), OTHER, Fixed([0], [1.0], [2, 0]), vocabulary)
    assert example.next_sentence == 1
    assert example.inputs.tolist() == [3, 12, 5, 1, 20, 5, 1]


def test_short_windows_end_with_a_sentence(vocabulary):
    objective = dataclasses.replace(PLAIN, short_rate=0.1)
    # 4 tokens are reached with the second sentence.
    example = objective(WINDOW, OTHER, Fixed([4, 1], [0.05, 0.5]), vocabulary)
    assert example.inputs.tolist() == [3, 10, 5, 1, 11, 12, 5, 1]


def truncated_as_google(first, second, limit):
    first, second = list(first), list(second)
    while len(first) + len(second) > limit:
        (first if len(first) > len(second) else second).pop()
    return len(first), len(second)


def test_lengths_of_pairs_that_are_too_long_are_googles(vocabulary):
    for a, b, limit in np.random.default_rng(0).integers(1, 12, (500, 3)):
        limit = max(limit, 2)
        pair = _truncate(np.arange(a), np.arange(b), int(limit), np.random.default_rng(1))
        assert tuple(map(len, pair)) == truncated_as_google(range(a), range(b), limit)
        assert all((np.diff(side) == 1).all() for side in pair)


def test_statistics(vocabulary, draws, fits, sigmas):
    window = np.array([5 if i % 4 == 3 else 10 + i for i in range(40)])  # ten sentences of four tokens
    other = np.array([5 if i % 4 == 3 else 100 + i for i in range(80)])
    ends, starts, labels = [], [], []
    for i in range(N):
        first, second, is_random = PLAIN.pair(window, other, draws(i), vocabulary)
        assert len(first) + len(second) <= 40
        ends.append(len(first) // 4)
        labels.append(is_random)
        assert (second[0] >= 100) == is_random
        if is_random:
            starts.append((second[0] - 100) // 4)
    assert sigmas(np.mean(labels), 0.5, N) < 5
    assert fits(np.bincount(ends, minlength=10)[1:], 1)
    assert fits(np.bincount(starts, minlength=20), 1)
    short = NextSentence(random_rate=0.0, short_rate=0.1)
    cut = [sum(map(len, short.pair(window, window, draws(i), vocabulary)[:2])) for i in range(N)]
    # Of lengths of 2 to 40 tokens those above 36 come to the whole window again.
    assert sigmas(np.mean(np.array(cut) < 40), 0.1 * 35 / 39, N) < 5


def test_special_tokens_are_never_hidden(vocabulary, draws):
    objective = NextSentence(Masking(1.0))
    for i in range(200):
        example = objective(WINDOW, OTHER, draws(i), vocabulary)
        special = np.isin(example.input_targets, (1, 3))
        assert special.sum() == 3
        assert not example.input_weights[special].any()
        assert example.input_weights[~special].all()


def test_errors(vocabulary):
    with pytest.raises(InputError, match=r"random_rate 1\.5: must be from 0 to 1"):
        NextSentence(random_rate=1.5)
    with pytest.raises(InputError, match="a document without tokens"):
        PLAIN(WINDOW, OTHER[:0], Fixed([], []), vocabulary)
    with pytest.raises(InputError, match="input_length 4: must be at least 5"):
        PLAIN.window(4, None, vocabulary)
    assert PLAIN.window(512, None, vocabulary) == 509
    with pytest.raises(InputError, match="no separator after a text"):
        PLAIN.check(100, dataclasses.replace(vocabulary, suffix_ids=()))
    with pytest.raises(InputError, match="full stop"):
        PLAIN.check(100, dataclasses.replace(vocabulary, sentence_ends=None))
