"""The order of the data, and every draw in it, as functions of (seed, place): nothing is remembered in between."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# What a stream of random numbers is for.
SHUFFLE, TRAIN, EVAL, MIX, PACK, BUCKETS, PARTS = range(7)

_ROUNDS = 64
_LARGEST_CYCLE = 2**16
_RATE_TOLERANCE = 0.01  # how far the share of a component in a cycle may be from its rate, relative to the rate


def generator(seed: int, epoch: int, index: int, purpose: int, component: int = 0) -> np.random.Generator:
    """Returns the random numbers of one example of one epoch; streams with different arguments never overlap."""
    # Philox is counter-based: key and counter name a stream, and no stream reaches the next index within 2**64 draws.
    # As uint64 arrays: a list with an integer above 2**63 passes through float64, which merges neighbouring seeds.
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, index, purpose, component], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def permute(
    places: np.ndarray, size: int, key: tuple[int, int], purpose: int = SHUFFLE, component: int = 0
) -> np.ndarray:
    """Returns int64 images of `places` in [0, size) under the permutation that the other arguments name.

    The swap-or-not shuffle (Hoang, Morris and Rogaway 2012): each round pairs every number with another and swaps the
    pair or not by a hash, so any one image is computed without the others, in constant time and memory.
    """
    rng = generator(*key, 0, purpose, component)
    pivots = rng.integers(size, size=_ROUNDS)
    salts = rng.integers(2**64, size=_ROUNDS, dtype=np.uint64)
    images = np.asarray(places, np.int64)
    for pivot, salt in zip(pivots, salts, strict=True):
        partners = (pivot - images) % size
        swap = _hash_bit(np.maximum(images, partners).astype(np.uint64) ^ salt)
        images = np.where(swap, partners, images)
    return images


def _hash_bit(values: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64; products wrap modulo 2**64.
    values = (values ^ (values >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> 27)) * np.uint64(0x94D049BB133111EB)
    return (values >> 63).astype(bool)


@dataclass(frozen=True)
class Mixing:
    """Which component each row of a mixture comes from, and which of the component's rows it is.

    The rows come in cycles, each with `counts[c]` rows of component c in an order of its own. Within a component rows
    are taken one after the other, so that each of its own epochs is complete before the next one begins.

    Attributes:
        counts: rows of each component in a cycle.
    """

    counts: tuple[int, ...]

    @staticmethod
    def of(rates: Sequence[float]) -> "Mixing":
        """Returns a mixing with a short cycle, in which every share is within 1 % of its rate.

        Rates are above 0 and need not sum to 1. No cycle is longer than 65,536 rows, and each component has one at
        least, so that one whose rate is below that is seen more often than it says.
        """
        shares = np.asarray(rates, np.float64) / np.sum(rates)
        cycle = 1
        while True:
            counts = np.diff(np.round(np.cumsum([0.0, *shares]) * cycle)).astype(np.int64)
            error = np.max(np.abs(counts / cycle - shares) / shares)
            if error <= _RATE_TOLERANCE or cycle == _LARGEST_CYCLE:
                return Mixing(tuple(np.maximum(counts, 1).tolist()))
            cycle = min(cycle + max(1, cycle // 8), _LARGEST_CYCLE)

    def __call__(self, places: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the components of the rows at `places` and their places among the rows of their components, int64."""
        places = np.asarray(places, np.int64)
        if len(self.counts) == 1:
            return np.zeros_like(places), places
        cycles, within = np.divmod(places, sum(self.counts))
        components, positions = np.empty_like(within), np.empty_like(within)
        for cycle in np.unique(cycles).tolist():
            here = cycles == cycle
            order, ranks = _cycle(self.counts, seed, cycle)
            components[here] = order[within[here]]
            positions[here] = ranks[within[here]]
        return components, cycles * np.asarray(self.counts)[components] + positions


@functools.lru_cache(maxsize=16)
def _cycle(counts: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the component of each row of a cycle, and how many rows of that component come before it."""
    order = generator(seed, cycle, 0, MIX).permutation(np.repeat(np.arange(len(counts)), counts))
    ranks = np.empty_like(order)
    ranks[np.argsort(order, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return order, ranks
