"""T5's denoising objectives: spans of tokens, or tokens one by one, are replaced by sentinels."""

import dataclasses
from typing import ClassVar

import numpy as np

from t5x_lite.data.objectives.example import Example, Objective, Sides, append_eos
from t5x_lite.data.objectives.vocabulary import Vocabulary
from t5x_lite.errors import InputError


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
    """T5's denoising objective (Raffel et al. 2020, section 3.1.4; `t5.data.preprocessors.span_corruption`).

    Spans of tokens are replaced in the inputs by one sentinel each; the targets are the sentinels, each followed by the
    tokens it stands for. There is no closing sentinel.

    Attributes:
        noise_density: the fraction of tokens to replace, in (0, 0.99].
        mean_span_length: the mean number of tokens in a span, at least 1.
        random_roll: whether to rotate the mask by a random offset. Without it the first token is never replaced and the
            last always is; with it every token is replaced equally often, and a span may lie across the ends, as two.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    random_roll: bool = False

    sides: ClassVar[Sides] = "encoder_decoder"
    arrays: ClassVar[tuple[str, ...]] = ("tokens",)
    joined: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Closer to 1 the window that fits a row grows without bound.
        if not 0 < self.noise_density <= 0.99:
            raise InputError(f"noise_density {self.noise_density}: must be above 0 and at most 0.99")
        if not self.mean_span_length >= 1:
            raise InputError(f"mean_span_length {self.mean_span_length}: must be at least 1 token")

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """See `Objective.window`; `raw_length`, and less where `target_length` asks for it."""
        raw = self.raw_length(input_length)
        if target_length is None:
            return raw
        if target_length < 3:
            raise InputError(f"target_length {target_length}: span corruption needs at least 3")
        while self._lengths(raw)[1] > target_length:
            raw -= 1
        return raw

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """See `Objective.sizes`; they are reached by every example, but for the one span more of `random_roll`."""
        return self._lengths(raw)

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: as many sentinels as spans."""
        vocabulary.require_eos()
        noise, spans = self._noise(raw)
        check_sentinels(
            spans + (self.random_roll and max(noise, max(raw, 2) - noise) > spans), len(vocabulary.sentinels)
        )

    def raw_length(self, input_length: int) -> int:
        """Returns the longest window of tokens whose corrupted inputs, EOS included, fit in `input_length`.

        As T5's `random_spans_helper`, but counting exactly as `noise_mask` does. T5 counts in float64 here and in
        float32 there, and does not count the span that a very short text always gets, so at some lengths its windows
        overflow; these differ from T5's only there (T5's own lengths, 256 to 2048, are the same).

        Raises:
            InputError: for an `input_length` below 3, which cannot hold a token, a sentinel and EOS.
        """
        if input_length < 3:
            raise InputError(f"input_length {input_length}: span corruption needs at least 3")
        raw = input_length - 1
        while self._lengths(raw + 1)[0] <= input_length:
            raw += 1
        inputs, targets = self._lengths(raw)
        # T5 keeps the targets no longer than the inputs when half of the tokens are noise.
        return raw - 1 if self.noise_density == 0.5 and targets > inputs else raw

    def target_length(self, input_length: int) -> int:
        """Returns the length in tokens, EOS included, of the targets of a window of `raw_length(input_length)`."""
        return self._lengths(self.raw_length(input_length))[1]

    def num_spans(self, raw_length: int) -> int:
        """Returns how many spans, and so sentinels, a window of `raw_length` tokens gets."""
        return self._noise(raw_length)[1]

    def noise_mask(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Draws bool [length], true on the tokens to replace (`t5.data.preprocessors.random_spans_noise_mask`).

        Their number and the number of spans depend on `length` alone; given these, all masks that start outside a span
        and end inside one are equally likely, and then, with `random_roll`, all rotations. A text of one token is left
        whole.
        """
        noise, spans = self._noise(length)
        nonnoise = max(length, 2) - noise
        noise_starts = rng.permutation(np.arange(noise - 1) < spans - 1)
        nonnoise_starts = rng.permutation(np.arange(nonnoise - 1) < spans - 1)
        mask = mask_from_starts(noise_starts, nonnoise_starts)[:length]
        return np.roll(mask, rng.integers(max(length, 2))) if self.random_roll else mask

    def corrupt(
        self, tokens: np.ndarray, mask: np.ndarray, sentinels: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 (inputs, targets), without EOS, for int `tokens` [n] and bool `mask` [n].

        T5's `noise_span_to_unique_sentinel` and `nonnoise_span_to_unique_sentinel`.

        Raises:
            InputError: if the mask has more spans than there are sentinels.
        """
        return _replace_spans(tokens, mask, sentinels), _replace_spans(tokens, ~mask, sentinels)

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        """Corrupts int `tokens` [n] afresh and closes both sides with EOS; raises what `corrupt` raises."""
        eos_id = vocabulary.require_eos()
        inputs, targets = self.corrupt(tokens, self.noise_mask(len(tokens), rng), vocabulary.sentinels)
        return Example(append_eos(inputs, eos_id), append_eos(targets, eos_id))

    def _noise(self, length: int) -> tuple[int, int]:
        """Returns the numbers of noise tokens and of noise spans for a text of `length` tokens."""
        length = max(length, 2)
        # float32 because T5 counts in it: 190 * 0.15 rounds to 29 there and to 28 in float64.
        noise = int(np.round(np.float32(length) * np.float32(self.noise_density)))
        noise = min(max(noise, 1), length - 1)
        spans = int(np.round(np.float32(noise) / np.float32(self.mean_span_length)))
        # T5 fails on a shape where the tokens between the spans are fewer than the spans (density above 0.5).
        return noise, min(max(spans, 1), length - noise)

    def _lengths(self, raw: int) -> tuple[int, int]:
        if raw < 2:  # left whole: one sentinel stands for it in the targets
            return raw + 1, raw + 1
        noise, spans = self._noise(raw)
        # A span, or a stretch between two, lies across the ends only if it has two tokens.
        across = self.random_roll and noise > spans, self.random_roll and raw - noise > spans
        return raw - noise + spans + 1 + across[0], noise + spans + 1 + across[1]


@dataclasses.dataclass(frozen=True)
class IidDenoising(Objective):
    """T5's baseline objective (Raffel et al. 2020, section 3.1.4; `t5.data.preprocessors.iid_denoising`).

    Every token is replaced with the same probability, whatever becomes of its neighbours; tokens replaced in a row get
    one sentinel. The targets are as those of `SpanCorruption`, except that they begin without a sentinel where the
    first token is replaced.

    T5 goes on with ordinary tokens where a text has more spans than there are sentinels. Here such a text keeps its
    tokens from there on, and `check` refuses texts for which this would not be rare.

    Attributes:
        noise_density: the probability, in (0, 1).
    """

    noise_density: float = 0.15

    sides: ClassVar[Sides] = "encoder_decoder"
    arrays: ClassVar[tuple[str, ...]] = ("tokens",)
    joined: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise InputError(f"noise_density {self.noise_density}: must be above 0 and below 1")

    def window(self, input_length: int, target_length: int | None, vocabulary: Vocabulary) -> int:
        """See `Objective.window`: all but the place of EOS, as in T5, because it may be that nothing is replaced."""
        shortest = input_length if target_length is None else min(input_length, target_length)
        if shortest < 2:
            raise InputError(f"rows of {shortest} tokens: denoising needs at least 2, one token and EOS")
        return shortest - 1

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        """See `Objective.sizes`: all of the tokens and EOS, on either side."""
        return raw + 1, raw + 1

    def check(self, raw: int, vocabulary: Vocabulary) -> None:
        """See `Objective.check`: sentinels for three standard deviations more spans than a text has on average."""
        vocabulary.require_eos()
        changes = self.noise_density * (1 - self.noise_density)
        # Spans begin at pairs (kept, replaced); neighbouring pairs exclude one another, hence the smaller variance.
        likely = raw * changes + 3 * (raw * changes * (1 - 3 * changes)) ** 0.5
        check_sentinels(min(int(np.ceil(likely)), (raw + 1) // 2), len(vocabulary.sentinels))

    def noise_mask(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Draws bool [length], true on the tokens to replace (`t5.data.preprocessors.iid_noise_mask`)."""
        return rng.random(length, np.float32) < np.float32(self.noise_density)

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        """Corrupts int `tokens` [n] afresh and closes both sides with EOS."""
        eos_id, sentinels = vocabulary.require_eos(), vocabulary.sentinels
        mask = self.noise_mask(len(tokens), rng)
        starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
        if len(starts) >= len(sentinels):
            check_sentinels(1, len(sentinels))
            # One fewer, because there may be one more stretch of kept tokens than of replaced ones.
            mask[starts[len(sentinels) - 1] :] = False
        inputs, targets = _replace_spans(tokens, mask, sentinels), _replace_spans(tokens, ~mask, sentinels)
        return Example(append_eos(inputs, eos_id), append_eos(targets, eos_id))


def mask_from_starts(noise_starts: np.ndarray, nonnoise_starts: np.ndarray) -> np.ndarray:
    """Returns the noise mask that two draws stand for: T5's arithmetic without its randomness.

    Args:
        noise_starts: bool [noise tokens - 1], true where a noise token other than the first begins a new span.
        nonnoise_starts: bool [other tokens - 1], the same for the tokens between; as many true as in `noise_starts`.

    Returns:
        bool [noise tokens + other tokens], alternating from a stretch of other tokens to a noise span at the end.
    """
    lengths = np.stack([_segment_lengths(nonnoise_starts), _segment_lengths(noise_starts)], axis=1).reshape(-1)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def _segment_lengths(starts: np.ndarray) -> np.ndarray:
    return np.diff(np.flatnonzero(np.concatenate([[True], starts, [True]])))


def _replace_spans(tokens: np.ndarray, mask: np.ndarray, sentinels: tuple[int, ...]) -> np.ndarray:
    follows = np.concatenate([[False], mask[:-1]])
    starts = mask & ~follows
    spans = int(starts.sum())
    check_sentinels(spans, len(sentinels))
    replaced = tokens.astype(np.int32)
    replaced[starts] = sentinels[:spans]
    return replaced[~(mask & follows)]


def check_sentinels(spans: int, sentinels: int) -> None:
    """Raises InputError if a text has more `spans` than the tokenizer has `sentinels`."""
    if spans > sentinels:
        raise InputError(
            f"{spans} spans but the tokenizer has {sentinels} sentinels (<extra_id_N>): use a shorter input_length, "
            "a longer mean_span_length, a lower noise_density, or a tokenizer with more sentinels"
        )
