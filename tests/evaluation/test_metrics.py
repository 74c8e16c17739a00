"""Metrics against numbers worked out by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from t5x_lite.errors import InputError
from t5x_lite.evaluation.metrics import (
    accuracy,
    answer_scores,
    bits_per_byte,
    exact_match,
    f1,
    f1_macro,
    majority_baseline,
    matthews_correlation,
    means_noun,
    pearson,
    perplexity,
    spearman,
    unigram_entropy,
)


def test_exact_match() -> None:
    assert exact_match(["a", " b ", "c"], ["a", "b", "d"]) == pytest.approx(2 / 3)
    assert exact_match([], []) == 0
    with pytest.raises(ValueError, match="1 predictions for 2 targets"):
        exact_match(["a"], ["a", "b"])


def test_perplexity_and_bits() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e9) < math.inf
    # 8 ln 2 nats are 8 bits; over 4 bytes that is 2.
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)


def test_baselines() -> None:
    assert majority_baseline(["a", "b", "a", "c"]) == 0.5
    assert unigram_entropy(np.full(8, 5)) == pytest.approx(np.log(8))
    assert unigram_entropy(np.array([3, 0, 0])) == 0.0
    assert unigram_entropy(np.array([1, 3])) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))
    for empty in (lambda: majority_baseline([]), lambda: unigram_entropy(np.zeros(3))):
        with pytest.raises(InputError):
            empty()


def test_accuracy_is_to_the_character() -> None:
    assert accuracy(["a", "b ", "c", "c"], ["a", "b", "c", "d"]) == 0.5


def test_matthews_correlation() -> None:
    # 2 true positives, 1 true negative, 1 false positive, 1 false negative: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2).
    assert matthews_correlation([1, 1, 1, 0, 0], [1, 1, 0, 0, 1]) == pytest.approx(1 / 6)
    assert matthews_correlation([0, 1, 2, 1], [0, 1, 2, 1]) == pytest.approx(1)
    assert matthews_correlation([0, 1], [1, 0]) == pytest.approx(-1)
    assert matthews_correlation([1, 1, 1], [1, 0, 1]) == 0
    assert matthews_correlation([1, 0, 1], [1, 1, 1]) == 0


def test_f1() -> None:
    # Precision 2/3, recall 2/4.
    assert f1("yyynnn", "yynyyn", "y") == pytest.approx(4 / 7)
    assert f1("nnn", "nnn", "y") == 0
    # Of a: 2 * 1 / (1 + 2); of b: 2 * 1 / (2 + 1); c is never said.
    assert f1_macro("abbx", "aabc", "abc") == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_correlations() -> None:
    # Deviations (-1, 0, 1) and (-2/3, -2/3, 4/3): 2 / sqrt(2 * 24/9).
    assert pearson([1, 2, 3], [0, 0, 2]) == pytest.approx(2 / math.sqrt(2 * 24 / 9))
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert pearson([1, 1, 1], [1, 2, 3]) == 0
    assert pearson([1, 2, 3], [1, 1, 1]) == 0
    assert spearman([1, 10, 100], [0.1, 0.2, 0.3]) == pytest.approx(1)
    # Ranks (1, 2, 3) and (1.5, 1.5, 3), which are as above but for their scale.
    assert spearman([5, 6, 9], [0, 0, 2]) == pytest.approx(2 / math.sqrt(2 * 24 / 9))


def test_answers_are_compared_by_their_words() -> None:
    assert answer_scores(["The  Old mill!"], [["old mill"]]) == {"exact_match": 1, "f1": 1}
    # Of "old red mill" and "a mill" two words of three and one are compared: 2 * 1 / (3 + 1).
    assert answer_scores(["old red mill"], [["a mill", "house"]]) == {"exact_match": 0, "f1": 0.5}
    assert answer_scores(["mill mill"], [["mill"]])["f1"] == pytest.approx(2 / 3)
    assert answer_scores(["x", "y"], [["x"], ["z", "y"]]) == {"exact_match": 1, "f1": 1}
    assert answer_scores(["the"], [["a"]]) == {"exact_match": 1, "f1": 0}  # as T5 has it


@pytest.mark.parametrize(
    ("prediction", "noun", "means"),
    [
        ("the mill", "Mill", True),
        ("the old mill", "his mill", True),
        ("mill", "the old mill", True),
        ("miller", "the mill", False),
        ("Ada", "Ada's mill", False),
        ("Ada's", "Ada's mill", True),
        ("The", "the mill", None),
        ("", "the mill", None),
    ],
)
def test_answers_that_mean_a_noun(prediction: str, noun: str, means: bool | None) -> None:
    assert means_noun(prediction, noun) is means


@pytest.mark.parametrize("measure", [accuracy, matthews_correlation, pearson, spearman, answer_scores])
def test_nothing_to_measure(measure: Callable) -> None:
    with pytest.raises(InputError, match="there are no examples to measure"):
        measure([], [])
    with pytest.raises(ValueError, match="1 predictions for 2 targets"):
        measure(["1"], ["1", "2"])
