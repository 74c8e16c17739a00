"""Token embeddings, and the output head that may share them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.nn.parameters import Initializer, parameter
from t5x_lite.sharding import constrain


class TokenEmbedding(nn.Module):
    """A table `[vocab_size, embed_dim]`, read by token id, and by hidden state when it is the tied head too."""

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

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps hidden states `[B, L, D]` to float32 logits `[B, L, V]`."""
        return jnp.einsum(
            "BLD,VD->BLV", x.astype(self.dtype), self.table.astype(self.dtype), preferred_element_type=jnp.float32
        )
