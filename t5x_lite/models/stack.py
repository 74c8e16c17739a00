"""An encoder or a decoder: a scan over layers that every family configures."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.initialization import Initializers, initializers
from t5x_lite.nn.attention import Attention, KeysValues, Mask
from t5x_lite.nn.dense import stream_dtype
from t5x_lite.nn.dropout import Dropout
from t5x_lite.nn.embeddings import SmallEmbedding
from t5x_lite.nn.feed_forward import FeedForward
from t5x_lite.nn.norms import LayerNorm, RMSNorm
from t5x_lite.nn.positions import RelativeBias, Rotation, rotation, sinusoids
from t5x_lite.nn.row_attention import ATTENDED
from t5x_lite.sharding import constrain

_LAYER_INPUT, _HOST = "layer_input", "pinned_host"

# What the backward pass finds stored, from most memory of a device to least. None: everything XLA likes to keep.
REMAT_POLICIES: Mapping[str, Any] = {
    "none": None,
    "minimal": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst=_HOST,
    ),
}


def check_remat(remat: str, device: Any) -> None:
    """Checks that a device can do what a key of `REMAT_POLICIES` asks for.

    Raises:
      InputError: `offload`, and the device cannot reach the host's memory.
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if remat == "offload" and _HOST not in kinds:
        raise InputError(
            f"train.remat=offload needs {_HOST} memory, and {device.device_kind} has {', '.join(kinds)} alone;"
            f" allowed here: {', '.join(name for name in REMAT_POLICIES if name != remat)}"
        )


_NO_WINDOW = 2**30  # further than any two tokens are apart


@struct.dataclass
class LayerCache:
    """What a decoder layer keeps between calls.

    Attributes:
      self_attention: its own keys and values.
      cross_attention: those of the encoder's output, in blocks; None in a decoder without an encoder.
    """

    self_attention: KeysValues
    cross_attention: KeysValues | None


@struct.dataclass
class Context:
    """What all layers of a stack share in one call.

    Attributes:
      mask: of the self-attention.
      positions: int32 `[B, T]`, where each token stands in its text.
      token_types: int32 `[B, T]`, or None: all 0.
      bias: float32 `[1 or B, H, T, S]`, or None where there is none, or each layer has its own.
      rotation: of queries and keys at `positions`, or None.
      encoded: `[B, S, D]`; None without an encoder, and where the cache already holds its projections.
      cross_mask: of the cross-attention; None without one.
      start: int32 scalar or `[B]`, the cache slot of the first query; None without a cache.
    """

    mask: Mask
    positions: jax.Array
    token_types: jax.Array | None = None
    bias: jax.Array | None = None
    rotation: Rotation | None = None
    encoded: jax.Array | None = None
    cross_mask: Mask | None = None
    start: jax.Array | None = None


def make_norm(config: TransformerConfig, dtype: Any, name: str) -> nn.Module:
    """Returns the family's norm layer."""
    if config.norm == "rms":
        return RMSNorm(config.norm_epsilon, dtype=dtype, name=name)
    return LayerNorm(config.norm_epsilon, use_bias=config.bias, dtype=dtype, name=name)


def make_dropout(config: TransformerConfig) -> Dropout:
    """Returns the dropout of embeddings and sub-layers."""
    return Dropout(config.dropout_rate, shared=config.dropout_style == "t5")


def relative_bias(config: TransformerConfig, is_decoder: bool) -> RelativeBias:
    """Returns the position bias of a stack (or of a layer, where each has its own)."""
    return RelativeBias(
        config.heads(is_decoder),
        bidirectional=not is_decoder,
        num_buckets=config.relative_bias_buckets,
        max_distance=config.relative_bias_max_distance,
        name="position_bias",
    )


class Layer(nn.Module):
    """One block: self-attention, cross-attention where there is an encoder to look at, feed-forward."""

    config: TransformerConfig
    is_decoder: bool
    dtype: Any
    enable_dropout: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None, window: jax.Array | int | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Maps `[B, T, D]` to itself, and the layer's cache to the next one."""
        cfg = self.config
        inits = initializers(cfg)
        kept: dict[str, KeysValues | None] = {"cross_attention": None}
        x = checkpoint_name(x, _LAYER_INPUT)
        options: dict[str, Any] = {"cached": cache is not None, "enable_dropout": self.enable_dropout}
        mask = context.mask if window is None else dataclasses.replace(context.mask, window=window)

        def self_attention(y: jax.Array) -> jax.Array:
            attend = self._attention("self_attention", inits)
            keys_values = attend.project(y, context.rotation)
            if cache is not None:
                keys_values = cache.self_attention.write(keys_values, cast(jax.Array, context.start))
            kept["self_attention"] = keys_values
            bias = context.bias
            if bias is None and cfg.positions == "relative":
                bias = relative_bias(cfg, self.is_decoder)(*_bias_places(y, cache, mask))
            return attend(y, keys_values, mask, bias, context.rotation, **options)

        def cross_attention(y: jax.Array) -> jax.Array:
            attend = self._attention("cross_attention", inits)
            if context.encoded is not None:
                keys_values = attend.project(context.encoded)
                if cache is not None:
                    keys_values = cast(KeysValues, cache.cross_attention).filled(keys_values)
            else:
                keys_values = cast(KeysValues, cast(LayerCache, cache).cross_attention)
            kept["cross_attention"] = keys_values
            return attend(y, keys_values, cast(Mask, context.cross_mask), **options)

        def feed_forward(y: jax.Array) -> jax.Array:
            block = FeedForward(
                cfg.stack_mlp_dim(self.is_decoder),
                cfg.activation,
                cfg.gated,
                use_bias=cfg.bias,
                kernel_init=inits.kernel,
                residual_init=inits.residual,
                dropout_rate=cfg.rate(cfg.mlp_dropout_rate),
                dropout_shared=cfg.dropout_style == "t5",
                dtype=self.dtype,
                name="mlp",
            )
            return block(y, enable_dropout=self.enable_dropout)

        if cfg.parallel_block:
            x = self._sublayer(x, "self_attention", lambda y: self_attention(y) + feed_forward(y))
        else:
            x = self._sublayer(x, "self_attention", self_attention)
            if context.cross_mask is not None:
                x = self._sublayer(x, "cross_attention", cross_attention)
            x = self._sublayer(x, "mlp", feed_forward)
        return x, None if cache is None else LayerCache(**cast(Any, kept))

    def _attention(self, name: str, inits: Initializers) -> Attention:
        cfg = self.config
        return Attention(
            cfg.embed_dim,
            cfg.heads(self.is_decoder),
            cfg.kv_heads(self.is_decoder),
            cfg.stack_head_dim(self.is_decoder),
            scaled=cfg.scaled_attention,
            use_bias=cfg.bias,
            kernel_init=inits.kernel,
            query_init=inits.query,
            residual_init=inits.residual,
            dropout_rate=cfg.rate(cfg.attention_dropout_rate),
            dropout_shared=cfg.dropout_style == "t5",
            dtype=self.dtype,
            name=name,
        )

    def _sublayer(self, x: jax.Array, name: str, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        pre = self.config.norm_position == "pre"
        norm: Any = make_norm(self.config, self.dtype if pre else stream_dtype(self.dtype), f"{name}_norm")
        y = function(norm(x) if pre else x)
        x = x + make_dropout(self.config)(y, enabled=self.enable_dropout)
        return constrain(x if pre else norm(x), "batch", "length", "features")


def _bias_places(x: jax.Array, cache: LayerCache | None, mask: Mask) -> tuple[Any, ...]:
    # Without a cache every row counts from 0, and one bias serves the whole batch.
    if cache is None:
        return x.shape[1], x.shape[1]
    return x.shape[1], cache.self_attention.key.shape[2], mask.query_positions, mask.key_positions


class Stack(nn.Module):
    """An encoder or a decoder.

    Without a cache it is a `lax.scan` over its layers, so that compile time does not grow with depth. With one the
    layers follow each other one by one: every layer's cache is then an array of its own, which a decoding loop updates
    in place, where a scan would copy all of them in every step.

    Attributes:
      config: of the model.
      is_decoder: which of its two stacks it is.
      dtype: of the computation.
      remat: a key of `REMAT_POLICIES`.
      scan_layers: False unrolls the scan. The numbers are the same, but for the order of some sums; what a layer leaves
        for the backward pass then is an array of its own, which a scan copies into one of all layers. With `none` the
        compiler may keep norms and activations as well, which in a scan are computed again.
    """

    config: TransformerConfig
    is_decoder: bool
    dtype: Any
    remat: str
    scan_layers: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: Context,
        cache: tuple[LayerCache, ...] | None = None,
        *,
        enable_dropout: bool = False,
    ) -> tuple[jax.Array, tuple[LayerCache, ...] | None]:
        """Maps token embeddings `[B, T, D]` to hidden states, and the cache of each layer to the next one."""
        cfg = self.config
        x = self._embed(x, context, enable_dropout)
        if cfg.positions == "rotary":
            turn = rotation(context.positions, cfg.stack_head_dim(self.is_decoder), cfg.rotary_base, cfg.rotary_scaling)
            context = dataclasses.replace(context, rotation=turn)
        if cfg.positions == "relative" and not cfg.relative_bias_per_layer:
            bias = relative_bias(cfg, self.is_decoder)(
                *_bias_places(x, None if cache is None else cache[0], context.mask)
            )
            context = dataclasses.replace(context, bias=bias)
        if cache is None:
            x = self._scan(x, context, enable_dropout)
        else:
            x, cache = self._step(x, context, cache)
        if cfg.final_norm:
            x = cast(Any, make_norm(cfg, self.dtype, "final_norm"))(x)
        if cfg.dropout_style == "t5":
            x = make_dropout(cfg)(x, enabled=enable_dropout)
        return x, cache

    def _windows(self, depth: int) -> Any:
        if not self.config.attention_window:
            return None
        dense = self.config.alternating_window & (np.arange(depth) % 2 == 0)
        return np.where(dense, _NO_WINDOW, self.config.attention_window)

    def _scan(self, x: jax.Array, context: Context, enable_dropout: bool) -> jax.Array:
        depth = self.config.num_decoder_layers if self.is_decoder else self.config.num_encoder_layers
        layer = Layer
        if self.remat != "none":
            # Outside of a loop XLA would find that it has what is to be computed again, and keep it.
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},  # the latter only where somebody looks inside
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (nn.broadcast, nn.broadcast, 0)),
            length=depth,
            unroll=1 if self.scan_layers else depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config, self.is_decoder, self.dtype, enable_dropout, name="layers")
        return layers(x, context, None, self._windows(depth))[0]

    def _step(
        self, x: jax.Array, context: Context, cache: tuple[LayerCache, ...]
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        params = self.get_variable("params", "layers")
        windows = self._windows(len(cache))
        layer, kept = Layer(self.config, self.is_decoder, self.dtype, enable_dropout=False, parent=None), []
        for index, memory in enumerate(cache):
            window = None if windows is None else int(windows[index])
            x, memory = layer.apply({"params": layer_params(params, index)}, x, context, memory, window)
            kept.append(memory)
        return x, tuple(kept)

    def _embed(self, x: jax.Array, context: Context, enable_dropout: bool) -> jax.Array:
        cfg = self.config
        x = x.astype(stream_dtype(self.dtype))
        if cfg.scaled_embedding:
            x = x * cfg.embed_dim**0.5
        if cfg.positions == "learned":
            rows = cfg.max_positions + cfg.position_offset
            x = x + self._table("positions", rows)(context.positions + cfg.position_offset)
        elif cfg.positions == "sinusoidal":
            x = x + sinusoids(context.positions, cfg.embed_dim).astype(self.dtype)
        if cfg.token_types and not self.is_decoder:
            types = jnp.zeros_like(context.positions) if context.token_types is None else context.token_types
            x = x + self._table("token_types", cfg.token_types, axis="types")(types)
        if cfg.embedding_norm:
            x = cast(Any, make_norm(cfg, x.dtype, "embedding_norm"))(x)
        return make_dropout(cfg)(x, enabled=enable_dropout)

    def _table(self, name: str, rows: int, axis: str = "positions") -> SmallEmbedding:
        init = initializers(self.config).positions
        return SmallEmbedding(rows, self.config.embed_dim, axis, init, dtype=self.dtype, name=name)


def layer_params(layers: Any, index: int) -> Any:
    """Returns the parameters of one layer, from stacked ones or from a tuple with those of each layer."""
    return layers[index] if isinstance(layers, tuple) else jax.tree.map(lambda x: x[index], layers)
