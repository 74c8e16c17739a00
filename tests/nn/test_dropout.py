import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.dropout import Dropout, kept


def drop(x: jax.Array, rate: float, seed: int = 0, **attributes) -> jax.Array:
    return Dropout(rate, **attributes).apply({}, x, enabled=True, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize(("rate", "enabled"), [(0.5, False), (0.0, True), (0.0, False)])
def test_is_the_identity_and_needs_no_key(rate: float, enabled: bool) -> None:
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    np.testing.assert_array_equal(Dropout(rate).apply({}, x, enabled=enabled), x)


def test_mask_is_shared_along_the_length_and_nothing_else() -> None:
    dropped = np.asarray(drop(jnp.ones((16, 9, 32)), 0.5))
    np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[:, :1], dropped.shape))
    assert len(np.unique(dropped[:, 0], axis=0)) == 16  # every example has a mask of its own
    assert len(np.unique(dropped[:, 0], axis=1).T) == 32  # and so has every feature


def test_keeps_the_mean_and_drops_at_the_rate() -> None:
    rate = 0.1
    dropped = np.asarray(drop(jnp.ones((400, 1, 400)), rate))
    # 160,000 draws: a standard error of 0.00075 for the rate, five of them here.
    assert abs(np.mean(dropped == 0) - rate) < 0.004
    assert abs(np.mean(dropped) - 1) < 0.005
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=1e-6)


def test_keys_decide() -> None:
    x = jnp.ones((4, 1, 64))
    np.testing.assert_array_equal(drop(x, 0.5, seed=3), drop(x, 0.5, seed=3))
    assert np.any(drop(x, 0.5, seed=3) != drop(x, 0.5, seed=4))


def test_keeps_bfloat16() -> None:
    assert drop(jnp.ones((2, 3, 4), jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_elementwise_masks_are_shared_along_nothing() -> None:
    dropped = np.asarray(drop(jnp.ones((16, 9, 32)), 0.5, shared=False))
    for axis in range(3):
        rows = np.moveaxis(dropped, axis, 0).reshape(dropped.shape[axis], -1)
        assert len(np.unique(rows, axis=0)) == len(rows)
    # Neighbours along the length agree by chance alone: half of 4,096 pairs, five standard errors.
    assert abs(np.mean(dropped[:, 1:] == dropped[:, :-1]) - 0.5) < 5 * 0.5 / np.sqrt(16 * 8 * 32)


@pytest.mark.parametrize("rate", [0.1, 0.75])
def test_elementwise_keeps_the_mean_and_drops_at_the_rate(rate: float) -> None:
    dropped = np.asarray(drop(2 * jnp.ones((4, 100, 400)), rate, shared=False))
    error = 5 * np.sqrt(rate * (1 - rate) / dropped.size)
    assert abs(np.mean(dropped == 0) - rate) < error
    np.testing.assert_allclose(dropped[dropped != 0], 2 / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize(("shared", "bits"), [(True, 16 * 32), (False, 16 * 9 * 2)])
def test_random_numbers_are_few(shared: bool, bits: int) -> None:
    # One for each place of a mask that rows share; else two for each line, from which the rest is hashed.
    jaxpr = jax.make_jaxpr(lambda x: drop(x, 0.5, shared=shared))(jnp.ones((16, 9, 32)))

    def sizes(jaxpr) -> list[int]:
        inner = [value.jaxpr for eqn in jaxpr.eqns for value in eqn.params.values() if hasattr(value, "jaxpr")]
        drawn = [eqn.outvars[0].aval.size for eqn in jaxpr.eqns if eqn.primitive.name == "random_bits"]
        return drawn + [size for part in inner for size in sizes(part)]

    assert sizes(jaxpr.jaxpr) == [bits]


# --- the hash -------------------------------------------------------------------------------------------------------

LINES, LENGTH = 512, 2048


def lines(seed: int, rate: float) -> np.ndarray:
    """Returns which of a million numbers are kept, `[LINES, LENGTH]`."""
    seeds = jax.random.bits(jax.random.key(seed), (LINES, 1, 2), jnp.uint32)
    return np.asarray(jax.jit(lambda seeds: kept(seeds, (LINES, LENGTH), 1, rate))(seeds))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the correlation in standard errors of that of as many independent pairs."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1] * np.sqrt(a.size))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_hashed_masks_are_not_correlated(rate: float) -> None:
    # Places near each other and far apart, lines next to each other, other keys: 52 correlations of a million pairs,
    # of which one in a billion would be beyond six standard errors by chance.
    mask = lines(0, rate)
    lags = [*range(1, 33), 64, 128, 256, 512, 1000, 1024]
    found = [correlation(mask[:, lag:], mask[:, :-lag]) for lag in lags]
    found += [correlation(mask[lag:], mask[:-lag]) for lag in (1, 2, 3, 8, 64)]
    found += [correlation(mask[1:, lag:], mask[:-1, :-lag]) for lag in (1, 2, 3, 8)]
    found += [correlation(mask, lines(seed, rate)) for seed in range(1, 6)]
    assert len(found) == 52
    assert max(map(abs, found)) < 6
    # Together they are as spread as they should be, and not less: five standard errors of a standard deviation.
    assert abs(np.std(found) - 1) < 5 / np.sqrt(2 * len(found))


def test_hashed_masks_have_every_pattern_as_often() -> None:
    bits = lines(0, 0.5).reshape(-1, 8) @ (1 << np.arange(8))
    expected = bits.size / 256
    chi_square = np.sum((np.bincount(bits, minlength=256) - expected) ** 2) / expected
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
    per_line = lines(1, 0.1).mean(axis=1)
    # A line keeps a binomial number; 20 % is five standard errors of the variance of 512.
    assert abs(np.var(per_line) / (0.1 * 0.9 / LENGTH) - 1) < 5 * np.sqrt(2 / LINES)


def test_hashed_masks_belong_to_places_whatever_axis_they_lie_along() -> None:
    seeds = jax.random.bits(jax.random.key(0), (6, 2), jnp.uint32)
    across = kept(seeds[:, None], (6, 50), 1, 0.3)
    np.testing.assert_array_equal(kept(seeds[None], (50, 6), 0, 0.3), across.T)
    np.testing.assert_array_equal(kept(seeds[2:4, None], (2, 50), 1, 0.3), across[2:4])
    assert kept(seeds[:, None], (6, 50), 1, 0.0).all()
