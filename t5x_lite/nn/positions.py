"""How a model knows where a token stands. So far: T5's relative position bias."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.nn.parameters import Initializer, parameter


def relative_position_bucket(
    distance: jax.Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> jax.Array:
    """Sorts distances (key position - query position) into buckets: exact when near, logarithmic when far.

    Half of the buckets hold the distances 0, 1, 2, ..., the other half grow logarithmically up to `max_distance`, and
    all that lies further shares the last one. `bidirectional` spends half of the buckets on keys that come after the
    query; otherwise those all count as distance 0. (T5 paper, section 2.1; the formula of Mesh TensorFlow's
    `_relative_position_bucket`.)

    Returns:
      int32 of the shape of `distance`, in [0, num_buckets).
    """
    bucket = jnp.zeros_like(distance, dtype=jnp.int32)
    back = -distance
    if bidirectional:
        num_buckets //= 2
        bucket += (back < 0).astype(jnp.int32) * num_buckets
        back = jnp.abs(back)
    else:
        back = jnp.maximum(back, 0)
    num_exact = num_buckets // 2
    far = num_exact + (
        # The epsilon only keeps log(0) out of the branch that `where` discards.
        jnp.log(back.astype(jnp.float32) / num_exact + jnp.finfo(jnp.float32).eps)
        / math.log(max_distance / num_exact)
        * (num_buckets - num_exact)
    ).astype(jnp.int32)
    return bucket + jnp.where(back < num_exact, back, jnp.minimum(far, num_buckets - 1))


class RelativeBias(nn.Module):
    """A learned number per head and distance bucket, added to the attention logits."""

    num_heads: int
    bidirectional: bool
    num_buckets: int = 32
    max_distance: int = 128
    table_init: Initializer = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")

    def setup(self) -> None:
        """Creates the table `[buckets, heads]`."""
        shape = (self.num_buckets, self.num_heads)
        self.table = parameter(self, "table", self.table_init, shape, ("buckets", "heads"))

    def __call__(self, query_length: int, key_length: int, query_positions: jax.Array | None = None) -> jax.Array:
        """Returns the bias, float32 `[1 or B, H, T, S]`.

        Args:
          query_length: T.
          key_length: S; key s stands at position s.
          query_positions: int32 `[B, T]`, where each query stands, for decoding with a cache; by default query t
            stands at position t in every row.
        """
        if query_positions is None:
            return self._toeplitz(query_length, key_length)
        keys = jnp.arange(key_length)[None, None, :]
        bias = self._values(keys - query_positions[:, :, None])
        return jnp.transpose(bias, (0, 3, 1, 2))

    def _values(self, distance: jax.Array) -> jax.Array:
        bucket = relative_position_bucket(
            distance,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return jnp.take(self.table, bucket, axis=0)

    def _toeplitz(self, query_length: int, key_length: int) -> jax.Array:
        # The bias depends on s - t alone: look up the T + S - 1 distances there are, then lay them out as the
        # diagonals of [T, S] by a reshape to rows one element longer. No gather over T x S, and no scatter of that
        # size in the backward pass.
        t, s = query_length, key_length
        diagonals = self._values(jnp.arange(-(t - 1), s)).T  # [H, T + S - 1]
        rows = jnp.broadcast_to(jnp.pad(diagonals, ((0, 0), (0, 1)))[:, None, :], (self.num_heads, t, t + s))
        skewed = rows.reshape(self.num_heads, t * (t + s))[:, : t * (t + s - 1)].reshape(self.num_heads, t, t + s - 1)
        return skewed[None, :, :, t - 1 :]
