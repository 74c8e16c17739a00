import numpy as np
import pytest
from scipy import stats

from t5x_lite.data.objectives import Vocabulary

STOP, BOS, EOS, MASK = 5, 3, 1, 4
SENTINELS = tuple(range(999, 899, -1))
MODES = {"[NLU]": (890,), "[NLG]": (891,), "[S2S]": (892, 893)}


@pytest.fixture(scope="session")
def vocabulary():
    """1,000 ids: pad 0, EOS 1, unknown 2, BOS 3, mask 4, a full stop 5, then ordinary ones; even ids begin a word."""
    ids = np.arange(1000)
    special = (ids < 5) | (ids >= 890)
    return Vocabulary(
        vocab_size=1000,
        pad_id=0,
        eos_id=EOS,
        bos_id=BOS,
        mask_id=MASK,
        unk_id=2,
        sentinels=SENTINELS,
        prefix_ids=(BOS,),
        suffix_ids=(EOS,),
        target_affixes=((BOS,), (EOS,)),
        special=special,
        word_starts=special | (ids % 2 == 0),
        sentence_ends=ids == STOP,
        modes=MODES,
    )


@pytest.fixture(scope="session")
def draws():
    """A generator for each index, made as the pipeline makes them."""

    def generator(index, seed=0):
        key, counter = np.array([seed, 0], np.uint64), np.array([0, index, 1, 0], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    return generator


@pytest.fixture(scope="session")
def fits():
    """Whether counts follow expected ones: chi-square, at a probability of one in a million."""

    def check(observed, expected):
        observed, expected = np.asarray(observed, float), np.asarray(expected, float)
        expected = np.broadcast_to(expected, observed.shape) * (
            observed.sum() / np.broadcast_to(expected, observed.shape).sum()
        )
        assert expected.min() > 5  # below this the statistic does not follow the distribution
        return ((observed - expected) ** 2 / expected).sum() < stats.chi2.isf(1e-6, observed.size - 1)

    return check


@pytest.fixture(scope="session")
def sigmas():
    """By how many standard deviations the frequency of an event of probability `p` in `trials` trials is off."""

    def distance(frequency, p, trials):
        return np.abs(np.asarray(frequency) - p).max() / np.sqrt(p * (1 - p) / trials)

    return distance
