import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.positions import RelativeBias, relative_position_bucket

SIZES = [(32, 128), (64, 256)]


def bucket_of(distance: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """The T5 paper's description in whole numbers and fractions, so that no rounding decides a boundary."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        back = abs(distance)
    else:
        back = max(-distance, 0)  # whatever comes after the query counts as distance 0
    exact = buckets // 2
    if back < exact:
        return first + back
    wide = buckets - exact
    # The largest j with log(back / exact) / log(max / exact) * wide >= j.
    j = max(j for j in range(wide) if Fraction(back, exact) ** wide >= Fraction(max_distance, exact) ** j)
    return first + exact + j


@pytest.mark.parametrize(("buckets", "max_distance"), SIZES)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_follow_the_paper(bidirectional: bool, buckets: int, max_distance: int) -> None:
    distances = range(-600, 601)
    got = relative_position_bucket(
        jnp.array(distances), bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    expected = [bucket_of(d, bidirectional, buckets, max_distance) for d in distances]
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)
    # In both directions "before" never uses the bucket of "distance 0 after", which so stays without meaning.
    assert set(expected) == set(range(buckets)) - ({buckets // 2} if bidirectional else set())


def bias_module(bidirectional: bool) -> tuple[RelativeBias, dict]:
    module = RelativeBias(num_heads=3, bidirectional=bidirectional, num_buckets=8, max_distance=16)
    table = jax.random.normal(jax.random.key(0), (8, 3))
    return module, {"params": {"table": table}}


@functools.lru_cache
def buckets_of(t: int, s: int, bidirectional: bool) -> np.ndarray:
    return np.array([[bucket_of(j - i, bidirectional, 8, 16) for j in range(s)] for i in range(t)])


def naive(table: jax.Array, t: int, s: int, bidirectional: bool) -> np.ndarray:
    return np.transpose(np.asarray(table)[buckets_of(t, s, bidirectional)], (2, 0, 1))[None]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (9, 1), (12, 12), (7, 40)])
def test_diagonal_layout_equals_looking_up_every_pair(t: int, s: int, bidirectional: bool) -> None:
    module, variables = bias_module(bidirectional)
    got = jax.jit(lambda variables: module.apply(variables, t, s))(variables)
    assert got.shape == (1, 3, t, s)
    np.testing.assert_array_equal(got, naive(variables["params"]["table"], t, s, bidirectional))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_decoding_positions_give_the_rows_of_the_whole_bias(bidirectional: bool) -> None:
    module, variables = bias_module(bidirectional)
    whole = module.apply(variables, 20, 20)
    positions = jnp.array([[0, 1], [7, 8], [18, 19]])  # every row of a batch may stand elsewhere
    got = module.apply(variables, 2, 20, positions)
    np.testing.assert_array_equal(got, whole[0][:, positions].transpose(1, 0, 2, 3))


@pytest.mark.parametrize(("t", "s"), [(12, 12), (5, 30)])
def test_gradient_of_the_table_equals_the_naive_one(t: int, s: int) -> None:
    module, variables = bias_module(True)
    upstream = jax.random.normal(jax.random.key(1), (1, 3, t, s))
    table = variables["params"]["table"]
    got = jax.jit(jax.grad(lambda table: jnp.vdot(module.apply({"params": {"table": table}}, t, s), upstream)))(table)
    expected = np.zeros(table.shape)
    np.add.at(expected, buckets_of(t, s, True), np.transpose(upstream[0], (1, 2, 0)))
    # Sums of up to 150 numbers of size 1 in two orders: 150 * 2 ** -24 at worst, 1e-5.
    np.testing.assert_allclose(got, expected, atol=1e-5)
