"""The feed-forward block, plain or gated."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.nn.dense import Dense, stream_dtype
from t5x_lite.nn.dropout import Dropout
from t5x_lite.nn.parameters import Initializer, fan_in_normal
from t5x_lite.sharding import constrain


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """Returns `max(x, 0)`; its backward pass asks the result for the sign, so that the input need not be kept."""
    return jnp.maximum(x, 0)


def _relu_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = relu(x)
    return y, y


def _relu_bwd(y: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(y > 0, dy, 0),)


relu.defvjp(_relu_fwd, _relu_bwd)

# Two gelus: they differ by up to 5e-4, which is enough to make every logit wrong in the third digit.
ACTIVATIONS = {
    "relu": relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


class FeedForward(nn.Module):
    """`down(activation(up(x)))`, or gated `down(activation(gate(x)) * up(x))` (Shazeer 2020).

    T5X calls the gated three `wi_0` (here `gate`), `wi_1` (`up`) and `wo` (`down`).

    Attributes:
      mlp_dim: width F of the hidden layer.
      activation: a key of `ACTIVATIONS`.
      gated: whether there is a gate.
      use_bias: whether the projections have biases.
      kernel_init: of the projections into the hidden layer.
      residual_init: of the one out of it.
      dropout_rate: of the hidden layer.
      dropout_shared: see `Dropout`.
      dtype: of the computation.
    """

    mlp_dim: int
    activation: str
    gated: bool
    use_bias: bool = False
    kernel_init: Initializer = fan_in_normal()
    residual_init: Initializer = fan_in_normal()
    dropout_rate: float = 0.0
    dropout_shared: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, enable_dropout: bool = False) -> jax.Array:
        """Maps `[B, L, D]` to `[B, L, D]`."""

        def project(name: str) -> jax.Array:
            return Dense(self.mlp_dim, ("embed", "mlp"), self.kernel_init, self.use_bias, self.dtype, name=name)(x)

        def drop(hidden: jax.Array) -> jax.Array:
            hidden = constrain(hidden, "batch", "length", "mlp")
            return cast(Any, Dropout(self.dropout_rate, self.dropout_shared))(hidden, enabled=enable_dropout)

        activation = ACTIVATIONS[self.activation]
        if self.activation != "relu":
            # Computed again in the backward pass: that takes less time than storing all it is made of.
            activation = jax.checkpoint(activation, prevent_cse=False)
        if self.gated:
            hidden = drop(activation(project("gate")) * project("up"))
        elif self.activation == "relu":
            # The other way round it would be the same numbers, but one array more to keep for the backward pass.
            hidden = activation(drop(project("up")))
        else:
            hidden = drop(activation(project("up")))
        down = (self.residual_init, self.use_bias, self.dtype, stream_dtype(self.dtype))
        return Dense(x.shape[-1], ("mlp", "embed"), *down, name="down")(hidden)
