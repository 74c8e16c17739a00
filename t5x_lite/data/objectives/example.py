"""The form of an example, and what every training objective can be asked."""

import dataclasses
from typing import Any, Literal, Protocol

import numpy as np

from t5x_lite.data.objectives.vocabulary import Vocabulary

Sides = Literal["encoder_decoder", "decoder", "encoder"]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Arrays of one example, without padding; ids are int32 and weights float32.

    Attributes:
        inputs: what the encoder reads, special tokens included; None for a decoder alone.
        targets: what the decoder says (it reads them shifted right behind `start`); None for an encoder alone.
        target_weights: how much each target counts in the loss, 0 on a prompt; None: all of them count 1.
        start: what the decoder reads before the first target; None: the start token of the model.
        input_targets: for an encoder alone, what it should have read at each place of `inputs`.
        input_weights: how much each of these counts; 0 where nothing was asked.
        input_types: BERT's segment of each place of `inputs`: 0 for A, 1 for B. None: 0 everywhere.
        next_sentence: 0 if B follows A, 1 if it is of another text; None where that is not asked.
    """

    inputs: np.ndarray | None = None
    targets: np.ndarray | None = None
    target_weights: np.ndarray | None = None
    start: int | None = None
    input_targets: np.ndarray | None = None
    input_weights: np.ndarray | None = None
    input_types: np.ndarray | None = None
    next_sentence: int | None = None


class Objective(Protocol):
    """What is asked of the model. Objectives are frozen, picklable dataclasses; equal draws give equal examples."""

    @property
    def sides(self) -> Sides:
        """The models that it can train."""
        ...

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays that a call takes, before `rng` and `vocabulary`.

        Of a text `tokens`; of a pair `inputs` and `targets`; of a conversation `tokens` and `answer`; and `other`, the
        whole of another document, which is drawn with the same `rng`.
        """
        ...

    @property
    def joined(self) -> bool:
        """Whether texts are laid end to end, and cut into windows that may hold an end of one and a start of the next.

        If not, a window is of one text.
        """
        ...

    def separator(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Returns the ids that follow each text where texts are laid end to end; T5's are followed by nothing."""
        return ()

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """Returns the most tokens whose example surely fits in rows of these lengths; `None` is no limit.

        Raises:
            InputError: for rows too short for any example.
        """
        ...

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """Returns the most input and target tokens that `raw` tokens can become; 0 for a side that there is not."""
        ...

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """Raises InputError if the vocabulary lacks what examples of up to `raw` tokens need."""
        ...

    def __call__(self, *arguments: Any, **named: Any) -> Example:
        """Returns the example of the arrays that `arrays` names, a `numpy.random.Generator` and a `Vocabulary`."""
        ...


def surround(prefix: tuple[int, ...], tokens: np.ndarray, suffix: tuple[int, ...]) -> np.ndarray:
    """Returns int32 `tokens` [n] between `prefix` and `suffix`."""
    result = np.empty(len(prefix) + len(tokens) + len(suffix), np.int32)
    result[: len(prefix)] = prefix
    result[len(prefix) : len(prefix) + len(tokens)] = tokens
    result[len(prefix) + len(tokens) :] = suffix
    return result


def frame(tokens: np.ndarray, affixes: tuple[tuple[int, ...], tuple[int, ...]], max_length: int) -> np.ndarray:
    """Returns int32 `tokens` between prefix and suffix (T5: an EOS after them), cut to fit `max_length`."""
    prefix, suffix = affixes
    return surround(prefix, tokens[: max(max_length - len(prefix) - len(suffix), 0)], suffix)


def append_eos(tokens: np.ndarray, eos_id: int, max_length: int | None = None) -> np.ndarray:
    """Returns int32 `tokens` [n] cut to `max_length - 1` and closed with EOS (seqio's `append_eos_after_trim`)."""
    return surround((), tokens if max_length is None else tokens[: max_length - 1], (eos_id,))
