import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.embeddings import Head, SmallEmbedding, TokenEmbedding

TABLE = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
VARIABLES = {"params": {"table": jnp.asarray(TABLE)}}
TOKENS = np.array([[3, 0, 10], [3, 3, 1]], np.int32)


def test_looks_rows_up() -> None:
    np.testing.assert_array_equal(TokenEmbedding(11, 6).apply(VARIABLES, TOKENS), TABLE[TOKENS])


def test_bfloat16_compute_gives_bfloat16_vectors() -> None:
    got = TokenEmbedding(11, 6, dtype=jnp.bfloat16).apply(VARIABLES, TOKENS)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(TABLE, jnp.bfloat16)[TOKENS])


def test_gradient_adds_up_over_repeated_tokens() -> None:
    def total(table: jax.Array) -> jax.Array:
        return jnp.sum(TokenEmbedding(11, 6).apply({"params": {"table": table}}, TOKENS))

    gradient = jax.grad(total)(jnp.asarray(TABLE))
    np.testing.assert_array_equal(gradient[:, 0], np.bincount(TOKENS.ravel(), minlength=11))


# --- tables of a few rows -------------------------------------------------------------------------------------------


def test_small_tables_look_rows_up() -> None:
    indices = jnp.array([[0, 10, 3], [2, 2, 1]])
    got = SmallEmbedding(11, 6, "positions").apply(VARIABLES, indices)
    np.testing.assert_array_equal(got, TABLE[np.asarray(indices)])
    rounded = SmallEmbedding(11, 6, "types", dtype=jnp.bfloat16).apply(VARIABLES, indices)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_index_that_the_table_does_not_have_gives_nan(dtype) -> None:
    got = SmallEmbedding(11, 6, "positions", dtype=dtype).apply(VARIABLES, jnp.array([[10, 11, 12, 1000, 0]]))
    nan = np.isnan(np.asarray(got, np.float32))
    np.testing.assert_array_equal(nan[0], np.repeat([[False], [True], [True], [True], [False]], 6, axis=1))


def test_an_index_below_zero_gives_nan() -> None:
    assert np.all(np.isnan(SmallEmbedding(11, 6, "positions").apply(VARIABLES, jnp.array([[-1, -11]]))))


# --- the output head ------------------------------------------------------------------------------------------------

X = np.random.default_rng(1).normal(size=(2, 3, 6)).astype(np.float32)
HEAD_KERNEL = np.random.default_rng(2).normal(size=(6, 11)).astype(np.float32)
HEAD_BIAS = np.random.default_rng(3).normal(size=11).astype(np.float32)


def apply_head(tied: bool, use_bias: bool, x: np.ndarray = X, **attributes) -> jax.Array:
    params = ({} if tied else {"kernel": HEAD_KERNEL}) | ({"bias": HEAD_BIAS} if use_bias else {})
    return Head(11, tied, use_bias, **attributes).apply({"params": params}, jnp.asarray(x), jnp.asarray(TABLE))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_products_that_nothing_scales(tied: bool, use_bias: bool) -> None:
    expected = X.astype(np.float64) @ (TABLE.T if tied else HEAD_KERNEL) + (HEAD_BIAS if use_bias else 0.0)
    np.testing.assert_allclose(apply_head(tied, use_bias), expected, rtol=1e-5, atol=1e-6)  # float32, sums of 6


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_compute_gives_float32_logits(tied: bool) -> None:
    logits = apply_head(tied, True, dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    x, kernel = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (X, TABLE.T if tied else HEAD_KERNEL))
    # Products of bfloat16 numbers summed in float32, and a float32 bias: far closer than bfloat16's own 4e-3.
    np.testing.assert_allclose(logits, x @ kernel + HEAD_BIAS, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tied", "use_bias", "names"),
    [(True, False, set()), (True, True, {"bias"}), (False, False, {"kernel"}), (False, True, {"kernel", "bias"})],
)
def test_a_tied_head_has_no_kernel(tied: bool, use_bias: bool, names: set[str]) -> None:
    variables = Head(11, tied, use_bias).init(jax.random.key(0), jnp.asarray(X), jnp.asarray(TABLE))
    params = {name: box.unbox() for name, box in variables.get("params", {}).items()}
    assert params.keys() == names
    if use_bias:
        np.testing.assert_array_equal(params["bias"], np.zeros(11))
