"""Attention a few rows at a time: the logits of a whole batch, `[B, H, T, S]`, never exist.

The forward pass keeps the largest logit and the sum of the softmax of each query, and the backward pass computes the
logits again (Rabe and Staats 2021; Dao et al. 2022). A CPU takes a row of the batch at a time and, of long ones, a
block of queries: what it works on then stays in its cache. An accelerator takes as many rows as keep it busy. Where
queries and keys are the same tokens in order, a quarter of the queries only meets the keys up to its end.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from t5x_lite.nn.dropout import kept
from t5x_lite.sharding import activation_spec, axis_size

# Finite, as in T5X: a row in which everything is masked then attends evenly instead of turning into NaN.
MASKED = -1e10

# The name of what comes out, for what decides what a backward pass finds stored: without it everything is done again.
ATTENDED = "attended"

# Logits at a time: on a CPU what its caches hold, on an accelerator what keeps it busy (256 MiB of float32). One
# row may have that many on a CPU, where blocks of it are slower; several rows together a quarter of them, since more
# rows at a time are no faster than one by one.
_ON_CPU, _ON_ACCELERATOR = 2**21, 2**26

# Of queries in order: into how many parts they are divided, and from which length on. Of the logits 3 / 8 are left out;
# more parts would leave out little more, and compile longer.
_PARTS, _LONG = 4, 256

_FEW = 8  # arrays that are added up one by one


@struct.dataclass
class Queries:
    """The queries of a call, and what their masks and their dropout need.

    Attributes:
      query: `[B, T, H, K]`.
      segments: int32 `[B, T]`, 0 is padding.
      positions: int32 `[B, T]`, among the keys; None where nobody asks.
      seeds: uint32 `[B, H, T, 2]`, from which the fate of each weight of a query follows (see `dropout.kept`); None:
        weights are not dropped one by one.
    """

    query: jax.Array
    segments: jax.Array
    positions: jax.Array | None = None
    seeds: jax.Array | None = None


@struct.dataclass
class Keys:
    """The keys and values of a call, and what their masks and their dropout need.

    Attributes:
      key: `[B, G, S, K]`; each of the G heads serves H / G neighbouring heads of queries.
      value: likewise.
      segments: int32 `[B, S]`, 0 is padding.
      positions: int32 `[B, S]`; None where nobody asks.
      factors: float32 `[B, H, S]`, by which all weights on a key are multiplied: 0 or 1 / (1 - rate); None: by 1.
    """

    key: jax.Array
    value: jax.Array
    segments: jax.Array
    positions: jax.Array | None = None
    factors: jax.Array | None = None


@dataclass(frozen=True)
class Rules:
    """What is known before anything is computed.

    Attributes:
      causal: whether a query sees keys up to its own position only.
      in_order: whether, besides, query t and key t both have position t. A query that may look at nothing then attends
        evenly to some of the keys.
      rate: share of the weights that `Queries.seeds` drop.
    """

    causal: bool = False
    in_order: bool = False
    rate: float = 0.0


def row_attention(
    rules: Rules, queries: Queries, keys: Keys, bias: jax.Array | None, window: jax.Array | int | None
) -> jax.Array:
    """Returns softmax(query . key + bias) . value, logits and softmax in float32, like `dot_product_attention`.

    Where a mesh is set each device computes its rows, its heads and its part of the queries' length, with the keys and
    values of the whole length, which it gathers along `context`.

    Args:
      rules: causality and dropout.
      queries: of T tokens.
      keys: of S tokens.
      bias: float32 `[1, H, T, S]`, added to the logits.
      window: int32 scalar; a query sees keys less than this far from it. None: all.

    Returns:
      `[B, T, H, K]` in the dtype of the query.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local(rules, queries, keys, bias, window)
    heads, groups = queries.query.shape[2], keys.key.shape[1]
    if groups > 1 and groups % axis_size(mesh, "model"):
        # A device's heads of queries would not be those that its heads of keys serve.
        key, value = (jnp.repeat(x, heads // groups, axis=1) for x in (keys.key, keys.value))
        keys = dataclasses.replace(cast(Any, keys), key=key, value=value)

    def spec(x: jax.Array | None, *names: str) -> PartitionSpec | None:
        # An axis that does not divide stays whole.
        if x is None:
            return None
        rules = activation_spec(*names)
        divides = [size % axis_size(mesh, rule) == 0 for rule, size in zip(rules, x.shape, strict=True)]
        return PartitionSpec(*(rule if fits else None for rule, fits in zip(rules, divides, strict=True)))

    def on_device(queries: Queries, keys: Keys, bias: Any, window: Any) -> jax.Array:
        return _local(here, queries, _whole_length(keys) if gathered else keys, bias, window)

    out = spec(queries.query, "batch", "length", "heads", "head_dim")
    of_queries = Queries(
        query=cast(Any, out),
        segments=cast(Any, spec(queries.segments, "batch", "length")),
        positions=cast(Any, spec(queries.positions, "batch", "length")),
        seeds=cast(Any, spec(queries.seeds, "batch", "heads", "length", "features")),
    )
    of_keys = Keys(
        key=cast(Any, spec(keys.key, "batch", "kv_heads", "length", "head_dim")),
        value=cast(Any, spec(keys.value, "batch", "kv_heads", "length", "head_dim")),
        segments=cast(Any, spec(keys.segments, "batch", "length")),
        positions=cast(Any, spec(keys.positions, "batch", "length")),
        factors=cast(Any, spec(keys.factors, "batch", "heads", "features")),
    )
    gathered = axis_size(mesh, cast(Any, of_keys.segments)[1]) > 1
    here = dataclasses.replace(rules, in_order=rules.in_order and not gathered)
    specs = (of_queries, of_keys, spec(bias, "features", "heads", "length", "features"), PartitionSpec())
    if window is None:
        specs = (*specs[:3], None)
    return jax.shard_map(on_device, in_specs=specs, out_specs=out, check_vma=False)(queries, keys, bias, window)


def _whole_length(keys: Keys) -> Keys:
    gather = partial(jax.lax.all_gather, axis_name="context", tiled=True)
    return Keys(
        key=gather(keys.key, axis=2),
        value=gather(keys.value, axis=2),
        segments=gather(keys.segments, axis=1),
        positions=None if keys.positions is None else gather(keys.positions, axis=1),
        factors=keys.factors,
    )


def _local(rules: Rules, queries: Queries, keys: Keys, bias: Any, window: Any) -> jax.Array:
    key, value = (x.astype(queries.query.dtype) for x in (keys.key, keys.value))
    keys = dataclasses.replace(cast(Any, keys), key=key, value=value)
    return cast(jax.Array, _attention(rules, queries, _turned(keys), bias, window))


def _turned(tree: Any) -> Any:
    """Swaps heads and length of queries, keys, values and what has their shape; seeds always have the heads first."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2) if x.ndim == 4 and x.dtype != jnp.uint32 else x, tree)


# --- rows, and blocks of their queries ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How a batch is divided.

    Attributes:
      rows: how many at a time.
      parts: of their queries, each with the first query, the one after the last, and the key after the last it needs.
      blocks: of each part.
    """

    rows: int
    parts: tuple[tuple[int, int, int], ...]
    blocks: int


def _plan(rules: Rules, queries: Queries, keys: Keys, most: int, of_rows: int) -> _Plan:
    b, t, h, _ = queries.query.shape
    s = keys.segments.shape[1]
    parts: tuple[tuple[int, int, int], ...] = ((0, t, s),)
    if rules.in_order and t >= _LONG:
        size = -(-t // _PARTS)
        parts = tuple((start, (end := min(start + size, t)), end) for start in range(0, t, size))
    row = h * parts[0][1] * s
    if row > most:
        return _Plan(1, parts, min(math.ceil(row / most), parts[0][1]))
    rows = max(rows for rows in range(1, b + 1) if b % rows == 0 and (rows * row <= of_rows or rows == 1))
    return _Plan(rows, parts, 1)


def _planned(rules: Rules, function: Callable[..., Any], queries: Queries, keys: Keys, *rest: Any) -> Any:
    """Returns `function(plan, queries, keys, *rest)`, by the plan of the platform that it is compiled for."""
    cpu = _plan(rules, queries, keys, _ON_CPU, _ON_CPU // 4)
    default = _plan(rules, queries, keys, _ON_ACCELERATOR, _ON_ACCELERATOR)
    if cpu == default:
        return function(cpu, queries, keys, *rest)
    return jax.lax.platform_dependent(
        queries, keys, *rest, cpu=partial(function, cpu), default=partial(function, default)
    )


def _together(queries: Queries, keys: Keys) -> tuple[Queries, Keys]:
    # Segments are the same in all layers, so that a scan over layers would compute the masks of all rows ahead of it
    # and keep them, `[B, H, T, S]`; not so if they seem to depend on the queries.
    return cast(tuple[Queries, Keys], jax.lax.optimization_barrier((queries, keys)))


def _by_rows(function: Callable[..., Any], carry: Any, tree: Any, rows: int) -> tuple[Any, Any]:
    """Scans `function(carry, some rows of the tree)`, and puts its results together, `[B, ...]`.

    Heads come before the length in there, and after it out here, as products with kernels have them: what is turned is
    a few rows in a cache, and nothing is kept in both forms. The rows are cut out inside the loop as well: had they an
    axis of their own, XLA's CPU compiler would give it another place in memory, and copy everything.
    """

    def some(carry: Any, start: jax.Array) -> tuple[Any, Any]:
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows), tree)
        carry, out = function(carry, _turned(part))
        return carry, _turned(out)

    starts = jnp.arange(0, jax.tree.leaves(tree)[0].shape[0], rows)
    carry, out = jax.lax.scan(some, carry, starts)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _length_axis(x: jax.Array) -> int:
    return min(x.ndim - 1, 2)  # of `[B, T]` it is 1, of all else 2


def _cut(tree: Any, start: int, end: int) -> Any:
    """Returns the tokens from `start` to `end`."""
    return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, start, end, axis=_length_axis(x)), tree)


def _split(tree: Any, blocks: int) -> Any:
    """Splits the length into blocks that lead; the last is filled up with zeros."""

    def leaf(x: jax.Array) -> jax.Array:
        axis = _length_axis(x)
        size = -(-x.shape[axis] // blocks)
        fill = [(0, 0)] * x.ndim
        fill[axis] = (0, blocks * size - x.shape[axis])
        x = jnp.pad(x, fill) if fill[axis][1] else x
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(leaf, tree)


def _merged(tree: Any, length: int) -> Any:
    """Undoes `_split` of arrays `[blocks, B, H, T / blocks, ...]`."""

    def leaf(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]

    return jax.tree.map(leaf, tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rules: Rules, queries: Queries, keys: Keys, bias: Any, window: Any) -> jax.Array:
    # Of queries `[B, T, H, K]`, and so is the result, and keys `[B, S, G, K]`.
    return _attend(rules, queries, keys, bias, window)[0]


def _attend(rules: Rules, queries: Queries, keys: Keys, bias: Any, window: Any) -> tuple[jax.Array, ...]:
    """Returns the result, and of the softmax of each query the largest logit and the sum, float32 `[B, H, T]`."""

    def run(plan: _Plan, queries: Queries, keys: Keys, bias: Any, window: Any) -> Any:
        bias = _split(bias, plan.blocks)

        def some(_: None, group: tuple[Queries, Keys]) -> Any:
            def attend(start: int, end: int, needed: int) -> Any:
                keys = _cut(group[1], 0, needed)

                def block(part: tuple[Queries, Any]) -> Any:
                    forward = partial(_forward, rules, bias=None if part[1] is None else part[1][0], window=window)
                    return jax.vmap(forward)(part[0], keys)

                parts = _split(_cut(group[0], start, end), plan.blocks), bias
                return _merged(jax.lax.map(block, parts), end - start)

            found = [attend(*part) for part in plan.parts]
            return None, jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *found)

        return _by_rows(some, None, _together(queries, keys), plan.rows)[1]

    return _planned(rules, run, queries, keys, bias, window)


def _attention_fwd(rules: Rules, queries: Queries, keys: Keys, bias: Any, window: Any) -> tuple[jax.Array, Any]:
    out, top, total = (checkpoint_name(x, ATTENDED) for x in _attend(rules, queries, keys, bias, window))
    return out, (queries, keys, bias, window, (out, top, total))


def _attention_bwd(rules: Rules, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    queries, keys, bias, window, (out, top, total) = kept
    d_out = d_out.astype(jnp.float32)
    # Of all queries at once: within the loop XLA's CPU compiler would join it to a product, which slows that down.
    along = jnp.swapaxes(jnp.sum(out.astype(jnp.float32) * d_out, axis=-1), 1, 2)
    narrow = queries.query.dtype != jnp.float32
    if not narrow:
        d_out, along = d_out / jnp.swapaxes(total, 1, 2)[..., None], along / total
    pull = _Pull(d_out.astype(queries.query.dtype), along, top, total if narrow else None)

    def run(plan: _Plan, queries: Queries, keys: Keys, bias: Any, window: Any, pull: _Pull) -> Any:
        queries, keys = _together(queries, keys)
        # As the logits are here, the bias and its gradient, a sum over rows, have the keys before the queries.
        bias = None if bias is None else jnp.swapaxes(_split(bias, plan.blocks)[:, 0], 2, 3)

        def some(d_bias: Any, group: tuple[Queries, Keys, _Pull]) -> Any:
            def back(d_bias: Any, start: int, end: int, needed: int) -> Any:
                keys = _cut(group[1], 0, needed)

                def block(d_keys: Any, part: Any) -> Any:
                    (queries, pull), bias, d_bias = part
                    backward = partial(_backward, rules, bias=bias, window=window)
                    d_query, d_logits, *more = jax.vmap(backward)(queries, keys, pull)
                    d_bias = None if d_bias is None else _added(d_bias, d_logits)
                    return jax.tree.map(jnp.add, d_keys, more), (d_query, d_bias)

                zeros = [jnp.zeros(x.shape, jnp.float32) for x in (keys.key, keys.value)]
                parts = _split(_cut((group[0], group[2]), start, end), plan.blocks), bias, d_bias
                d_keys, (d_query, d_bias) = _scan(block, zeros, parts, plan.blocks)
                rest = [(0, 0), (0, 0), (0, group[1].key.shape[2] - needed), (0, 0)]
                return d_bias, _merged(d_query, end - start), [jnp.pad(x, rest) for x in d_keys]

            d_queries, d_keys = list[Any](), list[Any]()
            for part in plan.parts:
                d_bias, d_query, d_key_value = back(d_bias, *part)
                d_queries.append(d_query)
                d_keys.append(d_key_value)
            return d_bias, (jnp.concatenate(d_queries, axis=2), *(sum(x[1:], x[0]) for x in zip(*d_keys, strict=True)))

        d_bias = None if bias is None else jnp.zeros_like(bias)
        d_bias, (d_query, d_key, d_value) = _by_rows(some, d_bias, (queries, keys, pull), plan.rows)
        if d_bias is not None:
            d_bias = _merged(jnp.swapaxes(d_bias, 2, 3)[:, None], pull.top.shape[2])
        return d_query.astype(queries.query.dtype), *(x.astype(keys.key.dtype) for x in (d_key, d_value)), d_bias

    d_query, d_key, d_value, d_bias = _planned(rules, run, queries, keys, bias, window, pull)
    nothing: Any = None
    d_queries = Queries(d_query, nothing, nothing, nothing)
    return d_queries, Keys(d_key, d_value, nothing, nothing, nothing), d_bias, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _added(total: jax.Array, parts: jax.Array) -> jax.Array:
    # XLA's CPU compiler joins a reduction to the products before it, which slows those down; not so a few additions.
    return sum(parts, total) if parts.shape[0] <= _FEW else total + jnp.sum(parts, axis=0)


def _scan(function: Callable[..., Any], carry: Any, parts: Any, number: int) -> Any:
    # As `jax.lax.scan`, but that a single part does without a loop.
    if number > 1:
        return jax.lax.scan(function, carry, parts)
    carry, out = function(carry, jax.tree.map(lambda x: x[0], parts))
    return carry, jax.tree.map(lambda x: x[None], out)


# --- one row: heads, queries T, keys S ------------------------------------------------------------------------------


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """Returns the float32 product of `[H, ...]` and `[H, ...]` over one axis of each."""
    over = ((left_axis,), (right_axis,)), ((0,), (0,))
    return jax.lax.dot_general(left, right, over, preferred_element_type=jnp.float32)


def _allowed(rules: Rules, queries: Queries, keys: Keys, window: Any, query_axis: int) -> jax.Array:
    """Returns bool `[T, S]`, or `[S, T]` if queries are axis 1: who may look at whom."""

    def column(x: jax.Array | None) -> Any:
        return None if x is None else jnp.expand_dims(x, 1 - query_axis)

    def line(x: jax.Array | None) -> Any:
        return None if x is None else jnp.expand_dims(x, query_axis)

    segments = line(keys.segments)
    allowed = (column(queries.segments) == segments) & (segments > 0)
    here, there = column(queries.positions), line(keys.positions)
    if rules.causal:
        allowed &= there <= here
    if window is not None:
        allowed &= jnp.abs(here - there) < window
    return allowed


def _per_head(keys: Keys, heads: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns keys and values, times the factors, `[H, S, K]`, and the factors `[H, S, 1]`: each head has its own."""
    times = heads // keys.key.shape[0]
    key, value = (jnp.repeat(x, times, axis=0) if times > 1 else x for x in (keys.key, keys.value))
    if keys.factors is None:
        return key, value, None
    factors = keys.factors[..., None]
    return key, (value * factors).astype(value.dtype), factors


def _forward(rules: Rules, queries: Queries, keys: Keys, *, bias: Any, window: Any) -> tuple[jax.Array, ...]:
    query = queries.query
    key, value, _ = _per_head(keys, query.shape[0])
    logits = _product(query, key, 2, 2)
    logits = logits if bias is None else logits + bias
    logits = jnp.where(_allowed(rules, queries, keys, window, query_axis=0), logits, MASKED)
    top = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(weights, axis=-1)
    scale = 1.0 / total
    if queries.seeds is not None:
        weights = jnp.where(kept(queries.seeds[:, :, None], weights.shape, 2, rules.rate), weights, 0.0)
        scale *= 1.0 / (1.0 - rules.rate)
    out = _product(weights.astype(query.dtype), value, 2, 1) * scale[..., None]
    return out.astype(query.dtype), top, total


@struct.dataclass
class _Pull:
    """What the backward pass knows of each query.

    The gradient of the weights is multiplied by the weights, and one of them is divided by the sum of the softmax: the
    gradient, as `d_out`, which is smaller; but the weights if `d_out` is narrow, and would be rounded once more.

    Attributes:
      d_out: the gradient of the result, `[B, H, T, K]` within the loop over rows, if it is float32 divided by the sum.
      along: float32 `[B, H, T]`, the product of the result and `d_out`.
      top: float32 `[B, H, T]`, the largest logit.
      total: float32 `[B, H, T]`, the sum, if the weights are yet to be divided; else None.
    """

    d_out: jax.Array
    along: jax.Array
    top: jax.Array
    total: jax.Array | None


def _backward(rules: Rules, queries: Queries, keys: Keys, pull: _Pull, *, bias: Any, window: Any) -> tuple[Any, ...]:
    """Returns gradients: of queries, of logits `[H, S, T]`, of keys and values.

    Logits have the keys first here. Of the five products one then sums over the first axis of a factor, with the
    queries first it would be three, and that is what a CPU is slow at.
    """
    query, d_out = queries.query, pull.d_out
    heads, groups = query.shape[0], keys.key.shape[0]
    key, value, factors = _per_head(keys, heads)
    allowed = _allowed(rules, queries, keys, window, query_axis=1)
    logits = _product(key, query, 2, 2)
    logits = logits if bias is None else logits + bias
    weights = jnp.exp(jnp.where(allowed, logits, MASKED) - pull.top[:, None, :])
    if pull.total is not None:
        weights /= jnp.maximum(pull.total, 1.0)[:, None, :]  # it is 1 at least, but 0 of what fills a block up
    d_weights = _product(value, d_out, 2, 2)
    dropped = weights
    if queries.seeds is not None:
        keep = kept(queries.seeds[:, None], weights.shape, 1, rules.rate)
        factor = 1.0 / (1.0 - rules.rate)
        dropped, d_weights = (jnp.where(keep, x * factor, 0.0) for x in (weights, d_weights))
    d_logits = jnp.where(allowed, weights * (d_weights - pull.along[:, None, :]), 0.0)
    d_value = _product(dropped.astype(query.dtype), d_out, 2, 1)
    if factors is not None:
        d_value *= factors
    rounded = d_logits.astype(query.dtype)
    d_key = _product(rounded, query, 2, 1)
    d_query = jnp.swapaxes(_product(key, rounded, 1, 1), 1, 2)
    d_key, d_value = (x.reshape(groups, heads // groups, *x.shape[1:]).sum(axis=1) for x in (d_key, d_value))
    return d_query, d_logits, d_key, d_value
