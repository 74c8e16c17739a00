"""Optax, told which arrays are stacks of layers.

Layers are scanned, so one array holds the same kernel of every layer. Adafactor measures each parameter: it scales
the update to the parameter's RMS and clips it by its own RMS. Over a whole stack those would mix layers (a layer with
small weights would be updated as hard as one with large weights), and the layer axis could be taken for one to
factor. `per_layer` gives every layer its own statistics, as T5X does by calling the axis BATCH.
"""

from typing import Any, NamedTuple

import jax
import optax

from t5x_lite.errors import InputError, nearest

OPTIMIZERS = ("adafactor", "adamw")


def stacked(logical_axes: Any) -> Any:
    """Returns a tree of bools: which parameters have a leading `layers` axis."""
    return jax.tree.map(lambda names: names[0] == "layers", logical_axes, is_leaf=lambda node: isinstance(node, tuple))


def decayed(logical_axes: Any) -> Any:
    """Returns a tree of bools: which parameters weight decay applies to (matrices, not norm scales or bias tables)."""

    def leaf(names: tuple[str, ...]) -> bool:
        return len([name for name in names if name != "layers"]) > 1 and "buckets" not in names

    return jax.tree.map(leaf, logical_axes, is_leaf=lambda node: isinstance(node, tuple))


class _Result(NamedTuple):
    update: Any
    state: Any


def per_layer(inner: optax.GradientTransformation, is_stacked: Any) -> optax.GradientTransformation:
    """Applies `inner` to every parameter on its own, and to every layer of a stacked one on its own.

    Args:
      inner: a transformation that treats arrays independently of each other.
      is_stacked: tree of bools, from `stacked`.

    Returns:
      A transformation whose state has a state of `inner` in place of each parameter, with a leading `layers` axis
      where that is stacked.
    """

    def init(params: Any) -> Any:
        return jax.tree.map(lambda stack, p: (jax.vmap(inner.init) if stack else inner.init)(p), is_stacked, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def leaf(stack: bool, u: jax.Array, s: Any, p: jax.Array) -> _Result:
            return _Result(*(jax.vmap(inner.update) if stack else inner.update)(u, s, p))

        results = jax.tree.map(leaf, is_stacked, updates, state, params)
        pick = lambda name: jax.tree.map(  # noqa: E731
            lambda r: getattr(r, name), results, is_leaf=lambda node: isinstance(node, _Result)
        )
        return pick("update"), pick("state")

    return optax.GradientTransformation(init, update)


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    is_stacked: Any,
    *,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float = 1.0,
    min_dim_size_to_factor: int = 128,
    weight_decay: float = 0.0,
    decay_mask: Any = None,
) -> optax.GradientTransformation:
    """Adafactor as T5 was trained with (Shazeer and Stern 2018; T5X `adafactor.py`), from Optax's parts.

    The second moment of a matrix is kept as row and column means, with decay `1 - (t + 1) ** -decay_rate`; the update
    is clipped to an RMS of `clipping_threshold`, and multiplied by the learning rate and by the parameter's RMS (at
    least 1e-3). No momentum, no bias correction.

    Args:
      learning_rate: relative to the parameter's RMS.
      is_stacked: tree of bools, from `stacked`.
      decay_rate: exponent of the second moment's decay.
      step_offset: steps of the optimizer's count `t` that the decay leaves out, never more than there are. A fresh
        optimizer counts from 0, so 0 is right for training and for fine-tuning from a checkpoint's parameters. T5X
        restores the count with the parameters; whoever does the same with fresh moments gives the number of
        pre-training steps here, or the first gradients would hardly enter the moments.
      clipping_threshold: of the update's RMS.
      min_dim_size_to_factor: matrices smaller than this on a side keep the full moment.
      weight_decay: each step also subtracts `learning_rate * weight_decay * parameter`. (Optax's and T5X's own leave
        the learning rate out, and so decay a thousand times harder at 1e-3.)
      decay_mask: tree of bools, which parameters decay; by default all.
    """
    scale = optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, step_offset=step_offset, min_dim_size_to_factor=min_dim_size_to_factor
        ),
        optax.clip_by_block_rms(clipping_threshold),
        optax.scale_by_param_block_rms(),
    )
    decay = [optax.add_decayed_weights(weight_decay, decay_mask)] if weight_decay else []
    return optax.chain(per_layer(scale, is_stacked), *decay, optax.scale_by_learning_rate(learning_rate))


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    logical_axes: Any,
    *,
    clip_norm: float = 0.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Returns the optimizer of that name.

    Args:
      name: `adafactor` or `adamw`.
      learning_rate: a number or schedule.
      logical_axes: `Transformer.logical_axes()`; tells stacks of layers and matrices apart from the rest.
      clip_norm: global norm that gradients are clipped to; 0: not at all.
      weight_decay: decoupled and multiplied by the learning rate, for both; norm scales and bias tables do not decay.
      b1: first-moment decay of AdamW.
      b2: second-moment decay of AdamW.

    Raises:
      InputError: unknown name.
    """
    if name not in OPTIMIZERS:
        raise InputError(
            f"optimizer.name '{name}' is unknown, allowed: {', '.join(OPTIMIZERS)}{nearest(name, OPTIMIZERS)}"
        )
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    mask = decayed(logical_axes)
    if name == "adafactor":
        parts.append(adafactor(learning_rate, stacked(logical_axes), weight_decay=weight_decay, decay_mask=mask))
    else:
        parts.append(optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask))
    return optax.chain(*parts)
