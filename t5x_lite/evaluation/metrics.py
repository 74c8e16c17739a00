"""Numbers that are compared with other people's; each says exactly what it counts."""

import collections
import math
from collections.abc import Sequence

import numpy as np

from t5x_lite.errors import InputError


def exact_match(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the share of predictions that equal their target, surrounding white space aside; in [0, 1]."""
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    return sum(p.strip() == t.strip() for p, t in zip(predictions, targets, strict=True)) / max(len(targets), 1)


def perplexity(nats_per_token: float) -> float:
    """Returns exp of the loss."""
    return math.exp(min(nats_per_token, 700.0))  # beyond, a float overflows


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Returns the code length of a text in bits per byte of its UTF-8 form; comparable across tokenizers."""
    return nats / math.log(2) / num_bytes


def majority_baseline(targets: Sequence[str]) -> float:
    """Returns the accuracy, in [0, 1], of always answering the most frequent target; raises InputError for none."""
    if not targets:
        raise InputError("no targets to take a majority of")
    return max(collections.Counter(targets).values()) / len(targets)


def unigram_entropy(token_counts: np.ndarray) -> float:
    """Returns the entropy, in nats a token, of tokens drawn by their counts [vocab]: the loss without context.

    Raises:
        InputError: if no token is counted.
    """
    counts = np.asarray(token_counts, np.float64)
    if not counts.sum() > 0:
        raise InputError("no tokens to measure the entropy of")
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
