"""How layers create parameters: float32, with a logical name for every axis."""

from typing import Any, cast

import flax.linen as nn
import jax

Initializer = jax.nn.initializers.Initializer


def parameter(
    module: nn.Module, name: str, initializer: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> jax.Array:
    """Returns the module's parameter of that name, creating it in `init`.

    Args:
      module: whose parameter it is.
      name: in the tree of parameters.
      initializer: called with a key and `shape`.
      shape: of one layer; `nn.scan` stacks layers in front.
      axes: logical name of every axis, see `sharding.PARAMETERS`.
    """
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name}: {len(axes)} axis names {axes} for shape {shape}")
    return cast(jax.Array, module.param(name, cast(Any, nn.with_logical_partitioning(initializer, axes)), shape))


def fan_in_normal(scale: float = 1.0) -> Initializer:
    """Returns the initializer N(0, scale / fan_in), as Mesh TensorFlow's T5 draws its kernels."""
    return jax.nn.initializers.variance_scaling(scale, "fan_in", "normal")
