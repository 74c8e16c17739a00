import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.attention import Attention, KeysValues, Mask, dot_product_attention, whole_attention
from t5x_lite.nn.positions import rotation

B, T, S, H, K, D = 2, 5, 7, 3, 4, 6
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


QUERY, KEY, VALUE, BIAS = normal(B, T, H, K), normal(B, S, H, K), normal(B, S, H, K), normal(1, H, T, S)
ALL = Mask(jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32))


def keys_values(key: np.ndarray, value: np.ndarray) -> KeysValues:
    """As attention takes them: heads before places."""
    return KeysValues(jnp.asarray(key).swapaxes(1, 2), jnp.asarray(value).swapaxes(1, 2))


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, allowed: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """softmax(query . key + bias) . value in float64, one query at a time."""
    out = np.zeros(query.shape)
    for b, t, h in np.ndindex(query.shape[:3]):
        logits = key[b, :, h].astype(np.float64) @ query[b, t, h] + bias[min(b, bias.shape[0] - 1), h, t]
        weights = np.where(allowed[b, t], np.exp(logits - logits.max()), 0)
        out[b, t, h] = weights / weights.sum() @ value[b, :, h]
    return out


def test_unscaled_softmax_attention_with_bias() -> None:
    got = dot_product_attention(QUERY, keys_values(KEY, VALUE), ALL, BIAS)
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
    got = dot_product_attention(QUERY, keys_values(KEY[:, :T], VALUE[:, :T]), mask, BIAS[..., :T])
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
        return jnp.sum(dot_product_attention(query, keys_values(KEY, VALUE), mask, BIAS))

    value, gradient = jax.value_and_grad(total)(jnp.asarray(QUERY))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_logits_and_softmax_of_bfloat16_inputs_are_float32() -> None:
    # Logits near 100 that differ by 0.1: in bfloat16, whose spacing there is 0.5, most of them would be equal.
    bias = jnp.asarray(100 + 0.1 * RNG.permutation(T * S).reshape(1, 1, T, S) * np.ones((1, H, 1, 1)), jnp.float32)
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in (QUERY, KEY, VALUE))
    got = dot_product_attention(query, keys_values(key, value), ALL, bias)
    assert got.dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float32) for x in (query, key, value)]
    # Weights and result are rounded to bfloat16 (4e-3 of numbers of size 1), and nothing else is.
    np.testing.assert_allclose(
        got.astype(jnp.float32), attend(*wide, np.ones((B, T, S)), np.asarray(bias)), atol=1.5e-2
    )


@pytest.mark.parametrize("shared", [True, False])
def test_dropout_of_the_weights_shares_its_mask_along_the_queries(shared: bool) -> None:
    # Equal weights, and values that tell the keys apart: what is attended is which keys were kept.
    query, value = np.zeros((B, T, H, S), np.float32), np.broadcast_to(np.eye(S, dtype=np.float32), (B, H, S, S))
    memory = KeysValues(jnp.zeros((B, H, S, S)), jnp.asarray(value))
    attended = whole_attention(query, memory, ALL, None, rate=0.5, shared=shared, key=jax.random.key(1))
    np.testing.assert_allclose(attended * S, 2 * (np.asarray(attended) > 0), rtol=1e-6)
    kept = np.swapaxes(np.asarray(attended) > 0, 1, 2)  # [B, H, T, S]
    assert 0 < kept.mean() < 1
    assert len(np.unique(kept[:, :, 0].reshape(B * H, S), axis=0)) > 1
    same = kept == kept[:, :, :1]
    assert same.all() if shared else not same.all()


def test_the_module_drops_when_asked_to() -> None:
    module = Attention(D, H, H, K, dropout_rate=0.5)
    x, memory = normal(B, T, D), keys_values(KEY, VALUE)
    variables = module.init(jax.random.key(0), x, memory, ALL)
    whole = module.apply(variables, x, memory, ALL)
    key = {"dropout": jax.random.key(1)}
    np.testing.assert_array_equal(module.apply(variables, x, memory, ALL, rngs=key), whole)
    dropped = module.apply(variables, x, memory, ALL, enable_dropout=True, rngs=key)
    assert np.max(np.abs(dropped - whole)) > 0.1


def module_params(kv_heads: int, heads: int, use_bias: bool) -> dict:
    """Random parameters of `Attention(D, heads, kv_heads, K)`."""
    widths = {"query": heads * K, "key": kv_heads * K, "value": kv_heads * K}
    shapes = {name: (D, width) for name, width in widths.items()} | {"out": (heads * K, D)}
    biases = {name: {"bias": normal(shape[1])} if use_bias else {} for name, shape in shapes.items()}
    return {name: {"kernel": normal(*shape)} | biases[name] for name, shape in shapes.items()}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_module_joins_heads_in_two_dimensional_kernels(scaled: bool, use_bias: bool) -> None:
    module = Attention(D, H, H, K, scaled=scaled, use_bias=use_bias)
    x, source = normal(B, T, D), normal(B, S, D)
    params = module_params(H, H, use_bias)

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ params[name]["kernel"] + params[name].get("bias", 0)

    def heads(x: np.ndarray, name: str) -> np.ndarray:
        return dense(x, name).reshape(*x.shape[:2], H, K)

    query = heads(x, "query") / (np.sqrt(K) if scaled else 1)
    expected = attend(query, heads(source, "key"), heads(source, "value"), np.ones((B, T, S)), BIAS)
    keys_values = module.apply({"params": params}, source, method="project")
    got = module.apply({"params": params}, x, keys_values, ALL, BIAS)
    # Logits of size 20 in float32, exponentiated: 20 * 6e-8 of numbers as large as 30.
    np.testing.assert_allclose(got, dense(expected.reshape(B, T, H * K), "out"), rtol=1e-4, atol=1e-4)


def test_biases_are_there_if_asked_for_and_start_at_zero() -> None:
    x = normal(B, T, D)

    def init(use_bias: bool) -> dict:
        # Keys and values come from `project`, so a method that calls both creates all four.
        def both(module: Attention) -> jax.Array:
            return module(x, module.project(x), Mask(ALL.query_segments, ALL.query_segments))

        return Attention(D, H, H, K, use_bias=use_bias).init(jax.random.key(0), method=both)["params"]

    assert all(part.keys() == {"kernel"} for part in init(False).values())
    params = init(True)
    assert params.keys() == {"query", "key", "value", "out"}
    for part in params.values():
        np.testing.assert_array_equal(part["bias"].unbox(), np.zeros(part["kernel"].unbox().shape[1]))


# --- grouped and multi-query attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_queries_are_multi_head_attention_with_repeated_keys_and_values(kv_heads: int) -> None:
    heads = 6
    params = module_params(kv_heads, heads, use_bias=True)
    x, mask = normal(B, T, D), Mask(ALL.query_segments, ALL.query_segments, jnp.arange(T)[None])
    turn = rotation(jnp.arange(T)[None], K, 10000.0)

    def repeated(columns: np.ndarray) -> np.ndarray:
        split = columns.reshape(*columns.shape[:-1], kv_heads, K)
        return np.repeat(split, heads // kv_heads, axis=-2).reshape(*columns.shape[:-1], heads * K)

    whole = params | {name: jax.tree.map(repeated, params[name]) for name in ("key", "value")}

    def run(params: dict, kv_heads: int) -> jax.Array:
        module = Attention(D, heads, kv_heads, K, scaled=True, use_bias=True)
        projected = module.apply({"params": params}, x, turn, method="project")
        assert projected.key.shape == projected.value.shape == (B, kv_heads, T, K)
        return module.apply({"params": params}, x, projected, mask, rotation=turn)

    # The same float32 products in another order.
    np.testing.assert_allclose(run(params, kv_heads), run(whole, heads), rtol=1e-5, atol=1e-4)


def test_each_group_serves_neighbouring_heads() -> None:
    query = normal(B, T, 6, K)
    bias = normal(1, 6, T, S)
    key, value = KEY[:, :, :2], VALUE[:, :, :2]
    expected = attend(query, np.repeat(key, 3, axis=2), np.repeat(value, 3, axis=2), np.ones((B, T, S)), bias)
    got = dot_product_attention(query, keys_values(key, value), ALL, bias)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_queries_and_keys_are_rotated_and_values_are_not() -> None:
    module, params = Attention(D, H, H, K), module_params(H, H, use_bias=False)
    x, positions = normal(B, T, D), jnp.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    turn, still = rotation(positions, K, 100.0), rotation(jnp.zeros_like(positions), K, 100.0)
    plain, rotated = (module.apply({"params": params}, x, r, method="project") for r in (still, turn))
    np.testing.assert_array_equal(rotated.value, plain.value)
    key, value = (np.swapaxes(np.asarray(x), 1, 2) for x in (rotated.key, rotated.value))
    np.testing.assert_allclose(key, turn.turn(jnp.swapaxes(plain.key, 1, 2)), rtol=1e-6)
    mask = Mask(ALL.query_segments, ALL.query_segments)
    got = module.apply({"params": params}, x, rotated, mask, rotation=turn)
    query = np.asarray(turn.turn(jnp.asarray((x @ params["query"]["kernel"]).reshape(B, T, H, K))))
    none = np.zeros((1, H, T, T))
    expected = attend(query, key, value, np.ones((B, T, T)), none)
    np.testing.assert_allclose(got, expected.reshape(B, T, -1) @ params["out"]["kernel"], rtol=1e-4, atol=1e-4)


# --- windows --------------------------------------------------------------------------------------------------------

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)


def windowed(window: int, causal: bool) -> np.ndarray:
    """Who sees whom, one pair at a time: the window counts the query itself."""
    expected = np.zeros((2, 9, 9), bool)
    for b, t, s in np.ndindex(expected.shape):
        if SEGMENTS[b, t] == SEGMENTS[b, s] != 0:
            back = t - s
            expected[b, t, s] = (back >= 0 or not causal) and abs(back) <= window - 1
    return expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 3, 9, 2**30])
def test_windows(window: int, causal: bool) -> None:
    positions = jnp.arange(9)[None] if causal else None
    allowed = Mask(SEGMENTS, SEGMENTS, positions, jnp.int32(window)).allowed()
    np.testing.assert_array_equal(allowed[:, 0], windowed(window, causal))
    if window >= 9:
        np.testing.assert_array_equal(allowed, Mask(SEGMENTS, SEGMENTS, positions).allowed())


@pytest.mark.parametrize("window", [1, 3, 20])
def test_windows_of_rows_that_stand_at_different_places_of_a_cache(window: int) -> None:
    positions = np.array([[3, 4], [6, 7]])
    mask = Mask(jnp.ones((2, 2), jnp.int32), jnp.ones((2, 9), jnp.int32), jnp.asarray(positions), jnp.int32(window))
    expected = np.zeros((2, 2, 9), bool)
    for b, t, s in np.ndindex(expected.shape):
        expected[b, t, s] = s in range(max(0, positions[b, t] - window + 1), positions[b, t] + 1)
    np.testing.assert_array_equal(mask.allowed()[:, 0], expected)


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("starts", [(1, 4), (3, 3)])
def test_write_puts_every_row_at_its_own_place(length: int, starts: tuple[int, int]) -> None:
    cache = KeysValues.zeros((B, H, S, K), jnp.bfloat16)
    new = KeysValues(normal(B, H, length, K), normal(B, H, length, K))
    # Where all rows start at the same slot a scalar says so.
    start = jnp.array(starts[0] if starts[0] == starts[1] else starts)
    written = cache.write(new, start)
    for before, update, after in [(cache.key, new.key, written.key), (cache.value, new.value, written.value)]:
        expected = np.array(before)
        for row, first in enumerate(starts):
            expected[row, :, first : first + length] = update[row].astype(expected.dtype)
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, expected)


def test_padding_of_a_late_chunk_does_not_overwrite_what_is_kept() -> None:
    old = np.arange(10, dtype=np.float32).reshape(1, 1, 10, 1)
    new = np.full((1, 1, 4, 1), -1, np.float32)
    written = KeysValues(old, old).write(KeysValues(new, new), jnp.array([8])).key
    assert np.ravel(written).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, -1]


def test_int8_has_a_scale_for_each_head_of_each_token() -> None:
    # Heads and tokens of very different size: one scale for several of them would lose the small ones.
    sizes = 10.0 ** RNG.integers(-3, 3, (B, H, S, 1))
    exact = KeysValues(*(np.float32(sizes * normal(B, H, S, K)) for _ in range(2)))
    cache = KeysValues.zeros((B, H, S + 2, K), jnp.int8).write(exact, jnp.int32(1))
    assert cache.key.dtype == cache.value.dtype == jnp.int8
    assert cache.key_scale.shape == cache.value_scale.shape == (B, H, S + 2)
    for numbers, scale, wanted in (
        (cache.key, cache.key_scale, exact.key),
        (cache.value, cache.value_scale, exact.value),
    ):
        got = np.asarray(numbers, np.float32) * np.asarray(scale)[..., None]
        # Half a step of the rounding, and a step is the largest number over 127; the rest is float32's own rounding.
        assert np.all(np.abs(got[:, :, 1:-1] - wanted) <= np.max(np.abs(wanted), -1, keepdims=True) * (0.501 / 127))
        assert np.all(got[:, :, [0, -1]] == 0)
    zeros = KeysValues(jnp.zeros((1, 1, 1, K)), jnp.zeros((1, 1, 1, K))).quantized()
    assert np.all(np.isfinite(zeros.key_scale))
    assert np.all(zeros.key == 0)


def test_attention_over_int8_is_attention_over_what_it_stands_for() -> None:
    stored = keys_values(KEY, VALUE).quantized()
    key, value = (
        np.swapaxes(np.asarray(x, np.float32) * np.asarray(scale)[..., None], 1, 2)
        for x, scale in ((stored.key, stored.key_scale), (stored.value, stored.value_scale))
    )
    got = dot_product_attention(QUERY, stored, ALL, BIAS)
    # The scales come after the sums instead of before, in float32.
    np.testing.assert_allclose(got, attend(QUERY, key, value, np.ones((B, T, S)), BIAS), rtol=1e-5, atol=1e-6)


def test_visible_takes_the_place_of_segments_and_order() -> None:
    visible = RNG.integers(0, 2, (1, T, S)).astype(bool)
    positions, places = jnp.array([[5, 5, 6, 6, 9]]), jnp.array([[0, 1, 2, 5, 5, 6, 6]])
    mask = Mask(ALL.query_segments * 0, ALL.key_segments * 0, positions, None, visible, places)
    np.testing.assert_array_equal(mask.allowed()[:, 0], visible)
    near = Mask(ALL.query_segments, ALL.key_segments, positions, 4, visible, places).allowed()[:, 0]
    distance = np.abs(np.asarray(positions)[:, :, None] - np.asarray(places)[:, None, :])
    np.testing.assert_array_equal(near, visible & (distance < 4))
    assert near.any()
    assert (near != visible).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_keys_in_blocks_are_the_same_keys(length: int, dtype: jax.typing.DTypeLike) -> None:
    queries = 2 * H  # two for each head of keys, and as many tokens as leave the last block of 150 mostly empty
    query, exact = normal(B, T, queries, K), KeysValues(normal(B, H, length, K), normal(B, H, length, K))
    plain = KeysValues.zeros((B, H, length, K), dtype).write(exact, jnp.int32(0))
    blocks = KeysValues.zeros((B, H, length, K), dtype).in_blocks().filled(exact)
    width = min(length, 64)
    assert blocks.key.shape == (B, H, -(-length // width), K, width)
    assert blocks.key.dtype == dtype
    mask = Mask(jnp.ones((B, T), jnp.int32), jnp.asarray(RNG.integers(0, 2, (B, length)), jnp.int32))
    got, wanted = (dot_product_attention(query, x, mask, None) for x in (blocks, plain))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)  # float32 sums of four terms
