"""Checkpoints that others have written, whichever kind: what `load`, `import` and `init_from` share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5x_lite.errors import InputError
from t5x_lite.interop import huggingface, t5x
from t5x_lite.models.config import TransformerConfig

KINDS = "a Hugging Face directory (config.json and weights) or a T5X or Mesh TensorFlow checkpoint"


def is_foreign(path: str | Path) -> bool:
    """Returns whether there is a checkpoint of Hugging Face, T5X or Mesh TensorFlow at `path`."""
    return huggingface.is_huggingface(path) or t5x.is_t5x(path)


def read_config(path: str | Path) -> TransformerConfig:
    """Returns the shape of the model at `path`.

    Raises:
      InputError: nothing there that we know, or a model that we do not have.
    """
    if huggingface.is_huggingface(path):
        return huggingface.read_config(path)
    if t5x.is_t5x(path):
        return t5x.read_config(path)
    raise InputError(f"'{path}' is not {KINDS}")


def load_params(
    path: str | Path,
    config: TransformerConfig,
    abstract: Any,
    *,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> Any:
    """Reads the parameters at `path` straight to their layouts.

    Args:
      path: as `is_foreign`.
      config: of the model, usually `read_config(path)`.
      abstract: tree of `jax.ShapeDtypeStruct`s with the layouts wanted; values are cast to their dtypes.
      allow_missing: patterns of parameters that the checkpoint may lack, see `huggingface.load_params`.
      allow_unused: patterns of its tensors that the model may leave unread.

    Raises:
      CheckpointMismatch: its tensors are not the model's parameters.
      InputError: it cannot be read.
    """
    if huggingface.is_huggingface(path):
        return huggingface.load_params(path, config, abstract, allow_missing=allow_missing, allow_unused=allow_unused)
    if allow_missing or allow_unused:
        raise InputError(f"allow_missing and allow_unused are for Hugging Face directories, and '{path}' is none")
    return t5x.load_params(path, config, abstract)
