"""Normalisation layers; statistics are always float32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.nn.parameters import parameter


class RMSNorm(nn.Module):
    """Root-mean-square norm: no mean, no bias (Zhang and Sennrich 2019; T5's layer norm).

    Attributes:
      epsilon: added to the mean square.
      dtype: of the output.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., D]` to `[..., D]`."""
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), ("embed",))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)
