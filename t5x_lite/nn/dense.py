"""The linear map under every other layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.nn.parameters import Initializer, fan_in_normal, parameter


class Dense(nn.Module):
    """`x @ kernel`, over the last axis, plus a bias if asked for.

    Attributes:
      features: size of the output.
      axes: logical names of the kernel's two axes. Kernels are always 2-D: attention joins heads and head size into
        one axis, so that Adafactor factors the second moment (it looks at axes of 128 and more).
      kernel_init: initializer; sees the 2-D shape.
      use_bias: whether there is a bias `[features]`, which starts at 0.
      dtype: of the factors and the sum; parameters are stored in float32.
    """

    features: int
    axes: tuple[str, str]
    kernel_init: Initializer = fan_in_normal()
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., in]` to `[..., features]`."""
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
        x = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=self.dtype)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:])
            x = x + bias.astype(self.dtype)
        return x
