"""Attention a few rows at a time against the form that holds all logits: values, all gradients, every feature."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn import row_attention
from t5x_lite.nn.attention import KeysValues, Mask, dot_product_attention, whole_attention
from t5x_lite.nn.dropout import kept
from t5x_lite.sharding import make_mesh

B, T, H, K = 4, 8, 4, 8
KEY = jax.random.key(3)

# What a call can have. `S`: keys, where they are not the queries' own tokens; `G`: heads of keys.
CASES: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "causal with groups": {"causal": True, "G": 2},
    "one head of keys, windows": {"G": 1, "window": 3},
    "causal windows, a bias": {"causal": True, "window": 3, "bias": True},
    "cross-attention": {"S": 12, "rate": 0.3},
    "shared dropout with groups and a bias": {"bias": True, "rate": 0.3, "G": 2},
    "dropout of each weight": {"causal": True, "rate": 0.3, "shared": False, "bias": True},
    "dropout of each weight with groups": {"rate": 0.3, "shared": False, "G": 2},
    "in order, with groups": {"causal": True, "in_order": True, "G": 2},
    "in order, windows, dropout of each weight": {
        "causal": True,
        "in_order": True,
        "window": 3,
        "rate": 0.3,
        "shared": False,
    },
    "in order, shared dropout": {"causal": True, "in_order": True, "rate": 0.3},
    "in order, a bias": {"causal": True, "in_order": True, "bias": True},
}


@pytest.fixture(autouse=True)
def few_tokens_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divides eight queries in order into parts of two."""
    monkeypatch.setattr(row_attention, "_LONG", 2)  # what a device has of eight tokens over four


def segments(rng: np.random.Generator, length: int) -> jax.Array:
    """Packed examples, with padding on the left here and on the right there, and a row that is all padding."""
    ids = np.sort(rng.integers(0, 3, (B, length)), axis=1)
    ids[1], ids[2] = np.where(ids[1] == 0, 3, ids[1] - 1), 0
    return jnp.asarray(ids, jnp.int32)


def call(
    S: int | None = None,
    G: int = H,
    bias: bool = False,
    causal: bool = False,
    in_order: bool = False,
    window: int | None = None,
    rate: float = 0.0,
    shared: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array], list[jax.Array]]:
    """Returns both forms as functions of query, key, value and, with `bias`, bias; and arguments for them."""
    rng = np.random.default_rng(0)
    s = S or T

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    own = segments(rng, T)
    if in_order:
        own = jnp.maximum(own, 1)  # what padding attends to is another then
    places = jnp.arange(T)[None] if causal else None
    mask = Mask(own, segments(rng, S) if S else own, places, window, in_order=in_order)
    arguments = [normal(B, T, H, K), normal(B, G, s, K), normal(B, G, s, K)]
    if bias:
        arguments.append(normal(1, H, T, s).astype(jnp.float32))

    def drop(weights: jax.Array) -> jax.Array:
        if shared:
            keep = jax.random.bernoulli(KEY, 1.0 - rate, (B, H, s))[:, :, None]
        else:
            keep = kept(jax.random.bits(KEY, (B, H, T, 2), jnp.uint32)[:, :, :, None], (B, H, T, s), 3, rate)
        return jnp.where(keep, weights / (1.0 - rate), 0.0).astype(weights.dtype)

    def reference(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any = None) -> jax.Array:
        return dot_product_attention(query, KeysValues(key, value), mask, bias, drop if rate else None)

    def rows(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any = None) -> jax.Array:
        options = {"rate": rate, "shared": shared, "key": KEY if rate else None}
        return whole_attention(query, KeysValues(key, value), mask, bias, **options)

    return reference, rows, arguments


def value_and_gradients(function: Callable[..., jax.Array], arguments: list[jax.Array]) -> list[np.ndarray]:
    pull = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, H, K)), jnp.float32)

    def total(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*arguments).astype(jnp.float32)
        return jnp.sum(out * pull), out

    places = tuple(range(len(arguments)))
    gradients, out = jax.jit(jax.grad(total, argnums=places, has_aux=True))(*arguments)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_alike(got: list[np.ndarray], wanted: list[np.ndarray], tolerance: float) -> None:
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


# Float32 sums of a few dozen numbers of size 1 in another order; 8e-7 was seen.
FLOAT32 = 3e-6


@pytest.mark.parametrize("most", [2**21, 8 * H * T * T, 100], ids=["all rows", "two rows", "blocks of queries"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_attention, "_ON_CPU", most)
    reference, rows, arguments = call(**CASES[case])
    assert_alike(value_and_gradients(rows, arguments), value_and_gradients(reference, arguments), FLOAT32)


@pytest.mark.parametrize("mesh", ["context:4,data:2", "data:2,context:2,model:2", "fsdp:2,model:4", "context:8"])
@pytest.mark.parametrize("case", ["causal with groups", *list(CASES)[2:]])
def test_every_mesh_computes_the_same(case: str, mesh: str) -> None:
    reference, rows, arguments = call(**CASES[case])
    with jax.set_mesh(make_mesh(mesh)):
        assert_alike(value_and_gradients(rows, arguments), value_and_gradients(reference, arguments), FLOAT32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_have_float32_sums(dtype: Any) -> None:
    reference, rows, arguments = call(bias=True, causal=True, dtype=dtype)
    wide = [x.astype(jnp.float32) for x in arguments]
    exact = value_and_gradients(reference, wide)
    # Factors of products and results are rounded, to 8 or 11 bits; nothing else is.
    assert_alike(value_and_gradients(rows, arguments), exact, 2.0 ** (-6 if dtype == jnp.bfloat16 else -9))


def test_no_array_holds_the_logits_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_attention, "_ON_CPU", 100)
    monkeypatch.setattr(row_attention, "_ON_ACCELERATOR", 100)
    reference, rows, arguments = call(S=12, G=2)

    def has_all(function: Callable[..., jax.Array]) -> bool:
        gradient = jax.grad(lambda *x: jnp.sum(function(*x)), argnums=(0, 1, 2))
        text = jax.jit(gradient).lower(*arguments).as_text()
        return f"tensor<{B}x{H}x{T}x12xf32>" in text

    assert has_all(reference)
    assert not has_all(rows)


def test_what_lies_ahead_is_not_computed() -> None:
    def operations(**case: Any) -> float:
        _, rows, arguments = call(causal=True, **case)
        gradient = jax.grad(lambda *x: jnp.sum(rows(*x)), argnums=(0, 1, 2))
        analysis: Any = jax.jit(gradient).lower(*arguments).cost_analysis()
        return analysis["flops"]

    # Of four parts the first needs a quarter of the keys, the second a half, ...: 5 / 8, and a little to put together.
    assert operations(in_order=True) < 0.7 * operations()


def test_rows_that_see_nothing_attend_evenly() -> None:
    query, memory = jnp.ones((1, 2, 1, 4)), KeysValues(jnp.ones((1, 1, 3, 4)), jnp.arange(12.0).reshape(1, 1, 3, 4))
    blind = Mask(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 3), jnp.int32))
    out, pull = jax.vjp(lambda query: whole_attention(query, memory, blind, None), query)
    np.testing.assert_allclose(out[0, :, 0], [[4, 5, 6, 7]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.ones_like(out))[0], jnp.zeros_like(query))


def test_masks_that_are_given_and_int8_are_for_decoding() -> None:
    _, _, (query, key, value) = call()
    mask = Mask(jnp.ones((B, T), jnp.int32), jnp.ones((B, T), jnp.int32), visible=jnp.ones((1, T, T), bool))
    with pytest.raises(ValueError, match="neither a mask that is given nor int8 keys"):
        whole_attention(query, KeysValues(key, value), mask, None)
    with pytest.raises(ValueError, match="neither a mask that is given nor int8 keys"):
        whole_attention(query, KeysValues(key, value).quantized(), mask.replace(visible=None), None)
