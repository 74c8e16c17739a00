"""The feed-forward block, plain or gated."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.nn.dense import Dense
from t5x_lite.nn.dropout import Dropout
from t5x_lite.sharding import constrain

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class FeedForward(nn.Module):
    """`down(activation(up(x)))`, or gated `down(activation(gate(x)) * up(x))` (Shazeer 2020).

    T5X calls the gated three `wi_0` (here `gate`), `wi_1` (`up`) and `wo` (`down`).
    """

    mlp_dim: int
    activation: str
    gated: bool
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, enable_dropout: bool = False) -> jax.Array:
        """Maps `[B, L, D]` to `[B, L, D]`."""
        activation = ACTIVATIONS[self.activation]
        up = Dense(self.mlp_dim, ("embed", "mlp"), dtype=self.dtype, name="up")(x)
        if self.gated:
            hidden = activation(Dense(self.mlp_dim, ("embed", "mlp"), dtype=self.dtype, name="gate")(x)) * up
        else:
            hidden = activation(up)
        hidden = constrain(hidden, "batch", "length", "mlp")
        hidden = Dropout(self.dropout_rate)(hidden, enabled=enable_dropout)
        return Dense(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="down")(hidden)
