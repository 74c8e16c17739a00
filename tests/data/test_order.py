import collections

import numpy as np
import pytest

from t5x_lite.data.order import Mixing, generator, permute


@pytest.mark.parametrize("size", [1, 2, 3, 10, 257, 5000])
def test_permute_is_a_permutation(size):
    images = permute(np.arange(size), size, (7, 2))
    assert sorted(images.tolist()) == list(range(size))
    np.testing.assert_array_equal(permute(np.array([size - 1, 0]), size, (7, 2)), images[[-1, 0]])


def test_permute_gives_all_orders_equally_often():
    counts = collections.Counter(tuple(permute(np.arange(4), 4, (seed, 5)).tolist()) for seed in range(1200))
    assert len(counts) == 24
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 55  # chi-squared of 23 degrees, p = 2e-4


def test_permute_leaves_no_order_behind():
    images = permute(np.arange(20_000), 20_000, (0, 0))
    assert abs(np.corrcoef(np.arange(20_000), images)[0, 1]) < 0.03
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03
    assert permute(np.array([10**12 - 1]), 10**12, (0, 0))[0] < 10**12


def test_neighbouring_large_seeds_differ():
    draws = {generator(2**64 - 1 - i, 0, 0, 0).integers(2**60) for i in range(8)}
    assert len(draws) == 8


def test_streams_of_random_numbers_are_told_apart_by_each_of_their_names() -> None:
    names = [(3, 1, 4, 1, 5), (4, 1, 4, 1, 5), (3, 2, 4, 1, 5), (3, 1, 5, 1, 5), (3, 1, 4, 2, 5), (3, 1, 4, 1, 6)]
    draws = [generator(*name).integers(2**60) for name in names]
    assert len(set(draws)) == len(names)
    assert draws[0] == generator(*names[0]).integers(2**60)


# --- mixing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [[1.0], [1, 1], [1, 2], [3, 1, 2], [0.9, 0.07, 0.03], [1, 1e-3], np.arange(1, 20)])
def test_components_come_at_their_rates_and_each_in_its_own_order(rates) -> None:
    rates = np.asarray(rates, float) / np.sum(rates)
    mixing = Mixing.of(rates)
    places = np.arange(3 * sum(mixing.counts))
    components, positions = mixing(places, seed=5)
    for component, rate in enumerate(rates):
        own = positions[components == component]
        assert own.tolist() == list(range(len(own)))  # one after the other, none left out
        assert len(own) / len(places) == pytest.approx(rate, rel=0.011)  # Mixing.of promises 1 %


def test_any_place_is_known_without_those_before_it() -> None:
    mixing = Mixing.of([5, 3, 1])
    components, positions = mixing(np.arange(1000), 7)
    for place in (999, 0, 500):
        assert [array[0] for array in mixing(np.array([place]), 7)] == [components[place], positions[place]]
    assert (mixing(np.arange(1000), 8)[0] != components).any()
    far = 10**15
    assert mixing(np.array([far]), 7)[1][0] == pytest.approx(
        far * np.array([5, 3, 1])[mixing(np.array([far]), 7)[0]] / 9, rel=0.01
    )


def test_a_rate_below_what_a_cycle_can_hold_is_not_lost() -> None:
    counts = Mixing.of([1, 1e-9]).counts
    assert counts[1] == 1
    assert counts[0] >= 65_535


def test_neighbouring_rows_of_a_mixture_do_not_follow_a_pattern() -> None:
    components, _ = Mixing.of([0.5, 0.3, 0.2])(np.arange(20_000), 0)
    # Cycles are of ten rows: within one the order is drawn, so that a row tells little of the next. The correlation of
    # draws without replacement from ten is about -1/9.
    assert abs(np.corrcoef(components[:-1], components[1:])[0, 1]) < 0.15
