"""Checkpoints that others have written, whichever kind: what `load`, `import` and `init_from` share."""

import warnings
from collections.abc import Collection, Sequence
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


# What a Hugging Face directory may ask for that is not done here, unless it has the neutral value of its kind.
_NOT_DONE = (
    "num_beam_groups",
    "diversity_penalty",
    "penalty_alpha",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "guidance_scale",
    "sequence_bias",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "constraints",
    "renormalize_logits",
    "remove_invalid_values",
    "top_h",
    "watermarking_config",
)
_IDS = ("eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def read_generation(directory: str | Path, config: TransformerConfig, known: Collection[str]) -> dict[str, Any]:
    """Returns the generation settings published with a model: `generation_config.json`, else those in `config.json`.

    Token ids are left out: they are in the model's configuration. With an encoder `max_length` and `min_length`, which
    count the decoder's start token, become `max_new_tokens` and `min_new_tokens`; of a decoder alone, where they count
    the prompt, they are left out.

    Args:
      directory: a Hugging Face directory, or a run that was imported from one; others have no such settings.
      config: of the model.
      known: names of settings that are wanted.
    """
    files = (Path(directory).expanduser() / name for name in ("generation_config.json", "config.json"))
    path = next((path for path in files if path.is_file()), None)
    if path is None or not config.num_decoder_layers:
        return {}
    stored = {name: value for name, value in huggingface.read_json(path).items() if value is not None}
    for name in _NOT_DONE:
        if stored.get(name) not in (None, 0, 1, False, [], {}):
            warnings.warn(f"{path} asks for {name} {stored[name]}, which is not done here", stacklevel=2)
    settings = {name: value for name, value in stored.items() if name in known and name not in _IDS}
    if config.num_encoder_layers:
        for side in ("max", "min"):
            length = stored.get(f"{side}_length")
            if isinstance(length, int) and length > 1:
                settings.setdefault(f"{side}_new_tokens", length - 1)
    return settings
