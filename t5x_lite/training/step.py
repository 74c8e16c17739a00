"""The training step and the evaluation step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from t5x_lite import sharding
from t5x_lite.models.transformer import Batch, Transformer
from t5x_lite.training.losses import LossSums, cross_entropy
from t5x_lite.training.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def batch_loss(
    model: Transformer, params: Any, batch: Batch, *, z_loss: float = 0.0, dropout_key: jax.Array | None = None
) -> LossSums:
    """Returns the loss sums of a batch (see `LossSums`); dropout is on when there is a key."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    logits: Any = model.apply({"params": params}, batch, enable_dropout=dropout_key is not None, rngs=rngs)
    return cross_entropy(logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"], z_loss)


def loss_gradients(
    model: Transformer, params: Any, batch: Batch, *, microbatches: int, z_loss: float, key: jax.Array
) -> tuple[Any, LossSums]:
    """Returns the gradients of the loss per real target token, and the loss sums, of a global batch.

    Every microbatch's sums are divided by the token count of the *whole* batch, so that the result does not depend on
    how many there are or how unequal their targets are.

    Args:
      model: the model.
      params: its parameters.
      batch: the global batch; its rows must divide by `microbatches`.
      microbatches: how many parts are run one after the other, to save activation memory.
      z_loss: coefficient.
      key: for dropout.
    """
    total = jnp.maximum(jnp.sum(batch["decoder_loss_weights"]), 1.0)

    def loss(params: Any, part: Batch, index: jax.Array) -> tuple[jax.Array, LossSums]:
        dropout_key = jax.random.fold_in(key, index) if model.config.dropout_rate else None
        sums = batch_loss(model, params, part, z_loss=z_loss, dropout_key=dropout_key)
        return (sums.cross_entropy + sums.z_loss) / total, sums

    gradient = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        return gradient(params, batch, jnp.zeros((), jnp.int32))

    def split(x: jax.Array) -> jax.Array:
        # Every microbatch takes every n-th row: each device then finds its share of each part in its own rows.
        x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1)

    def accumulate(carry: tuple[Any, LossSums], part: tuple[Batch, jax.Array]) -> tuple[tuple[Any, LossSums], None]:
        return jax.tree.map(jnp.add, carry, gradient(params, *part)), None

    zeros = jax.tree.map(jnp.zeros_like, params), LossSums(*(jnp.zeros(()) for _ in LossSums._fields))
    parts = jax.tree.map(split, dict(batch)), jnp.arange(microbatches)
    return jax.lax.scan(accumulate, zeros, parts)[0]


def make_train_step(
    model: Transformer,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    state: TrainState,
    *,
    microbatches: int = 1,
    z_loss: float = 0.0,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the compiled, donating `(state, batch) -> (next state, metrics)`.

    Args:
      model: the model.
      tx: the optimizer.
      schedule: the learning rate, for the metrics.
      mesh: where state and batch lie.
      state: the state, or its `abstract_state`, for the layouts.
      microbatches: see `loss_gradients`.
      z_loss: coefficient.
      seed: of dropout, together with the step.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, sums = loss_gradients(model, state.params, batch, microbatches=microbatches, z_loss=z_loss, key=key)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        tokens = jnp.maximum(sums.weight, 1.0)
        metrics = {
            "loss": sums.cross_entropy / tokens,
            "z_loss": sums.z_loss / tokens,
            "accuracy": sums.correct / tokens,
            "target_tokens": sums.weight,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state.step),
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    layouts = state_shardings(state)
    return _on_mesh(
        mesh,
        jax.jit(
            train_step,
            in_shardings=(layouts, sharding.batch_sharding(mesh)),
            out_shardings=(layouts, sharding.replicated(mesh)),
            donate_argnums=0,
        ),
    )


def make_eval_step(model: Transformer, mesh: Mesh) -> Callable[[Any, Batch], LossSums]:
    """Returns the compiled `(params, batch) -> LossSums`, without dropout and z-loss."""
    return _on_mesh(
        mesh,
        jax.jit(lambda params, batch: batch_loss(model, params, batch), out_shardings=sharding.replicated(mesh)),
    )


def _on_mesh(mesh: Mesh, function: Any) -> Any:
    # The model's activation constraints name mesh axes; this is the mesh they mean.
    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args)

    return call
