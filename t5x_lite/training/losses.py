"""Losses, in nats; sums over tokens, so that whoever normalises does it once over the whole global batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Float32 scalars, each a sum over the real target tokens of a batch.

    Attributes:
      cross_entropy: nats.
      z_loss: the penalty, already multiplied by its coefficient.
      correct: tokens whose most likely prediction is the target.
      weight: sum of the loss weights, which is the number of real target tokens.
      auxiliary: nats of a second task (BERT's next sentence), times real target tokens per example of that task, so
        that divided by `weight` they are its mean.
    """

    cross_entropy: jax.Array
    z_loss: jax.Array
    correct: jax.Array
    weight: jax.Array
    auxiliary: jax.Array | float = 0.0


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float = 0.0) -> LossSums:
    """Returns the summed cross-entropy and z-loss of a batch.

    The z-loss is `z_loss * log(Z) ** 2` with Z the softmax normaliser (Mesh TensorFlow; T5X's
    `cross_entropy_with_logits`). It keeps logits from drifting, belongs to the gradient, and is reported apart because
    it is not part of the log-likelihood.

    Args:
      logits: float32 `[..., V]`.
      targets: int32 `[...]`.
      weights: float32 `[...]`, 0 on padding.
      z_loss: coefficient; T5 uses 1e-4.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: it stays local where the vocabulary is split over devices, and its gradient
    # is a mask, not a scatter.
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    correct = target_logit >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    return LossSums(
        cross_entropy=jnp.sum((log_z - target_logit) * weights),
        z_loss=jnp.sum(z_loss * jnp.square(log_z) * weights),
        correct=jnp.sum(correct * weights),
        weight=jnp.sum(weights),
    )
