"""What changes the scores of the next token before one is chosen: penalties, bans, forced tokens.

Every processor is a small frozen dataclass, so that a tuple of them can be closed over or be a static argument of a
compiled function. What they do, and the order in which `processors` puts them, is that of transformers 5.23
(`generation/logits_process.py` and `_get_logits_processor`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.errors import InputError


@struct.dataclass
class History:
    """What the decoder has seen in R sequences.

    Attributes:
      tokens: int32 `[R, M]`: the prompt or decoder start token, then what was generated, from the left; what comes
        after it may be anything. Only processors with `reads_history` look at it.
      lengths: int32 `[R]`, how many of the tokens there are; at least 1.
      step: int32 scalar, how many of them were generated.
    """

    tokens: jax.Array
    lengths: jax.Array
    step: jax.Array


class Processor(ABC):
    """Changes the scores of the next token.

    Attributes:
      reads_history: whether it looks at `History.tokens`; where no processor does, nobody needs to keep them.
    """

    reads_history: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns the scores to go on with.

        Args:
          scores: float32 `[R, V]`: logits, or log-probabilities in beam search.
          history: of the R sequences.
        """


def processors(
    config: GenerationConfig,
    *,
    end_ids: tuple[int, ...],
    vocab_size: int | None,
    forced_bos_id: int | None,
    forced_eos_id: int | None,
) -> tuple[Processor, ...]:
    """Returns the processors that a configuration asks for, in the order in which they apply.

    Args:
      config: its ids come before the model's.
      end_ids: the model's ids that end a sequence.
      vocab_size: ids from here on are never generated; None: the model's whole vocabulary may be.
      forced_bos_id: the model's first token.
      forced_eos_id: the model's last token.

    Raises:
      InputError: if a token is both forced and banned.
    """
    end_ids = config.end_ids(end_ids)
    bos = forced_bos_id if config.forced_bos_token_id is None else config.forced_bos_token_id
    eos = forced_eos_id if config.forced_eos_token_id is None else config.forced_eos_token_id
    words = tuple(word for word in config.bad_words_ids if word not in [(token,) for token in end_ids])
    banned = {
        "suppress_tokens": config.suppress_tokens,
        "bad_words_ids": [word[0] for word in words if len(word) == 1],
    }
    for name, tokens in banned.items():
        for forced, token in (("forced_bos_token_id", bos), ("forced_eos_token_id", eos)):
            if token in tokens:
                raise InputError(f"{name} must not contain {token}, which is the {forced}")
    chain: list[Processor] = []
    if vocab_size is not None:
        chain.append(Allowed(vocab_size))  # before what is forced, which may lie beyond the tokenizer's ids
    if config.repetition_penalty != 1.0:
        chain.append(RepetitionPenalty(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        chain.append(NoRepeatNGram(config.no_repeat_ngram_size))
    if words:
        chain.append(BadWords(words))
    if config.min_new_tokens and end_ids:
        chain.append(MinNewTokens(config.min_new_tokens, end_ids))
    if bos is not None:
        chain.append(ForcedBOS(bos))
    if eos is not None:
        chain.append(ForcedEOS(eos, config.max_new_tokens))
    if config.suppress_tokens:
        chain.append(Suppress(config.suppress_tokens))
    if config.begin_suppress_tokens:
        chain.append(BeginSuppress(config.begin_suppress_tokens, after_forced_bos=bos is not None))
    return tuple(chain)


def process(chain: Sequence[Processor], scores: jax.Array, history: History) -> jax.Array:
    """Returns scores `[R, V]` after one processor after the other."""
    for processor in chain:
        scores = processor(scores, history)
    return scores


@dataclass(frozen=True)
class Allowed(Processor):
    """Bans the ids from `vocab_size` on: rows of the embedding that no token of the tokenizer uses."""

    vocab_size: int

    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns scores `[R, V]`."""
        return jnp.where(jnp.arange(scores.shape[1])[None, :] < self.vocab_size, scores, -jnp.inf)


@dataclass(frozen=True)
class RepetitionPenalty(Processor):
    """Divides positive and multiplies negative scores of tokens in the history by `penalty` (Keskar et al. 2019)."""

    penalty: float
    reads_history: ClassVar[bool] = True

    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns scores `[R, V]`."""
        real = jnp.arange(history.tokens.shape[1])[None, :] < history.lengths[:, None]
        seen = _marked(history.tokens, real, scores.shape[1])
        penalized = jnp.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return jnp.where(seen, penalized, scores)


@dataclass(frozen=True)
class NoRepeatNGram(Processor):
    """Bans what would complete a sequence of `size` tokens that the history has already."""

    size: int
    reads_history: ClassVar[bool] = True

    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns scores `[R, V]`."""
        windows = history.tokens.shape[1] - self.size + 1
        if windows < 1:
            return scores
        ends = jnp.arange(windows)[None, :] + self.size
        matches = ends <= history.lengths[:, None]
        prefix = _last(history, self.size - 1)
        for i in range(self.size - 1):
            matches &= history.tokens[:, i : i + windows] == prefix[:, i : i + 1]
        banned = _marked(history.tokens[:, self.size - 1 :], matches, scores.shape[1])
        return jnp.where(banned, -jnp.inf, scores)


@dataclass(frozen=True)
class BadWords(Processor):
    """Bans the last token of every word whose other tokens are the end of the history."""

    words: tuple[tuple[int, ...], ...]
    reads_history: ClassVar[bool] = True

    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns scores `[R, V]`."""
        vocab = scores.shape[1]
        _check("bad_words_ids", [token for word in self.words for token in word], vocab)
        for length, group in groupby(sorted(self.words, key=len), key=len):
            words = np.array(list(group), np.int32)
            matches = jnp.all(_last(history, length - 1)[:, None, :] == words[None, :, :-1], axis=-1)
            matches &= (history.lengths >= length - 1)[:, None]
            lasts = jnp.broadcast_to(words[None, :, -1], matches.shape)
            scores = jnp.where(_marked(lasts, matches, vocab), -jnp.inf, scores)
        return scores


@dataclass(frozen=True)
class MinNewTokens(Processor):
    """Bans the ids that end a sequence until `count` tokens were generated."""

    count: int
    end_ids: tuple[int, ...]

    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns scores `[R, V]`."""
        ends = _mask("eos_token_id", self.end_ids, scores.shape[1])
        return jnp.where(ends & (history.step < self.count), -jnp.inf, scores)


@dataclass(frozen=True)
class ForcedBOS(Processor):
    """Makes `token` the only choice, with score 0, after a decoder start token alone."""

    token: int

    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns scores `[R, V]`."""
        forced = _only("forced_bos_token_id", self.token, scores.shape[1])
        return jnp.where((history.lengths == 1)[:, None], forced, scores)


@dataclass(frozen=True)
class ForcedEOS(Processor):
    """Makes `token` the only choice, with score 0, for the last of `max_new_tokens`."""

    token: int
    max_new_tokens: int

    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns scores `[R, V]`."""
        forced = _only("forced_eos_token_id", self.token, scores.shape[1])
        return jnp.where(history.step == self.max_new_tokens - 1, forced, scores)


@dataclass(frozen=True)
class Suppress(Processor):
    """Bans tokens everywhere."""

    tokens: tuple[int, ...]

    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns scores `[R, V]`."""
        return jnp.where(_mask("suppress_tokens", self.tokens, scores.shape[1]), -jnp.inf, scores)


@dataclass(frozen=True)
class BeginSuppress(Processor):
    """Bans tokens as the first one generated, or as the first that is not forced.

    Attributes:
      tokens: the ids.
      after_forced_bos: whether `ForcedBOS` takes the first place of whatever starts with a start token alone.
    """

    tokens: tuple[int, ...]
    after_forced_bos: bool

    def __call__(self, scores: jax.Array, history: History) -> jax.Array:
        """Returns scores `[R, V]`."""
        prompt = history.lengths - history.step
        begins = history.step == jnp.where((prompt == 1) & self.after_forced_bos, 1, 0)
        banned = _mask("begin_suppress_tokens", self.tokens, scores.shape[1])
        return jnp.where(banned & begins[:, None], -jnp.inf, scores)


def _last(history: History, count: int) -> jax.Array:
    """Returns the last tokens `[R, count]` of the history, anything where it has fewer."""
    places = history.lengths[:, None] - count + jnp.arange(count)[None, :]
    return jnp.take_along_axis(history.tokens, jnp.maximum(places, 0), axis=1)


def _marked(ids: jax.Array, which: jax.Array, size: int) -> jax.Array:
    """Returns bool `[R, size]`: True at the ids `[R, X]` for which `which` is."""
    rows = jnp.arange(ids.shape[0])[:, None]
    # An index beyond the end is dropped, and so an id that stands twice cannot be unmarked by its other place.
    return jnp.zeros((ids.shape[0], size), bool).at[rows, jnp.where(which, ids, size)].set(True, mode="drop")


def _check(name: str, ids: Sequence[int], size: int) -> None:
    if max(ids) >= size:
        raise InputError(f"{name} must be below the size of the vocabulary, {size}, not {max(ids)}")


def _mask(name: str, ids: Sequence[int], size: int) -> np.ndarray:
    """Returns bool `[1, size]`, True at the ids."""
    _check(name, ids, size)
    mask = np.zeros((1, size), bool)
    mask[0, list(ids)] = True
    return mask


def _only(name: str, token: int, size: int) -> np.ndarray:
    """Returns float32 `[1, size]`: 0 for the token, -inf for all others."""
    return np.where(_mask(name, (token,), size), 0.0, -np.inf).astype(np.float32)
