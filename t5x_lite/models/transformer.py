"""The Transformer that every family configures: embedding, stacks of scanned layers, head.

Functions of parameters and batch alone. The key-value cache is an argument and a result, so that decoding is an
ordinary loop over `(tokens, cache)`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.models.config import TransformerConfig
from t5x_lite.nn.attention import Attention, KeysValues, Mask
from t5x_lite.nn.dense import Dense
from t5x_lite.nn.dropout import Dropout
from t5x_lite.nn.embeddings import TokenEmbedding
from t5x_lite.nn.feed_forward import FeedForward
from t5x_lite.nn.norms import RMSNorm
from t5x_lite.nn.parameters import fan_in_normal
from t5x_lite.nn.positions import RelativeBias
from t5x_lite.sharding import constrain

Batch = Mapping[str, Any]  # int32 and float32 arrays by the names of the batch contract

# What the backward pass finds stored, from most memory to least. None: everything XLA likes to keep.
REMAT_POLICIES: Mapping[str, Any] = {
    "none": None,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@struct.dataclass
class LayerCache:
    """What a decoder layer keeps between calls; `[B, ...]` in a layer, `[layers, B, ...]` in a stack."""

    self_attention: KeysValues
    cross_attention: KeysValues


@struct.dataclass
class Cache:
    """A decoder's memory.

    Attributes:
      layers: keys and values of every layer, `[layers, B, N, H, K]` (self) and `[layers, B, S, H, K]` (cross).
      encoder_segments: int32 `[B, S]`, which encoder positions are real.
      position: int32 `[B]`, how many tokens each row has seen, and so the slot its next one goes to.
    """

    layers: LayerCache
    encoder_segments: jax.Array
    position: jax.Array


@struct.dataclass
class Context:
    """What all layers of a stack share in one call.

    Attributes:
      mask: of the self-attention.
      bias: float32 `[1 or B, H, T, S]`, or None where each layer has its own.
      encoded: `[B, S, D]`; None in an encoder, and in a decoder whose cache already holds its projections.
      cross_mask: of the cross-attention.
      position: int32 `[B]`, the cache slot of the first query; None without a cache.
    """

    mask: Mask
    bias: jax.Array | None = None
    encoded: jax.Array | None = None
    cross_mask: Mask | None = None
    position: jax.Array | None = None


class Layer(nn.Module):
    """One pre-norm block: self-attention, cross-attention in a decoder, feed-forward."""

    config: TransformerConfig
    is_decoder: bool
    dtype: Any
    enable_dropout: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        """Maps `[B, T, D]` to itself, and the layer's cache to the next one."""
        cfg = self.config

        def norm(name: str) -> RMSNorm:
            return RMSNorm(cfg.norm_epsilon, dtype=self.dtype, name=name)

        def attention(name: str) -> Attention:
            return Attention(
                cfg.embed_dim,
                cfg.num_heads,
                cfg.head_dim,
                query_init=fan_in_normal(1.0 / cfg.head_dim),  # instead of 1/sqrt(head_dim) on the logits
                dropout_rate=cfg.dropout_rate,
                dtype=self.dtype,
                name=name,
            )

        def residual(x: jax.Array, y: jax.Array) -> jax.Array:
            y = Dropout(cfg.dropout_rate)(y, enabled=self.enable_dropout)
            return constrain(x + y, "batch", "length", "features")

        attend = attention("self_attention")
        y = norm("self_attention_norm")(x)
        self_kv = attend.project(y)
        if cache is not None:
            self_kv = cache.self_attention.write(self_kv, cast(jax.Array, context.position))
        bias = context.bias
        if bias is None:
            bias = relative_bias(cfg, self.is_decoder)(y.shape[1], self_kv.key.shape[1], context.mask.query_positions)
        x = residual(x, attend(y, self_kv, context.mask, bias, enable_dropout=self.enable_dropout))

        cross_kv: Any = None
        if self.is_decoder:
            cross = attention("cross_attention")
            y = norm("cross_attention_norm")(x)
            if context.encoded is not None:
                cross_kv = cross.project(context.encoded)
            else:
                cross_kv = cast(LayerCache, cache).cross_attention
            cross_mask = cast(Mask, context.cross_mask)
            x = residual(x, cross(y, cross_kv, cross_mask, enable_dropout=self.enable_dropout))

        feed_forward = FeedForward(
            cfg.mlp_dim, cfg.activation, cfg.gated, cfg.dropout_rate, dtype=self.dtype, name="mlp"
        )
        x = residual(x, feed_forward(norm("mlp_norm")(x), enable_dropout=self.enable_dropout))
        return x, None if cache is None else LayerCache(self_attention=self_kv, cross_attention=cross_kv)


def relative_bias(config: TransformerConfig, is_decoder: bool) -> RelativeBias:
    """Returns the position bias of a stack (or of a layer, where each has its own)."""
    return RelativeBias(
        config.num_heads,
        bidirectional=not is_decoder,
        num_buckets=config.relative_bias_buckets,
        max_distance=config.relative_bias_max_distance,
        name="position_bias",
    )


class Stack(nn.Module):
    """An encoder or a decoder: `lax.scan` over its layers, so that compile time does not grow with depth."""

    config: TransformerConfig
    is_decoder: bool
    dtype: Any
    remat: str

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None = None, *, enable_dropout: bool = False
    ) -> tuple[jax.Array, LayerCache | None]:
        """Maps `[B, T, D]` to itself, and the cache `[layers, ...]` to the next one."""
        cfg = self.config
        if not cfg.relative_bias_per_layer:
            key_length = x.shape[1] if cache is None else cache.self_attention.key.shape[2]
            # Without a cache every row counts from 0, and one bias serves the whole batch.
            positions = None if cache is None else context.mask.query_positions
            bias = relative_bias(cfg, self.is_decoder)(x.shape[1], key_length, positions)
            context = dataclasses.replace(context, bias=bias)

        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (nn.broadcast, 0)),
            length=cfg.num_decoder_layers if self.is_decoder else cfg.num_encoder_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.is_decoder, self.dtype, enable_dropout, name="layers")

        x = Dropout(cfg.dropout_rate)(x, enabled=enable_dropout)
        x, cache = layers(x, context, cache)
        x = RMSNorm(cfg.norm_epsilon, dtype=self.dtype, name="final_norm")(x)
        return Dropout(cfg.dropout_rate)(x, enabled=enable_dropout), cache


class Transformer(nn.Module):
    """An encoder-decoder language model.

    Attributes:
      config: its shape.
      dtype: of the computation; parameters, norms, softmax and logits are float32 all the same.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
    """

    config: TransformerConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        """Creates the embedding, both stacks and the head."""
        cfg = self.config
        self.embedding = TokenEmbedding(cfg.vocab_size, cfg.embed_dim, dtype=self.dtype)
        self.encoder = Stack(cfg, is_decoder=False, dtype=self.dtype, remat=self.remat)
        self.decoder = Stack(cfg, is_decoder=True, dtype=self.dtype, remat=self.remat)
        if not cfg.tied_head:
            self.head = Dense(cfg.vocab_size, ("embed", "vocab"), dtype=self.dtype, output_dtype=jnp.float32)

    def __call__(self, batch: Batch, *, enable_dropout: bool = False) -> jax.Array:
        """Returns float32 logits `[B, T, V]` of every target token, given those before it.

        Args:
          batch: `encoder_input_tokens` `[B, S]` and `decoder_input_tokens` `[B, T]`, int32, with or without
            `encoder_segment_ids` and `decoder_segment_ids`. Absent segment ids are derived from the pad id: in the
            encoder, a pad is padding; in the decoder, whose start token may be the pad, pads at the end are.
          enable_dropout: needs `rngs={"dropout": key}` in `apply`.
        """
        encoded = self.encode(batch, enable_dropout=enable_dropout)
        return self.decode(batch, encoded, enable_dropout=enable_dropout)

    def encode(self, batch: Batch, *, enable_dropout: bool = False) -> jax.Array:
        """Returns the encoder's hidden states `[B, S, D]` of `encoder_input_tokens` `[B, S]`."""
        segments = encoder_segments(batch, self.config.pad_id)
        x = self.embedding(batch["encoder_input_tokens"])
        return self.encoder(x, Context(mask=Mask(segments, segments)), enable_dropout=enable_dropout)[0]

    def decode(
        self,
        batch: Batch,
        encoded: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Any:
        """Returns float32 logits `[B, T, V]` and, with a cache, `(logits, next cache)`.

        Args:
          batch: `decoder_input_tokens` `[B, T]`. With a cache these continue each row where it stands, and rows may
            be right-padded by `decoder_segment_ids` 0; a row advances by its real tokens.
          encoded: `[B, S, D]`, of the same batch. With a cache it is needed in the first call only: that one projects
            it for every layer, and the cache keeps the result.
          cache: from `new_cache`, or the previous call.
          enable_dropout: needs `rngs={"dropout": key}` in `apply`.
        """
        tokens = batch["decoder_input_tokens"]
        if cache is None:
            segments = decoder_segments(batch, self.config.pad_id)
            source = encoder_segments(batch, self.config.pad_id)
            mask = Mask(segments, segments, jnp.arange(tokens.shape[1])[None, :])
            position = None
        else:
            segments = batch.get("decoder_segment_ids", jnp.ones_like(tokens))
            source = cache.encoder_segments if encoded is None else encoder_segments(batch, self.config.pad_id)
            # Slots not written yet lie behind every query, so all of them may count as real.
            slots = jnp.ones((tokens.shape[0], cache.layers.self_attention.key.shape[2]), jnp.int32)
            position = cache.position
            mask = Mask(segments, slots, position[:, None] + jnp.arange(tokens.shape[1])[None, :])
        context = Context(mask=mask, encoded=encoded, cross_mask=Mask(segments, source), position=position)
        x, layers = self.decoder(self.embedding(tokens), context, cache and cache.layers, enable_dropout=enable_dropout)
        if self.config.scaled_head:
            x = x * self.config.embed_dim**-0.5
        logits = self.embedding.logits(x) if self.config.tied_head else self.head(x)
        logits = constrain(logits, "batch", "length", "vocab")
        if cache is None:
            return logits
        advanced = cache.position + jnp.sum(segments > 0, axis=1)
        return logits, Cache(cast(LayerCache, layers), source, advanced)

    @nn.nowrap
    def new_cache(self, batch_size: int, length: int, encoder_length: int) -> Cache:
        """Returns an empty cache for `length` decoder positions and an encoder of `encoder_length`."""
        cfg = self.config

        def keys_values(slots: int) -> KeysValues:
            shape = (cfg.num_decoder_layers, batch_size, slots, cfg.num_heads, cfg.head_dim)
            return KeysValues(key=jnp.zeros(shape, self.dtype), value=jnp.zeros(shape, self.dtype))

        return Cache(
            layers=LayerCache(self_attention=keys_values(length), cross_attention=keys_values(encoder_length)),
            encoder_segments=jnp.zeros((batch_size, encoder_length), jnp.int32),
            position=jnp.zeros((batch_size,), jnp.int32),
        )

    @nn.nowrap
    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns fresh variables `{"params": nested dict of float32 arrays}`, without any metadata boxes."""
        return nn.unbox(super().init(rngs, *args, **kwargs))

    @nn.nowrap
    def logical_axes(self) -> Any:
        """Returns the tree of parameters with each replaced by the tuple of its logical axis names."""
        boxed = jax.eval_shape(super().init, jax.random.key(0), _tiny_batch())["params"]
        return jax.tree.map(
            lambda box: tuple(box.names), boxed, is_leaf=lambda node: isinstance(node, nn.LogicallyPartitioned)
        )

    @nn.nowrap
    def param_shapes(self) -> Any:
        """Returns the tree of parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
        return jax.eval_shape(self.init, jax.random.key(0), _tiny_batch())["params"]


def encoder_segments(batch: Batch, pad_id: int) -> jax.Array:
    """Returns the encoder's segment ids `[B, S]`, derived from the pad id if the batch has none."""
    if "encoder_segment_ids" in batch:
        return batch["encoder_segment_ids"]
    return (batch["encoder_input_tokens"] != pad_id).astype(jnp.int32)


def decoder_segments(batch: Batch, pad_id: int) -> jax.Array:
    """Returns the decoder's segment ids `[B, T]`; without any, pads at the end of the inputs are padding."""
    if "decoder_segment_ids" in batch:
        return batch["decoder_segment_ids"]
    real = (jnp.asarray(batch["decoder_input_tokens"]) != pad_id).astype(jnp.int32).at[:, 0].set(1)
    return jax.lax.cummax(real, axis=1, reverse=True)


def _tiny_batch() -> dict[str, jax.Array]:
    token = jnp.ones((1, 1), jnp.int32)
    return {"encoder_input_tokens": token, "decoder_input_tokens": token}
