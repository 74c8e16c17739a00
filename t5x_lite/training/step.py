"""The training step and the evaluation step."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from t5x_lite import sharding
from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.stack import check_remat
from t5x_lite.models.transformer import Batch, Transformer, encoder_segments
from t5x_lite.nn.attention import MASKED
from t5x_lite.training.averaging import ema_update
from t5x_lite.training.losses import (
    PLAIN,
    LossSettings,
    LossSums,
    chunked_cross_entropy,
    cross_entropy,
    number_of_chunks,
)
from t5x_lite.training.norms import norm_metrics
from t5x_lite.training.optimizers import hold
from t5x_lite.training.scalars import Scalars
from t5x_lite.training.state import TrainState, state_shardings

Metrics = Scalars

EVALUATION = LossSettings(chunk=None)


class Targets(NamedTuple):
    """What a batch asks the model to predict: int32 targets, float32 weights of the same shape."""

    targets: jax.Array
    weights: jax.Array


def batch_targets(config: TransformerConfig, batch: Batch) -> tuple[Targets, Targets | None]:
    """Returns the targets of a batch, and those of the second task of BERT's pre-training.

    With a decoder they are `decoder_target_tokens` and `decoder_loss_weights` `[B, T]`. For an encoder alone, by head:
    `masked_lm`, `pretraining` and `token_classification` `encoder_target_tokens` and `encoder_loss_weights` `[B, S]`;
    `sequence_classification` `labels` `[B]`; `span` `start_positions` and `end_positions` `[B]`; for the second task
    `next_sentence_labels` `[B]`. A row of padding alone does not count.

    Raises:
      InputError: an encoder without a head predicts nothing.
    """
    if config.num_decoder_layers:
        return Targets(batch["decoder_target_tokens"], batch["decoder_loss_weights"]), None
    if config.head is None:
        raise InputError("an encoder without model.head predicts nothing that it could learn")
    rows = jnp.max(encoder_segments(batch, config.pad_id), axis=1).clip(0, 1).astype(jnp.float32)
    if config.head == "sequence_classification":
        if config.num_labels == 1:
            raise InputError("model.num_labels=1 is a regression, for which there is no loss here; allowed: 2 or more")
        return Targets(batch["labels"], rows), None
    if config.head == "span":
        spans = jnp.stack([batch["start_positions"], batch["end_positions"]], axis=1)
        return Targets(spans, jnp.broadcast_to(rows[:, None], spans.shape)), None
    second = Targets(batch["next_sentence_labels"], rows) if config.head == "pretraining" else None
    return Targets(batch["encoder_target_tokens"], batch["encoder_loss_weights"]), second


def batch_loss(
    model: Transformer,
    params: Any,
    batch: Batch,
    settings: LossSettings = PLAIN,
    *,
    dropout_key: jax.Array | None = None,
    second_task: jax.Array | float | None = None,
) -> LossSums:
    """Returns the loss sums of a batch (see `LossSums`); dropout is on when there is a key.

    Args:
      model: the model.
      params: its parameters.
      batch: with the targets of `batch_targets`.
      settings: what the loss is made of. Labels other than tokens are neither smoothed in chunks nor many.
      dropout_key: for dropout.
      second_task: what an example of the second task weighs, see `LossSums.auxiliary`; by default this batch's share.
    """
    config = model.config
    first, second = batch_targets(config, batch)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    call = partial(model.apply, {"params": params}, batch, enable_dropout=dropout_key is not None, rngs=rngs)
    if not config.num_decoder_layers and config.head not in ("masked_lm", "pretraining"):
        logits: Any = call()
        if config.head == "span":  # the classes are positions, and padding is none of them
            real = encoder_segments(batch, config.pad_id) > 0
            logits = jnp.swapaxes(jnp.where(real[..., None], logits, MASKED), 1, 2)
        return cross_entropy(logits, *first, settings)

    def head(params: Any, hidden: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply({"params": params}, hidden, method="head_logits"))

    if second is None:
        hidden, auxiliary = cast(jax.Array, call(method="prediction_inputs")), None
    else:
        hidden, second_logits = cast(Any, call(method="pretraining_inputs"))
        share = _second_task_share(config, batch) if second_task is None else second_task
        auxiliary = cross_entropy(second_logits, *second).cross_entropy * share
    chunks = number_of_chunks(cast(Any, first.targets.shape), config.vocab_size, settings.chunk)
    if chunks == 1:
        sums = cross_entropy(head(params, hidden), *first, settings)
    else:
        sums = chunked_cross_entropy(head, model.head_params(params), hidden, *first, settings, chunks)
    return sums if auxiliary is None else sums._replace(auxiliary=auxiliary)


def _second_task_share(config: TransformerConfig, batch: Batch) -> jax.Array | float:
    first, second = batch_targets(config, batch)
    if second is None:
        return 0.0
    return jnp.sum(first.weights) / jnp.maximum(jnp.sum(second.weights), 1.0)


def loss_gradients(
    model: Transformer,
    params: Any,
    batch: Batch,
    *,
    settings: LossSettings = PLAIN,
    microbatches: int,
    key: jax.Array,
    scale: jax.Array | float = 1.0,
    trained: Any = None,
) -> tuple[Any, LossSums]:
    """Returns the gradients of the loss per real target token, and the loss sums, of a global batch.

    Every microbatch's sums are divided by the token count of the *whole* batch, so that the result does not depend on
    how many there are or how unequal their targets are.

    Args:
      model: the model.
      params: its parameters.
      batch: the global batch; its rows must divide by `microbatches`.
      settings: what the loss is made of.
      microbatches: how many parts are run one after the other, to save activation memory.
      key: for dropout.
      scale: what the loss is multiplied by before the backward pass, and the gradients divided by after it.
      trained: tree of bools, which parameters are trained; the gradients of the others are 0 and not computed.
    """
    config = model.config
    total = jnp.maximum(jnp.sum(batch_targets(config, batch)[0].weights), 1.0)
    share = _second_task_share(config, batch)
    has_dropout = any((config.dropout_rate, config.attention_dropout_rate, config.mlp_dropout_rate))

    def loss(params: Any, part: Batch, index: jax.Array) -> tuple[jax.Array, LossSums]:
        dropout_key = jax.random.fold_in(key, index) if has_dropout else None
        sums = batch_loss(model, hold(params, trained), part, settings, dropout_key=dropout_key, second_task=share)
        return (sums.trained + sums.auxiliary) / total * scale, sums

    def gradient(params: Any, part: Batch, index: jax.Array) -> tuple[Any, LossSums]:
        scaled, sums = jax.grad(loss, has_aux=True)(params, part, index)
        return jax.tree.map(lambda x: x / scale, scaled), sums

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


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A jitted function, called within the mesh that the model's activation constraints mean."""

    mesh: Mesh
    function: Any

    def __call__(self, *args: Any) -> Any:
        """Calls the function."""
        with jax.set_mesh(self.mesh):
            return self.function(*args)

    def lower(self, *args: Any) -> Any:
        """Returns the function lowered for arguments of these shapes and layouts, to be compiled and looked at."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(*args)


def make_train_step(
    model: Transformer,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    state: TrainState,
    *,
    loss: LossSettings = PLAIN,
    microbatches: int = 1,
    seed: int = 0,
    ema_decay: float = 0.0,
    trained: Any = None,
    halt_above: int | None = None,
) -> OnMesh:
    """Returns the compiled, donating `(state, batch) -> (next state, metrics)`.

    A step whose loss or gradient is not finite changes nothing but the counts, and its metric `finite` is 0. So is that
    of a step whose update alone is not finite; it leaves the parameters and their mean as they are, but the optimizer's
    state has moved.

    Args:
      model: the model.
      tx: the optimizer.
      schedule: the learning rate, for the metrics.
      mesh: where state and batch lie.
      state: the state, or its `abstract_state`, for the layouts.
      loss: what it is made of.
      microbatches: see `loss_gradients`.
      seed: of dropout, together with the step.
      ema_decay: of the running mean of the parameters, if the state has one.
      trained: tree of bools, which parameters are trained, from `trained_parameters`; by default all.
      halt_above: once more steps than this have been skipped, nothing changes any more: the state stays the one that
        went wrong, although another step is under way by the time somebody looks.

    Raises:
      InputError: the devices cannot offload what `model.remat` asks them to.
    """
    check_remat(model.remat, mesh.devices.flat[0])

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = dropout_key(seed, state.step)
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
        gradients, sums = loss_gradients(
            model,
            state.params,
            batch,
            settings=loss,
            microbatches=microbatches,
            key=key,
            scale=scale,
            trained=trained,
        )
        norms = {**norm_metrics("gradient_norm", gradients), **norm_metrics("parameter_norm", state.params)}
        finite = jnp.isfinite(sums.cross_entropy)
        finite &= jnp.isfinite(norms["gradient_norm"]) & jnp.isfinite(norms["parameter_norm"])
        moves = finite if halt_above is None else finite & (state.skipped <= halt_above)
        opt_state, updates = _updated(tx, moves, gradients, state)
        update_norms = norm_metrics("update_norm", updates)
        norms |= {name: jnp.where(moves, norm, jnp.nan) for name, norm in update_norms.items()}
        finite &= ~moves | jnp.isfinite(norms["update_norm"])
        moves &= finite
        params = _if(moves, optax.apply_updates(state.params, updates), state.params)
        done, ema = state.step - state.skipped, state.ema
        if ema is not None:
            ema = _if(moves, ema_update(ema, params, ema_decay, done), ema)
        metrics = {
            **_loss_metrics(model.config, sums),
            "tokens": _real_tokens(batch),
            "learning_rate": schedule(done),
            "finite": finite.astype(jnp.float32),
            **norms,
        }
        loss_scale = None
        if state.loss_scale is not None:
            metrics["loss_scale"], loss_scale = state.loss_scale.scale, state.loss_scale.next(finite)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        metrics["skipped"] = skipped.astype(jnp.float32)
        return TrainState(state.step + 1, params, opt_state, skipped, loss_scale, ema), Scalars.of(metrics)

    layouts = state_shardings(state)
    return OnMesh(
        mesh,
        jax.jit(
            train_step,
            in_shardings=(layouts, None),
            out_shardings=(layouts, sharding.replicated(mesh)),
            donate_argnums=0,
        ),
    )


def _loss_metrics(config: TransformerConfig, sums: LossSums) -> dict[str, jax.Array]:
    tokens = jnp.maximum(sums.weight, 1.0)
    metrics = {
        "loss": sums.cross_entropy / tokens,
        "z_loss": sums.z_loss / tokens,
        "accuracy": sums.correct / tokens,
        "target_tokens": sums.weight,
    }
    if config.head == "pretraining":
        metrics["next_sentence_loss"] = sums.auxiliary / tokens
    return metrics


def _updated(
    tx: optax.GradientTransformation, moves: jax.Array, gradients: Any, state: TrainState
) -> tuple[optax.OptState, Any]:
    """Returns the optimizer's next state and its updates; without moving, its state as it was and the gradients."""

    def once(_: jax.Array, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        params, opt_state, gradients = carry
        updates, opt_state = tx.update(gradients, opt_state, params)
        # Behind the barrier the parameters do not seem to stay the same, and nothing is computed from them ahead of
        # the loop, to be kept.
        return jax.lax.optimization_barrier((params, opt_state, updates))

    # A loop of one round or none, in which XLA updates moments and gradients in place. A choice between the old and the
    # new ones, as of the parameters, would hold both, and more: with AdamW on a CPU four times the parameters' memory.
    carry = state.params, state.opt_state, gradients
    _, opt_state, updates = jax.lax.fori_loop(0, moves.astype(jnp.int32), once, carry)
    return opt_state, updates


def _if(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _real_tokens(batch: Batch) -> jax.Array:
    """Returns how many tokens of encoder and decoder are not padding; 0 of a batch without segment ids."""
    counts = (jnp.sum(x > 0, dtype=jnp.float32) for name, x in batch.items() if name.endswith("_segment_ids"))
    return sum(counts, jnp.zeros(()))


def dropout_key(seed: int, step: jax.typing.ArrayLike) -> jax.Array:
    """Returns the random key of a training step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_eval_step(model: Transformer, mesh: Mesh, loss: LossSettings = EVALUATION) -> OnMesh:
    """Returns the compiled `(params, batch) -> LossSums`, without dropout."""
    return OnMesh(
        mesh,
        jax.jit(lambda params, batch: batch_loss(model, params, batch, loss), out_shardings=sharding.replicated(mesh)),
    )
