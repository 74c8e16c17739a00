"""Metrics against numbers worked out by hand."""

import math

import pytest

from t5x_lite.evaluation.metrics import bits_per_byte, exact_match, perplexity


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
