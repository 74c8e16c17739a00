"""Losses, in nats; sums over tokens, so that whoever normalises does it once over the whole global batch."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from t5x_lite.errors import InputError
from t5x_lite.sharding import ACTIVATIONS, axis_size

Smoothing = Literal["t5", "hf"]

# Logits that a device holds at a time unless a chunk is asked for: 128 MiB of float32, and as much again of gradients.
_LOGITS = 2**25


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What the loss is made of.

    Attributes:
      z_loss: coefficient, see `cross_entropy`; T5 uses 1e-4.
      label_smoothing: share of the target's probability that goes to other tokens.
      label_smoothing_style: `t5` gives each of the V - 1 other tokens an equal share of it and subtracts the entropy
        of such a target, so that a perfect prediction costs 0 (T5X, `compute_weighted_cross_entropy`); `hf` gives each
        of the V tokens one, and subtracts nothing (transformers' `LabelSmoother`, Szegedy et al. 2016).
      chunk: tokens of each row whose logits exist at a time; 0: all; None: all, where a device can hold them well.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    label_smoothing_style: Smoothing = "t5"
    chunk: int | None = 0

    def __post_init__(self) -> None:
        """Raises InputError for what is no share of a probability, no style or no number of tokens."""
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(f"train.label_smoothing must be in [0, 1), not {self.label_smoothing}")
        if self.label_smoothing_style not in get_args(Smoothing):
            raise InputError(
                f"train.label_smoothing_style '{self.label_smoothing_style}' is unknown, allowed:"
                f" {', '.join(get_args(Smoothing))}"
            )
        if self.chunk is not None and self.chunk < 0:
            raise InputError(f"train.loss_chunk must be at least 0, or null, not {self.chunk}")


class LossSums(NamedTuple):
    """Float32 scalars, each a sum over the real target tokens of a batch.

    Attributes:
      cross_entropy: nats, of the targets as they are, whatever is smoothed.
      z_loss: the penalty, already multiplied by its coefficient.
      correct: tokens whose most likely prediction is the target.
      weight: sum of the loss weights, which is the number of real target tokens.
      trained: nats that the gradient is taken of, all but the `auxiliary` ones: the cross-entropy of the targets as
        they are smoothed, and the penalty. Where logits come in chunks nothing else has a gradient.
      auxiliary: nats of a second task (BERT's next sentence), times real target tokens per example of that task, so
        that divided by `weight` they are its mean.
    """

    cross_entropy: jax.Array
    z_loss: jax.Array
    correct: jax.Array
    weight: jax.Array
    trained: jax.Array
    auxiliary: jax.Array | float = 0.0


PLAIN = LossSettings()


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, settings: LossSettings = PLAIN
) -> LossSums:
    """Returns the loss sums of a batch.

    The z-loss is `z_loss * log(Z) ** 2` with Z the softmax normaliser (Mesh TensorFlow; T5X's
    `cross_entropy_with_logits`). It keeps logits from drifting, belongs to the gradient, and is reported apart because
    it is not part of the log-likelihood.

    Args:
      logits: float32 `[..., V]`.
      targets: int32 `[...]`.
      weights: float32 `[...]`, 0 on padding.
      settings: z-loss and smoothing.
    """
    log_z, target_logit = _log_z_and_target(logits, targets)
    correct = target_logit >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    nats = log_z - target_logit
    z_loss = settings.z_loss * jnp.square(log_z)
    smoothed = nats if not settings.label_smoothing else _smoothed(logits, log_z, target_logit, settings)
    return LossSums(
        cross_entropy=jnp.sum(nats * weights),
        z_loss=jnp.sum(z_loss * weights),
        correct=jnp.sum(correct * weights),
        weight=jnp.sum(weights),
        trained=jnp.sum((smoothed + z_loss) * weights),
    )


@jax.custom_vjp
def _log_z_and_target(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the logarithm of the softmax's normaliser, and the target's logit."""
    # A comparison instead of a gather: it stays local where the vocabulary is split over devices, and its gradient
    # is a mask, not a scatter.
    target_logit = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1), target_logit


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]


def _log_z_and_target_fwd(logits: jax.Array, targets: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
    log_z, target_logit = _log_z_and_target(logits, targets)
    return (log_z, target_logit), (logits, targets, log_z)


def _log_z_and_target_bwd(kept: Any, d: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    # In one go over the logits. JAX would keep their exponentials, and add up two arrays as large.
    logits, targets, log_z = kept
    d_log_z, d_target = (x[..., None] for x in d)
    softmax = jnp.exp(logits - log_z[..., None])
    return softmax * d_log_z + jnp.where(_is_target(logits, targets), d_target, 0.0), None


_log_z_and_target.defvjp(_log_z_and_target_fwd, _log_z_and_target_bwd)


def _smoothed(logits: jax.Array, log_z: jax.Array, target_logit: jax.Array, settings: LossSettings) -> jax.Array:
    share, vocab = settings.label_smoothing, logits.shape[-1]
    if settings.label_smoothing_style == "hf":
        other, entropy = share / vocab, 0.0
    else:
        other = share / (vocab - 1)
        entropy = -((1 - share) * math.log(1 - share) + share * math.log(other))
    # What the target has more than another token, and what all have.
    more = 1.0 - share if settings.label_smoothing_style == "hf" else 1.0 - share - other
    return log_z - more * target_logit - other * jnp.sum(logits, axis=-1) - entropy


# --- chunks ---------------------------------------------------------------------------------------------------------


def number_of_chunks(shape: tuple[int, int], vocab_size: int, chunk: int | None) -> int:
    """Returns into how many chunks the length is divided, 1 for not at all.

    Args:
      shape: `(B, T)` of the targets.
      vocab_size: V.
      chunk: see `LossSettings`.
    """
    rows, length = shape
    if chunk is None:
        mesh = jax.sharding.get_abstract_mesh()
        split = (ACTIVATIONS[name] for name in ("batch", "length", "vocab"))
        devices = 1 if mesh.empty else math.prod(axis_size(mesh, rule) for rule in split)
        wanted = -(-rows * length * vocab_size // (_LOGITS * devices))
    else:
        wanted = -(-length // chunk) if chunk else 1
    # A number that divides the length spares filling it up, if it is not many more.
    return next((n for n in range(wanted, min(2 * wanted, length) + 1) if length % n == 0), min(wanted, length))


def chunked_cross_entropy(
    head: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    settings: LossSettings,
    chunks: int,
) -> LossSums:
    """Returns `cross_entropy(head(params, hidden), ...)` without ever holding all logits.

    Where it is differentiated the gradients of a chunk are computed right after its logits, so that nothing is computed
    again; only `LossSums.trained` has one then. A chunk has every `chunks`-th token, so that a length which is split
    over devices stays where it is.

    Args:
      head: from its parameters and hidden states `[B, T / chunks, D]` to float32 logits `[B, T / chunks, V]`.
      params: what `head` is given, floats; they are to hold nothing that it does not need.
      hidden: `[B, T, D]`.
      targets: int32 `[B, T]`.
      weights: float32 `[B, T]`.
      settings: z-loss and smoothing.
      chunks: their number.
    """
    static = dataclasses.replace(settings, z_loss=0.0)
    return _chunked(head, static, params, *_strided(chunks, hidden, targets, weights), settings.z_loss)


def chunked_log_likelihood(
    head: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunks: int,
) -> jax.Array:
    """Returns the log-probability of each row's targets, float32 `[B]`, without ever holding all logits.

    Arguments are those of `chunked_cross_entropy`.
    """

    def one(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        states, targets, weights = chunk
        log_z, target_logit = _log_z_and_target(head(params, states), targets)
        return total + jnp.sum((target_logit - log_z) * weights, axis=1), None

    return jax.lax.scan(one, jnp.zeros(len(targets)), _strided(chunks, hidden, targets, weights))[0]


def _strided(chunks: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns arrays `[B, T, ...]` as `[chunks, B, T / chunks, ...]`: every `chunks`-th token, filled up with 0."""

    def strided(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunks)] + [(0, 0)] * (x.ndim - 2))  # what is added weighs nothing
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunks, *x.shape[2:]), 2, 0)

    return tuple(strided(x) for x in arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    head: Any, settings: LossSettings, params: Any, hidden: Any, targets: Any, weights: Any, z_loss: Any
) -> Any:
    def one(total: LossSums, chunk: Any) -> tuple[LossSums, None]:
        states, targets, weights = chunk
        sums = cross_entropy(head(params, states), targets, weights, dataclasses.replace(settings, z_loss=z_loss))
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(one, _no_sums(), (hidden, targets, weights))[0]


def _chunked_fwd(
    head: Any, settings: LossSettings, params: Any, hidden: Any, targets: Any, weights: Any, z_loss: Any
) -> tuple[LossSums, Any]:
    def loss(params: Any, states: Any, targets: Any, weights: Any) -> tuple[jax.Array, LossSums]:
        sums = cross_entropy(head(params, states), targets, weights, dataclasses.replace(settings, z_loss=z_loss))
        return sums.trained, sums

    def one(carry: tuple[LossSums, Any], chunk: Any) -> tuple[tuple[LossSums, Any], jax.Array]:
        (d_params, d_states), sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, *chunk)
        return jax.tree.map(jnp.add, carry, (sums, d_params)), d_states

    start = _no_sums(), jax.tree.map(jnp.zeros_like, params)
    (sums, d_params), d_hidden = jax.lax.scan(one, start, (hidden, targets, weights))
    return sums, (d_params, d_hidden)


def _chunked_bwd(head: Any, settings: LossSettings, gradients: Any, d_sums: LossSums) -> tuple[Any, ...]:
    d_params, d_hidden = jax.tree.map(lambda x: (x * d_sums.trained).astype(x.dtype), gradients)
    return d_params, d_hidden, None, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _no_sums() -> LossSums:
    return LossSums(*(jnp.zeros(()) for _ in LossSums._fields))
