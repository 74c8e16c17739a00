"""Supervised objectives: an answer to an input, where only the answer counts in the loss."""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from t5x_lite.data.objectives.example import Example, Objective, append_eos, frame
from t5x_lite.data.objectives.vocabulary import Vocabulary
from t5x_lite.errors import InputError


@dataclasses.dataclass(frozen=True)
class _Supervised(Objective):
    """What pairs and conversations share.

    Attributes:
        input_length: the most tokens of the inputs, special ones included; at least 2. Not used for a decoder alone.
        target_length: the same for the targets; for a decoder alone, the row.
        sides: the model to train.
    """

    input_length: int
    target_length: int
    sides: Literal["encoder_decoder", "decoder"] = "encoder_decoder"

    joined: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.sides not in ("encoder_decoder", "decoder"):
            raise InputError(f"sides '{self.sides}': allowed are encoder_decoder, decoder")
        for name in ("input_length", "target_length"):
            if getattr(self, name) < 2 and (self.sides != "decoder" or name == "target_length"):
                raise InputError(f"{name} {getattr(self, name)}: must be at least 2, one token and EOS")

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """See `Objective.window`: records of any length are cut to fit, so that this is only the lengths' sum."""
        return self.input_length + self.target_length

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """See `Objective.sizes`: the lengths."""
        return (0 if self.sides == "decoder" else self.input_length), self.target_length

    def _row(self, tokens: np.ndarray, asked: np.ndarray, vocabulary: Vocabulary) -> Example:
        """Returns what a decoder alone reads: `tokens` [n] behind the prefix of its texts, of which `asked` [n] count.

        The first of them stands in the start token's place, as where the model is asked to go on with a text, unless
        it is itself to be said.
        """
        prefix = vocabulary.prefix_ids
        whole = np.concatenate([prefix, tokens]).astype(np.int32)
        weights = np.concatenate([np.zeros(len(prefix)), asked]).astype(np.float32)
        start = int(whole[0]) if len(whole) and not weights[0] else None
        read_only = int(start is not None)
        kept = slice(read_only, read_only + self.target_length)
        return Example(targets=whole[kept], target_weights=weights[kept], start=start)


@dataclasses.dataclass(frozen=True)
class TextToText(_Supervised):
    """Supervised text in, text out.

    An encoder-decoder gets each side cut to its length, in the special tokens that its model knows (after the cut, as
    seqio's `append_eos_after_trim`). A decoder alone gets inputs, targets and EOS in one row, the inputs without weight
    in the loss; where this is too long, targets and EOS are cut to fit the row, and the inputs to what is left of it.
    The row begins as a prompt does when the model is used: with the prefix of its texts, if they have one.

    Attributes:
        input_length, target_length, sides: see `_Supervised`.
    """

    arrays: ClassVar[tuple[str, ...]] = ("inputs", "targets")

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: EOS for a decoder alone, which else could not end."""
        if self.sides == "decoder":
            vocabulary.require_eos()

    def lengths(self, inputs: np.ndarray, targets: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Returns int64 [pairs, 2]: the input and target tokens of examples of texts of these lengths in tokens."""
        if self.sides == "decoder":
            # The first token of a prompt is read and not said.
            prompt = np.maximum(inputs + len(vocabulary.prefix_ids) - 1, 0)
            row = np.minimum(prompt + targets + 1, self.target_length)
            return np.stack([np.zeros_like(row), row], axis=1).astype(np.int64)
        room = self._special(vocabulary)
        kept = np.minimum(inputs + room[0], self.input_length), np.minimum(targets + room[1], self.target_length)
        return np.stack(kept, axis=1).astype(np.int64)

    def truncated(
        self, inputs: np.ndarray, targets: np.ndarray, vocabulary: Vocabulary
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns bool [pairs] twice: which inputs and which targets of these lengths in tokens are cut."""
        if self.sides == "decoder":
            kept = np.minimum(targets, self.target_length - 1)
            return inputs > self.target_length - kept - len(vocabulary.prefix_ids), targets > kept
        room = self._special(vocabulary)
        return inputs > self.input_length - room[0], targets > self.target_length - room[1]

    def _special(self, vocabulary: Vocabulary) -> tuple[int, int]:
        """Returns how many special tokens an encoder-decoder's inputs and targets have."""
        affixes = (vocabulary.prefix_ids, vocabulary.suffix_ids), vocabulary.target_affixes
        inputs, targets = (len(prefix) + len(suffix) for prefix, suffix in affixes)
        return inputs, targets

    def __call__(
        self, inputs: np.ndarray, targets: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary
    ) -> Example:
        """Returns the int tokens `inputs` [n] and `targets` [m] cut to fit, with the special tokens; draws nothing."""
        if self.sides == "decoder":
            answer = append_eos(targets, vocabulary.require_eos(), self.target_length)
            prompt = inputs[: max(self.target_length + 1 - len(answer) - len(vocabulary.prefix_ids), 0)]
            asked = np.repeat([0, 1], [len(prompt), len(answer)])
            return self._row(np.concatenate([prompt, answer]), asked, vocabulary)
        around = vocabulary.prefix_ids, vocabulary.suffix_ids
        return Example(
            frame(inputs, around, self.input_length), frame(targets, vocabulary.target_affixes, self.target_length)
        )


@dataclasses.dataclass(frozen=True)
class Chat(_Supervised):
    """A conversation of which only the answers count in the loss (instruction tuning).

    A decoder alone reads the conversation in one row, up to its length, and is asked for every answer. An EOS closes
    it, unless it was cut or ends with a special token of its own; it counts if the token before it does. The row begins
    as that of `TextToText` does. An encoder-decoder reads what is before the last answer, the end of it if it is too
    long, and says that answer.

    Attributes:
        input_length, target_length, sides: see `_Supervised`.
    """

    sides: Literal["encoder_decoder", "decoder"] = "decoder"

    arrays: ClassVar[tuple[str, ...]] = ("tokens", "answer")

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: EOS."""
        vocabulary.require_eos()

    def __call__(
        self, tokens: np.ndarray, answer: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary
    ) -> Example:
        """Returns int `tokens` [n], of which `answer` [n] is 1 on the answers and 0 elsewhere; draws nothing.

        Raises:
            InputError: for an encoder-decoder, a conversation without an answer.
        """
        asked = np.asarray(answer, bool)
        if self.sides == "decoder":
            if len(tokens) and not vocabulary.special[tokens[-1]]:
                tokens, asked = append_eos(tokens, vocabulary.require_eos()), np.append(asked, asked[-1])
            return self._row(tokens, asked, vocabulary)
        if not asked.any():
            raise InputError("a conversation without an answer: the encoder-decoder has nothing to learn from it")
        end = int(np.flatnonzero(asked)[-1]) + 1
        begin = end - int(np.argmin(asked[:end][::-1])) if not asked[:end].all() else 0
        prefix, suffix = vocabulary.prefix_ids, vocabulary.suffix_ids
        room = max(self.input_length - len(prefix) - len(suffix), 0)
        inputs = frame(tokens[max(begin - room, 0) : begin], (prefix, suffix), self.input_length)
        targets = tokens[begin:end]
        if len(targets) and targets[-1] == vocabulary.eos_id:  # the suffix has it
            targets = targets[:-1]
        return Example(inputs, frame(targets, vocabulary.target_affixes, self.target_length))
