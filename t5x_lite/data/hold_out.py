"""Which records are kept apart for evaluation: by what they say, so that it does not change when others are added."""

import numpy as np

from t5x_lite.errors import InputError

# Running text is held out in blocks of neighbouring records, so that what is held out can still be read as text.
BLOCK_CHARACTERS = 10_000


def held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Returns bool [n], true for about `fraction` of the records; those with equal keys are on one side.

    Args:
        keys: uint64 [n], `tokens.text_hashes` of what decides.
        fraction: in (0, 1). Neither side is left empty.

    Raises:
        InputError: for a fraction outside (0, 1), or fewer than two different keys.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation fraction {fraction}: must be above 0 and below 1")
    if not len(keys) or (keys == keys[0]).all():
        raise InputError(
            f"cannot hold out a validation set: {len(keys)} records, fewer than 2 different ones; give data.eval_path"
        )
    held = keys < np.uint64(int(fraction * 2**64))
    if not held.any():
        held = keys == keys.min()
    elif held.all():
        held = keys != keys.max()
    return held


def held_out_blocks(keys: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Returns what `held_out` does, but for blocks of neighbours of about ten thousand characters.

    Of a small corpus they are a hundredth of it, so that there are enough of them to hold out a fair share.

    Args:
        keys: uint64 [n].
        sizes: int64 [n], characters of each record.
        fraction: as for `held_out`.
    """
    total = int(sizes.sum())
    blocks = (np.cumsum(sizes) - sizes) // max(1, min(BLOCK_CHARACTERS, total // 100))
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    if not len(starts):
        return held_out(keys, fraction)
    of_block = np.bitwise_xor.reduceat(keys, starts)
    return np.repeat(held_out(of_block, fraction), np.diff(np.append(starts, len(keys))))
