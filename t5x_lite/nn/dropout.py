"""Dropout with cheap masks."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dropout(nn.Module):
    """Drops with probability `rate`, one mask for all positions along `broadcast_axis`.

    Sharing the mask along the length is what T5 and T5X do; it also needs `length` times fewer random bits, and those
    cost a good part of a training step on a CPU. The key is the `dropout` stream of `apply(rngs=...)`.
    """

    rate: float
    broadcast_axis: int = -2

    @nn.compact
    def __call__(self, x: jax.Array, *, enabled: bool) -> jax.Array:
        """Maps any shape to itself; the identity unless `enabled`."""
        if not enabled or self.rate == 0.0:
            return x
        shape = list(x.shape)
        shape[self.broadcast_axis] = 1
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, tuple(shape))
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))
