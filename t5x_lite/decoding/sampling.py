"""How the next token of a sequence is chosen: the most likely one, or a draw from a narrowed distribution.

The warpers, which narrow it, do what those of transformers 5.23 do (`generation/logits_process.py`), in its order.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.decoding.logits import History, Processor


class Warper(Processor):
    """A processor that needs no history."""

    @abstractmethod
    def __call__(self, scores: jax.Array, history: History | None = None) -> jax.Array:
        """Returns the scores `[R, V]` to go on with, -inf for tokens that are left out."""


def warpers(config: GenerationConfig) -> tuple[Warper, ...]:
    """Returns the warpers that a configuration asks for, in the order in which they apply."""
    chain: list[Warper] = []
    if config.temperature != 1.0:
        chain.append(Temperature(config.temperature))
    if config.top_k:
        chain.append(TopK(config.top_k))
    if config.top_p < 1.0:
        chain.append(TopP(config.top_p))
    if config.min_p:
        chain.append(MinP(config.min_p))
    if config.typical_p < 1.0:
        chain.append(Typical(config.typical_p))
    return tuple(chain)


def warp(scores: jax.Array, chain: Sequence[Warper]) -> jax.Array:
    """Returns scores `[R, V]` after one warper after the other."""
    for warper in chain:
        scores = warper(scores)
    return scores


def probabilities(scores: jax.Array, chain: Sequence[Warper]) -> jax.Array:
    """Returns the distribution float32 `[R, V]` that `Sample(chain)` draws from."""
    return jax.nn.softmax(warp(scores, chain), axis=-1)


@dataclass(frozen=True)
class Greedy:
    """Chooses the most likely token, of several the one with the lowest id."""

    def __call__(self, scores: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Returns a token for every row of scores `[R, V]`: int32 `[R]`."""
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Sample:
    """Draws a token from the distribution that the warpers leave."""

    warpers: tuple[Warper, ...] = ()

    def __call__(self, scores: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns a token for every row of scores `[R, V]`, drawn with its key of `[R]`: int32 `[R]`."""
        return jax.vmap(jax.random.categorical)(keys, warp(scores, self.warpers)).astype(jnp.int32)


def row_keys(seed: int | jax.Array, row_ids: jax.Array, sequences: int) -> jax.Array:
    """Returns a key for each sequence of each row, which no other row of the batch has a part in.

    Args:
      seed: 0 to 2**32 - 1.
      row_ids: int32 `[B]`: what tells a row apart, wherever in whichever batch it is.
      sequences: R of every row.

    Returns:
      Keys `[B * R]`, those of a row next to each other.
    """
    key = jax.random.key(jnp.asarray(seed, jnp.uint32))
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)
    each = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(rows, jnp.arange(sequences))
    return each.reshape(-1)


def step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """Returns the keys `[R]` of a step, from those of `row_keys`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


@dataclass(frozen=True)
class Temperature(Warper):
    """Divides the scores: above 1 evens out, below 1 sharpens."""

    temperature: float

    def __call__(self, scores: jax.Array, history: History | None = None) -> jax.Array:
        """Returns scores `[R, V]`."""
        return scores / self.temperature


@dataclass(frozen=True)
class TopK(Warper):
    """Keeps the `k` best scores, and those equal to the last of them."""

    k: int

    def __call__(self, scores: jax.Array, history: History | None = None) -> jax.Array:
        """Returns scores `[R, V]`."""
        best = jax.lax.top_k(scores, min(self.k, scores.shape[1]))[0]
        # The minimum, as a slice of the last makes XLA sort the whole vocabulary on a CPU.
        return jnp.where(scores < jnp.min(best, axis=-1, keepdims=True), -jnp.inf, scores)


@dataclass(frozen=True)
class TopP(Warper):
    """Keeps the smallest set of the most likely tokens whose probabilities sum to at least `p`.

    Of equally likely tokens it takes those with the higher ids first, as transformers does.
    """

    p: float

    def __call__(self, scores: jax.Array, history: History | None = None) -> jax.Array:
        """Returns scores `[R, V]`."""
        share = jax.nn.softmax(scores, axis=-1)
        rank = _sortable(jnp.ones_like(share)) - _sortable(share)
        last = _last_of_set(rank, share, jnp.full(scores.shape[:1], self.p))[:, None]
        better, equal = rank < last, rank == last
        missing = self.p - jnp.sum(jnp.where(better, share, 0.0), axis=-1)
        vocab = scores.shape[1]
        place = vocab - 1 - jnp.arange(vocab)[None, :]
        last_place = _last_of_set(place, jnp.where(equal, share, 0.0), missing, vocab.bit_length())[:, None]
        return jnp.where(better | (equal & (place <= last_place)), scores, -jnp.inf)


@dataclass(frozen=True)
class MinP(Warper):
    """Keeps the tokens at least `p` times as likely as the most likely one (Nguyen et al. 2024)."""

    p: float

    def __call__(self, scores: jax.Array, history: History | None = None) -> jax.Array:
        """Returns scores `[R, V]`."""
        share = jax.nn.softmax(scores, axis=-1)
        return jnp.where(share < self.p * jnp.max(share, axis=-1, keepdims=True), -jnp.inf, scores)


@dataclass(frozen=True)
class Typical(Warper):
    """Keeps the tokens whose information is closest to the entropy, until they sum to `p` (Meister et al. 2022)."""

    p: float

    def __call__(self, scores: jax.Array, history: History | None = None) -> jax.Array:
        """Returns scores `[R, V]`."""
        information = -jax.nn.log_softmax(scores, axis=-1)
        share = jnp.exp(-information)
        entropy = jnp.sum(jnp.where(share > 0, share * information, 0.0), axis=-1, keepdims=True)
        rank = _sortable(jnp.abs(information - entropy))
        last = _last_of_set(rank, share, jnp.full(scores.shape[:1], self.p))[:, None]
        return jnp.where(rank <= last, scores, -jnp.inf)


def _sortable(x: jax.Array) -> jax.Array:
    """Returns float32 numbers of at least 0 as int32 numbers in the same order, which are their bits."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _last_of_set(rank: jax.Array, share: jax.Array, total: jax.Array, bits: int = 31) -> jax.Array:
    """Returns the rank up to which tokens must be taken for their shares to sum to at least `total`: int32 `[R]`.

    That is the largest number below which the shares sum to less. It is found bit by bit: 31 sums over a vocabulary of
    50 thousand take a tenth of the time that sorting it takes on a CPU.

    Args:
      rank: int32 `[R or 1, V]`, at least 0; the lowest are taken first.
      share: float32 `[R, V]`, at least 0.
      total: float32 `[R]`, above 0.
      bits: of the highest rank.
    """

    def try_bit(i: jax.Array, last: jax.Array) -> jax.Array:
        higher = last | (1 << (bits - 1 - i))
        below = jnp.sum(jnp.where(rank < higher[:, None], share, 0.0), axis=-1)
        return jnp.where(below < total, higher, last)

    return jax.lax.fori_loop(0, bits, try_bit, jnp.zeros(share.shape[:1], jnp.int32))
