"""Numbers that are compared with other people's; each says exactly what it counts."""

import math
from collections.abc import Sequence


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
