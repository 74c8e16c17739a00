"""How a fresh model's parameters are drawn, by the papers."""

import math
from dataclasses import dataclass

import jax

from t5x_lite.models.config import TransformerConfig
from t5x_lite.nn.parameters import Initializer, fan_in_normal

normal = jax.nn.initializers.normal


@dataclass(frozen=True)
class Initializers:
    """What each kind of parameter is drawn from; biases start at 0 and norm scales at 1.

    Attributes:
      embedding: of tokens.
      positions: of learned positions and token types.
      kernel: of every projection that is none of these:
      query: of attention queries.
      residual: of projections into the residual stream, of attention and feed-forward.
      head: of an output head of its own, and of classifiers.
    """

    embedding: Initializer
    positions: Initializer
    kernel: Initializer
    query: Initializer
    residual: Initializer
    head: Initializer


def initializers(config: TransformerConfig) -> Initializers:
    """Returns the initializers that `config.initialization` names.

    Sources: `t5` Raffel et al. 2020 with Mesh TensorFlow's code (queries take the 1/sqrt(head_dim) that its attention
    does not have); `fan_in` Chowdhery et al. 2022, section 2; `gpt2` Radford et al. 2019, section 2.3 and its code
    (positions half as large); `truncated_normal` Devlin et al. 2019 (cut off at two standard deviations).
    """
    kind = config.initialization
    if kind in ("t5", "fan_in"):
        fan_in = fan_in_normal()
        query = fan_in_normal(1.0 / config.head_dim) if kind == "t5" else fan_in
        return Initializers(normal(1.0), normal(1.0), fan_in, query, fan_in, fan_in)
    draw = jax.nn.initializers.truncated_normal if kind == "truncated_normal" else normal
    plain = draw(config.init_std)
    if kind != "gpt2":
        return Initializers(plain, plain, plain, plain, plain, plain)
    layers = config.num_encoder_layers + config.num_decoder_layers
    residual = draw(config.init_std / math.sqrt(2 * layers))
    return Initializers(plain, draw(config.init_std / 2), plain, plain, residual, plain)
