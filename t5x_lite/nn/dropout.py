"""Dropout, with cheap masks where the family allows them, and cheap random bits where it does not."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp


def kept(seeds: jax.Array, shape: Sequence[int], axis: int, rate: float) -> jax.Array:
    """Returns bool of that shape: which numbers stay, by a hash of where they stand along `axis`.

    A number's fate depends on its seeds and its place alone, so that no division of an array over devices or over time
    changes it, and the backward pass computes it again instead of keeping it. JAX's own generator (threefry) takes
    several times as many operations, which is a good part of a training step on a CPU. It draws the seeds.

    The hash is two rounds of multiplying and shifting, with the constants of the `lowbias32` of Chris Wellons's
    hash-prospector, over a Weyl sequence; the second seed enters between the rounds, so that lines whose first seeds
    are near each other do not repeat each other.

    Args:
      seeds: uint32 `[..., 2]`, two for each line along `axis`; without their last axis they broadcast to `shape`.
      shape: of the result.
      axis: along which numbers share their seeds.
      rate: share of the numbers that do not stay, in steps of 2**-32.
    """
    place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = place * jnp.uint32(0x9E3779B9) + seeds[..., 0]
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ seeds[..., 1] ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    x ^= x >> 15
    return x >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x: jax.Array, seeds: jax.Array, rate: float) -> jax.Array:
    keep = kept(seeds[..., None, :], x.shape, x.ndim - 1, rate)
    return jnp.where(keep, x.astype(jnp.float32) * (1.0 / (1.0 - rate)), 0.0).astype(x.dtype)


def _drop_fwd(x: jax.Array, seeds: jax.Array, rate: float) -> tuple[jax.Array, jax.Array]:
    return _drop(x, seeds, rate), seeds


def _drop_bwd(rate: float, seeds: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
    return _drop(dy, seeds, rate), None


_drop.defvjp(_drop_fwd, _drop_bwd)


class Dropout(nn.Module):
    """Drops with probability `rate`; the key is the `dropout` stream of `apply(rngs=...)`.

    Attributes:
      rate: share of the numbers that become 0; the others grow by 1 / (1 - rate).
      shared: whether one mask serves all positions along the last axis but one, which is the length. T5 and T5X do
        so; it needs `length` times fewer random bits.
    """

    rate: float
    shared: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, enabled: bool) -> jax.Array:
        """Maps any shape to itself; the identity unless `enabled`."""
        if not enabled or self.rate == 0.0:
            return x
        key = self.make_rng("dropout")
        if not self.shared:
            return _drop(x, jax.random.bits(key, (*x.shape[:-1], 2), jnp.uint32), self.rate)
        keep = jax.random.bernoulli(key, 1.0 - self.rate, (*x.shape[:-2], 1, x.shape[-1]))
        # In float32: bfloat16's 1 / 0.9 would be 0.2 % too small, and the mean with it.
        return (x.astype(jnp.float32) * jnp.where(keep, 1.0 / (1.0 - self.rate), 0.0)).astype(x.dtype)
