"""Normalisation layers; statistics are always float32."""

from functools import partial
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

        # As in `LayerNorm` the backward pass computes this again, from the input alone.
        @partial(jax.checkpoint, prevent_cse=False)
        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
            return (x * scale).astype(self.dtype)

        return norm(x, scale)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016): mean and variance over the features.

    Attributes:
      epsilon: added to the variance. There is no usual one: BERT has 1e-12, BART and GPT-2 1e-5.
      use_bias: whether a bias is added (PaLM has none).
      dtype: of the output.
    """

    epsilon: float
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., D]` to `[..., D]`."""
        shape = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones, shape, ("embed",))
        bias = parameter(self, "bias", nn.initializers.zeros, shape, ("embed",)) if self.use_bias else 0.0

        @partial(jax.checkpoint, prevent_cse=False)
        def norm(x: jax.Array, scale: jax.Array, bias: jax.Array | float) -> jax.Array:
            x = x.astype(jnp.float32)
            # The variance from the centred values: E[x^2] - E[x]^2 cancels where the mean is large.
            x = x - jnp.mean(x, axis=-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon) * scale
            return (x + bias).astype(self.dtype)

        return norm(x, scale, bias)
