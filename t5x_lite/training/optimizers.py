"""Optax, told which arrays are stacks of layers, which decay and which stay as they are.

Layers are scanned, so one array holds the same kernel of every layer. Adafactor measures each parameter: it scales
the update to the parameter's RMS and clips it by its own RMS. Over a whole stack those would mix layers (a layer with
small weights would be updated as hard as one with large weights), and the layer axis could be taken for one to
factor. `per_layer` gives every layer its own statistics, as T5X does by calling the axis BATCH. Muon likewise makes
every layer's matrix orthogonal on its own. AdamW, Lion and SGD treat every number on its own, stacked or not.
"""

import operator
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite.errors import InputError, nearest

OPTIMIZERS = ("adafactor", "adamw", "lion", "muon", "sgd")

# What `b1` and `b2` are by default; None: the optimizer has no such number.
_MOMENTS: Mapping[str, tuple[float | None, float | None]] = {
    "adafactor": (None, None),
    "adamw": (0.9, 0.999),
    "lion": (0.9, 0.99),
    "muon": (0.95, 0.95),
    "sgd": (0.9, None),
}

# Axes of tables and heads. The other matrices map hidden states to hidden states, which is what Muon is for.
_NOT_HIDDEN = {"vocab", "buckets", "positions", "types", "labels"}


def _map_axes(function: Any, logical_axes: Any) -> Any:
    return jax.tree.map(function, logical_axes, is_leaf=lambda node: isinstance(node, tuple))


def stacked(logical_axes: Any) -> Any:
    """Returns a tree of bools: which parameters have a leading `layers` axis."""
    return _map_axes(lambda names: names[0] == "layers", logical_axes)


def decayed(logical_axes: Any) -> Any:
    """Returns a tree of bools: which parameters weight decay applies to (matrices, not norm scales or bias tables)."""
    return _map_axes(
        lambda names: len([name for name in names if name != "layers"]) > 1 and "buckets" not in names, logical_axes
    )


def hidden_matrices(logical_axes: Any) -> Any:
    """Returns a tree of bools: which parameters are matrices between hidden states, one or a stack of them.

    Those of attention and feed-forward, a pooler's; no embeddings, position tables, heads, norms or biases.
    """

    def leaf(names: tuple[str, ...]) -> bool:
        return len([name for name in names if name != "layers"]) == 2 and not _NOT_HIDDEN & set(names)

    return _map_axes(leaf, logical_axes)


def matching(logical_axes: Any, patterns: Sequence[str], key: str) -> Any:
    """Returns a tree of bools: which parameters have a path that one of the patterns matches as a whole.

    Args:
      logical_axes: `Transformer.logical_axes()`.
      patterns: of paths such as `encoder/layers/mlp/up/kernel`; `*` stands for any text, also with slashes in it,
        `?` for a character and `[ab]` for one of these.
      key: what the configuration calls the patterns, for the message.

    Raises:
      InputError: a pattern that matches nothing.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(logical_axes, lambda node: isinstance(node, tuple))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            modules = {path.rsplit("/", depth)[0] + "/*" for path in paths for depth in range(1, path.count("/") + 1)}
            raise InputError(
                f"{key} '{pattern}' matches no parameter; paths are such as '{paths[0]}' or 'decoder/*'"
                f"{nearest(pattern, [*paths, *sorted(modules)])}"
            )
    matched = [any(fnmatchcase(path, pattern) for pattern in patterns) for path in paths]
    return jax.tree.unflatten(structure, matched)


def trained_parameters(logical_axes: Any, frozen: Sequence[str]) -> Any:
    """Returns a tree of bools: which parameters `optimizer.frozen` leaves to train; None, for all, if it is empty.

    Raises:
      InputError: a pattern that matches nothing, or patterns that leave nothing.
    """
    if not frozen:
        return None
    trained = jax.tree.map(operator.not_, matching(logical_axes, frozen, "optimizer.frozen"))
    if not any(jax.tree.leaves(trained)):
        raise InputError(f"optimizer.frozen {', '.join(frozen)} matches every parameter: nothing is left to train")
    return trained


def hold(params: Any, trained: Any) -> Any:
    """Returns the parameters, the frozen ones cut off from differentiation: a backward pass then has no part for them.

    Args:
      params: the parameters.
      trained: from `trained_parameters`; None: all are.
    """
    if trained is None:
        return params
    return jax.tree.map(lambda trains, p: p if trains else jax.lax.stop_gradient(p), trained, params)


def select(tree: Mapping[str, Any], labels: Mapping[str, Any], wanted: Any) -> dict[str, Any]:
    """Returns a nested dict without the leaves whose label is another than `wanted`, and without what is then empty."""
    chosen: dict[str, Any] = {}
    for name, label in labels.items():
        if not isinstance(label, Mapping):
            if label == wanted:
                chosen[name] = tree[name]
        elif part := select(tree[name], label, wanted):
            chosen[name] = part
    return chosen


def _together(labels: Mapping[str, Any], parts: Mapping[Any, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `select` took apart; leaves of a label without a part are those of `rest`."""

    def below(tree: Any, name: str) -> Any:
        return tree.get(name, {}) if isinstance(tree, Mapping) else tree

    return {
        name: _together(label, {key: below(part, name) for key, part in parts.items()}, rest[name])
        if isinstance(label, Mapping)
        else parts[label][name]
        if label in parts
        else rest[name]
        for name, label in labels.items()
    }


def by_label(transformations: Mapping[Any, optax.GradientTransformation], labels: Any) -> optax.GradientTransformation:
    """Applies to every parameter the transformation of its label; a label without one gets zeros, and no state.

    `optax.partition` does this with a placeholder for every parameter in the state of every other label. Here a state
    is what the transformation makes of a tree that has only its own parameters: nothing to save, or to lay out, for
    the others.

    Args:
      transformations: by label.
      labels: tree of labels, nested dicts as the parameters are.
    """

    def init(params: Any) -> Any:
        return tuple(tx.init(select(params, labels, label)) for label, tx in transformations.items())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        parts, states = {}, []
        for (label, tx), before in zip(transformations.items(), state, strict=True):
            own = None if params is None else select(params, labels, label)
            parts[label], after = tx.update(select(updates, labels, label), before, own)
            states.append(after)
        return _together(labels, parts, jax.tree.map(jnp.zeros_like, updates)), tuple(states)

    return optax.GradientTransformation(init, update)


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


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Makes the momentum of every matrix, of `[..., in, out]` with stacks in front, orthogonal (Jordan 2024).

    Optax's Muon: Nesterov's momentum with bias correction, five Newton-Schulz iterations in float32. The result has
    the RMS that an update of Adam has: it is multiplied by `0.2 * sqrt(max(in, out))` (Liu et al. 2025, section 2.2,
    "Moonlight"), so that one learning rate and one weight decay suit both. (Jordan's own factor is
    `sqrt(max(1, out / in))`, which needs a learning rate of its own.)

    Args:
      momentum: its decay.
    """

    def numbers(updates: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)

    def resize(update: jax.Array) -> jax.Array:
        return update * (0.2 * max(update.shape[-2:]) ** 0.5)

    return optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=numbers),
        optax.stateless(lambda updates, _: jax.tree.map(resize, updates)),
    )


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    logical_axes: Any,
    *,
    clip_norm: float = 0.0,
    weight_decay: float = 0.0,
    b1: float | None = None,
    b2: float | None = None,
    frozen: Sequence[str] = (),
    no_decay: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Returns the optimizer of that name.

    * `adafactor`: T5's, see `adafactor`;
    * `adamw` (Loshchilov and Hutter 2019), with bias correction and an epsilon of 1e-8 outside of the root;
    * `lion` (Chen et al. 2023);
    * `muon` for `hidden_matrices`, see `scale_by_muon`, and AdamW, with a `b1` of 0.9, for the rest;
    * `sgd`: torch's momentum, `m = b1 * m + gradient` and a step of `learning_rate * m`, without Nesterov's look
      ahead; with `b1=0` none, and no state.

    Args:
      name: a member of `OPTIMIZERS`.
      learning_rate: a number or schedule.
      logical_axes: `Transformer.logical_axes()`; tells stacks of layers and matrices apart from the rest.
      clip_norm: global norm that gradients are clipped to, over the parameters that are trained; 0: not at all.
      weight_decay: decoupled and multiplied by the learning rate, for all; norm scales, biases and bias tables do not
        decay.
      b1: first-moment decay of AdamW, 0.9; share of the momentum in Lion's update, 0.9; momentum of Muon, 0.95, and
        of SGD, 0.9.
      b2: second-moment decay of AdamW, 0.999, also beside Muon, 0.95; decay of Lion's momentum, 0.99.
      frozen: patterns (see `matching`) of parameters that stay as they are. They have no optimizer state, and their
        gradients are not looked at; `hold` is for not computing them either.
      no_decay: patterns of parameters that do not decay, beside those that never do.

    Raises:
      InputError: unknown name, a `b1` or `b2` that the optimizer does not have, a pattern that matches nothing.
    """
    if name not in OPTIMIZERS:
        raise InputError(
            f"optimizer.name '{name}' is unknown, allowed: {', '.join(OPTIMIZERS)}{nearest(name, OPTIMIZERS)}"
        )
    for key, given, default in zip(("b1", "b2"), (b1, b2), _MOMENTS[name], strict=True):
        if given is not None and default is None:
            having = [other for other, moments in _MOMENTS.items() if moments[int(key == "b2")] is not None]
            raise InputError(
                f"optimizer.{key}={given}: {name} has no such number; leave it out, or use {', '.join(having)}"
            )
    first, second = ((d or 0.0) if g is None else g for g, d in zip((b1, b2), _MOMENTS[name], strict=True))
    trained = trained_parameters(logical_axes, frozen)
    mask = jax.tree.map(
        lambda decays, spared: decays and not spared,
        decayed(logical_axes),
        matching(logical_axes, no_decay, "optimizer.no_decay"),
    )
    if trained is not None:
        logical_axes, mask = select(logical_axes, trained, True), select(mask, trained, True)

    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if name == "adafactor":
        parts.append(adafactor(learning_rate, stacked(logical_axes), weight_decay=weight_decay, decay_mask=mask))
    elif name == "adamw":
        parts.append(optax.adamw(learning_rate, b1=first, b2=second, weight_decay=weight_decay, mask=mask))
    else:
        parts.append(
            {
                "lion": lambda: optax.scale_by_lion(first, second),
                "muon": lambda: by_label(
                    {"matrices": scale_by_muon(first), "rest": optax.scale_by_adam(b2=second)},
                    jax.tree.map(lambda hidden: "matrices" if hidden else "rest", hidden_matrices(logical_axes)),
                ),
                "sgd": lambda: optax.trace(first) if first else optax.identity(),
            }[name]()
        )
        parts += [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []
        parts.append(optax.scale_by_learning_rate(learning_rate))
    tx = optax.chain(*parts)
    return tx if trained is None else by_label({True: tx}, trained)
