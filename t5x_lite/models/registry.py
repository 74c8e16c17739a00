"""From a name to a configuration, from a configuration to a model."""

import math
from typing import TYPE_CHECKING, Any

from t5x_lite.errors import InputError, nearest
from t5x_lite.models import t5
from t5x_lite.models.config import TransformerConfig

if TYPE_CHECKING:
    from t5x_lite.models.transformer import Transformer

PRESETS: dict[str, TransformerConfig] = {**t5.PRESETS}

DTYPES = ("float32", "bfloat16")


def preset(name: str) -> TransformerConfig:
    """Returns the frozen configuration of a published model, such as `preset("t5-small")`.

    Raises:
      InputError: no model of that name; the message has the nearest one.
    """
    if name not in PRESETS:
        raise InputError(f"unknown model '{name}'{nearest(name, PRESETS)} (one of {', '.join(PRESETS)})")
    return PRESETS[name]


def build(config: TransformerConfig | str, dtype: Any = "float32", remat: str = "none") -> "Transformer":
    """Returns the Flax module of a configuration or preset name.

    Args:
      config: the shape of the model.
      dtype: of the computation, float32 or bfloat16; parameters stay float32.
      remat: what the backward pass recomputes: `none`, `minimal` (keeps matrix products) or `full`.

    Raises:
      InputError: unknown preset, dtype or remat policy.
    """
    import jax.numpy as jnp

    from t5x_lite.models.transformer import REMAT_POLICIES, Transformer

    config = preset(config) if isinstance(config, str) else config
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise InputError(f"dtype '{name}' is not supported, allowed: {', '.join(DTYPES)}{nearest(name, DTYPES)}")
    if remat not in REMAT_POLICIES:
        hint = nearest(remat, REMAT_POLICIES)
        raise InputError(f"remat '{remat}' is unknown, allowed: {', '.join(REMAT_POLICIES)}{hint}")
    return Transformer(config, dtype=jnp.dtype(name), remat=remat)


def count_parameters(config: TransformerConfig | str) -> int:
    """Returns the number of parameters, without allocating any."""
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(build(config).param_shapes()))
