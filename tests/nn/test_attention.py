import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.attention import Attention, KeysValues, Mask, dot_product_attention

B, T, S, H, K, D = 2, 5, 7, 3, 4, 6
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


QUERY, KEY, VALUE, BIAS = normal(B, T, H, K), normal(B, S, H, K), normal(B, S, H, K), normal(1, H, T, S)
ALL = Mask(jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32))


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, allowed: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """softmax(query . key + bias) . value in float64, one query at a time."""
    out = np.zeros(query.shape)
    for b, t, h in np.ndindex(query.shape[:3]):
        logits = key[b, :, h].astype(np.float64) @ query[b, t, h] + bias[min(b, bias.shape[0] - 1), h, t]
        weights = np.where(allowed[b, t], np.exp(logits - logits.max()), 0)
        out[b, t, h] = weights / weights.sum() @ value[b, :, h]
    return out


def test_unscaled_softmax_attention_with_bias() -> None:
    got = dot_product_attention(QUERY, KeysValues(KEY, VALUE), ALL, BIAS)
    expected = attend(QUERY, KEY, VALUE, np.ones((B, T, S)), BIAS)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # float32 with a handful of terms
    scaled = attend(QUERY / np.sqrt(K).astype(np.float32), KEY, VALUE, np.ones((B, T, S)), BIAS)
    assert np.max(np.abs(got - scaled)) > 0.1  # what 1/sqrt(head_dim) would have given


def test_segments_and_causality() -> None:
    segments = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]], np.int32)
    mask = Mask(jnp.asarray(segments), jnp.asarray(segments), jnp.arange(T)[None])
    expected = np.zeros((B, T, T), bool)
    for b, t, s in np.ndindex(B, T, T):
        expected[b, t, s] = segments[b, t] == segments[b, s] != 0 and s <= t
    np.testing.assert_array_equal(mask.allowed()[:, 0], expected)
    real = segments > 0
    got = dot_product_attention(QUERY, KeysValues(KEY[:, :T], VALUE[:, :T]), mask, BIAS[..., :T])
    reference = attend(QUERY, KEY[:, :T], VALUE[:, :T], expected | ~real[:, :, None], BIAS[..., :T])
    np.testing.assert_allclose(got[real], reference[real], rtol=1e-5, atol=1e-6)


def test_positions_say_where_queries_stand_among_the_keys() -> None:
    # Two decoding rows that have seen three and five tokens.
    mask = Mask(jnp.ones((2, 1), jnp.int32), jnp.ones((2, S), jnp.int32), jnp.array([[3], [5]]))
    np.testing.assert_array_equal(mask.allowed()[:, 0, 0].sum(axis=-1), [4, 6])


def test_rows_that_may_see_nothing_are_finite_in_value_and_gradient() -> None:
    segments = jnp.zeros((B, T), jnp.int32)
    mask = Mask(segments, jnp.zeros((B, S), jnp.int32), jnp.arange(T)[None])
    assert not mask.allowed().any()

    def total(query: jax.Array) -> jax.Array:
        return jnp.sum(dot_product_attention(query, KeysValues(KEY, VALUE), mask, BIAS))

    value, gradient = jax.value_and_grad(total)(jnp.asarray(QUERY))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_logits_and_softmax_of_bfloat16_inputs_are_float32() -> None:
    # Logits near 100 that differ by 0.1: in bfloat16, whose spacing there is 0.5, most of them would be equal.
    bias = jnp.asarray(100 + 0.1 * RNG.permutation(T * S).reshape(1, 1, T, S) * np.ones((1, H, 1, 1)), jnp.float32)
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in (QUERY, KEY, VALUE))
    got = dot_product_attention(query, KeysValues(key, value), ALL, bias)
    assert got.dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float32) for x in (query, key, value)]
    # Weights and result are rounded to bfloat16 (4e-3 of numbers of size 1), and nothing else is.
    np.testing.assert_allclose(
        got.astype(jnp.float32), attend(*wide, np.ones((B, T, S)), np.asarray(bias)), atol=1.5e-2
    )


def test_dropout_of_the_weights_shares_its_mask_along_the_queries() -> None:
    # With unit vectors for values the result is the weights themselves.
    value = np.broadcast_to(np.eye(S, dtype=np.float32)[None, :, None, :], (B, S, H, S))
    module = Attention(D, H, S, dropout_rate=0.5)
    x = normal(B, T, D)
    variables = jax.tree.map(jnp.asarray, module.init(jax.random.key(0), x, KeysValues(normal(B, S, H, S), value), ALL))

    def weights(keys_values: KeysValues, key: int) -> np.ndarray:
        seen = []

        def record(module: Attention, x: jax.Array) -> jax.Array:
            def dropout(w: jax.Array) -> jax.Array:
                seen.append(module.dropout(w, enabled=True))
                return seen[-1]

            return dot_product_attention(module._split(module.query(x)), keys_values, ALL, None, dropout=dropout)

        module.apply(variables, x, method=record, rngs={"dropout": jax.random.key(key)})
        return np.asarray(seen[0])

    kept = weights(KeysValues(normal(B, S, H, S), value), 1) > 0  # [B, H, T, S]
    np.testing.assert_array_equal(kept, np.broadcast_to(kept[:, :, :1], kept.shape))
    assert 0 < kept.mean() < 1
    assert len(np.unique(kept[:, :, 0].reshape(B * H, S), axis=0)) > 1


def test_module_joins_heads_in_two_dimensional_kernels() -> None:
    module = Attention(D, H, K)
    x, source = normal(B, T, D), normal(B, S, D)
    kernels = {
        name: normal(*shape)
        for name, shape in zip(["query", "key", "value", "out"], [(D, H * K)] * 3 + [(H * K, D)], strict=True)
    }
    variables = {"params": {name: {"kernel": kernel} for name, kernel in kernels.items()}}

    def heads(x: np.ndarray, name: str) -> np.ndarray:
        return (x @ kernels[name]).reshape(*x.shape[:2], H, K)

    expected = attend(heads(x, "query"), heads(source, "key"), heads(source, "value"), np.ones((B, T, S)), BIAS)
    keys_values = module.apply(variables, source, method="project")
    got = module.apply(variables, x, keys_values, ALL, BIAS)
    # Logits of size 20 in float32, exponentiated: 20 * 6e-8 of numbers as large as 30.
    np.testing.assert_allclose(got, expected.reshape(B, T, H * K) @ kernels["out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2])
def test_write_puts_every_row_at_its_own_place(length: int) -> None:
    cache = KeysValues(jnp.zeros((B, S, H, K), jnp.bfloat16), jnp.zeros((B, S, H, K), jnp.bfloat16))
    new = KeysValues(normal(B, length, H, K), normal(B, length, H, K))
    written = cache.write(new, jnp.array([1, 4]))
    for before, update, after in [(cache.key, new.key, written.key), (cache.value, new.value, written.value)]:
        expected = np.array(before)
        expected[0, 1 : 1 + length], expected[1, 4 : 4 + length] = update.astype(expected.dtype)
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, expected)
