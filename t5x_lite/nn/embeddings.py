"""Tables of vectors, and the output head that may share the one of tokens."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.nn.dense import Matrix, Quantized, linear, matrix
from t5x_lite.nn.parameters import Initializer, fan_in_normal, parameter
from t5x_lite.sharding import constrain


class TokenEmbedding(nn.Module):
    """A table `[vocab_size, embed_dim]`, read by token id."""

    vocab_size: int
    embed_dim: int
    table_init: Initializer = jax.nn.initializers.normal(1.0)
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the table."""
        shape = (self.vocab_size, self.embed_dim)
        self.table = matrix(self, "table", self.table_init, shape, ("vocab", "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ids `[B, L]` to vectors `[B, L, D]`."""
        # Whole rows on every device before the look-up: the partitioner has no efficient way to split a gather along
        # both the vocabulary and the row, and would replicate the result instead.
        if isinstance(self.table, Quantized):
            values = constrain(self.table.values, "vocab", "features")
            scale = constrain(self.table.scale, "vocab")
            rows = jnp.take(values, tokens, axis=0) * jnp.take(scale, tokens, axis=0)[..., None]
            rows = rows.astype(self.dtype)
        else:
            table = constrain(self.table.astype(self.dtype), "vocab", "features")
            if self.table.dtype == table.dtype == jnp.bfloat16:
                rows = jax.lax.platform_dependent(table, tokens, cpu=_rows_on_cpu, default=_rows)
            else:
                rows = _rows(table, tokens)
        return constrain(rows, "batch", "length", "features")


def _rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take(table, tokens, axis=0)


def _rows_on_cpu(table: jax.Array, tokens: jax.Array) -> jax.Array:
    # XLA's CPU compiler reads bfloat16 rows by way of float32, for which a loop gets a copy of the whole table. From a
    # branch nothing is moved ahead of the loop.
    def none(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.full((*tokens.shape, table.shape[1]), jnp.nan, table.dtype)

    return jax.lax.cond(jnp.any(tokens < table.shape[0]), _rows, none, table, tokens)


class SmallEmbedding(nn.Module):
    """A table of a few rows that no mesh splits: learned positions, token types.

    An index that the table does not have gives NaN, not somebody else's row.
    """

    rows: int
    embed_dim: int
    axis: str
    table_init: Initializer = jax.nn.initializers.normal(1.0)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, indices: jax.Array) -> jax.Array:
        """Maps indices `[1 or B, L]` to vectors `[1 or B, L, D]`."""
        table = parameter(self, "table", self.table_init, (self.rows, self.embed_dim), (self.axis, "embed"))
        table = constrain(table.astype(self.dtype), self.axis, "features")  # whole rows, as above
        indices = jnp.where(indices < 0, self.rows, indices)  # or they would count from the end
        return jnp.take(table, indices, axis=0, mode="fill", fill_value=jnp.nan)


class Head(nn.Module):
    """From hidden states to a logit for every token, with a kernel `[D, V]` of its own or with the embedding table.

    Attributes:
      vocab_size: V.
      tied: whether `table` is given in the call.
      use_bias: whether a bias `[V]` is added.
      kernel_init: of the kernel.
      dtype: of the factors; the logits are float32 all the same.
    """

    vocab_size: int
    tied: bool
    use_bias: bool = False
    kernel_init: Initializer = fan_in_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, table: Matrix | None) -> jax.Array:
        """Maps hidden states `[B, L, D]` to float32 logits `[B, L, V]`; `table` `[V, D]` is a tied embedding's."""
        shape = (x.shape[-1], self.vocab_size)
        own = None if self.tied else matrix(self, "kernel", self.kernel_init, shape, ("embed", "vocab"))
        kernel = cast(Matrix, table if own is None else own)
        logits = linear(x, kernel, self.dtype, jnp.float32, transposed=self.tied)
        if self.use_bias:
            logits = logits + parameter(self, "bias", nn.initializers.zeros, (self.vocab_size,), ("vocab",))
        return constrain(logits, "batch", "length", "vocab")
