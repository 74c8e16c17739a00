"""Training objectives: what is asked of the model, as token ids in and (inputs, targets) out."""

import dataclasses

import numpy as np

from t5x_lite.data.tokenizers import Tokenizer, require_eos
from t5x_lite.errors import InputError

Example = tuple[np.ndarray, np.ndarray]
"""Inputs and targets, int32 [input length] and [target length], each ending in EOS; the lengths vary by example."""


def frame(tokens: np.ndarray, affixes: tuple[tuple[int, ...], tuple[int, ...]], max_length: int) -> np.ndarray:
    """Returns int32 `tokens` between prefix and suffix (T5: an EOS after them), cut to fit `max_length`."""
    prefix, suffix = affixes
    kept = tokens[: max_length - len(prefix) - len(suffix)]
    return np.concatenate([prefix, kept, suffix]).astype(np.int32)


def append_eos(tokens: np.ndarray, eos_id: int, max_length: int | None = None) -> np.ndarray:
    """Returns int32 `tokens` [n] cut to `max_length - 1` and closed with EOS (seqio's `append_eos_after_trim`)."""
    kept = tokens if max_length is None else tokens[: max_length - 1]
    return np.append(kept, eos_id).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """T5's denoising objective (Raffel et al. 2020, section 3.1.4; `t5.data.preprocessors.span_corruption`).

    Spans of tokens are replaced in the inputs by one sentinel each; the targets are the sentinels, each followed by the
    tokens it stands for. There is no closing sentinel.

    Attributes:
        noise_density: the fraction of tokens to replace, in (0, 0.99].
        mean_span_length: the mean number of tokens in a span, at least 1.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0

    def __post_init__(self) -> None:
        # Closer to 1 the window that fits a row grows without bound.
        if not 0 < self.noise_density <= 0.99:
            raise InputError(f"noise_density {self.noise_density}: must be above 0 and at most 0.99")
        if not self.mean_span_length >= 1:
            raise InputError(f"mean_span_length {self.mean_span_length}: must be at least 1 token")

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
        and end inside one are equally likely. A text of one token is left whole.
        """
        noise, spans = self._noise(length)
        nonnoise = max(length, 2) - noise
        noise_starts = rng.permutation(np.arange(noise - 1) < spans - 1)
        nonnoise_starts = rng.permutation(np.arange(nonnoise - 1) < spans - 1)
        return mask_from_starts(noise_starts, nonnoise_starts)[:length]

    def corrupt(self, tokens: np.ndarray, mask: np.ndarray, sentinels: tuple[int, ...]) -> Example:
        """Returns int32 (inputs, targets), without EOS, for int `tokens` [n] and bool `mask` [n].

        T5's `noise_span_to_unique_sentinel` and `nonnoise_span_to_unique_sentinel`.

        Raises:
            InputError: if the mask has more spans than there are sentinels.
        """
        return _replace_spans(tokens, mask, sentinels), _replace_spans(tokens, ~mask, sentinels)

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        """Corrupts int `tokens` [n] afresh and closes both sides with EOS; raises what `corrupt` raises."""
        inputs, targets = self.corrupt(tokens, self.noise_mask(len(tokens), rng), tokenizer.sentinels)
        eos_id = require_eos(tokenizer)
        return append_eos(inputs, eos_id), append_eos(targets, eos_id)

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
        noise, spans = self._noise(raw)
        return raw - noise + spans + 1, noise + spans + 1


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


@dataclasses.dataclass(frozen=True)
class TextToText:
    """Supervised text in, text out: each side cut to its length, in the special tokens that its model knows.

    Attributes:
        input_length: the most tokens of the inputs, special ones included; at least 2.
        target_length: the same for the targets.
    """

    input_length: int
    target_length: int

    def __post_init__(self) -> None:
        for name in ("input_length", "target_length"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} {getattr(self, name)}: must be at least 2, one token and EOS")

    def __call__(self, inputs: np.ndarray, targets: np.ndarray, tokenizer: Tokenizer) -> Example:
        """Returns the int tokens `inputs` [n] and `targets` [m] cut to fit, with the special tokens around them."""
        around = tokenizer.prefix_ids, tokenizer.suffix_ids
        return frame(inputs, around, self.input_length), frame(targets, tokenizer.target_affixes, self.target_length)

    def encode(self, pair: tuple[str, str], tokenizer: Tokenizer) -> Example:
        """Returns a pair of texts as tokens, cut to fit, with the special tokens around them."""
        inputs, targets = (np.array(ids, np.int32) for ids in tokenizer.encode_batch(list(pair)))
        return self(inputs, targets, tokenizer)
