"""BART's denoising: a text is damaged, in one way or in several, and the model is to say the original."""

import dataclasses
import math
from typing import ClassVar, Protocol

import numpy as np

from t5x_lite.data.objectives.example import Example, Objective, Sides, surround
from t5x_lite.data.objectives.sentences import sentence_bounds
from t5x_lite.data.objectives.vocabulary import Vocabulary
from t5x_lite.errors import InputError


class Noise(Protocol):
    """A way to damage a text. It makes no text longer, and leaves special tokens where they are among the others."""

    def check(self, vocabulary: Vocabulary) -> None:
        """Raises InputError if the vocabulary lacks what it needs."""
        ...

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
        """Returns the damaged int `tokens` [n], in a new array."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenMasking:
    """Tokens are replaced by the mask: exactly `ceil(rate n)` of a text's n tokens (or words), as in fairseq.

    Attributes:
        rate: in [0, 1].
        whole_words: whether whole words are chosen; each of their tokens becomes a mask.
    """

    rate: float = 0.3
    whole_words: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def check(self, vocabulary: Vocabulary) -> None:
        """See `Noise.check`."""
        vocabulary.require_mask()
        if self.whole_words:
            vocabulary.require_word_starts()

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
        """See `Noise`."""
        damaged = tokens.copy()
        damaged[_choose(tokens, self.rate, self.whole_words, rng, vocabulary)] = vocabulary.require_mask()
        return damaged


@dataclasses.dataclass(frozen=True)
class TokenDeletion:
    """Tokens are left out, as many as `TokenMasking` replaces; the model has to find where.

    Attributes:
        rate: in [0, 1].
        whole_words: whether whole words are chosen.
    """

    rate: float = 0.3
    whole_words: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def check(self, vocabulary: Vocabulary) -> None:
        """See `Noise.check`."""
        if self.whole_words:
            vocabulary.require_word_starts()

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
        """See `Noise`."""
        kept = np.ones(len(tokens), bool)
        kept[_choose(tokens, self.rate, self.whole_words, rng, vocabulary)] = False
        return tokens[kept]


@dataclasses.dataclass(frozen=True)
class TextInfilling:
    """Spans of tokens are replaced by one mask each; a span of no tokens is a mask that is put in between.

    The lengths follow a Poisson distribution; they are drawn until they come to `ceil(rate n)` tokens (or words), the
    last being cut to that. As in fairseq, except that there spans may lie over one another, so that fewer tokens are
    replaced than asked for: here all orders of spans and kept tokens are equally likely. And there are never more spans
    than tokens to replace, so that a text does not grow (the last of them then takes all that are left).

    Attributes:
        rate: the fraction of the tokens to replace, in [0, 1].
        mean_span_length: the Poisson distribution's mean, above 0.
        whole_words: whether a span's length is counted in words, as in fairseq.
    """

    rate: float = 0.3
    mean_span_length: float = 3.0
    whole_words: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if not self.mean_span_length > 0:
            raise InputError(f"mean_span_length {self.mean_span_length}: must be above 0")

    def check(self, vocabulary: Vocabulary) -> None:
        """See `Noise.check`."""
        vocabulary.require_mask()
        if self.whole_words:
            vocabulary.require_word_starts()

    def spans(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws the spans of a text of `length` tokens: int64 starts and lengths, from left to right.

        Spans may touch, and several may begin at one place, of which all but the last are of no tokens.
        """
        budget = _count(length, self.rate)
        lengths = self._lengths(budget, rng)
        kept = length - budget
        # Among the places of kept tokens and spans, those of the spans.
        places = np.sort(rng.permutation(kept + len(lengths))[: len(lengths)])
        starts = places - np.arange(len(lengths)) + np.cumsum(lengths) - lengths
        return starts, lengths

    def _lengths(self, budget: int, rng: np.random.Generator) -> np.ndarray:
        lengths = rng.poisson(self.mean_span_length, budget)
        total = np.cumsum(lengths)
        spans = min(int(np.searchsorted(total, budget)) + 1, budget)
        if spans:
            lengths[spans - 1] += budget - total[spans - 1]
        return lengths[:spans]

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
        """See `Noise`."""
        units = _units(tokens, self.whole_words, vocabulary)  # the first token of each unit, and the end
        starts, lengths = self.spans(len(units) - 1, rng)
        places = np.flatnonzero(~vocabulary.special[tokens])
        change = np.zeros(len(places) + 1, np.int64)
        np.add.at(change, units[starts], 1)
        np.add.at(change, units[starts + lengths], -1)
        kept = np.ones(len(tokens), bool)
        kept[places[np.cumsum(change[:-1]) > 0]] = False
        # A mask goes before the token where its span begins; at the end, behind the last one.
        ends = np.append(places, places[-1] + 1 if len(places) else 0)
        before = ends[units[starts]]
        at = np.concatenate([[0], np.cumsum(kept)])[before]
        return np.insert(tokens[kept], at, vocabulary.require_mask())


@dataclasses.dataclass(frozen=True)
class SentencePermutation:
    """The sentences are put in a random order; see `sentence_bounds` for what a sentence is."""

    def check(self, vocabulary: Vocabulary) -> None:
        """See `Noise.check`."""
        vocabulary.require_sentence_ends()

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
        """See `Noise`."""
        bounds = sentence_bounds(tokens, vocabulary)
        order = rng.permutation(len(bounds) - 1)
        return np.concatenate([tokens[:0], *(tokens[bounds[i] : bounds[i + 1]] for i in order)])


@dataclasses.dataclass(frozen=True)
class DocumentRotation:
    """The text begins at a token that is drawn uniformly, and its beginning follows its end."""

    def check(self, vocabulary: Vocabulary) -> None:
        """See `Noise.check`: it needs nothing."""

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
        """See `Noise`."""
        return np.roll(tokens, -int(rng.integers(max(len(tokens), 1))))


@dataclasses.dataclass(frozen=True)
class Bart(Objective):
    """BART's objective (Lewis et al. 2020, section 2.2): the inputs are the damaged text, the targets the original.

    Both are in the special tokens of the model. The default is what BART itself was trained on: its sentences permuted,
    and 30 % of the tokens infilled.

    Attributes:
        noises: the ways to damage a text, one after the other.
    """

    noises: tuple[Noise, ...] = dataclasses.field(default_factory=lambda: (SentencePermutation(), TextInfilling()))

    sides: ClassVar[Sides] = "encoder_decoder"
    arrays: ClassVar[tuple[str, ...]] = ("tokens",)
    joined: ClassVar[bool] = False

    def separator(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """See `Objective.separator`: EOS, for those who join texts; fairseq's default does not."""
        return () if vocabulary.eos_id is None else (vocabulary.eos_id,)

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """See `Objective.window`."""
        inputs, targets = self.sizes(0, vocabulary)
        raw = min(input_length - inputs, input_length if target_length is None else target_length - targets)
        if raw < 1:
            raise InputError(
                f"rows of {input_length} and {target_length} tokens: need at least {inputs + 1} and {targets + 1}"
            )
        return raw

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """See `Objective.sizes`: the text in its special tokens, on either side."""
        prefix, suffix = vocabulary.target_affixes
        return raw + len(vocabulary.prefix_ids) + len(vocabulary.suffix_ids), raw + len(prefix) + len(suffix)

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: a mask, sentences, words, as the noises need them."""
        for noise in self.noises:
            noise.check(vocabulary)

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        """Damages int `tokens` [n] afresh."""
        damaged = tokens.astype(np.int32)
        for noise in self.noises:
            damaged = noise(damaged, rng, vocabulary)
        prefix, suffix = vocabulary.target_affixes
        return Example(
            surround(vocabulary.prefix_ids, damaged, vocabulary.suffix_ids), surround(prefix, tokens, suffix)
        )


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise InputError(f"rate {rate}: must be from 0 to 1")


def _count(units: int, rate: float) -> int:
    # 0.07 of 100 is 7, although floating point makes a little more of it.
    return math.ceil(units * rate - 1e-6)


def _units(tokens: np.ndarray, whole_words: bool, vocabulary: Vocabulary) -> np.ndarray:
    """Returns int64 [units + 1]: where units begin among the tokens that are not special, and how many these are."""
    ordinary = ~vocabulary.special[tokens]
    if not whole_words:
        return np.arange(int(ordinary.sum()) + 1)
    starts = vocabulary.require_word_starts()[tokens]
    starts[:1] = True
    starts[1:] |= ~ordinary[:-1]
    return np.append(np.flatnonzero(starts[ordinary]), int(ordinary.sum()))


def _choose(
    tokens: np.ndarray, rate: float, whole_words: bool, rng: np.random.Generator, vocabulary: Vocabulary
) -> np.ndarray:
    """Returns the places of `ceil(rate n)` of the n tokens or words, of those that are not special."""
    places = np.flatnonzero(~vocabulary.special[tokens])
    units = _units(tokens, whole_words, vocabulary)
    chosen = rng.permutation(len(units) - 1)[: _count(len(units) - 1, rate)]
    if not whole_words:
        return places[chosen]
    lengths = np.diff(units)
    is_chosen = np.zeros(len(lengths), bool)
    is_chosen[chosen] = True
    return places[np.repeat(is_chosen, lengths)]
