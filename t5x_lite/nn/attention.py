"""Multi-head attention, its mask, and its key-value cache."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.nn.dense import Dense
from t5x_lite.nn.dropout import Dropout
from t5x_lite.nn.parameters import Initializer, fan_in_normal
from t5x_lite.sharding import constrain

# Finite, as in T5X: a row in which everything is masked then attends evenly instead of turning into NaN.
MASKED = -1e10


@struct.dataclass
class Mask:
    """Who may look at whom, as a description: `[B, T, S]` booleans only come into being inside attention.

    Attributes:
      query_segments: int32 `[B, T]`, 0 is padding, 1.. are packed examples; equal segments see each other.
      key_segments: int32 `[B, S]`.
      query_positions: int32 `[B, T]` or `[1, T]`, index of each query among the keys; None: not causal. A causal
        query sees the keys up to its own index.
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_positions: jax.Array | None = None

    def allowed(self) -> jax.Array:
        """Returns bool `[B, 1, T, S]`: True where the query may see the key."""
        allowed = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        allowed &= (self.key_segments > 0)[:, None, :]
        if self.query_positions is not None:
            keys = jnp.arange(self.key_segments.shape[1])
            allowed &= keys[None, None, :] <= self.query_positions[:, :, None]
        return allowed[:, None, :, :]


@struct.dataclass
class KeysValues:
    """Projected keys and values, `[B, S, H, K]` each (with a leading `layers` axis in a cache)."""

    key: jax.Array
    value: jax.Array

    def write(self, new: "KeysValues", position: jax.Array) -> "KeysValues":
        """Returns self with `new` (`[B, T, H, K]`) written to the slots `position[b], position[b] + 1, ...`."""

        def put(old: jax.Array, update: jax.Array) -> jax.Array:
            return jax.vmap(lambda o, u, p: jax.lax.dynamic_update_slice_in_dim(o, u.astype(o.dtype), p, axis=0))(
                old, update, position
            )

        return KeysValues(key=put(self.key, new.key), value=put(self.value, new.value))


def dot_product_attention(
    query: jax.Array, keys_values: KeysValues, mask: Mask, bias: jax.Array | None, dropout: Any = None
) -> jax.Array:
    """Returns softmax(query . key + bias) . value, logits and softmax in float32.

    There is no 1/sqrt(head_dim) here: T5 folds it into the query's initialisation, and a family that wants it scales
    its query.

    Args:
      query: `[B, T, H, K]`.
      keys_values: `[B, S, H, K]` each.
      mask: who may look at whom.
      bias: float32 `[1 or B, H, T, S]`, added to the logits.
      dropout: a function of the weights `[B, H, T, S]`.

    Returns:
      `[B, T, H, K]` in the dtype of the query.
    """
    logits = jnp.einsum("BTHK,BSHK->BHTS", query, keys_values.key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(jnp.where(mask.allowed(), logits, MASKED), axis=-1).astype(query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum("BHTS,BSHK->BTHK", weights, keys_values.value)


class Attention(nn.Module):
    """Multi-head attention with 2-D kernels `(embed, joined heads)`.

    Call `project` on the source of keys and values, then the module on the queries; whoever decodes keeps the
    projections in between.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    query_init: Initializer = fan_in_normal()
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the four projections."""
        joined = self.num_heads * self.head_dim
        axes = ("embed", "heads")
        self.query = Dense(joined, axes, self.query_init, dtype=self.dtype)
        self.key = Dense(joined, axes, dtype=self.dtype)
        self.value = Dense(joined, axes, dtype=self.dtype)
        self.out = Dense(self.embed_dim, ("heads", "embed"), dtype=self.dtype)
        self.dropout = Dropout(self.dropout_rate)

    def _split(self, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:2], self.num_heads, self.head_dim)
        return constrain(x, "batch", "length", "heads", "head_dim")

    def project(self, source: jax.Array) -> KeysValues:
        """Maps `[B, S, D]` to keys and values."""
        return KeysValues(key=self._split(self.key(source)), value=self._split(self.value(source)))

    def __call__(
        self,
        x: jax.Array,
        keys_values: KeysValues,
        mask: Mask,
        bias: jax.Array | None = None,
        *,
        enable_dropout: bool = False,
    ) -> jax.Array:
        """Maps queries `[B, T, D]` to `[B, T, D]`."""
        attended = dot_product_attention(
            self._split(self.query(x)),
            keys_values,
            mask,
            bias,
            dropout=lambda weights: self.dropout(weights, enabled=enable_dropout),
        )
        return self.out(attended.reshape(*x.shape[:2], self.num_heads * self.head_dim))
