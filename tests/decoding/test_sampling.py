from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.decoding.logits import History, process, processors
from t5x_lite.decoding.sampling import (
    Greedy,
    MinP,
    Sample,
    Temperature,
    TopK,
    TopP,
    Typical,
    Warper,
    probabilities,
    row_keys,
    step_keys,
    warp,
    warpers,
)

narrowed = jax.jit(warp, static_argnums=1)
distribution = jax.jit(probabilities, static_argnums=1)
draw = jax.jit(lambda strategy, scores, keys: strategy(scores, keys), static_argnums=0)

# --- what the warpers leave -----------------------------------------------------------------------------------------

SHARES = np.array(
    [
        [0.4, 0.25, 0.15, 0.1, 0.06, 0.04],
        [0.25, 0.25, 0.25, 0.25, 0.0, 0.0],
        [0.5, 0.125, 0.125, 0.125, 0.0625, 0.0625],
        [0.01, 0.02, 0.9, 0.03, 0.03, 0.01],
    ]
)
with np.errstate(divide="ignore"):
    SCORES = np.log(SHARES).astype(np.float32)
FOUR, ALL = [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("warper", "wanted"),
    [  # as transformers 5.23 has it
        (TopK(1), [[0], FOUR, [0], [2]]),
        (TopK(2), [[0, 1], FOUR, FOUR, [2, 3, 4]]),
        (TopK(99), [ALL, FOUR, ALL, ALL]),
        (TopP(1e-9), [[0], [3], [0], [2]]),
        (TopP(0.45), [[0, 1], [2, 3], [0], [2]]),
        (TopP(0.5), [[0, 1], [2, 3], [0], [2]]),
        (TopP(0.7), [[0, 1, 2], [1, 2, 3], [0, 2, 3], [2]]),
        (TopP(0.95), [[0, 1, 2, 3, 4], FOUR, ALL, [2, 3, 4]]),
        (TopP(0.999), [ALL, FOUR, ALL, ALL]),
        (MinP(0.12), [[0, 1, 2, 3, 4], FOUR, ALL, [2]]),
        (MinP(0.3), [[0, 1, 2], FOUR, [0], [2]]),
        (MinP(0.99), [[0], FOUR, [0], [2]]),
        (Typical(0.05), [[1], FOUR, [1, 2, 3], [2]]),
        (Typical(0.5), [[0, 1, 2], FOUR, FOUR, [2]]),
        (Typical(0.9), [FOUR, FOUR, ALL, [2]]),
    ],
)
def test_a_warper_keeps_a_set_and_its_scores(warper: Warper, wanted: list[list[int]]) -> None:
    left = np.asarray(narrowed(SCORES, (warper,)))
    kept = left > -np.inf
    assert [np.flatnonzero(row).tolist() for row in kept] == wanted
    np.testing.assert_array_equal(left[kept], SCORES[kept])


def test_all_warpers_at_once_are_as_in_transformers() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, typical_p=0.8)
    chain = warpers(config)
    assert chain == (Temperature(0.7), TopK(5), TopP(0.9), MinP(0.1), Typical(0.8))
    wanted = [
        [0.569061, 0.290776, 0.140163, 0, 0, 0],
        [0.25, 0.25, 0.25, 0.25, 0, 0],
        [0.707197, 0.097601, 0.097601, 0.097601, 0, 0],
        [0, 0, 1, 0, 0, 0],
    ]
    np.testing.assert_allclose(distribution(SCORES, chain), wanted, atol=1e-6)  # they are rounded to as many places


def test_only_the_warpers_that_change_something_are_built() -> None:
    assert warpers(GenerationConfig(do_sample=True)) == ()
    assert warpers(GenerationConfig(do_sample=True, min_p=0.2)) == (MinP(0.2),)


@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_top_p_of_many_tokens_is_the_smallest_set(spread: float) -> None:
    # In bfloat16, so that many of them are equally likely.
    scores = np.random.default_rng(0).normal(0, spread, (3, 5000)).astype(jnp.bfloat16).astype(np.float32)
    kept = np.asarray(narrowed(scores, (TopP(0.8),))) > -np.inf
    shares = np.exp(scores.astype(np.float64))
    shares /= shares.sum(axis=1, keepdims=True)
    for share, keep in zip(shares, kept, strict=True):
        assert np.min(share[keep]) >= np.max(share[~keep])
        # Sums of thousands of float32 numbers are right to about 1e-6, and the least likely share is more than that.
        assert np.sum(share[keep]) >= 0.8 - 1e-6
        assert np.sum(share[keep]) - np.min(share[keep]) < 0.8 + 1e-6
        assert 500 < np.sum(keep) < 4500


# --- what is drawn --------------------------------------------------------------------------------------------------

DRAWS, VOCAB = 20_000, 16
LOGITS = np.random.default_rng(4).normal(0, 0.9, VOCAB)
# What chi-square exceeds with probability 0.001, by degrees of freedom.
CRITICAL = [0, 10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9, 29.6, 31.3, 32.9, 34.5, 36.1, 37.7]


def exact(
    temperature: float = 1.0,
    top_k: int = VOCAB,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    logits: np.ndarray = LOGITS,
) -> np.ndarray:
    """The distribution from the definitions, in float64, by sorting."""

    def normal(share: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
        share = share if keep is None else np.where(np.isin(np.arange(VOCAB), keep), share, 0.0)
        return share / np.sum(share)

    def smallest(order: np.ndarray, share: np.ndarray, total: float) -> np.ndarray:
        return order[: np.searchsorted(np.cumsum(share[order]), total - 1e-12) + 1]

    share = normal(np.exp(logits / temperature))
    share = normal(share, np.argsort(-share)[:top_k])
    share = normal(share, smallest(np.argsort(-share), share, top_p))
    share = normal(share, np.flatnonzero(share >= min_p * np.max(share)))
    information = -np.log(np.maximum(share, 1e-300))
    distance = np.where(share > 0, np.abs(information - np.sum(share * information)), np.inf)
    return normal(share, smallest(np.argsort(distance), share, typical_p))


def assert_as_often(drawn: jax.Array, wanted: np.ndarray) -> None:
    """Each of the tokens was drawn as often as it is likely, by chi-square."""
    counts = np.bincount(drawn, minlength=VOCAB)
    possible = wanted > 0
    assert np.sum(counts[~possible]) == 0
    expected = DRAWS * wanted[possible]
    assert np.min(expected) > 20  # where chi-square is no approximation to worry about
    assert np.sum((counts[possible] - expected) ** 2 / expected) <= CRITICAL[np.sum(possible) - 1]


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 16),
        ({"temperature": 0.7}, 16),
        ({"temperature": 2.0}, 16),
        ({"top_k": 6}, 6),
        ({"top_p": 0.8}, 8),
        ({"min_p": 0.2}, 5),
        ({"typical_p": 0.6}, 8),  # the most likely is none of them
        ({"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.15, "typical_p": 0.85}, 9),
    ],
)
def test_tokens_come_as_often_as_they_are_likely(settings: dict[str, Any], tokens: int) -> None:
    wanted = exact(**settings)
    assert np.count_nonzero(wanted) == tokens
    chain = warpers(GenerationConfig(do_sample=True, **settings))
    scores = jnp.tile(jnp.array(LOGITS, jnp.float32), (DRAWS, 1))
    # Probabilities of float32 logits around 1.
    np.testing.assert_allclose(distribution(scores[:1], chain)[0], wanted, atol=1e-6)
    assert_as_often(draw(Sample(chain), scores, row_keys(0, jnp.arange(DRAWS), 1)), wanted)


@dataclass(frozen=True)
class Case:
    """Settings, what was seen before the draw, and what they do to it, by hand."""

    config: GenerationConfig
    seen: tuple[int, ...] = (0, 5, 7, 5, 2, 5)
    prompt: int = 2  # tokens of it
    model: tuple[tuple[str, int], ...] = ()
    penalized: float = 1.0
    banned: tuple[int, ...] = ()
    forced: int | None = None

    def wanted(self) -> np.ndarray:
        """Returns the distribution, float64 `[V]`."""
        logits = LOGITS.copy()
        for token in {*self.seen}:
            logits[token] *= self.penalized if logits[token] < 0 else 1 / self.penalized
        logits[list(self.banned)] = -np.inf
        if self.forced is not None:
            logits = np.where(np.arange(VOCAB) == self.forced, 0.0, -np.inf)
        narrowing = {name: getattr(self.config, name) for name in ("temperature", "top_p")}
        return exact(**narrowing, top_k=self.config.top_k or VOCAB, logits=logits)

    def drawn(self) -> jax.Array:
        """Returns what is drawn, int32 `[DRAWS]`."""
        model: dict[str, Any] = {"vocab_size": None, "forced_bos_id": None, "forced_eos_id": None} | dict(self.model)
        chain = processors(self.config, end_ids=(1, 9), **model)
        seen = jnp.array([(*self.seen, 4, 4)], jnp.int32)  # and what may not be read any more
        lengths = jnp.array([len(self.seen)])
        scores = process(chain, jnp.array(LOGITS, jnp.float32)[None], History(seen, lengths, lengths[0] - self.prompt))
        keys = step_keys(row_keys(1, jnp.arange(DRAWS), 1), lengths[0])
        return Sample(warpers(self.config))(jnp.broadcast_to(scores, (DRAWS, VOCAB)), keys)


def sampled(**settings: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, max_new_tokens=10, **settings)


WORDS = ((5, 4), (6,), (2, 5, 11), (7, 5, 12), (9,))  # the 9 is an end, which is not banned
CASES = {
    "repetition penalty": Case(sampled(repetition_penalty=1.6), penalized=1.6),
    "a reward for repetition": Case(sampled(repetition_penalty=0.7), penalized=0.7),
    "no pair twice": Case(sampled(no_repeat_ngram_size=2), seen=(0, 5, 7, 5, 2, 5, 5), banned=(7, 2, 5)),
    "no triple twice": Case(sampled(no_repeat_ngram_size=3), seen=(3, 5, 7, 2, 3, 5), banned=(7,)),
    "bad words": Case(sampled(bad_words_ids=WORDS), banned=(4, 6, 11)),
    "too short": Case(sampled(min_new_tokens=5), banned=(1, 9)),
    "long enough": Case(sampled(min_new_tokens=4)),
    "suppressed": Case(sampled(suppress_tokens=(0, 8)), banned=(0, 8)),
    "suppressed first": Case(sampled(begin_suppress_tokens=(0, 8)), prompt=6, banned=(0, 8)),
    "suppressed after the forced first": Case(
        sampled(begin_suppress_tokens=(0, 8), forced_bos_token_id=13), seen=(3, 13), prompt=1, banned=(0, 8)
    ),
    "not suppressed later": Case(sampled(begin_suppress_tokens=(0, 8))),
    "forced first": Case(sampled(forced_bos_token_id=13), seen=(3,), prompt=1, forced=13),
    "forced first by the model": Case(sampled(), seen=(3,), prompt=1, model=(("forced_bos_id", 12),), forced=12),
    "not forced after a prompt": Case(sampled(forced_bos_token_id=13), prompt=6),
    "forced last": Case(sampled(forced_eos_token_id=9), seen=(3, *range(10)), prompt=2, forced=9),
    "not forced yet": Case(sampled(forced_eos_token_id=9), seen=(3, *range(9)), prompt=2),
    "a smaller vocabulary": Case(sampled(), model=(("vocab_size", 12),), banned=(12, 13, 14, 15)),
    "all of them, narrowed": Case(
        sampled(
            repetition_penalty=1.6,
            no_repeat_ngram_size=2,
            bad_words_ids=WORDS,
            min_new_tokens=5,
            suppress_tokens=(0,),
            temperature=1.3,
            top_k=6,
            top_p=0.95,
        ),
        model=(("vocab_size", 15),),
        penalized=1.6,
        banned=(7, 2, 4, 6, 11, 1, 9, 0, 15),
    ),
}


@pytest.fixture(scope="module")
def drawn_cases() -> dict[str, jax.Array]:
    """What is drawn in each case, by one program."""
    return jax.jit(lambda: {name: case.drawn() for name, case in CASES.items()})()


@pytest.mark.parametrize("name", CASES)
def test_tokens_come_as_often_as_the_processors_leave_them_likely(name: str, drawn_cases: dict[str, jax.Array]) -> None:
    assert_as_often(drawn_cases[name], CASES[name].wanted())


def test_greedy_takes_the_best_and_of_several_the_first() -> None:
    tokens = draw(Greedy(), jnp.array([[0.0, 2.0, 1.0, 2.0], [-1.0, -2.0, -jnp.inf, -3.0]]), None)
    np.testing.assert_array_equal(tokens, [1, 0])
    assert tokens.dtype == jnp.int32


# --- whose draw it is -----------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="sequences")
def sample_rows(scores: jax.Array, row_ids: jax.Array, sequences: int) -> jax.Array:
    keys = step_keys(row_keys(0, row_ids, sequences), 5)
    tokens = Sample((TopK(80), TopP(0.95)))(jnp.repeat(scores, sequences, axis=0), keys)
    return tokens.reshape(-1, sequences)


def drawn(row_ids: list[int], sequences: int = 2) -> np.ndarray:
    """Tokens `[B, R]` of rows whose scores depend on their ids."""
    rows = [np.random.default_rng(i).normal(size=100).astype(np.float32) for i in row_ids]
    return np.asarray(sample_rows(jnp.array(rows), jnp.array(row_ids), sequences))


def test_a_row_is_drawn_alike_in_every_batch() -> None:
    batch = drawn([4, 7, 2, 9, 5])
    assert batch.dtype == np.int32
    assert len({tuple(row) for row in batch.tolist()}) == 5
    np.testing.assert_array_equal(drawn([7])[0], batch[1])
    np.testing.assert_array_equal(drawn([2, 5, 9, 7, 4]), batch[[2, 4, 3, 1, 0]])
    np.testing.assert_array_equal(drawn([7], sequences=3)[:, :2], batch[1:2])  # nor do more sequences change the first


def test_seed_row_sequence_and_step_all_make_a_difference() -> None:
    keys = [row_keys(seed, jnp.array([3, 4, 5]), 4) for seed in (0, 1, 2**32 - 1)]
    keys += [step_keys(keys[0], step) for step in range(3)]
    every = np.asarray(jax.random.key_data(jnp.concatenate(keys)))
    assert every.shape[0] == 6 * 12
    assert len({tuple(key) for key in every.tolist()}) == 6 * 12


def test_a_seed_may_be_traced() -> None:
    wanted = jax.random.key_data(row_keys(2**31 + 5, jnp.arange(2), 2))
    traced = jax.jit(row_keys, static_argnums=2)(jnp.uint32(2**31 + 5), jnp.arange(2), 2)
    np.testing.assert_array_equal(jax.random.key_data(traced), wanted)
