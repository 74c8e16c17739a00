"""A running mean of the parameters, which often evaluates better than the last ones."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def ema_update(mean: Any, params: Any, decay: float, updates: jax.typing.ArrayLike) -> Any:
    """Returns the exponential moving average after one more update.

    The decay is `min(decay, (1 + updates) / (10 + updates))`, so that the first parameters, which are random, do not
    weigh on it for `1 / (1 - decay)` steps (TensorFlow's `ExponentialMovingAverage` with `num_updates`).

    Args:
      mean: tree of the mean so far; at first the initial parameters.
      params: tree of the parameters after the update.
      decay: share of the old mean that stays.
      updates: how many updates the mean already has in it.
    """
    done = jnp.asarray(updates, jnp.float32)
    kept = jnp.minimum(decay, (1.0 + done) / (10.0 + done))
    return optax.incremental_update(params, mean, 1.0 - kept)
