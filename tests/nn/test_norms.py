from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.norms import LayerNorm, RMSNorm

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


def test_gradients_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(3)
    x, pull = (jnp.asarray(rng.normal(size=(2, 3, 512)), jnp.float32) for _ in range(2))

    def formula(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def module(x: jax.Array, scale: jax.Array) -> jax.Array:
        return RMSNorm().apply({"params": {"scale": scale}}, x)

    def gradients(function: Any) -> Any:
        return jax.grad(lambda *both: jnp.sum(function(*both) * pull), argnums=(0, 1))(x, jnp.asarray(SCALE))

    # Float32 sums of 512 numbers in another order.
    for got, wanted in zip(gradients(module), gradients(formula), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * np.max(np.abs(wanted)))
    half = jax.grad(lambda x: jnp.sum(module(x, jnp.asarray(SCALE)) * pull))(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


# --- layer norm -----------------------------------------------------------------------------------------------------

BIAS = np.linspace(-1.0, 3.0, 512).astype(np.float32)


def layer_norm(x: np.ndarray, epsilon: float, bias: np.ndarray | float = BIAS) -> np.ndarray:
    x = np.asarray(x, np.float64)
    centred = x - np.mean(x, axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + epsilon) * SCALE + bias


def apply_layer_norm(x: jax.Array, use_bias: bool = True, epsilon: float = 1e-5, **attributes) -> jax.Array:
    params = {"scale": jnp.asarray(SCALE)} | ({"bias": jnp.asarray(BIAS)} if use_bias else {})
    return LayerNorm(epsilon, use_bias, **attributes).apply({"params": params}, x)


# The mean is a sum of 512 numbers of its own size, rounded to 24 bits: an error of 1e-7 of it, and times the scale.
@pytest.mark.parametrize(("mean", "atol"), [(0.0, 2e-6), (3.0, 5e-6), (-1000.0, 1e-3)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_norm_takes_mean_and_variance_over_the_features(mean: float, atol: float, use_bias: bool) -> None:
    x = np.random.default_rng(0).normal(mean, 1.0, (2, 3, 512)).astype(np.float32)
    expected = layer_norm(x, 1e-5, BIAS if use_bias else 0.0)
    # E[x^2] - E[x]^2 in float32 has an error of 0.06 in the variance, at a mean of 1000 and a variance of 1.
    np.testing.assert_allclose(apply_layer_norm(jnp.asarray(x), use_bias), expected, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 1e-5])
def test_layer_norm_adds_epsilon_to_the_variance(epsilon: float) -> None:
    x = 1e-3 * np.random.default_rng(1).normal(size=(2, 512)).astype(np.float32)
    got = apply_layer_norm(jnp.asarray(x), epsilon=epsilon)
    np.testing.assert_allclose(got, layer_norm(x, epsilon), rtol=2e-6, atol=3e-6)
    np.testing.assert_allclose(apply_layer_norm(jnp.full((1, 512), 7.0), epsilon=epsilon)[0], BIAS, atol=1e-6)


def test_layer_norm_of_bfloat16_has_float32_statistics() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(2.0, 30.0, (4, 512)), jnp.bfloat16)
    got = apply_layer_norm(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, layer_norm(x.astype(jnp.float32), 1e-5), rtol=2e-6, atol=5e-6)
    rounded = apply_layer_norm(x, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))


@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_norm_starts_as_the_plain_one(use_bias: bool) -> None:
    variables = LayerNorm(1e-5, use_bias, dtype=jnp.bfloat16).init(jax.random.key(0), jnp.ones((1, 8), jnp.bfloat16))
    params = {name: box.unbox() for name, box in variables["params"].items()}
    assert params.keys() == ({"scale", "bias"} if use_bias else {"scale"})
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(params["scale"], np.ones(8))
    if use_bias:
        np.testing.assert_array_equal(params["bias"], np.zeros(8))


# --- a single row on a GPU ------------------------------------------------------------------------------------------


NORMS = {"rms": RMSNorm(epsilon=1e-3), "layer": LayerNorm(epsilon=1e-3)}


@pytest.mark.parametrize("name", NORMS)
def test_what_a_gpu_computes_for_a_single_row_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = NORMS[name], jnp.asarray(0.1 * np.random.default_rng(5).normal(0.5, 1.0, (1, 1, 500)), jnp.float32)
    params = module.init(jax.random.key(0), x)
    usual = module.apply(params, x)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    # Sums of 500 numbers that are divided before instead of afterwards: float32 rounding of each.
    np.testing.assert_allclose(module.apply(params, x), usual, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("platform", "rows", "barriers"), [("cuda", 1, 1), ("cuda", 2, 0), ("cpu", 1, 0)])
def test_a_gpu_is_to_compute_a_single_row_once(name: str, platform: str, rows: int, barriers: int) -> None:
    module, x = NORMS[name], jnp.ones((rows, 1, 8))
    params = module.init(jax.random.key(0), x)
    lowered = jax.jit(module.apply).trace(params, x).lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count("optimization_barrier") == barriers
