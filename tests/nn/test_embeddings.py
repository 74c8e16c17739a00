import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.nn.embeddings import TokenEmbedding

TABLE = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
VARIABLES = {"params": {"table": jnp.asarray(TABLE)}}
TOKENS = np.array([[3, 0, 10], [3, 3, 1]], np.int32)


def test_looks_rows_up() -> None:
    np.testing.assert_array_equal(TokenEmbedding(11, 6).apply(VARIABLES, TOKENS), TABLE[TOKENS])


def test_logits_are_products_with_the_rows_and_not_scaled() -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 6)).astype(np.float32)
    got = TokenEmbedding(11, 6).apply(VARIABLES, x, method="logits")
    np.testing.assert_allclose(got, x.astype(np.float64) @ TABLE.T, rtol=1e-5, atol=1e-6)  # float32, sums of 6


def test_bfloat16_compute_gives_bfloat16_vectors_and_float32_logits() -> None:
    module = TokenEmbedding(11, 6, dtype=jnp.bfloat16)
    x = module.apply(VARIABLES, TOKENS)
    logits = module.apply(VARIABLES, x, method="logits")
    assert x.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(TABLE, jnp.bfloat16), np.float64)
    # Products of bfloat16 numbers summed in float32: far closer than bfloat16's own 4e-3.
    np.testing.assert_allclose(logits, rounded[TOKENS] @ rounded.T, rtol=1e-5, atol=1e-5)


def test_gradient_adds_up_over_repeated_tokens() -> None:
    def total(table: jax.Array) -> jax.Array:
        return jnp.sum(TokenEmbedding(11, 6).apply({"params": {"table": table}}, TOKENS))

    gradient = jax.grad(total)(jnp.asarray(TABLE))
    np.testing.assert_array_equal(gradient[:, 0], np.bincount(TOKENS.ravel(), minlength=11))
