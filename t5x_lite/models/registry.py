"""From a name to a configuration, from a configuration to a model, from either to its family's file."""

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from t5x_lite.errors import InputError, nearest
from t5x_lite.models import bart, bert, gpt, llama, t5
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.weights import Stored

if TYPE_CHECKING:
    from t5x_lite.models.transformer import Transformer


class Family(Protocol):
    """What each family's file has: published sizes, and how Hugging Face spells its settings and its weights.

    Attributes:
      PRESETS: configurations by published name, in lower case.
      PREFIX: for each `model_type` of config.json that the file reads, what head models put before the names of their
        base model's tensors. Files of a base model alone (gpt2, bert-base-cased) may leave it out.
      BUFFERS: regular expressions that match whole names of tensors in Hugging Face files that are no parameters. They
        are for what `weights` leaves over, and only for that.
    """

    PRESETS: dict[str, TransformerConfig]
    PREFIX: dict[str, str]
    BUFFERS: tuple[str, ...]

    def from_huggingface(self, settings: Mapping[str, Any], names: Collection[str]) -> TransformerConfig:
        """Returns the configuration that a config.json of transformers 4 or 5 describes.

        Args:
          settings: the config.json. What it leaves out has the default of transformers' class.
          names: of the tensors in the file, with the prefix; may be empty. They tell heads, and whether there is an
            output head beside the embedding table: `tied_head` is then False, and it is for the caller to see whether
            the two are equal.

        Raises:
          InputError: a setting that changes the computation has a value that we do not have.
        """
        ...

    def to_huggingface(self, config: TransformerConfig) -> dict[str, Any]:
        """Returns the config.json of `config`, as transformers 4 writes it and 5 reads it, without a dtype.

        Raises:
          InputError: Hugging Face's class has no such model; the message names the first field that it lacks.
        """
        ...

    def weights(self, config: TransformerConfig) -> dict[str, Stored]:
        """Returns, for every parameter of `config` and no other, where Hugging Face's files have it.

        Args:
          config: of this family.

        Returns:
          By our path, joined by "/". Names are those of the head model, with the prefix.
        """
        ...


FAMILIES: dict[str, Family] = {
    "t5": t5,
    "bart": bart,
    "gpt": gpt,
    "llama": llama,
    "palm": llama,
    "bert": bert,
    "roberta": bert,
}
"""The file of each `TransformerConfig.family`."""

_FILES: tuple[Family, ...] = (t5, bart, gpt, llama, bert)

PRESETS: dict[str, TransformerConfig] = {name: config for file in _FILES for name, config in file.PRESETS.items()}

DTYPES = ("float32", "bfloat16", "float16")


def module_for(config: TransformerConfig) -> Family:
    """Returns the file of a configuration's family."""
    return FAMILIES[config.family]


def module_for_model_type(name: str) -> Family:
    """Returns the file that reads a Hugging Face configuration of this `model_type`.

    Raises:
      InputError: none does; the message has the nearest that one reads, or why this one is left out.
    """
    for file in _FILES:
        if name in file.PREFIX:
            return file
    if name in t5.REFUSED:
        raise InputError(f"model_type '{name}' is not supported: {t5.REFUSED[name]}")
    known = [kind for file in _FILES for kind in file.PREFIX]
    raise InputError(f"model_type '{name}' is unknown, allowed: {', '.join(known)}{nearest(name, known)}")


def preset(name: str) -> TransformerConfig:
    """Returns the frozen configuration of a published model, such as `preset("t5-small")`.

    Raises:
      InputError: no model of that name; the message has the nearest one.
    """
    if name not in PRESETS:
        raise InputError(f"unknown model '{name}'{nearest(name, PRESETS)} (one of {', '.join(PRESETS)})")
    return PRESETS[name]


def build(
    config: TransformerConfig | str, dtype: Any = "float32", remat: str = "none", *, scan_layers: bool = True
) -> "Transformer":
    """Returns the Flax module of a configuration or preset name.

    Args:
      config: the shape of the model.
      dtype: of the computation, float32, bfloat16 or float16; parameters stay float32.
      remat: what the backward pass recomputes: `none`, `minimal` (keeps matrix products), `full` or `offload`.
      scan_layers: whether a stack is a loop over its layers. False compiles longer and on a CPU trains a little faster.

    Raises:
      InputError: unknown preset, dtype or remat policy.
    """
    import jax.numpy as jnp

    from t5x_lite.models.stack import REMAT_POLICIES
    from t5x_lite.models.transformer import Transformer

    config = preset(config) if isinstance(config, str) else config
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise InputError(f"dtype '{name}' is not supported, allowed: {', '.join(DTYPES)}{nearest(name, DTYPES)}")
    if remat not in REMAT_POLICIES:
        hint = nearest(remat, REMAT_POLICIES)
        raise InputError(f"remat '{remat}' is unknown, allowed: {', '.join(REMAT_POLICIES)}{hint}")
    return Transformer(config, dtype=jnp.dtype(name), remat=remat, scan_layers=scan_layers)


def count_parameters(config: TransformerConfig | str) -> int:
    """Returns the number of parameters, without allocating any."""
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(build(config).param_shapes()))
