import numpy as np
import pytest

from t5x_lite.data.objectives import CausalLM, PrefixLM
from t5x_lite.errors import InputError

N = 10_000


def test_causal_by_hand(vocabulary, draws):
    example = CausalLM()(np.array([7, 8, 1, 9], np.uint16), draws(0), vocabulary)
    assert example.inputs is None
    assert example.targets.tolist() == [7, 8, 1, 9]
    assert example.targets.dtype == np.int32
    assert example.target_weights is None
    assert CausalLM().separator(vocabulary) == (1,)
    assert CausalLM().window(0, 64, vocabulary) == 64


class At:
    """Stands for a generator, and draws one point."""

    def __init__(self, point):
        self.point = point

    def integers(self, low, high):
        assert low <= self.point < high
        return self.point


def test_prefix_by_hand(vocabulary):
    tokens = np.arange(10, 15, dtype=np.uint16)
    example = PrefixLM()(tokens, At(2), vocabulary)
    assert example.inputs.tolist() == [10, 11, 1]
    assert example.targets.tolist() == [12, 13, 14, 1]
    example = PrefixLM(sides="decoder")(tokens, At(2), vocabulary)
    assert example.inputs is None
    assert example.targets.tolist() == [10, 11, 12, 13, 14]
    assert example.target_weights.tolist() == [0, 0, 1, 1, 1]
    assert example.target_weights.dtype == np.float32


@pytest.mark.parametrize(("density", "first"), [(0.5, 1), (0.25, 10), (0.1, 15)])
def test_points_are_uniform(density, first, vocabulary, draws, fits):
    tokens = np.arange(100, 120)
    objective = PrefixLM(density)
    lengths = [len(objective(tokens, draws(i), vocabulary).inputs) - 1 for i in range(N)]
    assert (min(lengths), max(lengths)) == (first, 19)
    assert fits(np.bincount(lengths)[first:], 1)
    decoder = PrefixLM(density, "decoder")
    weights = np.stack([decoder(tokens, draws(i), vocabulary).target_weights for i in range(N)])
    assert fits(np.bincount(20 - weights.sum(axis=1).astype(int))[first:], 1)


def test_window(vocabulary):
    assert PrefixLM().window(512, None, vocabulary) == 512
    assert PrefixLM().window(512, 100, vocabulary) == 100
    # At most half of the text is said: its last 100 tokens, and EOS.
    assert PrefixLM(0.25).window(512, 101, vocabulary) == 200
    assert PrefixLM(sides="decoder").window(0, 100, vocabulary) == 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: PrefixLM(0.6), "noise_density 0.6: must be above 0 and at most 0.5"),
        (lambda v: PrefixLM(sides="encoder"), "sides 'encoder': allowed are encoder_decoder, decoder"),
        (lambda v: PrefixLM().window(1, None, v), "rows of 1 and None tokens: a prefix needs 2"),
        (lambda v: CausalLM().window(8, None, v), "target_length None: a decoder alone needs rows"),
    ],
)
def test_errors(make, message, vocabulary):
    with pytest.raises(InputError, match=message):
        make(vocabulary)
