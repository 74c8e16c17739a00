"""Norms of parameters, gradients and updates, one for each module, so that a log shows which of them moves."""

from typing import Any

import jax
import jax.numpy as jnp

TOTAL = "total"


def module_of(path: tuple[Any, ...] | str) -> str:
    """Returns the module that a parameter belongs to.

    Args:
      path: the parameter's, as `jax.tree_util` gives it, or joined by slashes: `encoder/layers/mlp/up/kernel` belongs
        to `encoder/layers/mlp`, `decoder/final_norm/scale` to `decoder/final_norm`, `head/kernel` to `head`.
    """
    joined = path if isinstance(path, str) else jax.tree_util.keystr(path, simple=True, separator="/")
    names = joined.split("/")
    depth = 1 if names[0] not in ("encoder", "decoder") else 3 if names[1:2] == ["layers"] else 2
    return "/".join(names[:depth])


def module_norms(tree: Any) -> dict[str, jax.Array]:
    """Returns the Euclidean norm of each module of a tree shaped like the parameters, and of all of it as `total`.

    A stack's layers count together: `encoder/layers/mlp` is one number over all layers. Works inside `jit`.

    Args:
      tree: parameters, gradients or updates, floating-point arrays of any dtype; the squares are summed in float32.

    Returns:
      Float32 scalars by module, in the tree's order, then `total`.
    """
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        module = module_of(path)
        squares[module] = squares[module] + square if module in squares else square
    norms = {module: jnp.sqrt(square) for module, square in squares.items()}
    return {**norms, TOTAL: jnp.sqrt(sum(squares.values(), jnp.zeros(())))}


def norm_metrics(name: str, tree: Any) -> dict[str, jax.Array]:
    """Returns `module_norms` by the names they have in metrics.jsonl: `NAME` for the total, `NAME/MODULE` for each.

    Args:
      name: what the tree holds, such as `gradient_norm`.
      tree: see `module_norms`.
    """
    norms = module_norms(tree)
    return {name if module == TOTAL else f"{name}/{module}": norm for module, norm in norms.items()}
