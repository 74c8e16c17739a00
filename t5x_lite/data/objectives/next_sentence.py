"""BERT's pre-training: masked language modelling of pairs, and whether the second of them follows the first."""

import dataclasses
from typing import ClassVar

import numpy as np

from t5x_lite.data.objectives.example import Example, Objective, Sides
from t5x_lite.data.objectives.masked_lm import Masking, room_for
from t5x_lite.data.objectives.sentences import sentence_bounds
from t5x_lite.data.objectives.vocabulary import Vocabulary
from t5x_lite.errors import InputError


@dataclasses.dataclass(frozen=True)
class NextSentence(Objective):
    """Two segments A and B of whole sentences, as in BERT's `create_pretraining_data.py` (Devlin et al. 2019, 3.1).

    A is the beginning of a window, up to the end of a sentence that is drawn uniformly. B is the rest of it, or, half
    of the time, sentences of another document, as many as fill the window, from one that is drawn uniformly. A window
    of a single sentence always gets the latter. A pair that is too long loses tokens of the longer segment, each from
    its front or its back by chance. The inputs are `[CLS] A [SEP] B [SEP]`.

    Google's script goes on with the sentences that B did not use; here a window is used once in an epoch. And where a
    document ends before the window is full, B of another document is as short as what it stands for, so that the length
    does not give the answer away.

    Attributes:
        masking: which tokens are hidden, and how.
        random_rate: how often B is of another document, in [0, 1].
        short_rate: how often only the beginning of the window is used, up to a uniform length, in [0, 1].
    """

    masking: Masking = dataclasses.field(default_factory=Masking)
    random_rate: float = 0.5
    short_rate: float = 0.1

    sides: ClassVar[Sides] = "encoder"
    arrays: ClassVar[tuple[str, ...]] = ("tokens", "other")
    joined: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("random_rate", "short_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} {getattr(self, name)}: must be from 0 to 1")

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """See `Objective.window`."""
        return room_for(2, input_length, self.sizes(2, vocabulary)[0] - 2)

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """See `Objective.sizes`: the window in three special tokens, and at least a token in A and in B."""
        return max(raw, 2) + len(vocabulary.prefix_ids) + 2 * len(vocabulary.suffix_ids), 0

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: a mask, a separator, and tokens that end sentences."""
        self.masking.check(vocabulary)
        vocabulary.require_sentence_ends()
        if not vocabulary.suffix_ids:
            raise InputError("next sentence: this tokenizer puts no separator after a text, as BERT's puts [SEP]")

    def pair(
        self, tokens: np.ndarray, other: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Draws A and B, without special tokens, and whether B is of the other document.

        Raises:
            InputError: for an empty window or document.
        """
        if not len(tokens) or not len(other):
            raise InputError("next sentence: a document without tokens")
        bounds = sentence_bounds(tokens, vocabulary)
        if rng.random() < self.short_rate and len(tokens) > 2:
            cut = int(np.searchsorted(bounds, rng.integers(2, len(tokens) + 1)))
            bounds = bounds[: cut + 1]
        sentences, length = len(bounds) - 1, int(bounds[-1])
        end = bounds[rng.integers(1, sentences) if sentences > 1 else 1]
        first, second = tokens[:end], tokens[end:length]
        is_random = sentences == 1 or bool(rng.random() < self.random_rate)
        if is_random:
            bounds = sentence_bounds(other, vocabulary)
            start = int(rng.integers(len(bounds) - 1))
            stop = max(int(np.searchsorted(bounds, bounds[start] + length - end)), start + 1)
            second = other[bounds[start] : bounds[min(stop, len(bounds) - 1)]]
        return *_truncate(first, second, max(length, 2), rng), is_random

    def __call__(
        self, tokens: np.ndarray, other: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary
    ) -> Example:
        """Makes a pair of int `tokens` [n], a window of one document, and `other` [m], all of another; see `pair`."""
        first, second, is_random = self.pair(tokens, other, rng, vocabulary)
        prefix, suffix = vocabulary.prefix_ids, vocabulary.suffix_ids
        inputs = np.array([*prefix, *first, *suffix, *second, *suffix], np.int32)
        types = np.zeros(len(inputs), np.int32)
        types[len(prefix) + len(first) + len(suffix) :] = 1
        return self.masking(inputs, rng, vocabulary, types, int(is_random))


def _truncate(
    first: np.ndarray, second: np.ndarray, limit: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Takes tokens from the longer one (the second if they are equal) until both together are no more than `limit`."""
    if len(first) + len(second) <= limit:
        return first, second
    shorter = min(len(first), len(second))
    lengths = (limit - limit // 2, limit // 2)  # where both lose tokens
    if shorter <= limit - shorter:
        lengths = (shorter, limit - shorter) if len(first) == shorter else (limit - shorter, shorter)
    kept = []
    for segment, length in zip((first, second), lengths, strict=True):
        from_front = int(rng.binomial(len(segment) - length, 0.5))
        kept.append(segment[from_front : from_front + length])
    return kept[0], kept[1]
