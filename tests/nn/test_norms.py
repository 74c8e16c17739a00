import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.nn.norms import RMSNorm

SCALE = np.linspace(0.5, 2.0, 512).astype(np.float32)


def rms_norm(x: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * SCALE


def apply(x: jax.Array, **attributes) -> jax.Array:
    return RMSNorm(**attributes).apply({"params": {"scale": jnp.asarray(SCALE)}}, x)


def test_no_mean_is_taken_off_and_no_bias_added() -> None:
    x = np.random.default_rng(0).normal(3.0, 1.0, (2, 3, 512)).astype(np.float32)
    # Float32 rounding of a mean of 512, a square root and two products.
    np.testing.assert_allclose(apply(jnp.asarray(x)), rms_norm(x), rtol=2e-6)


def test_epsilon_is_added_to_the_mean_square() -> None:
    # At this size the epsilon is as large as the mean square: any other place or value for it gives other numbers.
    x = 1e-3 * np.random.default_rng(1).normal(size=(2, 512)).astype(np.float32)
    np.testing.assert_allclose(apply(jnp.asarray(x)), rms_norm(x), rtol=2e-6)
    np.testing.assert_allclose(apply(jnp.asarray(x), epsilon=1e-5), rms_norm(x, 1e-5), rtol=2e-6)
    assert np.all(np.isfinite(apply(jnp.zeros((1, 512)))))


def test_statistics_of_bfloat16_inputs_are_float32() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 512)) * 300, jnp.bfloat16)
    got = apply(x)
    assert got.dtype == jnp.float32
    # The same tolerance as for float32 inputs; bfloat16 statistics would be wrong by 4e-3.
    np.testing.assert_allclose(got, rms_norm(x.astype(jnp.float32)), rtol=2e-6)
    rounded = apply(x, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))


def test_scale_starts_at_one_in_float32() -> None:
    scale = RMSNorm(dtype=jnp.bfloat16).init(jax.random.key(0), jnp.ones((1, 8), jnp.bfloat16))["params"]["scale"]
    assert scale.unbox().dtype == jnp.float32
    np.testing.assert_array_equal(scale.unbox(), np.ones(8))
