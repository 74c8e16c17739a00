"""Multi-head attention, its mask, and its key-value cache."""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.nn.dense import FEW_ROWS, Dense, larger_first, stream_dtype
from t5x_lite.nn.parameters import Initializer, fan_in_normal
from t5x_lite.nn.positions import Rotation
from t5x_lite.nn.row_attention import MASKED, Keys, Queries, Rules, row_attention
from t5x_lite.sharding import constrain

_HEADS = (0, 1), (0, 1)  # axes that a product does not sum over: batch and heads of both factors

_BLOCK = 64  # tokens whose keys are turned together


@struct.dataclass
class Mask:
    """Who may look at whom, as a description: `[B, T, S]` booleans only come into being inside attention.

    Attributes:
      query_segments: int32 `[B, T]`, 0 is padding, 1.. are packed examples; equal segments see each other.
      key_segments: int32 `[B, S]`.
      query_positions: int32 `[B, T]` or `[1, T]`, index of each query among the keys; None: not causal, and query t
        has index t. A causal query sees the keys up to its own index.
      window: int32 scalar; a query sees keys less than this far from it, so itself alone with 1. None: all.
      visible: bool `[1 or B, T, S]`, which takes the place of segments and causality. Positions then only serve the
        window.
      key_positions: int32 `[1 or B, S]`; None: key s stands at position s.
      in_order: whether the queries are the keys' own tokens and `query_positions` count them, which spares computing
        what lies ahead of them.
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_positions: jax.Array | None = None
    window: jax.Array | int | None = None
    visible: jax.Array | None = None
    key_positions: jax.Array | None = None
    in_order: bool = struct.field(pytree_node=False, default=False)

    def allowed(self) -> jax.Array:
        """Returns bool `[B, 1, T, S]`: True where the query may see the key."""
        keys = self.key_positions
        if keys is None:
            keys = jnp.arange(self.key_segments.shape[1])[None, :]
        queries = self.query_positions
        if self.visible is not None:
            allowed = self.visible
        else:
            allowed = self.query_segments[:, :, None] == self.key_segments[:, None, :]
            allowed &= (self.key_segments > 0)[:, None, :]
            if queries is not None:
                allowed &= keys[:, None, :] <= queries[:, :, None]
        if self.window is not None:
            if queries is None:
                queries = jnp.arange(self.query_segments.shape[1])[None, :]
            allowed &= jnp.abs(queries[:, :, None] - keys[:, None, :]) < self.window
        return allowed[:, None, :, :]


@struct.dataclass
class KeysValues:
    """Projected keys and values of S tokens.

    Attributes:
      key: `[B, G, S, K]`: heads come first, so that the products of attention need no transposed copy of a cache. Or
        `[B, G, S / W, K, W]`, turned in blocks of W tokens, see `in_blocks`.
      value: `[B, G, S, K]`.
      key_scale: float32 `[B, G, S]`, by which an int8 key is multiplied; None for floats.
      value_scale: likewise.
    """

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @staticmethod
    def zeros(shape: tuple[int, int, int, int], dtype: Any) -> "KeysValues":
        """Returns an empty cache of shape `[B, G, S, K]`, with scales if the dtype is int8."""
        numbers = jnp.zeros(shape, dtype)
        scale = jnp.zeros(shape[:-1], jnp.float32) if numbers.dtype == jnp.int8 else None
        return KeysValues(numbers, numbers, scale, scale)

    def quantized(self) -> "KeysValues":
        """Returns the int8 form: each head of each token has its own scale, the largest number being 127."""

        def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = x.astype(jnp.float32)
            scale = jnp.max(jnp.abs(x), axis=-1) / 127
            return jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale

        (key, key_scale), (value, value_scale) = quantize(self.key), quantize(self.value)
        return KeysValues(key, value, key_scale, value_scale)

    def in_blocks(self) -> "KeysValues":
        """Returns self with the keys turned, a block of tokens at a time, the last one filled up with zeros.

        It is for keys that are written once and read in every step: a CPU multiplies them by few queries twice as fast.
        """
        b, g, s, k = self.key.shape
        width = max(min(s, _BLOCK), 1)
        key = jnp.pad(self.key, ((0, 0), (0, 0), (0, -s % width), (0, 0))).reshape(b, g, -1, width, k)
        return dataclasses.replace(cast(Any, self), key=jnp.swapaxes(key, 3, 4))

    def filled(self, new: "KeysValues") -> "KeysValues":
        """Returns `new`, floats of as many tokens as self has slots, in the form that self has: blocks of its dtype."""
        new = (new if self.key_scale is None else new.quantized()).in_blocks()
        return jax.tree.map(lambda old, x: x.astype(old.dtype), self, new)

    def write(self, new: "KeysValues", start: jax.Array) -> "KeysValues":
        """Returns self with `new`, of T tokens, in the slots `start, start + 1, ...`, as int8 if self is.

        Args:
          new: floats, `[B, G, T, K]`.
          start: int32 scalar; or `[B]`, a start for each row, and then what would come after the last slot, which is
            padding, is not written.
        """

        def put(old: jax.Array, update: jax.Array) -> jax.Array:
            update = update.astype(old.dtype)
            if start.ndim == 0 and old.shape[0] == 1:
                return jax.lax.dynamic_update_slice_in_dim(old[0], update[0], start, axis=1)[None]  # see without_batch
            if start.ndim == 0:
                return jax.lax.dynamic_update_slice_in_dim(old, update, start, axis=2)
            slots = start[:, None] + jnp.arange(update.shape[2])
            return jax.vmap(lambda row, to, what: row.at[:, to].set(what, mode="drop"))(old, slots, update)

        return jax.tree.map(put, self, new if self.key_scale is None else new.quantized())

    def extended(self, slots: int) -> "KeysValues":
        """Returns self with as many empty slots behind it."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots), *((0, 0),) * (x.ndim - 3))), self)


def dot_product_attention(
    query: jax.Array, keys_values: KeysValues, mask: Mask, bias: jax.Array | None, dropout: Any = None
) -> jax.Array:
    """Returns softmax(query . key + bias) . value, logits and softmax in float32.

    There is no 1/sqrt(head_dim) here: T5 folds it into the query's initialisation, and a family that wants it scales
    its query. With G < H heads of keys and values each of them serves H / G neighbouring heads of queries (Ainslie et
    al. 2023).

    Args:
      query: `[B, T, H, K]`.
      keys_values: of S tokens, G heads, the keys in blocks or not. The scales of int8 multiply the logits and the
        weights, never whole vectors.
      mask: who may look at whom.
      bias: float32 `[1 or B, H, T, S]`, added to the logits.
      dropout: a function of the weights `[B, H, T, S]`.

    Returns:
      `[B, T, H, K]` in the dtype of the query.
    """
    b, t, h, k = query.shape
    _, g, s, _ = keys_values.value.shape
    query = jnp.transpose(query.reshape(b, t, g, h // g, k), (0, 2, 3, 1, 4)).reshape(b, g, -1, k)
    key, value = (x.astype(query.dtype) for x in (keys_values.key, keys_values.value))
    logits = _keys_by_query(query, key) if key.ndim == 4 else _blocks_by_query(query, key)[..., :s]
    if keys_values.key_scale is not None:
        logits = logits * keys_values.key_scale[:, :, None, :]
    logits = logits.reshape(b, h, t, s)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(jnp.where(mask.allowed(), logits, MASKED), axis=-1).astype(query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    weights = weights.reshape(b, g, -1, s)
    if keys_values.value_scale is not None:
        weights = (weights * keys_values.value_scale[:, :, None, :]).astype(query.dtype)
    # Not an einsum, which puts the values first: with few queries that takes a CPU six times as long.
    attended = jax.lax.dot_general(weights, value, (((3,), (2,)), _HEADS))
    return jnp.transpose(attended.reshape(b, g, h // g, t, k), (0, 3, 1, 2, 4)).reshape(b, t, h, k)


def whole_attention(
    query: jax.Array,
    keys_values: KeysValues,
    mask: Mask,
    bias: jax.Array | None,
    *,
    rate: float = 0.0,
    shared: bool = True,
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns what `dot_product_attention` does, a few rows at a time and with a backward pass that recomputes.

    It is for whole sequences: training, encoding, scoring. What is the other's for: a cache, int8, and `mask.visible`.

    Args:
      query: `[B, T, H, K]`.
      keys_values: floats, of S tokens, G heads.
      mask: by segments, order and window.
      bias: float32 `[1, H, T, S]`, added to the logits.
      rate: of the attention weights that are dropped.
      shared: whether those are the same keys for all queries of a row and head.
      key: a random one, if there is a rate.

    Returns:
      `[B, T, H, K]` in the dtype of the query.
    """
    if mask.visible is not None or keys_values.key_scale is not None:
        raise ValueError("attention a few rows at a time has neither a mask that is given nor int8 keys")
    b, t, h, _ = query.shape
    s = keys_values.key.shape[2]

    def places(positions: jax.Array | None, length: int) -> jax.Array | None:
        if mask.query_positions is None and mask.window is None:
            return None
        return jnp.broadcast_to(jnp.arange(length)[None] if positions is None else positions, (b, length))

    seeds = factors = None
    if rate and shared:
        keep = jax.random.bernoulli(cast(jax.Array, key), 1.0 - rate, (b, h, s))
        factors = jnp.where(keep, 1.0 / (1.0 - rate), 0.0)
    elif rate:
        seeds = jax.random.bits(cast(jax.Array, key), (b, h, t, 2), jnp.uint32)
    return row_attention(
        Rules(causal=mask.query_positions is not None, in_order=mask.in_order and bias is None, rate=rate),
        Queries(query, mask.query_segments, places(mask.query_positions, t), seeds),
        Keys(keys_values.key, keys_values.value, mask.key_segments, places(mask.key_positions, s), factors),
        bias,
        mask.window,
    )


def _keys_by_query(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns float32 `[B, G, Q, S]`, the products of `[B, G, Q, K]` and `[B, G, S, K]`."""

    def queries_first(query: jax.Array, key: jax.Array) -> jax.Array:
        return jax.lax.dot_general(query, key, (((3,), (3,)), _HEADS), preferred_element_type=jnp.float32)

    if query.shape[2] > FEW_ROWS:
        return queries_first(query, key)
    return jax.lax.platform_dependent(
        query,
        key,
        cpu=lambda query, key: larger_first(key, query, ((3,), (3,)), _HEADS, jnp.float32),
        default=queries_first,
    )


def _blocks_by_query(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns float32 `[B, G, Q, S]`, the products of `[B, G, Q, K]` and `[B, G, S / W, K, W]`."""
    b, g, q, k = query.shape
    query = jnp.broadcast_to(query[:, :, None], (b, g, key.shape[2], q, k))
    # Without the barrier XLA makes one product of all blocks, for which it has to turn them again.
    query = jax.lax.optimization_barrier(query)
    heads_and_blocks = (0, 1, 2), (0, 1, 2)
    logits = jax.lax.dot_general(query, key, (((4,), (3,)), heads_and_blocks), preferred_element_type=jnp.float32)
    return jnp.swapaxes(logits, 2, 3).reshape(b, g, q, -1)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with 2-D kernels `(embed, joined heads)`.

    Call `project` on the source of keys and values, then the module on the queries; whoever decodes keeps the
    projections in between.

    Attributes:
      embed_dim: D.
      num_heads: H.
      num_kv_heads: G, which divides H.
      head_dim: K.
      scaled: whether queries are divided by sqrt(head_dim).
      use_bias: whether the projections have biases.
      kernel_init: of keys and values.
      query_init: of queries.
      residual_init: of the projection into the residual stream.
      dropout_rate: of the attention weights.
      dropout_shared: see `Dropout`.
      dtype: of the computation.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaled: bool = False
    use_bias: bool = False
    kernel_init: Initializer = fan_in_normal()
    query_init: Initializer = fan_in_normal()
    residual_init: Initializer = fan_in_normal()
    dropout_rate: float = 0.0
    dropout_shared: bool = True
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the four projections."""
        joined, kv_joined = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rest = {"use_bias": self.use_bias, "dtype": self.dtype}
        self.query = Dense(joined, ("embed", "heads"), self.query_init, **rest)
        self.key = Dense(kv_joined, ("embed", self._kv_axis), self.kernel_init, **rest)
        self.value = Dense(kv_joined, ("embed", self._kv_axis), self.kernel_init, **rest)
        out_dtype = stream_dtype(self.dtype)
        self.out = Dense(self.embed_dim, ("heads", "embed"), self.residual_init, out_dtype=out_dtype, **rest)

    @property
    def _kv_axis(self) -> str:
        if self.num_kv_heads == self.num_heads:
            return "heads"
        return "kv_heads" if self.num_kv_heads > 1 else "head_dim"  # a single one stays whole on every device

    def _split(self, x: jax.Array, heads: int, axis: str) -> jax.Array:
        x = x.reshape(*x.shape[:2], heads, self.head_dim)
        return constrain(x, "batch", "length", "features" if axis == "head_dim" else axis, "head_dim")

    def project(self, source: jax.Array, rotation: Rotation | None = None) -> KeysValues:
        """Maps `[B, S, D]` to keys and values, the keys rotated to their positions."""
        key = self._split(self.key(source), self.num_kv_heads, self._kv_axis)
        value = self._split(self.value(source), self.num_kv_heads, self._kv_axis)
        key = key if rotation is None else rotation.turn(key)
        return KeysValues(key=jnp.swapaxes(key, 1, 2), value=jnp.swapaxes(value, 1, 2))

    def __call__(
        self,
        x: jax.Array,
        keys_values: KeysValues,
        mask: Mask,
        bias: jax.Array | None = None,
        rotation: Rotation | None = None,
        *,
        cached: bool = False,
        enable_dropout: bool = False,
    ) -> jax.Array:
        """Maps queries `[B, T, D]` to `[B, T, D]`; `cached`: the keys are those of a cache, and nothing is dropped."""
        query = self._split(self.query(x), self.num_heads, "heads")
        if rotation is not None:
            query = rotation.turn(query)
        if self.scaled:
            query = query * self.head_dim**-0.5
        if cached:
            attended = dot_product_attention(query, keys_values, mask, bias)
        else:
            rate = self.dropout_rate if enable_dropout else 0.0
            key = self.make_rng("dropout") if rate else None
            attended = whole_attention(query, keys_values, mask, bias, rate=rate, shared=self.dropout_shared, key=key)
        return self.out(attended.reshape(*x.shape[:2], self.num_heads * self.head_dim))
