"""What a batch has to be that is generated from."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite.errors import InputError, nearest
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.transformer import decoder_segments, encoder_segments

_NAMES = tuple(
    f"{side}_{name}"
    for side, own in (("encoder", ("token_types",)), ("decoder", ("target_tokens", "loss_weights")))
    for name in ("input_tokens", "segment_ids", "positions", *own)
)


def checked(batch: Mapping[str, Any], config: TransformerConfig) -> tuple[dict[str, np.ndarray], int, int]:
    """Returns the arrays `[B, L]` of a batch, and how many tokens its longest input and its longest prompt have.

    A side that is not there has a single token, the decoder's first input.

    Args:
      batch: lists or arrays by the names of the batch contract; those of a side have the shape of its input tokens.
        Prompts are padded on the right.
      config: of the model, which needs the encoder's tokens or, without an encoder, the decoder's.

    Raises:
      InputError: anything else.
    """
    if not isinstance(batch, Mapping):
        raise InputError(f"a batch must be a dict of arrays, not a {type(batch).__name__}")
    for name in batch:
        if name not in _NAMES:
            raise InputError(f"the batch has '{name}', allowed: {', '.join(_NAMES)}{nearest(str(name), _NAMES)}")
    needed = f"{'encoder' if config.num_encoder_layers else 'decoder'}_input_tokens"
    if needed not in batch:
        raise InputError(f"the batch needs {needed}, it has {', '.join(batch) or 'nothing'}")
    arrays = {name: _array(name, value) for name, value in batch.items()}
    for name, array in arrays.items():
        tokens = f"{name.partition('_')[0]}_input_tokens"
        if tokens not in arrays:
            raise InputError(f"{name} needs {tokens}, which the batch has not")
        given, wanted = list(array.shape), list(arrays[tokens].shape)
        if given != wanted:
            raise InputError(f"{name} must have the shape of {tokens}, {wanted}, not {given}")
        if len(array) != len(arrays[needed]):
            raise InputError(f"{name} has {len(array)} rows, but {needed} has {len(arrays[needed])}")
    start = np.full((1, 1), config.decoder_start_id, np.int32)
    both: Any = {"encoder_input_tokens": start, "decoder_input_tokens": start, **arrays}
    sources, prompts = (np.asarray(of(both, config.pad_id)) for of in (encoder_segments, decoder_segments))
    if np.any(prompts[:, 1:] > prompts[:, :-1]):
        raise InputError("decoder_segment_ids rise within a row; prompts are padded on the right, with 0")
    if not np.all(prompts[:, 0]):
        row = int(np.argmin(prompts[:, 0]))
        raise InputError(f"the prompt of row {row} is empty: its decoder_segment_ids are 0")
    source, prompt = (int(np.max(np.sum(segments > 0, axis=1))) for segments in (sources, prompts))
    return arrays, source, prompt


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(f"{name} must be [rows, length], but its rows have different lengths") from None
    if array.ndim != 2 or not array.size:
        raise InputError(f"{name} must be [rows, length], both at least 1, not {list(array.shape)}")
    if array.dtype.kind not in "iu" and not name.endswith("_weights"):
        raise InputError(f"{name} must be whole numbers, not {array.dtype}")
    return array
