"""The Transformer that every family configures: embedding, encoder, decoder, heads.

Functions of parameters and batch alone. The key-value cache is an argument and a result, so that decoding is an
ordinary loop over `(tokens, cache)`.
"""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.initialization import initializers
from t5x_lite.models.stack import Context, LayerCache, Stack, layer_params
from t5x_lite.nn.attention import KeysValues, Mask
from t5x_lite.nn.dense import Dense, turned
from t5x_lite.nn.dropout import Dropout
from t5x_lite.nn.embeddings import Head, TokenEmbedding
from t5x_lite.nn.feed_forward import ACTIVATIONS
from t5x_lite.nn.norms import LayerNorm
from t5x_lite.nn.positions import positions_in_segments
from t5x_lite.sharding import constrain

Batch = Mapping[str, Any]  # int32 and float32 arrays by the names of the batch contract


@struct.dataclass
class Cache:
    """A decoder's memory.

    Attributes:
      layers: keys and values of each layer.
      encoder_segments: int32 `[B, S]`, which encoder positions are real; None without an encoder.
      position: int32 `[B]`, how many tokens each row has seen, and so the slot its next one goes to.
    """

    layers: tuple[LayerCache, ...]
    encoder_segments: jax.Array | None
    position: jax.Array

    @property
    def slots(self) -> int:
        """How many tokens its self-attention has room for, with the axis B or without."""
        return self.layers[0].self_attention.key.shape[-2]

    def extended(self, slots: int) -> "Cache":
        """Returns self with as many empty slots behind those there are."""
        grown = (dataclasses.replace(x, self_attention=x.self_attention.extended(slots)) for x in self.layers)
        return dataclasses.replace(self, layers=tuple(grown))

    def without_batch(self) -> "Cache":
        """Returns self for a loop to carry: layers of a single row lose their axis B.

        XLA's CPU compiler drops such an axis from products, and would copy the carried array in every step to have it
        both with and without.
        """
        if self.position.shape[0] > 1:
            return self
        return dataclasses.replace(self, layers=jax.tree.map(lambda x: x[0], self.layers))

    def with_batch(self) -> "Cache":
        """Returns what `without_batch` was given."""
        if self.position.shape[0] > 1:
            return self
        return dataclasses.replace(self, layers=jax.tree.map(lambda x: x[None], self.layers))


@struct.dataclass
class Slots:
    """Where the tokens of a call go in the cache and what they see, where rows do not simply continue.

    So several sequences of one example, the beams of a search, can be the T tokens of one row: they share the cache of
    its prompt, and nothing is moved when a beam changes its past, only `visible`.

    Attributes:
      start: int32 scalar, the slot of the first of the call's T tokens; the others follow it.
      visible: bool `[1 or B, T, M]`, which of the cache's M slots each token sees, its own included.
      positions: int32 `[1 or B, M]`, where the token in each slot stands in its text.
    """

    start: jax.Array
    visible: jax.Array
    positions: jax.Array


class Transformer(nn.Module):
    """A language model: encoder and decoder, or one of them.

    Attributes:
      config: its shape.
      dtype: of the computation; parameters, norms, softmax and logits are float32 all the same.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
      scan_layers: whether a stack is a loop over its layers; see `Stack`.
    """

    config: TransformerConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    scan_layers: bool = True

    def setup(self) -> None:
        """Creates the embedding, the stacks and the heads."""
        cfg = self.config
        inits = initializers(cfg)

        def dense(features: int, axes: tuple[str, str]) -> Dense:
            return Dense(features, axes, inits.head, use_bias=True, dtype=self.dtype)

        options: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat, "scan_layers": self.scan_layers}
        self.embedding = TokenEmbedding(cfg.vocab_size, cfg.embed_dim, inits.embedding, dtype=self.dtype)
        if cfg.num_encoder_layers:
            self.encoder = Stack(cfg, is_decoder=False, **options)
        if cfg.num_decoder_layers:
            self.decoder = Stack(cfg, is_decoder=True, **options)
        if cfg.num_decoder_layers or cfg.head in ("masked_lm", "pretraining"):
            self.head = Head(cfg.vocab_size, cfg.tied_head, cfg.head_bias, inits.head, dtype=self.dtype)
        if cfg.head in ("masked_lm", "pretraining"):
            self.prediction_transform = dense(cfg.embed_dim, ("embed", "features"))
            self.prediction_norm = LayerNorm(cfg.norm_epsilon, dtype=self.dtype)
        if cfg.pooler:
            self.pooler = dense(cfg.embed_dim, ("embed", "features"))
        if cfg.head == "pretraining":
            self.next_sentence_head = dense(2, ("embed", "labels"))
        if cfg.head in ("sequence_classification", "token_classification", "span"):
            self.classifier = dense(cfg.num_labels, ("embed", "labels"))
        self.head_dropout = Dropout(cfg.dropout_rate, shared=False)

    def __call__(self, batch: Batch, *, enable_dropout: bool = False) -> jax.Array:
        """Returns what the model predicts, float32.

        * with a decoder: logits `[B, T, V]` of every target token, given those before it;
        * an encoder with a head: `masked_lm` and `pretraining` logits `[B, S, V]`, `sequence_classification`
          `[B, labels]`, `token_classification` `[B, S, labels]`, `span` `[B, S, 2]` (start and end);
        * an encoder without one: hidden states `[B, S, D]`.

        Args:
          batch: `encoder_input_tokens` `[B, S]` and/or `decoder_input_tokens` `[B, T]`, int32, with or without
            `encoder_segment_ids` and `decoder_segment_ids`. Absent segment ids are derived from the pad id: in the
            encoder, a pad is padding; in the decoder, whose start token may be the pad, pads at the end are (a decoder
            with padding on the left needs them given). `encoder_positions`, `decoder_positions`: by default every
            segment counts from 0. `encoder_token_types`: by default all 0.
          enable_dropout: needs `rngs={"dropout": key}` in `apply`.
        """
        cfg = self.config
        if cfg.num_decoder_layers:
            encoded = self.encode(batch, enable_dropout=enable_dropout) if cfg.num_encoder_layers else None
            return self.decode(batch, encoded, enable_dropout=enable_dropout)
        encoded = self.encode(batch, enable_dropout=enable_dropout)
        if self.is_initializing() and cfg.pooler:
            self._pool(encoded)
        if cfg.head in ("masked_lm", "pretraining"):
            if self.is_initializing() and cfg.head == "pretraining":
                self._next_sentence(encoded, False)
            return self.head_logits(encoded)
        if cfg.head == "sequence_classification":
            encoded = self._pool(encoded)
        if cfg.head in ("sequence_classification", "token_classification"):
            encoded = self.head_dropout(encoded, enabled=enable_dropout)
        return encoded if cfg.head is None else self.classifier(encoded).astype(jnp.float32)

    def encode(self, batch: Batch, *, enable_dropout: bool = False) -> jax.Array:
        """Returns the encoder's hidden states `[B, S, D]` of `encoder_input_tokens` `[B, S]`.

        Raises:
          InputError: the model has no encoder, or no learned position for the last token.
        """
        if not self.config.num_encoder_layers:
            raise InputError("the model has no encoder; a decoder's hidden states come from method='hidden_states'")
        self._check_length(batch, "encoder")
        segments = encoder_segments(batch, self.config.pad_id)
        context = Context(
            mask=Mask(segments, segments),
            positions=_positions(batch, "encoder", segments),
            token_types=batch.get("encoder_token_types"),
        )
        x = self.embedding(batch["encoder_input_tokens"])
        return self.encoder(x, context, enable_dropout=enable_dropout)[0]

    def decode(
        self,
        batch: Batch,
        encoded: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        slots: Slots | None = None,
        only: jax.Array | None = None,
        enable_dropout: bool = False,
    ) -> Any:
        """Returns float32 logits `[B, T, V]` and, with a cache, `(logits, next cache)`.

        Args:
          batch: `decoder_input_tokens` `[B, T]`. With a cache these continue each row where it stands, and rows may
            be right-padded by `decoder_segment_ids` 0; a row advances by its real tokens.
          encoded: `[B, S, D]`, of the same batch; None for a decoder alone. With a cache it is needed in the first
            call only: that one projects it for every layer, and the cache keeps the result.
          cache: from `new_cache`, or the previous call.
          slots: with a cache, where the tokens go instead, and what they see. `batch` then has `decoder_positions`,
            and `cache.position` stays as it is.
          only: int32 `[B]`, the one token of each row whose logits `[B, 1, V]` are wanted.
          enable_dropout: without a cache; needs `rngs={"dropout": key}` in `apply`.
        """
        x, cache = self._decode(batch, encoded, cache, slots, enable_dropout)
        if only is not None:
            x = jnp.take_along_axis(x, only[:, None, None], axis=1)
        logits = self._logits(x)
        return logits if cache is None else (logits, cache)

    def prediction_inputs(self, batch: Batch, *, enable_dropout: bool = False) -> jax.Array:
        """Returns the hidden states `[B, L, D]` that `head_logits` predicts tokens from; see `__call__`."""
        encoded = self.encode(batch, enable_dropout=enable_dropout) if self.config.num_encoder_layers else None
        if not self.config.num_decoder_layers:
            return cast(jax.Array, encoded)
        return self._decode(batch, encoded, None, None, enable_dropout)[0]

    def head_logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits `[B, L, V]` of hidden states; it reads `head_params` alone."""
        if not self.config.num_decoder_layers:
            hidden = ACTIVATIONS[self.config.activation](self.prediction_transform(hidden))
            hidden = self.prediction_norm(hidden)
        return self._logits(hidden)

    @nn.nowrap
    def head_params(self, params: Any) -> Any:
        """Returns those of the parameters that `head_logits` reads."""
        parts = ["head", "prediction_transform", "prediction_norm", *(["embedding"] if self.config.tied_head else [])]
        return {name: params[name] for name in parts if name in params}

    def hidden_states(self, batch: Batch) -> jax.Array:
        """Returns the contextual embedding of every token: of the encoder if there is one, else of the decoder."""
        return self.encode(batch) if self.config.num_encoder_layers else self._decode(batch, None, None, None, False)[0]

    def pool(self, batch: Batch, *, enable_dropout: bool = False) -> jax.Array:
        """Returns the pooled output `[B, D]`: a tanh layer over the hidden state of the first token."""
        return self._pool(self.encode(batch, enable_dropout=enable_dropout))

    def next_sentence(self, batch: Batch, *, enable_dropout: bool = False) -> jax.Array:
        """Returns BERT's logits `[B, 2]`: segment B follows A, or does not."""
        return self._next_sentence(self.encode(batch, enable_dropout=enable_dropout), enable_dropout)

    def pretraining_inputs(self, batch: Batch, *, enable_dropout: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns what `prediction_inputs` does, and the next-sentence logits of the same pass."""
        encoded = self.encode(batch, enable_dropout=enable_dropout)
        return encoded, self._next_sentence(encoded, enable_dropout)

    def pretrain(self, batch: Batch, *, enable_dropout: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns masked-LM and next-sentence logits of one pass."""
        encoded, labels = self.pretraining_inputs(batch, enable_dropout=enable_dropout)
        return self.head_logits(encoded), labels

    def _pool(self, encoded: jax.Array) -> jax.Array:
        return jnp.tanh(self.pooler(encoded[:, 0]))

    def _next_sentence(self, encoded: jax.Array, enable_dropout: bool) -> jax.Array:
        return self.next_sentence_head(self._pool(encoded)).astype(jnp.float32)

    def _logits(self, x: jax.Array) -> jax.Array:
        if self.config.scaled_head:
            x = x * self.config.embed_dim**-0.5
        return self.head(x, self.embedding.table if self.config.tied_head else None)

    def _decode(
        self,
        batch: Batch,
        encoded: jax.Array | None,
        cache: Cache | None,
        slots: Slots | None,
        enable_dropout: bool,
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.config
        if not cfg.num_decoder_layers:
            raise InputError("the model has no decoder: it cannot predict what comes next")
        tokens = batch["decoder_input_tokens"]
        steps = jnp.arange(tokens.shape[1])[None, :]
        if cache is None:
            self._check_length(batch, "decoder")
            segments = decoder_segments(batch, cfg.pad_id)
            mask = Mask(segments, segments, steps, in_order=True)
            positions, start = _positions(batch, "decoder", segments), None
        else:
            segments = batch.get("decoder_segment_ids", jnp.ones_like(tokens))
            # Slots not written yet lie behind every query, so all of them may count as real.
            real = jnp.ones((tokens.shape[0], cache.layers[0].self_attention.key.shape[2]), jnp.int32)
            if slots is None:
                start, places = cache.position, cache.position[:, None] + steps
                mask = Mask(segments, real, places)
            else:
                start, places = slots.start, batch["decoder_positions"]
                mask = Mask(segments, real, places, visible=slots.visible, key_positions=slots.positions)
            positions = jnp.where(segments > 0, places, 0)
        source = None
        if cfg.num_encoder_layers:
            projected = cache is not None and encoded is None
            source = cast(Cache, cache).encoder_segments if projected else encoder_segments(batch, cfg.pad_id)
        context = Context(
            mask=mask,
            positions=positions,
            encoded=encoded,
            cross_mask=None if source is None else Mask(segments, source),
            start=start,
        )
        x, layers = self.decoder(self.embedding(tokens), context, cache and cache.layers, enable_dropout=enable_dropout)
        if cache is None:
            return x, None
        advanced = cache.position + (jnp.sum(segments > 0, axis=1) if slots is None else 0)
        return x, Cache(cast(Any, layers), source, advanced)

    def _check_length(self, batch: Batch, side: str) -> None:
        limit, length = self.config.max_positions, batch[f"{side}_input_tokens"].shape[1]
        # With segment ids a row may hold several texts; a text that is too long then shows as NaN.
        derived = not {f"{side}_positions", f"{side}_segment_ids"} & batch.keys()
        if self.config.positions == "learned" and length > limit and derived:
            raise InputError(f"{side}_input_tokens has {length} tokens a row, but the model has {limit} positions")

    @nn.nowrap
    def new_cache(self, batch_size: int, length: int, encoder_length: int = 0, dtype: Any = None) -> Cache:
        """Returns an empty cache, laid out over the mesh by batch and heads.

        Args:
          batch_size: B.
          length: slots for tokens of the decoder.
          encoder_length: S, if there is an encoder.
          dtype: float32, bfloat16, or int8, which has a scale for each head of each token; by default the model's.
        """
        cfg = self.config
        kv_heads = cfg.kv_heads(True)
        heads = "features" if kv_heads == 1 else "heads" if kv_heads == cfg.heads(True) else "kv_heads"

        def keys_values(slots: int) -> KeysValues:
            shape = (batch_size, kv_heads, slots, cfg.stack_head_dim(True))
            return KeysValues.zeros(shape, dtype or self.dtype)

        def laid_out(x: jax.Array) -> jax.Array:
            blocks = ("slots", "head_dim", "slots") if x.ndim == 5 else ("slots", "head_dim")
            return constrain(x, *("batch", heads, *blocks)[: x.ndim])

        crosses = cfg.num_encoder_layers > 0
        layer = LayerCache(keys_values(length), keys_values(encoder_length).in_blocks() if crosses else None)
        layer = jax.tree.map(laid_out, layer)
        return Cache(
            layers=(layer,) * cfg.num_decoder_layers,
            encoder_segments=jnp.zeros((batch_size, encoder_length), jnp.int32) if crosses else None,
            position=jnp.zeros((batch_size,), jnp.int32),
        )

    @nn.nowrap
    def unstacked(self, params: Any) -> Any:
        """Returns parameters in which the decoder's layers are a tuple, each with arrays of its own, kernels turned.

        Decoding takes either form. In a loop whose every step reads all weights once, this one spares reading them
        twice, out of the stack and then into the product, and has them in the order in which few rows are multiplied
        fastest (see `nn.dense.turned`); it costs the memory of the decoder's layers.
        """
        layers = params["decoder"]["layers"]
        if not isinstance(layers, tuple):
            layers = _split_layers(layers, self.config.num_decoder_layers)
        return {**params, "decoder": {**params["decoder"], "layers": layers}}

    @nn.nowrap
    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns fresh variables `{"params": nested dict of float32 arrays}`, without any metadata boxes."""
        return nn.unbox(super().init(rngs, *args, **kwargs))

    @nn.nowrap
    def init_params(self, key: jax.Array) -> Any:
        """Returns fresh parameters, which need no batch."""
        return self.init(key, _tiny_batch())["params"]

    @nn.nowrap
    def logical_axes(self) -> Any:
        """Returns the tree of parameters with each replaced by the tuple of its logical axis names."""
        return jax.tree.map(lambda box: tuple(box.names), _declared(cast(Any, self)), is_leaf=_is_box)

    @nn.nowrap
    def param_shapes(self) -> Any:
        """Returns the tree of parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
        return jax.tree.map(lambda box: box.value, _declared(cast(Any, self)), is_leaf=_is_box)


@lru_cache(maxsize=64)  # a start asks seven times, and tracing took a quarter of what a tiny model's start does
def _declared(model: Transformer) -> Any:
    """Returns the tree of parameters as boxes that hold their shapes and the names of their axes."""
    return jax.eval_shape(partial(nn.Module.init, model), jax.random.key(0), _tiny_batch())["params"]


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.LogicallyPartitioned)


@jax.jit(static_argnums=1)
def _split_layers(layers: Any, number: int) -> tuple[Any, ...]:
    return tuple(turned(layer_params(layers, index)) for index in range(number))


def encoder_segments(batch: Batch, pad_id: int | None) -> jax.Array:
    """Returns the encoder's segment ids `[B, S]`, derived from the pad id if the batch has none."""
    if "encoder_segment_ids" in batch:
        return batch["encoder_segment_ids"]
    tokens = batch["encoder_input_tokens"]
    return jnp.ones_like(tokens) if pad_id is None else (tokens != pad_id).astype(jnp.int32)


def decoder_segments(batch: Batch, pad_id: int | None) -> jax.Array:
    """Returns the decoder's segment ids `[B, T]`; without any, pads at the end of the inputs are padding."""
    if "decoder_segment_ids" in batch:
        return batch["decoder_segment_ids"]
    tokens = jnp.asarray(batch["decoder_input_tokens"])
    if pad_id is None:
        return jnp.ones_like(tokens)
    real = (tokens != pad_id).astype(jnp.int32).at[:, 0].set(1)
    return jax.lax.cummax(real, axis=1, reverse=True)


def _positions(batch: Batch, side: str, segments: jax.Array) -> jax.Array:
    positions = batch[f"{side}_positions"] if f"{side}_positions" in batch else positions_in_segments(segments)
    # Padding needs no position, and may go on for longer than there are any.
    return jnp.where(segments > 0, positions, 0)


def _tiny_batch() -> dict[str, jax.Array]:
    token = jnp.ones((1, 1), jnp.int32)
    return {"encoder_input_tokens": token, "decoder_input_tokens": token}
