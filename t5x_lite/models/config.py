"""The shape of a model, as plain data; nothing here needs JAX."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from t5x_lite.errors import InputError

Head = Literal["masked_lm", "pretraining", "sequence_classification", "token_classification", "span"]


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that distinguishes one Transformer from another. A family is a set of these values, not code.

    Attributes:
      family: which published family it belongs to; decides nothing but the names its tensors have elsewhere,
        and which rows of T5's published vocabularies are padding.
      vocab_size: rows of the embedding table; may exceed the tokenizer's size (T5: 32,128 for 32,100 tokens).
      embed_dim: width of the residual stream (`d_model`).
      num_heads: attention heads.
      num_kv_heads: heads of keys and values: fewer in grouped-query attention, 1 in multi-query; 0: `num_heads`.
      head_dim: size of one head (`d_kv`); `num_heads * head_dim` need not equal `embed_dim`.
      mlp_dim: width of the feed-forward block (`d_ff`).
      num_encoder_layers: encoder blocks; 0: a decoder alone (GPT, Llama).
      num_decoder_layers: decoder blocks; 0: an encoder alone (BERT).
      decoder_num_heads: attention heads of the decoder, together as wide as the encoder's; 0: `num_heads`.
      decoder_mlp_dim: width of the decoder's feed-forward block; 0: `mlp_dim`.
      activation: of the feed-forward block; gelu is the exact one (erf), gelu_tanh its approximation.
      gated: whether the activation gates a second projection (`gated-gelu`, SwiGLU).
      bias: whether projections and layer norms have a bias.
      norm: rms (no mean, no bias) or layer.
      norm_position: pre (of a sub-layer's input) or post (of its sum with the residual stream).
      norm_epsilon: added to the variance or the mean square.
      final_norm: whether the stream is normalised after the last block.
      embedding_norm: whether it is normalised before the first.
      parallel_block: attention and feed-forward read the same input, and one norm (PaLM).
      scaled_attention: logits are divided by sqrt(head_dim). T5 folds that into its initialisation.
      attention_window: keys a query sees, itself included, counted back (both ways in an encoder); 0: all.
      alternating_window: only every second layer has the window, the first has not (GPT-3).
      positions: how a token knows its place.
      max_positions: positions the model was made for: the rows of a learned table, without the offset.
      position_offset: rows of a learned table before position 0 (BART and RoBERTa: 2).
      relative_bias_buckets: distance buckets of T5's relative bias.
      relative_bias_max_distance: distances beyond share the last bucket.
      relative_bias_per_layer: a bias table in every layer (umT5), instead of one shared by the stack.
      rotary_base: theta, of rotary positions.
      rotary_scaling: Llama 3.1's stretching of rotary positions: factor, low and high frequency factor, original
        length; None: none.
      token_types: rows of the token type table (BERT's segments A and B); 0: no table.
      scaled_embedding: embeddings are multiplied by sqrt(embed_dim) (mBART).
      tied_head: whether the output head is the embedding table.
      scaled_head: whether the head's input is multiplied by embed_dim ** -0.5. T5 v1.0 ties and scales, v1.1 does
        neither; they are separate fields because confusing them is the classic way to load a T5 wrongly.
      head_bias: a number added to each token's logit (BART's final_logits_bias, BERT's prediction bias).
      head: of an encoder alone; None: hidden states. A decoder always predicts tokens.
      num_labels: classes of a classification head.
      pooler: whether there is a tanh layer over the first token.
      dropout_rate: in training, everywhere the family has dropout: embedding, sub-layers, and the two below.
      attention_dropout_rate: of attention weights; None: as `dropout_rate`.
      mlp_dropout_rate: inside the feed-forward block; None: as `dropout_rate`.
      dropout_style: t5: one mask for all positions of a row, and dropout after the final norm too; elementwise:
        every number on its own.
      initialization: t5 (fan-in, small queries), fan_in (PaLM), normal (N(0, init_std)), gpt2 (normal, projections
        into the residual stream divided by sqrt of their number), truncated_normal (BERT).
      init_std: standard deviation of the last three.
      pad_id: token id of padding, from which absent segment ids are derived; None: nothing is padding.
      bos_id: token id that begins a text, if there is one.
      eos_id: token id that ends a sequence, if there is one.
      stop_ids: further ids that end a generated sequence (Llama 3 has several).
      decoder_start_id: the decoder's first input.
      forced_bos_id: what generation must begin with (BART for summarisation).
      forced_eos_id: what it must end with when it is cut off.
    """

    family: Literal["t5", "bart", "gpt", "llama", "palm", "bert", "roberta"] = "t5"
    vocab_size: int = 32128
    embed_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 0
    head_dim: int = 64
    mlp_dim: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    decoder_num_heads: int = 0
    decoder_mlp_dim: int = 0
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"
    gated: bool = False
    bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-6
    final_norm: bool = True
    embedding_norm: bool = False
    parallel_block: bool = False
    scaled_attention: bool = False
    attention_window: int = 0
    alternating_window: bool = False
    positions: Literal["relative", "learned", "sinusoidal", "rotary", "none"] = "relative"
    max_positions: int = 0
    position_offset: int = 0
    relative_bias_buckets: int = 32
    relative_bias_max_distance: int = 128
    relative_bias_per_layer: bool = False
    rotary_base: float = 10000.0
    rotary_scaling: tuple[float, float, float, int] | None = None
    token_types: int = 0
    scaled_embedding: bool = False
    tied_head: bool = True
    scaled_head: bool = True
    head_bias: bool = False
    head: Head | None = None
    num_labels: int = 2
    pooler: bool = False
    dropout_rate: float = 0.1
    attention_dropout_rate: float | None = None
    mlp_dropout_rate: float | None = None
    dropout_style: Literal["t5", "elementwise"] = "t5"
    initialization: Literal["t5", "fan_in", "normal", "gpt2", "truncated_normal"] = "t5"
    init_std: float = 0.02
    pad_id: int | None = 0
    bos_id: int | None = None
    eos_id: int | None = 1
    stop_ids: tuple[int, ...] = ()
    decoder_start_id: int = 0
    forced_bos_id: int | None = None
    forced_eos_id: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a size that no model can have."""
        self._check_values()
        self._check_stacks()
        self._check_positions()
        self._check_encoder_parts()

    def _check_values(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not isinstance(value, int):
                raise InputError(f"model.{field.name} must be a whole number, not {value!r}")
            if field.type is int and not field.name.endswith("_id"):
                least = 0 if field.name in _MAY_BE_0 else 1
                if value < least:
                    raise InputError(f"model.{field.name} must be at least {least}, not {value}")
            allowed = get_args(field.type)
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise InputError(f"model.{field.name} '{value}' is unknown, allowed: {', '.join(allowed)}")
        if self.head not in (None, *get_args(Head)):
            raise InputError(f"model.head '{self.head}' is unknown, allowed: {', '.join(get_args(Head))}, null")
        for name in ("dropout_rate", "attention_dropout_rate", "mlp_dropout_rate"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise InputError(f"model.{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("norm_epsilon", "init_std", "rotary_base"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(f"model.{name} must be above 0 and finite, not {getattr(self, name)}")
        for name in ("pad_id", "bos_id", "eos_id", "decoder_start_id", "forced_bos_id", "forced_eos_id"):
            if not 0 <= (getattr(self, name) or 0) < self.vocab_size:
                raise InputError(
                    f"model.{name} must be in [0, vocab_size = {self.vocab_size}), not {getattr(self, name)}"
                )
        if not all(0 <= token < self.vocab_size for token in self.stop_ids):
            raise InputError(
                f"model.stop_ids must be in [0, vocab_size = {self.vocab_size}), not {list(self.stop_ids)}"
            )

    def _check_stacks(self) -> None:
        _need(
            self.num_encoder_layers + self.num_decoder_layers > 0,
            "model.num_encoder_layers and model.num_decoder_layers are both 0: a model needs one of them",
        )
        joined = self.num_heads * self.head_dim
        for is_decoder in (False, True) if self.num_decoder_layers else (False,):
            heads = self.heads(is_decoder)
            name = "decoder_num_heads" if is_decoder and self.decoder_num_heads else "num_heads"
            _need(joined % heads == 0, f"model.{name} {heads} does not divide num_heads * head_dim {joined}")
            _need(
                heads % self.kv_heads(is_decoder) == 0,
                f"model.{name} {heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
            )
            size = self.stack_head_dim(is_decoder)
            _need(
                self.positions != "rotary" or size % 2 == 0,
                f"model.positions=rotary needs an even head_dim in both stacks, not {size}",
            )
        _need(
            self.attention_window > 0 or not self.alternating_window,
            "model.alternating_window=true needs model.attention_window of at least 1",
        )
        _need(
            not self.parallel_block or (self.norm_position == "pre" and not self.num_encoder_layers),
            "model.parallel_block needs norm_position=pre and num_encoder_layers=0",
        )

    def _check_positions(self) -> None:
        if self.positions == "relative":
            # Half of the buckets may serve one direction, half of those exact distances: at least one has to remain.
            buckets, distance = self.relative_bias_buckets, self.relative_bias_max_distance
            _need(buckets >= 4, f"model.relative_bias_buckets must be at least 4, not {buckets}")
            _need(
                distance > buckets // 2,
                "model.relative_bias_max_distance must be greater than half of relative_bias_buckets,"
                f" {buckets // 2}, not {distance}",
            )
        if self.positions == "learned":
            _need(self.max_positions > 0, "model.positions=learned needs model.max_positions of at least 1")
        if self.positions == "sinusoidal":
            _need(self.embed_dim % 2 == 0, f"model.positions=sinusoidal needs an even embed_dim, not {self.embed_dim}")
        if self.rotary_scaling is not None:
            factor, low, high, length = self.rotary_scaling
            _need(
                factor > 0 and 0 < low < high and length > 0,
                "model.rotary_scaling must be factor, low and high frequency factor and length, above 0 and low below"
                f" high, not {list(self.rotary_scaling)}",
            )

    def _check_encoder_parts(self) -> None:
        if self.num_decoder_layers:
            _need(self.head is None, f"model.head={self.head} is for an encoder alone, with num_decoder_layers=0")
            _need(not self.pooler, "model.pooler is for an encoder alone, with num_decoder_layers=0")
        if self.head in ("pretraining", "sequence_classification"):
            _need(self.pooler, f"model.head={self.head} needs model.pooler=true")
        _need(
            self.num_encoder_layers > 0 or not self.token_types,
            f"model.token_types {self.token_types} is for an encoder, and num_encoder_layers is 0",
        )

    def heads(self, is_decoder: bool) -> int:
        """Returns the number of attention heads of a stack."""
        return (is_decoder and self.decoder_num_heads) or self.num_heads

    def kv_heads(self, is_decoder: bool) -> int:
        """Returns the number of key and value heads of a stack."""
        return self.num_kv_heads or self.heads(is_decoder)

    def stack_head_dim(self, is_decoder: bool) -> int:
        """Returns the size of one head of a stack."""
        return self.num_heads * self.head_dim // self.heads(is_decoder)

    def stack_mlp_dim(self, is_decoder: bool) -> int:
        """Returns the width of a stack's feed-forward block."""
        return (is_decoder and self.decoder_mlp_dim) or self.mlp_dim

    def rate(self, own: float | None) -> float:
        """Returns a dropout rate of its own, or where there is none the family's."""
        return self.dropout_rate if own is None else own

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a generated sequence."""
        return (*(() if self.eos_id is None else (self.eos_id,)), *self.stop_ids)

    @property
    def fill_id(self) -> int:
        """What rows are filled up with: the pad, or in a vocabulary without one the end of a sequence."""
        return next((i for i in (self.pad_id, self.eos_id) if i is not None), 0)

    def sharded_sizes(self) -> dict[str, int]:
        """Returns the sizes of the logical axes that a mesh may split, as the layers use them."""
        stacks = [d for d, layers in ((False, self.num_encoder_layers), (True, self.num_decoder_layers)) if layers]
        sizes = {
            "vocab": self.vocab_size,
            "embed": self.embed_dim,
            # What both stacks can be split by.
            "heads": math.gcd(*(self.heads(d) for d in stacks)),
            "mlp": math.gcd(*(self.stack_mlp_dim(d) for d in stacks)),
        }
        if self.num_kv_heads > 1:  # a single one is not split
            sizes["kv_heads"] = self.num_kv_heads
        return sizes


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


_MAY_BE_0 = (
    "num_kv_heads",
    "num_encoder_layers",
    "num_decoder_layers",
    "decoder_num_heads",
    "decoder_mlp_dim",
    "attention_window",
    "max_positions",
    "position_offset",
    "token_types",
)
