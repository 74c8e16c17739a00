"""How a model knows where a token stands: T5's relative bias, sinusoids, rotations; learned tables are embeddings."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.nn.parameters import Initializer, parameter


def positions_in_segments(segments: jax.Array) -> jax.Array:
    """Returns each token's place in its own segment, int32 `[B, L]`: 0, 1, ... from where the segment begins.

    So padding on the left, packed examples and padding on the right all need no word of their own. Padding within a
    segment counts, as a token that nobody looks at.

    Args:
      segments: int32 `[B, L]`, see `attention.Mask`.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :]
    # Every place belongs to the last segment that was there before it.
    owner = jax.lax.associative_scan(lambda before, here: jnp.where(here > 0, here, before), segments, axis=1)
    begins = jnp.concatenate([jnp.zeros_like(owner[:, :1], bool), owner[:, 1:] != owner[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def sinusoids(positions: jax.Array, embed_dim: int) -> jax.Array:
    """Returns fixed position vectors, float32 `[..., embed_dim]` (Vaswani et al. 2017, section 3.5).

    Number 2i is sin(position / 10000^(2i / embed_dim)), number 2i + 1 the cosine of the same.
    """
    frequencies = 10000.0 ** (-jnp.arange(0, embed_dim, 2, dtype=jnp.float32) / embed_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, embed_dim)


@struct.dataclass
class Rotation:
    """By how much queries and keys turn at their positions, float32 `[1 or B, L, K / 2]` each."""

    cos: jax.Array
    sin: jax.Array

    def turn(self, x: jax.Array) -> jax.Array:
        """Rotates `[B, L, H, K]` in the planes (i, i + K/2), as Hugging Face lays Llama's heads out.

        Meta's own files have the planes (2i, 2i + 1); the two differ by a permutation of the kernels' columns.
        """
        cos, sin = self.cos[:, :, None, :], self.sin[:, :, None, :]
        left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def rotation(
    positions: jax.Array, head_dim: int, base: float, scaling: tuple[float, float, float, int] | None = None
) -> Rotation:
    """Returns the rotation at `positions` `[1 or B, L]` (Su et al. 2021).

    Args:
      positions: of the tokens.
      head_dim: K; plane i turns by position * base^(-2i / K).
      base: theta.
      scaling: (factor, low, high, length) as Llama 3.1 stretches its context: planes with a wave longer than
        length / low turn `factor` times slower, those with one shorter than length / high as before, and between the
        two it goes over smoothly.
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        factor, low, high, length = scaling
        turns = length * frequencies / (2 * math.pi)  # of each plane, in the original context
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / factor)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(cos=jnp.cos(angles), sin=jnp.sin(angles))


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

    def __call__(
        self,
        query_length: int,
        key_length: int,
        query_positions: jax.Array | None = None,
        key_positions: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the bias, float32 `[1 or B, H, T, S]`.

        Args:
          query_length: T.
          key_length: S.
          query_positions: int32 `[1 or B, T]`, where each query stands, for decoding with a cache; by default query t
            stands at position t in every row.
          key_positions: int32 `[1 or B, S]`, likewise of the keys; read if there are `query_positions`.
        """
        if query_positions is None:
            return self._toeplitz(query_length, key_length)
        keys = jnp.arange(key_length)[None, :] if key_positions is None else key_positions
        bias = self._values(keys[:, None, :] - query_positions[:, :, None])
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
