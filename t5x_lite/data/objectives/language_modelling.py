"""Language modelling: every token from those before it, all of a text or what follows a prefix."""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from t5x_lite.data.objectives.example import Example, Objective, Sides, append_eos
from t5x_lite.data.objectives.vocabulary import Vocabulary
from t5x_lite.errors import InputError


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Next-token prediction for a decoder alone: the targets are the tokens, all of them (GPT; T5's `full_lm`)."""

    sides: ClassVar[Sides] = "decoder"
    arrays: ClassVar[tuple[str, ...]] = ("tokens",)
    joined: ClassVar[bool] = True

    def separator(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """See `Objective.separator`: EOS."""
        return (vocabulary.require_eos(),)

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """See `Objective.window`: all of the row."""
        return _row(target_length)

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """See `Objective.sizes`."""
        return 0, raw

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: EOS, for the ends of texts."""
        vocabulary.require_eos()

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        """Returns int `tokens` [n] as targets; draws nothing."""
        return Example(targets=tokens.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class PrefixLM(Objective):
    """T5's prefix language modelling (Raffel et al. 2020, section 3.2.3; `t5.data.preprocessors.prefix_lm`).

    A text is split at a random point. An encoder-decoder reads what is before it and says what is after it, each with
    an EOS. A decoder alone reads the whole text, and what is before the point does not count in the loss.

    Attributes:
        noise_density: the expected fraction of a text that is after the point, in (0, 0.5]. The point is uniform: with
            0.5 from the first token to the last, with less from token `round((1 - 2 density) (n - 1))` to the last.
        sides: the model to train.
    """

    noise_density: float = 0.5
    sides: Literal["encoder_decoder", "decoder"] = "encoder_decoder"

    arrays: ClassVar[tuple[str, ...]] = ("tokens",)

    def __post_init__(self) -> None:
        if not 0 < self.noise_density <= 0.5:
            raise InputError(f"noise_density {self.noise_density}: must be above 0 and at most 0.5 for a prefix")
        if self.sides not in ("encoder_decoder", "decoder"):
            raise InputError(f"sides '{self.sides}': allowed are encoder_decoder, decoder")

    @property
    def joined(self) -> bool:
        """See `Objective.joined`: for a decoder alone; T5 splits each text by itself."""
        return self.sides == "decoder"

    def separator(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """See `Objective.separator`: EOS for a decoder alone, as in causal language modelling."""
        return (vocabulary.require_eos(),) if self.sides == "decoder" else ()

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """See `Objective.window`."""
        if self.sides == "decoder":
            return _row(target_length)
        if input_length < 2 or (target_length is not None and target_length < 2):
            raise InputError(f"rows of {input_length} and {target_length} tokens: a prefix needs 2, one token and EOS")
        raw = input_length
        while target_length is not None and self.sizes(raw, vocabulary)[1] > target_length:
            raw -= 1
        return raw

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """See `Objective.sizes`."""
        if self.sides == "decoder":
            return 0, raw
        first, last = self._points(raw)
        return last + 1, raw - first + 1

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: EOS."""
        vocabulary.require_eos()

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        """Splits int `tokens` [n] at a point that is drawn afresh."""
        first, last = self._points(len(tokens))
        point = int(rng.integers(first, last + 1))
        if self.sides == "decoder":
            weights = np.ones(len(tokens), np.float32)
            weights[:point] = 0
            return Example(targets=tokens.astype(np.int32), target_weights=weights)
        eos_id = vocabulary.require_eos()
        return Example(append_eos(tokens[:point], eos_id), append_eos(tokens[point:], eos_id))

    def _points(self, length: int) -> tuple[int, int]:
        # `random_prefix_noise_mask`, in its float32.
        last = max(length - 1, 0)
        first = int(np.round(np.float32(1 - 2 * self.noise_density) * np.float32(last)))
        return min(last, max(1, first)), last


def _row(target_length: int | None) -> int:
    if target_length is None or target_length < 1:
        raise InputError(f"target_length {target_length}: a decoder alone needs rows of at least 1 token")
    return target_length
