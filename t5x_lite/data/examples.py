"""Examples by their number: windows of running text, pieces of documents, records of several texts.

Each class here is a function (index, random generator) -> examples, with a length. They can be pickled for other
processes, and hold no more of a corpus in memory than a few numbers for each stretch of it.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from t5x_lite.data.objectives import Example, Objective, TextToText, Vocabulary
from t5x_lite.data.tokens import Tokens
from t5x_lite.errors import InputError


class TokenSource(Protocol):
    """What holds the tokens of records: a `TokenCache`, or `InMemory`."""

    @property
    def features(self) -> Mapping[str, Tokens]:
        """The tokens of each feature, one text for each record."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """Tokens that are no files; see `TokenSource`."""

    features: Mapping[str, Tokens]


class ExampleSet(Protocol):
    """Examples by their number."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Example, ...]:
        """Returns example `index`, with the draws of `rng`; several where a window holds parts of several texts."""
        ...

    def sizes(self) -> np.ndarray:
        """Returns int64 [examples, 2], the most tokens that each has on the encoder's and on the decoder's side."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Documents laid end to end, some of them perhaps left out.

    Attributes:
        source: of the tokens.
        stretches: int64 [n, 2], the documents that there are: from the first number up to the second, for each n.
        separator: ids after each document.
        feature: whose tokens they are.
    """

    source: TokenSource
    stretches: np.ndarray
    separator: tuple[int, ...] = ()
    feature: str = "tokens"

    @property
    def _tokens(self) -> Tokens:
        return self.source.features[self.feature]

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Where each stretch ends, int64 [n]."""
        first, last = self.stretches[:, 0], self.stretches[:, 1]
        offsets = self._tokens.offsets
        return np.cumsum(offsets[last] - offsets[first] + (last - first) * len(self.separator))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns int32 tokens from place `start` to place `stop`."""
        if self.separator:
            return np.concatenate([np.zeros(0, np.int32), *self.documents(start, stop)])
        parts, tokens = [], self._tokens
        stretch = int(np.searchsorted(self._ends, start, "right"))
        while start < stop and stretch < len(self._ends):
            end = int(self._ends[stretch])
            # Without separators a stretch is a piece of the file.
            behind = int(tokens.offsets[self.stretches[stretch, 1]]) - end
            parts.append(tokens.flat[start + behind : min(stop, end) + behind])
            start, stretch = end, stretch + 1
        return np.concatenate([np.zeros(0, np.int32), *parts], dtype=np.int32)

    def documents(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields int32 tokens of each document from place `start` to place `stop`, the separator after it included."""
        offsets, extra = self._tokens.offsets, len(self.separator)
        stretch = int(np.searchsorted(self._ends, start, "right"))
        while start < stop and stretch < len(self._ends):
            first, last = self.stretches[stretch].tolist()
            begin = int(self._ends[stretch - 1]) if stretch else 0

            def place(number: int, first: int = first, begin: int = begin) -> int:
                return begin + int(offsets[number] - offsets[first]) + (number - first) * extra

            number = first + bisect.bisect_right(range(first, last), start, key=place) - 1
            while number < last and start < stop:
                at, end = place(number), place(number + 1)
                if end > start:
                    document = np.array([*self._tokens[number], *self.separator], np.int32)
                    yield document[start - at : stop - at]
                    start = end
                number += 1
            stretch += 1


def shortest(objective: Objective) -> int:
    """Returns how many tokens must be left of a stream, behind its last full window, for a window that is not full."""
    # Of a single token there is nothing to hide that could be told from the others.
    return 1 if objective.sides == "decoder" else 2


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A stream cut into windows of equal length, the last of which has what is left (T5's concatenate and split).

    Attributes:
        stream: what is cut.
        size: tokens of a window.
        objective: what is asked.
        vocabulary: for the objective.
        divided: whether the documents of a window are examples of their own, which share a row and nothing else.
    """

    stream: Stream
    size: int
    objective: Objective
    vocabulary: Vocabulary
    divided: bool = False

    def __len__(self) -> int:
        whole, left = divmod(len(self.stream), self.size)
        return whole + (left >= shortest(self.objective))

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Example, ...]:
        """See `ExampleSet`."""
        place = index * self.size, (index + 1) * self.size
        pieces = self.stream.documents(*place) if self.divided else (self.stream.read(*place),)
        return tuple(self.objective(piece, rng, self.vocabulary) for piece in pieces)

    def sizes(self) -> np.ndarray:
        """See `ExampleSet`."""
        return np.tile(np.array(self.objective.sizes(self.size, self.vocabulary), np.int64), (len(self), 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """Documents cut into pieces of at most `size` tokens, each of one document.

    Attributes:
        source: of the tokens.
        records: int64 [n], the numbers of the documents.
        size: tokens of a piece.
        objective: what is asked.
        vocabulary: for the objective.
        feature: whose tokens they are.
    """

    source: TokenSource
    records: np.ndarray
    size: int
    objective: Objective
    vocabulary: Vocabulary
    feature: str = "tokens"

    def __post_init__(self) -> None:
        if "other" in self.objective.arrays and len(self._ends) and (self._pieces > 0).sum() < 2:
            raise InputError("next sentences are drawn from other documents, and there is only one document")

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        offsets = self.source.features[self.feature].offsets
        return offsets[self.records + 1] - offsets[self.records]

    @property
    def _pieces(self) -> np.ndarray:
        return -(-self._lengths // self.size)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """How many pieces there are up to each document, it included, int64 [n]."""
        return np.cumsum(self._pieces)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Example, ...]:
        """See `ExampleSet`."""
        number = int(np.searchsorted(self._ends, index, "right"))
        piece = index - (int(self._ends[number - 1]) if number else 0)
        arrays = [self._document(number)[piece * self.size : (piece + 1) * self.size]]
        if "other" in self.objective.arrays:
            arrays.append(self._document(self._another(number, rng)))
        return (self.objective(*arrays, rng, self.vocabulary),)

    def _document(self, number: int) -> np.ndarray:
        return self.source.features[self.feature][int(self.records[number])]

    def _another(self, number: int, rng: np.random.Generator) -> int:
        # By pieces, so that documents without a token are never drawn.
        own = int(self._pieces[number])
        other = int(rng.integers(len(self) - own))
        return int(np.searchsorted(self._ends, other + own * (other >= self._ends[number] - own), "right"))

    def sizes(self) -> np.ndarray:
        """See `ExampleSet`."""
        numbers = np.repeat(np.arange(len(self.records)), self._pieces)
        before = np.arange(len(self)) - (self._ends - self._pieces)[numbers]
        return _sizes(np.minimum(self._lengths[numbers] - before * self.size, self.size), self)


def _sizes(raw: np.ndarray, examples: Pieces) -> np.ndarray:
    lengths, which = np.unique(raw, return_inverse=True)
    sizes = [examples.objective.sizes(length, examples.vocabulary) for length in lengths.tolist()]
    return np.array(sizes, np.int64).reshape(-1, 2)[which]


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Records whose texts are all of an example: a pair, a conversation.

    Attributes:
        source: of the tokens.
        records: int64 [n], the numbers of the records.
        objective: what is asked; its arrays are the source's features, in their order.
        vocabulary: for the objective.
    """

    source: TokenSource
    records: np.ndarray
    objective: Objective
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return len(self.records)

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Example, ...]:
        """See `ExampleSet`."""
        number = int(self.records[index])
        arrays = [feature[number] for feature in self.source.features.values()]
        return (self.objective(*arrays, rng, self.vocabulary),)

    def sizes(self) -> np.ndarray:
        """See `ExampleSet`."""
        if isinstance(self.objective, TextToText):
            inputs, targets = self._lengths()
            return self.objective.lengths(inputs, targets, self.vocabulary)
        sizes = np.zeros((len(self), 2), np.int64)
        rng = np.random.default_rng(0)
        for index in range(len(self)):
            (example,) = self(index, rng)
            sizes[index] = [0 if ids is None else len(ids) for ids in (example.inputs, example.targets)]
        return sizes

    def truncated(self) -> tuple[int, int]:
        """Returns how many inputs and how many targets are cut to fit; of conversations it is not counted."""
        if not isinstance(self.objective, TextToText):
            return 0, 0
        inputs, targets = self._lengths()
        cut = self.objective.truncated(inputs, targets, self.vocabulary)
        return int(cut[0].sum()), int(cut[1].sum())

    def _lengths(self) -> list[np.ndarray]:
        offsets = (feature.offsets for feature in self.source.features.values())
        return [own[self.records + 1] - own[self.records] for own in offsets]


def examples_of(
    source: TokenSource, kept: np.ndarray, objective: Objective, size: int, vocabulary: Vocabulary, *, packed: bool
) -> ExampleSet:
    """Returns the examples that an objective makes of records.

    Args:
        source: of their tokens.
        kept: bool [records], which of them count.
        objective: what is asked.
        size: tokens that an example is made of, where it is made of running text; from `Objective.window`.
        vocabulary: for the objective.
        packed: whether documents are to be kept apart. If not, those of running text are joined, where the objective
            joins them.
    """
    records = np.flatnonzero(kept)
    if objective.arrays not in (("tokens",), ("tokens", "other")):
        return Records(source, records, objective, vocabulary)
    objective.check(size, vocabulary)
    # A decoder's row can hold pieces of documents as they come: each of them is as long as its text.
    divided = packed and objective.sizes(size, vocabulary) == (0, size)
    if objective.joined and (divided or not packed):
        edges = np.flatnonzero(np.diff(kept, prepend=False, append=False)).reshape(-1, 2)
        stream = Stream(source, edges, objective.separator(vocabulary))
        return Windows(stream, size, objective, vocabulary, divided)
    return Pieces(source, records, size, objective, vocabulary)
