"""Metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest

from t5x_lite.errors import InputError
from t5x_lite.evaluation.metrics import bits_per_byte, exact_match, majority_baseline, perplexity, unigram_entropy


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
