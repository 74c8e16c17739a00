"""UL2's mixture of denoisers: each example is denoised in one of several ways, and begins with the name of its mode."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from t5x_lite.data.objectives.example import Example, Objective, surround
from t5x_lite.data.objectives.language_modelling import PrefixLM
from t5x_lite.data.objectives.span_corruption import SpanCorruption
from t5x_lite.data.objectives.vocabulary import Vocabulary
from t5x_lite.errors import InputError, nearest

Mode = Literal["R", "X", "S"]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to denoise.

    Attributes:
        mode: "R", regular: short spans and few of them; "X", extreme: long spans or many; "S", sequential: a prefix.
        objective: what is done.
        rate: how often, beside the other denoisers.
    """

    mode: Mode
    objective: SpanCorruption | PrefixLM
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in ("R", "X", "S"):
            raise InputError(f"mode '{self.mode}': allowed are R, X, S")
        if not self.rate >= 0:
            raise InputError(f"rate {self.rate}: must be 0 or more")
        if self.objective.sides != "encoder_decoder":
            raise InputError("a denoiser's objective has sides='encoder_decoder'; it is UL2's own sides that decide")


DENOISERS = (
    Denoiser("R", SpanCorruption(0.15, 3.0)),
    Denoiser("R", SpanCorruption(0.15, 8.0)),
    Denoiser("X", SpanCorruption(0.5, 3.0)),
    Denoiser("X", SpanCorruption(0.5, 8.0)),
    Denoiser("X", SpanCorruption(0.15, 64.0)),
    Denoiser("X", SpanCorruption(0.5, 64.0)),
    Denoiser("S", PrefixLM(0.25)),
)
"""The seven of the paper's table 1, equally often, as its published code has it where no rates are given."""

MODE_TOKENS: Mapping[Mode, str] = {"R": "[NLU]", "X": "[NLG]", "S": "[S2S]"}


@dataclasses.dataclass(frozen=True)
class UL2(Objective):
    """UL2's objective (Tay et al. 2022, section 3.1 and table 1).

    The sequential denoiser is T5's prefix language modelling with a quarter of the text to say on average; the paper's
    code calls T5's with its default, one half (`PrefixLM(0.5)`). All denoisers get windows of one length, which fits
    the most demanding of them; in the paper's code each has its own.

    Attributes:
        denoisers: the ways to denoise, and how often each is drawn.
        mode_tokens: the name of each mode, whose ids stand at the beginning of the inputs; a single token where the
            vocabulary has one, else, as in the paper's code, whatever the tokenizer makes of it. None: no names.
        sides: the model to train. A decoder alone reads inputs and targets in one row; the targets count in the loss.
    """

    denoisers: tuple[Denoiser, ...] = DENOISERS
    mode_tokens: Mapping[Mode, str] | None = dataclasses.field(default_factory=lambda: dict(MODE_TOKENS))
    sides: Literal["encoder_decoder", "decoder"] = "encoder_decoder"

    def __post_init__(self) -> None:
        if not sum(denoiser.rate for denoiser in self.denoisers) > 0:
            raise InputError("denoisers: at least one must have a rate above 0")
        if self.sides not in ("encoder_decoder", "decoder"):
            raise InputError(f"sides '{self.sides}': allowed are encoder_decoder, decoder")
        for mode in () if self.mode_tokens is None else {denoiser.mode for denoiser in self.denoisers}:
            if mode not in (self.mode_tokens or {}):
                raise InputError(f"mode_tokens has no name for mode {mode}; give one, or mode_tokens=None")

    @property
    def arrays(self) -> tuple[str, ...]:
        """See `Objective.arrays`."""
        return ("tokens",)

    @property
    def joined(self) -> bool:
        """See `Objective.joined`: as for T5's span corruption."""
        return True

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """See `Objective.window`: what fits whichever denoiser is drawn."""
        names = [len(self._name(denoiser, vocabulary)) for denoiser in self.denoisers]
        if self.sides == "encoder_decoder":
            return min(
                denoiser.objective.window(input_length - name, target_length, vocabulary)
                for denoiser, name in zip(self.denoisers, names, strict=True)
            )
        raw = 2
        if target_length is None or self.sizes(raw, vocabulary)[1] > target_length:
            raise InputError(f"target_length {target_length}: must be at least {self.sizes(raw, vocabulary)[1]}")
        while self.sizes(raw + 1, vocabulary)[1] <= target_length:
            raw += 1
        return raw

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """See `Objective.sizes`: those of the longest denoiser."""
        inputs, targets, both = [], [], []
        for denoiser in self.denoisers:
            name, sizes = len(self._name(denoiser, vocabulary)), denoiser.objective.sizes(raw, vocabulary)
            inputs.append(name + sizes[0])
            targets.append(sizes[1])
            is_split = isinstance(denoiser.objective, PrefixLM)
            # A prefix and what follows it are the text, with EOS after both.
            both.append(name + raw + 2 if is_split else name + sizes[0] + sizes[1])
        return (max(inputs), max(targets)) if self.sides == "encoder_decoder" else (0, max(both))

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: EOS, sentinels for every denoiser, and the names of the modes."""
        for denoiser in self.denoisers:
            denoiser.objective.check(raw, vocabulary)
            self._name(denoiser, vocabulary)

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        """Denoises int `tokens` [n] in a way that is drawn afresh."""
        rates = np.cumsum([denoiser.rate for denoiser in self.denoisers])
        denoiser = self.denoisers[int(np.searchsorted(rates, rng.random() * rates[-1], "right"))]
        example = denoiser.objective(tokens, rng, vocabulary)
        assert example.inputs is not None
        assert example.targets is not None
        inputs = surround(self._name(denoiser, vocabulary), example.inputs, ())
        if self.sides == "encoder_decoder":
            return Example(inputs, example.targets)
        weights = np.zeros(len(inputs) + len(example.targets), np.float32)
        weights[len(inputs) :] = 1
        return Example(targets=np.concatenate([inputs, example.targets]), target_weights=weights)

    def _name(self, denoiser: Denoiser, vocabulary: Vocabulary) -> tuple[int, ...]:
        if self.mode_tokens is None:
            return ()
        name = self.mode_tokens[denoiser.mode]
        if name not in vocabulary.modes:
            raise InputError(
                f"the vocabulary has no '{name}', the name of mode {denoiser.mode}: add the token, give another as "
                f"mode_tokens, or mode_tokens=None{nearest(name, vocabulary.modes)}"
            )
        return vocabulary.modes[name]
