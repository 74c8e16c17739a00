import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.positions import (
    RelativeBias,
    positions_in_segments,
    relative_position_bucket,
    rotation,
    sinusoids,
)

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


# --- where a token stands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segments", "positions"),
    [
        ([1, 1, 1, 0, 0], [0, 1, 2, 3, 4]),  # padding on the right
        ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2]),  # on the left
        ([1, 1, 2, 2, 2], [0, 1, 0, 1, 2]),  # packed
        ([1, 2, 3, 3, 0], [0, 0, 0, 1, 2]),
        ([0, 1, 1, 0, 2], [0, 0, 1, 2, 0]),  # a gap between two texts
        ([1, 1, 0, 1, 1], [0, 1, 2, 3, 4]),  # and one within a text
        ([2, 2, 1, 1, 1], [0, 1, 0, 1, 2]),  # in any order
        ([1, 1, 1, 1, 1], [0, 1, 2, 3, 4]),
        ([0, 0, 0, 0, 0], [0, 1, 2, 3, 4]),
    ],
)
def test_every_segment_counts_from_zero(segments: list[int], positions: list[int]) -> None:
    got = positions_in_segments(jnp.array([segments, [1] * 5], jnp.int32))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [positions, [0, 1, 2, 3, 4]])


@pytest.mark.parametrize("embed_dim", [2, 6, 64])
def test_sinusoids_are_those_of_the_paper(embed_dim: int) -> None:
    positions = np.array([[0, 1, 2, 3], [7, 100, 511, 1000]])
    expected = np.zeros((2, 4, embed_dim))
    for b, t in np.ndindex(2, 4):
        for i in range(embed_dim // 2):
            angle = positions[b, t] / 10000 ** (2 * i / embed_dim)
            expected[b, t, 2 * i : 2 * i + 2] = math.sin(angle), math.cos(angle)
    # A float32 angle of 1000 is off by up to 1e-4, a smaller one by less.
    got = sinusoids(jnp.asarray(positions), embed_dim)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=2e-4)


# --- rotation -------------------------------------------------------------------------------------------------------


def turned(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Plane (i, i + K/2) as a complex number, multiplied by exp(i * position * frequency)."""
    half = x.shape[-1] // 2
    planes = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    planes = planes * np.exp(1j * positions[:, :, None, None] * frequencies)
    return np.concatenate([planes.real, planes.imag], axis=-1)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotation_is_multiplication_by_complex_numbers(base: float) -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3], [9, 40, 41, 200]])
    frequencies = np.array([base ** (-2 * i / 8) for i in range(4)])
    got = rotation(jnp.asarray(positions), 8, base).turn(jnp.asarray(x))
    np.testing.assert_allclose(got, turned(x, positions, frequencies), atol=1e-4)  # float32 angles up to 200
    np.testing.assert_array_equal(got[0, 0], x[0, 0])
    # Pairs of neighbours, as in Meta's files, would be another model.
    neighbours = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[:, :, None, None] * frequencies)
    assert np.max(np.abs(np.asarray(got[..., 0]) - neighbours.real[..., 0])[1]) > 0.1


def test_products_of_rotated_vectors_depend_on_the_distance_alone() -> None:
    query, key = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def product(t: int, s: int) -> float:
        q, k = (rotation(jnp.array([[p]]), 16, 10000.0).turn(jnp.asarray(x)) for p, x in ((t, query), (s, key)))
        return float(jnp.sum(q * k))

    for distance in (0, 1, 5):
        near, *far = (product(s + distance, s) for s in (0, 3, 50))
        np.testing.assert_allclose(far, near, atol=1e-4)  # float32 angles up to 55
    assert abs(product(3, 3) - product(4, 3)) > 0.1
    assert abs(product(4, 3) - product(3, 4)) > 0.1  # and on its sign
    assert product(3, 3) == pytest.approx(float(np.sum(query * key)), abs=1e-5)


def test_one_rotation_serves_all_rows_and_keeps_the_dtype() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5, 2, 4)), jnp.bfloat16)
    turn = rotation(jnp.arange(5)[None], 4, 10000.0)
    got = turn.turn(x)
    assert (turn.cos.shape, turn.cos.dtype) == ((1, 5, 2), jnp.float32)
    assert got.dtype == jnp.bfloat16
    # The products are float32, and only their sum is rounded.
    np.testing.assert_array_equal(got, turn.turn(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("scaling", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 8.0, 256)])
def test_scaling_by_the_length_of_a_wave(scaling: tuple[float, float, float, int]) -> None:
    factor, low, high, length = scaling
    expected, bands = [], []
    for i in range(64):
        frequency = 500000.0 ** (-2 * i / 128)
        wave = 2 * math.pi / frequency
        if wave > length / low:
            bands.append("long")
            expected.append(frequency / factor)
        elif wave < length / high:
            bands.append("short")
            expected.append(frequency)
        else:
            bands.append("between")
            smooth = (length / wave - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    assert set(bands) == {"long", "short", "between"}
    # At position 1 the angle is the frequency; the smallest is 1e-7, and its sine says so to float32's precision.
    turn = rotation(jnp.array([[1]]), 128, 500000.0, scaling)
    np.testing.assert_allclose(np.arctan2(turn.sin[0, 0], turn.cos[0, 0]), expected, rtol=3e-6)
