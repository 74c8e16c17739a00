"""Weights of a trained model in int8, for decoding: a quarter of float32's memory, and as much less to read a token.

Only weights are quantised, each row or column of a matrix by the largest of its own numbers (symmetric absmax, as in
Dettmers et al. 2022, section 2.1). Activations stay as they are, and products are scaled once they are summed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig

Path = tuple[str, ...]


def quantize(params: Any, config: TransformerConfig) -> Any:
    """Returns parameters whose large matrices are int8, with which the model works as with the others.

    Those are the kernels of the encoder, the decoder and the output head, which get a `kernel_scale` beside them, one
    float32 number per output, and the embedding table, with a `table_scale` per row, of look-up and tied head alike. A
    weight is at most half a scale away from what it was. Everything else stays, and so does T5's projection out of the
    feed-forward block: its inputs are too large for coarse weights (transformers keeps T5's `wo` in float32).

    Args:
      params: of floats, stacked over layers as `Transformer.init_params` gives them; on a mesh or not, also in `jit`.
      config: of the model.

    Raises:
      InputError: they are quantised already.
    """
    return _with_scales(params, config, _rounded)


def quantized_axes(logical_axes: Any, config: TransformerConfig) -> Any:
    """Returns the logical axes of `quantize(params, config)`, from those of `params`: a scale has its outputs' name."""

    def split(names: Path, summed: int) -> tuple[Path, Path]:
        kept = list(names)
        del kept[summed]
        return names, tuple(kept)

    return _with_scales(logical_axes, config, split)


@jax.jit(static_argnums=1)
def _rounded(weights: jax.Array, summed: int) -> tuple[jax.Array, jax.Array]:
    weights = weights.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weights), axis=summed, keepdims=True)
    scale = jnp.maximum(largest / 127, jnp.finfo(jnp.float32).tiny)  # outputs whose weights are all 0 have one too
    return jnp.round(weights / scale).astype(jnp.int8), jnp.squeeze(scale, summed)


def _with_scales(tree: Any, config: TransformerConfig, split: Callable[[Any, int], tuple[Any, Any]]) -> Any:
    leaves: dict[Path, Any] = {}
    for path, leaf in flatten_dict(tree).items():
        if path[-1].endswith("_scale"):
            raise InputError(f"parameters are quantised already: they have {'/'.join(path)}")
        summed = _summed_axis(path, config)
        if summed is None:
            leaves[path] = leaf
        else:
            leaves[path], leaves[*path[:-1], f"{path[-1]}_scale"] = split(leaf, summed)
    return unflatten_dict(leaves)


def _summed_axis(path: Path, config: TransformerConfig) -> int | None:
    """Returns the axis that the inputs of a matrix to be quantised have, None for all other parameters."""
    if path == ("embedding", "table"):
        return -1
    sensitive = config.family == "t5" and path[-3:] == ("mlp", "down", "kernel")
    if path[-1] == "kernel" and path[0] in ("encoder", "decoder", "head") and not sensitive:
        return -2
    return None
