"""What training carries from step to step, and how it lies on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from t5x_lite import sharding
from t5x_lite.models.transformer import Transformer
from t5x_lite.training.precision import LossScale, initial_loss_scale


@struct.dataclass
class TrainState:
    """A plain pytree; random keys and data order follow from the step, so nothing else needs to be kept.

    Attributes:
      step: int32 scalar, batches trained on so far.
      params: nested dict of float32 arrays.
      opt_state: the optimizer's.
      skipped: int32 scalar, how many of the steps were not finite and changed nothing.
      loss_scale: of float16; None otherwise.
      ema: running mean of the parameters, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array
    loss_scale: LossScale | None = None
    ema: Any = None

    @property
    def averaged(self) -> Any:
        """The parameters to evaluate and to publish: their running mean, if there is one."""
        return self.params if self.ema is None else self.ema


def abstract_state(
    model: Transformer, tx: optax.GradientTransformation, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct`s with a NamedSharding each; nothing is allocated.

    Args:
      model: the model; its dtype decides whether there is a loss scale.
      tx: the optimizer.
      mesh: where the state lies.
      ema: whether there is a running mean of the parameters.

    Raises:
      InputError: an axis of the model does not divide over the mesh.
    """
    sharding.check_divides(mesh, model.config.sharded_sizes())
    shapes = model.param_shapes()
    layouts = sharding.tree_shardings(mesh, model.logical_axes(), shapes)
    params = _with_shardings(shapes, layouts)
    opt_state = _with_shardings(jax.eval_shape(tx.init, shapes), sharding.optimizer_shardings(mesh, tx.init, params))
    whole = sharding.replicated(mesh)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    loss_scale = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), initial_loss_scale(model.dtype)
    )
    return TrainState(count, params, opt_state, count, loss_scale, params if ema else None)


def init_state(
    model: Transformer,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    params: Any = None,
    *,
    ema: bool = False,
) -> TrainState:
    """Returns a fresh state, made directly in its layout: no device ever holds what it does not keep.

    Args:
      model: the model.
      tx: the optimizer.
      mesh: where the state lies.
      seed: of the initial parameters.
      params: parameters to start from instead, as NumPy or JAX arrays of the model's shapes.
      ema: whether to keep a running mean of the parameters.
    """
    layouts = state_shardings(abstract_state(model, tx, mesh, ema=ema))

    def fresh(key: jax.Array) -> TrainState:
        return started(model.init_params(key))

    def started(params: Any) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero, initial_loss_scale(model.dtype), params if ema else None)

    if params is None:
        return jax.jit(fresh, out_shardings=layouts)(jax.random.key(seed))
    return jax.jit(started, out_shardings=layouts)(jax.device_put(params, layouts.params))


def state_shardings(state: TrainState) -> TrainState:
    """Returns the layout of every leaf of a state."""
    return jax.tree.map(lambda x: x.sharding, state)


def _with_shardings(shapes: Any, layouts: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layouts)


def state_bytes(model: Transformer, tx: optax.GradientTransformation, *, ema: bool = False) -> int:
    """Returns the bytes of parameters, gradients, optimizer state and running mean together; nothing is allocated."""
    params = model.param_shapes()
    trees = [params] * (3 if ema else 2) + [jax.eval_shape(tx.init, params)]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))
