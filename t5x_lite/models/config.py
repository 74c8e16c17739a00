"""The shape of a model, as plain data; nothing here needs JAX."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from t5x_lite.errors import InputError


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that distinguishes one Transformer from another. A family is a set of these values, not code.

    Attributes:
      family: which file of `models/` it comes from.
      vocab_size: rows of the embedding table; may exceed the tokenizer's size (T5: 32,128 for 32,100 tokens).
      embed_dim: width of the residual stream (`d_model`).
      num_heads: attention heads.
      head_dim: size of one head (`d_kv`); `num_heads * head_dim` need not equal `embed_dim`.
      mlp_dim: width of the feed-forward block (`d_ff`).
      num_encoder_layers: encoder blocks.
      num_decoder_layers: decoder blocks.
      activation: of the feed-forward block.
      gated: whether the activation gates a second projection (`gated-gelu`).
      tied_head: whether the output head is the embedding table.
      scaled_head: whether the head's input is multiplied by embed_dim ** -0.5. T5 v1.0 ties and scales, v1.1 does
        neither; they are separate fields because confusing them is the classic way to load a T5 wrongly.
      relative_bias_buckets: distance buckets of the position bias.
      relative_bias_max_distance: distances beyond share the last bucket.
      relative_bias_per_layer: a bias table in every layer (umT5), instead of one shared by the stack.
      norm_epsilon: of the RMS norms.
      dropout_rate: in training, everywhere the T5 paper has it.
      pad_id: token id of padding, from which absent segment ids are derived.
      eos_id: token id that ends a sequence.
      decoder_start_id: the decoder's first input.
    """

    family: Literal["t5"] = "t5"
    vocab_size: int = 32128
    embed_dim: int = 512
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    activation: Literal["relu", "gelu_tanh"] = "relu"
    gated: bool = False
    tied_head: bool = True
    scaled_head: bool = True
    relative_bias_buckets: int = 32
    relative_bias_max_distance: int = 128
    relative_bias_per_layer: bool = False
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a size that no model can have."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", int) and not field.name.endswith("_id") and value < 1:
                raise InputError(f"model.{field.name} must be at least 1, not {value}")
            allowed = get_args(field.type)
            if allowed and value not in allowed:
                raise InputError(f"model.{field.name} '{value}' is unknown, allowed: {', '.join(allowed)}")
        # Half of the buckets may serve one direction, and half of those exact distances: at least one has to remain.
        if self.relative_bias_buckets < 4:
            raise InputError(f"model.relative_bias_buckets must be at least 4, not {self.relative_bias_buckets}")
        if self.relative_bias_max_distance <= self.relative_bias_buckets // 2:
            raise InputError(
                "model.relative_bias_max_distance must be greater than half of relative_bias_buckets,"
                f" {self.relative_bias_buckets // 2}, not {self.relative_bias_max_distance}"
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise InputError(f"model.dropout_rate must be in [0, 1), not {self.dropout_rate}")
        if not self.norm_epsilon > 0.0:
            raise InputError(f"model.norm_epsilon must be above 0, not {self.norm_epsilon}")
        for name in ("pad_id", "eos_id", "decoder_start_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise InputError(
                    f"model.{name} must be in [0, vocab_size = {self.vocab_size}), not {getattr(self, name)}"
                )

    def sharded_sizes(self) -> dict[str, int]:
        """Returns the sizes of the logical axes that a mesh may split, as the layers use them."""
        return {"vocab": self.vocab_size, "embed": self.embed_dim, "heads": self.num_heads, "mlp": self.mlp_dim}
