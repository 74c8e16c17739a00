"""Dropout, with cheap masks where the family allows them."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dropout(nn.Module):
    """Drops with probability `rate`; the key is the `dropout` stream of `apply(rngs=...)`.

    Attributes:
      rate: share of the numbers that become 0; the others grow by 1 / (1 - rate).
      shared: whether one mask serves all positions along the last axis but one, which is the length. T5 and T5X do
        so; it also needs `length` times fewer random bits, and those cost a good part of a training step on a CPU.
    """

    rate: float
    shared: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, enabled: bool) -> jax.Array:
        """Maps any shape to itself; the identity unless `enabled`."""
        if not enabled or self.rate == 0.0:
            return x
        shape = list(x.shape)
        if self.shared:
            shape[-2] = 1
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, tuple(shape))
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))
