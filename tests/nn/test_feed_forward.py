import math
from typing import Any

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


FORMULAS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
    "gelu_tanh": gelu_tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def apply(activation: str, gated: bool) -> jax.Array:
    params = {name: kernel for name, kernel in KERNELS.items() if gated or name != "gate"}
    return FeedForward(16, activation, gated).apply({"params": params}, jnp.asarray(X))


def product(x: np.ndarray, name: str) -> np.ndarray:
    return x.astype(np.float64) @ KERNELS[name]["kernel"]


@pytest.mark.parametrize("name", FORMULAS)
def test_plain(name: str) -> None:
    expected = product(FORMULAS[name](product(X, "up")), "down")
    np.testing.assert_allclose(apply(name, gated=False), expected, rtol=1e-5, atol=2e-5)  # float32, sums of 16


def test_the_activation_is_on_the_gate() -> None:
    expected = product(gelu_tanh(product(X, "gate")) * product(X, "up"), "down")
    swapped = product(gelu_tanh(product(X, "up")) * product(X, "gate"), "down")
    got = apply("gelu_tanh", gated=True)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)  # float32, sums of products as large as 100
    assert np.max(np.abs(got - swapped)) > 1.0


def test_every_activation_has_a_formula() -> None:
    assert set(ACTIVATIONS) == set(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_are_their_formulas(name: str) -> None:
    x = np.linspace(-12, 12, 2401).astype(np.float32)
    # The two gelus differ by up to 4.7e-4: a tolerance 200 times smaller tells them apart.
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), FORMULAS[name](x.astype(np.float64)), atol=2e-6)


def test_the_two_gelus_differ() -> None:
    exact, tanh = (float(ACTIVATIONS[name](jnp.float32(2.7))) for name in ("gelu", "gelu_tanh"))
    assert abs(exact - tanh) == pytest.approx(4.7e-4, abs=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_biases_are_added_before_the_activation_and_at_the_end(gated: bool) -> None:
    biases = {name: RNG.normal(size=kernel["kernel"].shape[1]).astype(np.float32) for name, kernel in KERNELS.items()}
    params = {name: KERNELS[name] | {"bias": biases[name]} for name in KERNELS if gated or name != "gate"}
    got = FeedForward(16, "silu", gated, use_bias=True).apply({"params": params}, jnp.asarray(X))
    up = product(X, "up") + biases["up"]
    hidden = FORMULAS["silu"](product(X, "gate") + biases["gate"]) * up if gated else FORMULAS["silu"](up)
    # Float32, sums of products as large as 100.
    np.testing.assert_allclose(got, product(hidden, "down") + biases["down"], rtol=1e-5, atol=1e-4)


def test_biases_start_at_zero() -> None:
    variables = FeedForward(16, "relu", True, use_bias=True).init(jax.random.key(0), jnp.asarray(X))
    for name, size in {"up": 16, "gate": 16, "down": 8}.items():
        np.testing.assert_array_equal(variables["params"][name]["bias"].unbox(), np.zeros(size))


def test_hidden_dropout_shares_its_mask_along_the_length() -> None:
    # relu of a constant input is constant along the length, so equal rows after dropout mean an equal mask.
    x = jnp.ones((4, 5, 8))
    module = FeedForward(16, "relu", False, dropout_rate=0.5)
    params = {name: KERNELS[name] for name in ("up", "down")}
    dropped = module.apply({"params": params}, x, enable_dropout=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(dropped, np.broadcast_to(dropped[:, :1], dropped.shape), rtol=1e-5)
    assert np.max(np.abs(dropped - module.apply({"params": params}, x))) > 0.1


def test_elementwise_hidden_dropout_differs_along_the_length() -> None:
    x = jnp.ones((4, 5, 8))
    module = FeedForward(16, "relu", False, dropout_rate=0.5, dropout_shared=False)
    params = {name: KERNELS[name] for name in ("up", "down")}
    dropped = module.apply({"params": params}, x, enable_dropout=True, rngs={"dropout": jax.random.key(0)})
    # Half of the units are off in any case, so of the 20 masks a few may be the same.
    assert len(np.unique(np.asarray(dropped).reshape(20, 8).round(3), axis=0)) > 12


def test_relu_has_jax_s_gradient() -> None:
    x = jnp.array([-2.0, -0.0, 0.0, 1e-30, 3.0, jnp.nan])
    weights = jnp.arange(1.0, 7.0)
    ours, theirs = (jax.grad(lambda x, f=f: jnp.sum(f(x) * weights))(x) for f in (ACTIVATIONS["relu"], jax.nn.relu))
    np.testing.assert_array_equal(ours, theirs)


def test_with_relu_one_hidden_array_is_kept_for_the_backward_pass() -> None:
    module = FeedForward(16, "relu", False, dropout_rate=0.5)
    params = {name: KERNELS[name] for name in ("up", "down")}

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(module.apply({"params": params}, x, enable_dropout=True, rngs={"dropout": jax.random.key(0)}))

    _, pull = jax.vjp(loss, params, jnp.asarray(X))
    hidden, *more = (leaf for leaf in jax.tree.leaves(pull) if leaf.shape == (2, 3, 16))
    for same in more:  # what the product keeps, and relu
        np.testing.assert_array_equal(same, hidden)
