"""Masked language modelling: some tokens are hidden, and the model is asked for these."""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from t5x_lite.data.objectives.example import Example, Objective, Sides, surround
from t5x_lite.data.objectives.vocabulary import Vocabulary
from t5x_lite.errors import InputError


@dataclasses.dataclass(frozen=True)
class Masking:
    """Which tokens are hidden, and how (Devlin et al. 2019, section 3.1).

    Of the hidden tokens `mask` become the mask, `random` any token that is not special (perhaps the same), and the rest
    stay as they are. Special tokens are never hidden. Each reading of a text draws anew, as RoBERTa has it.

    Attributes:
        rate: the fraction to hide, in (0, 1].
        style: "google" hides exactly `max(1, round(rate n))` of a text's n tokens, special ones counted, if there are
            as many to hide (BERT's `create_pretraining_data.py`); "huggingface" hides each with that probability
            (transformers' `DataCollatorForLanguageModeling`).
        whole_words: whether words are hidden whole. In Google's style a word that would exceed the number is passed
            over, so that it is not always reached.
        max_predictions: in Google's style, the most tokens to hide; None is no limit.
        mask, random: fractions that come to at most 1.
    """

    rate: float = 0.15
    style: Literal["google", "huggingface"] = "google"
    whole_words: bool = False
    max_predictions: int | None = None
    mask: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise InputError(f"rate {self.rate}: must be above 0 and at most 1")
        if self.style not in ("google", "huggingface"):
            raise InputError(f"style '{self.style}': allowed are google, huggingface")
        if self.max_predictions is not None and self.max_predictions < 1:
            raise InputError(f"max_predictions {self.max_predictions}: must be at least 1")
        if self.mask < 0 or self.random < 0 or self.mask + self.random > 1:
            raise InputError(f"mask {self.mask} and random {self.random}: must be fractions that come to at most 1")

    def check(self, vocabulary: Vocabulary) -> None:
        """Raises InputError if the vocabulary has no mask, or, for whole words, does not show where one begins."""
        vocabulary.require_mask()
        if self.whole_words:
            vocabulary.require_word_starts()

    def choose(self, inputs: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
        """Draws the places to hide in int `inputs` [n], which have their special tokens: int64, ascending."""
        places = np.flatnonzero(~vocabulary.special[inputs])
        words = _words(places, inputs, vocabulary) if self.whole_words else None
        if self.style == "huggingface":
            if words is None:
                return places[rng.random(len(places)) < self.rate]
            return places[np.repeat(rng.random(len(words)) < self.rate, words)]
        count = max(1, round(len(inputs) * self.rate))
        count = count if self.max_predictions is None else min(self.max_predictions, count)
        if words is None:
            return np.sort(places[rng.permutation(len(places))[:count]])
        is_chosen = np.zeros(len(words), bool)
        lengths = words.tolist()
        for word in rng.permutation(len(words)).tolist():
            if lengths[word] <= count:
                is_chosen[word] = True
                count -= lengths[word]
            if not count:
                break
        return places[np.repeat(is_chosen, words)]

    def __call__(
        self,
        inputs: np.ndarray,
        rng: np.random.Generator,
        vocabulary: Vocabulary,
        types: np.ndarray | None = None,
        next_sentence: int | None = None,
    ) -> Example:
        """Returns the example of int32 `inputs` [n], which have their special tokens."""
        places = self.choose(inputs, rng, vocabulary)
        hidden, weights = inputs.copy(), np.zeros(len(inputs), np.float32)
        weights[places] = 1
        share = rng.random(len(places))
        hidden[places[share < self.mask]] = vocabulary.require_mask()
        replaced = places[(share >= self.mask) & (share < self.mask + self.random)]
        hidden[replaced] = vocabulary.ordinary[rng.integers(len(vocabulary.ordinary), size=len(replaced))]
        return Example(
            inputs=hidden,
            input_targets=inputs,
            input_weights=weights,
            input_types=types,
            next_sentence=next_sentence,
        )


@dataclasses.dataclass(frozen=True)
class MaskedLM(Objective):
    """Masked language modelling of running text, for an encoder alone (RoBERTa; BERT without its pairs).

    A window stands between the special tokens of the model, `<s> ... </s>` or `[CLS] ... [SEP]`. Texts are laid end to
    end, with a separator after each (RoBERTa's "full sentences"; `sentence_windows` cuts at the ends of sentences).

    Attributes:
        masking: which tokens are hidden, and how.
    """

    masking: Masking = dataclasses.field(default_factory=Masking)

    sides: ClassVar[Sides] = "encoder"
    arrays: ClassVar[tuple[str, ...]] = ("tokens",)
    joined: ClassVar[bool] = True

    def separator(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """See `Objective.separator`: EOS, which is BERT's `[SEP]`."""
        return () if vocabulary.eos_id is None else (vocabulary.eos_id,)

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """See `Objective.window`."""
        return room_for(1, input_length, self.sizes(0, vocabulary)[0])

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """See `Objective.sizes`."""
        return raw + len(vocabulary.prefix_ids) + len(vocabulary.suffix_ids), 0

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: a mask, and words if these are hidden whole."""
        self.masking.check(vocabulary)

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        """Hides tokens of int `tokens` [n] afresh."""
        return self.masking(surround(vocabulary.prefix_ids, tokens, vocabulary.suffix_ids), rng, vocabulary)


def _words(places: np.ndarray, inputs: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Returns int64 [words]: how many of `places` belong to each word, in order."""
    starts = vocabulary.require_word_starts()[inputs[places]]
    starts[:1] = True
    starts[1:] |= np.diff(places) > 1
    return np.diff(np.append(np.flatnonzero(starts), len(places)))


def room_for(least: int, input_length: int, special: int) -> int:
    """Returns how many tokens fit in a row beside `special` ones; raises InputError if fewer than `least`."""
    if input_length < special + least:
        raise InputError(f"input_length {input_length}: must be at least {special + least}")
    return input_length - special
