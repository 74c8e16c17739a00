import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.feed_forward import ACTIVATIONS, FeedForward

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 8)).astype(np.float32)
KERNELS = {
    name: {"kernel": RNG.normal(size=shape).astype(np.float32)}
    for name, shape in {"up": (8, 16), "gate": (8, 16), "down": (16, 8)}.items()
}


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def apply(activation: str, gated: bool) -> jax.Array:
    params = {name: kernel for name, kernel in KERNELS.items() if gated or name != "gate"}
    return FeedForward(16, activation, gated).apply({"params": params}, jnp.asarray(X))


def product(x: np.ndarray, name: str) -> np.ndarray:
    return x.astype(np.float64) @ KERNELS[name]["kernel"]


@pytest.mark.parametrize("name", ["relu", "gelu_tanh"])
def test_plain(name: str) -> None:
    activation = {"relu": lambda x: np.maximum(x, 0), "gelu_tanh": gelu_tanh}[name]
    expected = product(activation(product(X, "up")), "down")
    np.testing.assert_allclose(apply(name, gated=False), expected, rtol=1e-5, atol=1e-5)  # float32, sums of 16


def test_the_activation_is_on_the_gate() -> None:
    expected = product(gelu_tanh(product(X, "gate")) * product(X, "up"), "down")
    swapped = product(gelu_tanh(product(X, "up")) * product(X, "gate"), "down")
    got = apply("gelu_tanh", gated=True)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)  # float32, sums of products as large as 100
    assert np.max(np.abs(got - swapped)) > 1.0


def test_gelu_is_the_tanh_form() -> None:
    x = np.linspace(-5, 5, 1001).astype(np.float32)
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    got = ACTIVATIONS["gelu_tanh"](jnp.asarray(x))
    # The two forms differ by up to 4.7e-4: a tolerance 200 times smaller tells them apart.
    np.testing.assert_allclose(got, gelu_tanh(x.astype(np.float64)), atol=2e-6)
    assert np.max(np.abs(got - erf)) > 4e-4


def test_hidden_dropout_shares_its_mask_along_the_length() -> None:
    # relu of a constant input is constant along the length, so equal rows after dropout mean an equal mask.
    x = jnp.ones((4, 5, 8))
    module = FeedForward(16, "relu", False, dropout_rate=0.5)
    params = {name: KERNELS[name] for name in ("up", "down")}
    dropped = module.apply({"params": params}, x, enable_dropout=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(dropped, np.broadcast_to(dropped[:, :1], dropped.shape), rtol=1e-5)
    assert np.max(np.abs(dropped - module.apply({"params": params}, x))) > 0.1
