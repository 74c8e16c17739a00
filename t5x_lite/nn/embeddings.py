"""Tables of vectors, and the output head that may share the one of tokens."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
        self.table = parameter(self, "table", self.table_init, shape, ("vocab", "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ids `[B, L]` to vectors `[B, L, D]`."""
        # Whole rows on every device before the look-up: the partitioner has no efficient way to split a gather along
        # both the vocabulary and the row, and would replicate the result instead.
        table = constrain(self.table.astype(self.dtype), "vocab", "features")
        return constrain(jnp.take(table, tokens, axis=0), "batch", "length", "features")


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
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Maps hidden states `[B, L, D]` to float32 logits `[B, L, V]`; `table` `[V, D]` is the embedding's."""
        if self.tied:
            kernel, product = table, "BLD,VD->BLV"
        else:
            shape = (x.shape[-1], self.vocab_size)
            kernel, product = parameter(self, "kernel", self.kernel_init, shape, ("embed", "vocab")), "BLD,DV->BLV"
        factors = x.astype(self.dtype), kernel.astype(self.dtype)
        logits = jnp.einsum(product, *factors, preferred_element_type=jnp.float32)
        if self.use_bias:
            logits = logits + parameter(self, "bias", nn.initializers.zeros, (self.vocab_size,), ("vocab",))
        return constrain(logits, "batch", "length", "vocab")
