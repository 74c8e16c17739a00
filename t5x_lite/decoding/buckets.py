"""Batches of any shape in a few shapes, because every shape that a compiled function sees compiles it anew."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.transformer import decoder_segments, encoder_segments

SHORTEST = 16  # tokens; shorter sequences gain nothing by a shape of their own


def bucket(size: int, multiple: int) -> int:
    """Returns the least power of two times `multiple` that holds `size`."""
    result = multiple
    while result < size:
        result *= 2
    return result


def length_bucket(length: int, config: TransformerConfig) -> int:
    """Returns the padded length of a sequence: no more than the model has positions."""
    padded = bucket(length, SHORTEST)
    return min(padded, config.max_positions) if config.positions == "learned" else padded


def padded(batch: Mapping[str, Any], config: TransformerConfig, rows_multiple: int) -> dict[str, np.ndarray]:
    """Returns the batch with the rows and lengths of its bucket.

    Padding behind the last real token of all rows is cut off first. Added rows repeat the last one, and so end when it
    does: a loop that waits for all rows waits no longer.

    Args:
      batch: `encoder_*` and `decoder_*` arrays `[B, L]` by the names of the batch contract, segment ids or not.
      config: of the model, for its pad id and its positions.
      rows_multiple: over how many devices the rows are spread.
    """
    arrays = {key: np.asarray(value) for key, value in batch.items()}
    for side, segments in (("encoder", encoder_segments), ("decoder", decoder_segments)):
        if f"{side}_input_tokens" not in arrays:
            continue
        arrays[f"{side}_segment_ids"] = real = np.asarray(segments(arrays, config.pad_id))
        length = int(np.max(np.flatnonzero(np.any(real > 0, axis=0)), initial=0)) + 1
        for key in [key for key in arrays if key.startswith(f"{side}_")]:
            fill = config.fill_id if key.endswith("_tokens") else 0
            short = arrays[key][:, :length]
            behind = max(length_bucket(length, config) - short.shape[1], 0)  # none behind much padding on the left
            arrays[key] = np.pad(short, ((0, 0), (0, behind)), constant_values=fill)
    rows = len(next(iter(arrays.values())))
    below = bucket(rows, rows_multiple) - rows
    return {key: np.pad(value, ((0, below), (0, 0)), mode="edge") for key, value in arrays.items()}
