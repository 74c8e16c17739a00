"""Expectations are derived by hand, those with many processors at once are what transformers 5.23's give."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.decoding.logits import (
    Allowed,
    BadWords,
    BeginSuppress,
    ForcedBOS,
    ForcedEOS,
    History,
    MinNewTokens,
    NoRepeatNGram,
    Processor,
    RepetitionPenalty,
    Suppress,
    process,
    processors,
)
from t5x_lite.errors import InputError

VOCAB, LENGTH = 12, 10
SCORES = (1.5, -2.0, 0.5, 0.0, 3.0, -1.0, 2.0, 2.5, -0.5, 1.0, 0.25, -4.0)
SEQUENCES = ((3, 5, 7, 5, 7, 5), (3,), (4, 4, 4, 6, 4, 4), (7, 0))
JUNK = (6, 7, 4, 4, 6, 7, 5, 5, 1, 3)  # after the end of a sequence, where it must not be read
NONE = -np.inf

run = jax.jit(process, static_argnums=0)


def history(*sequences: tuple[int, ...], step: int = 0) -> History:
    tokens = [(*sequence, *JUNK)[:LENGTH] for sequence in sequences]
    lengths = [len(sequence) for sequence in sequences]
    return History(jnp.array(tokens, jnp.int32), jnp.array(lengths, jnp.int32), jnp.int32(step))


def after(*chain: Processor, sequences: Any = SEQUENCES, step: int = 0) -> np.ndarray:
    scores = jnp.tile(jnp.array(SCORES, jnp.float32), (len(sequences), 1))
    changed = run(chain, scores, history(*sequences, step=step))
    assert (changed.shape, changed.dtype) == (scores.shape, jnp.float32)
    return np.asarray(changed)


def banned(*chain: Processor, sequences: Any = SEQUENCES, step: int = 0) -> list[list[int]]:
    """The ids of each row that got -inf; the scores of all others are as before."""
    changed = after(*chain, sequences=sequences, step=step)
    assert np.all((changed == NONE) | (changed == np.array(SCORES, np.float32)))
    return [np.flatnonzero(row == NONE).tolist() for row in changed]


def build(config: GenerationConfig, **model: Any) -> tuple[Processor, ...]:
    nothing = {"end_ids": (2, 10), "vocab_size": None, "forced_bos_id": None, "forced_eos_id": None}
    return processors(config, **nothing | model)


# --- what reads the history -----------------------------------------------------------------------------------------


def test_repetition_penalty_moves_the_scores_of_seen_tokens_down() -> None:
    wanted = np.tile(np.array(SCORES, np.float32), (4, 1))
    wanted[0, [5, 7]] = -2.0, 1.25  # once, however often they were seen; 3 has score 0
    wanted[2, [4, 6]] = 1.5, 1.0
    wanted[3, [0, 7]] = 0.75, 1.25
    np.testing.assert_array_equal(after(RepetitionPenalty(2.0)), wanted)


def test_repetition_penalty_leaves_what_is_banned_banned() -> None:
    assert after(Suppress((5,)), RepetitionPenalty(2.0))[0, 5] == NONE


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (1, [[3, 5, 7], [3], [4, 6], [0, 7]]),
        (2, [[7], [], [4, 6], []]),
        (3, [[7], [], [4, 6], []]),
        (4, [[7], [], [], []]),
        (6, [[], [], [], []]),
        (LENGTH + 5, [[], [], [], []]),
    ],
)
def test_no_ngram_comes_twice(size: int, wanted: list[list[int]]) -> None:
    assert banned(NoRepeatNGram(size)) == wanted


def test_an_ngram_may_end_at_the_last_place_of_the_buffer() -> None:
    full = (0, 1, 2, 3, 4, 5, 6, 7, 8, 0)
    assert banned(NoRepeatNGram(2), sequences=[full]) == [[1]]
    assert banned(NoRepeatNGram(LENGTH), sequences=[(1,) * LENGTH]) == [[1]]


def test_bad_words_are_not_completed() -> None:
    words = ((9,), (5, 1), (7, 5, 0), (4, 4, 4, 6, 4, 4, 2), (3, 3, 5), (5, 11), (7, 5, 8, 8))
    assert banned(BadWords(words)) == [[0, 1, 9, 11], [9], [2, 9], [9]]


def test_a_bad_word_longer_than_any_sequence_bans_nothing() -> None:
    assert banned(BadWords((tuple(range(12)),))) == [[], [], [], []]


def test_single_bad_words_need_no_tokens() -> None:
    scores = jnp.zeros((2, VOCAB))
    empty = History(jnp.zeros((2, 0), jnp.int32), jnp.ones(2, jnp.int32), jnp.int32(0))
    changed = run((BadWords(((9,),)),), scores, empty)
    np.testing.assert_array_equal(changed == NONE, np.tile(np.arange(VOCAB) == 9, (2, 1)))


# --- what looks at the step alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "wanted"), [(0, [2, 10]), (2, [2, 10]), (3, [])])
def test_no_end_before_min_new_tokens(step: int, wanted: list[int]) -> None:
    assert banned(MinNewTokens(3, (2, 10)), step=step) == [wanted] * 4


def test_the_first_token_is_forced_after_a_start_token_alone() -> None:
    changed = after(ForcedBOS(8))
    np.testing.assert_array_equal(changed[1], np.where(np.arange(VOCAB) == 8, 0.0, NONE))
    np.testing.assert_array_equal(changed[[0, 2, 3]], np.tile(np.array(SCORES, np.float32), (3, 1)))


@pytest.mark.parametrize("step", [6, 7, 8])
def test_the_last_token_is_forced(step: int) -> None:
    wanted = np.where(np.arange(VOCAB) == 8, 0.0, NONE) if step == 7 else np.array(SCORES, np.float32)
    np.testing.assert_array_equal(after(ForcedEOS(8, max_new_tokens=8), step=step), np.tile(wanted, (4, 1)))


def test_suppressed_tokens_are_banned_and_so_is_what_no_token_uses() -> None:
    assert banned(Suppress((4, 0)), step=5) == [[0, 4]] * 4
    assert banned(Allowed(9), step=5) == [[9, 10, 11]] * 4


@pytest.mark.parametrize(
    ("step", "after_forced_bos", "wanted"),
    [(0, False, [[6], [6]]), (1, False, [[], []]), (0, True, [[], [6]]), (1, True, [[6], []]), (2, True, [[], []])],
)
def test_suppressed_at_the_beginning(step: int, after_forced_bos: bool, wanted: list[list[int]]) -> None:
    # A start token alone, after which the first may be forced, and a prompt of three tokens.
    sequences = ((3, 8, 7)[: 1 + step], (3, 7, 4, 7, 0)[: 3 + step])
    assert banned(BeginSuppress((6,), after_forced_bos), sequences=sequences, step=step) == wanted


# --- all of them ----------------------------------------------------------------------------------------------------

EVERYTHING = GenerationConfig(
    max_new_tokens=8,
    repetition_penalty=2.0,
    no_repeat_ngram_size=2,
    bad_words_ids=[[9], [7, 5], [2], [4, 7, 0]],  # type: ignore[arg-type]
    min_new_tokens=3,
    forced_bos_token_id=8,
    forced_eos_token_id=2,
    suppress_tokens=[4],  # type: ignore[arg-type]
    begin_suppress_tokens=[6],  # type: ignore[arg-type]
    eos_token_id=[2, 10],  # type: ignore[arg-type]
)


@pytest.mark.parametrize(
    ("sequence", "step", "wanted"),
    [
        ((3,), 0, [NONE] * 8 + [0.0] + [NONE] * 3),
        ((3, 8), 1, [1.5, -2.0, NONE, 0.0, NONE, -1.0, NONE, 2.5, -1.0, NONE, NONE, -4.0]),
        ((3, 8, 7), 2, [1.5, -2.0, NONE, 0.0, NONE, NONE, 2.0, 1.25, -1.0, NONE, NONE, -4.0]),
        ((3, 8, 7, 4, 7), 4, [NONE, -2.0, 0.5, 0.0, NONE, NONE, 2.0, 1.25, -1.0, NONE, 0.25, -4.0]),
        ((3, 8, 7, 4, 7, 4, 7, 0), 7, [NONE] * 2 + [0.0] + [NONE] * 9),
        ((3, 7, 4), 0, [1.5, -2.0, NONE, 0.0, NONE, -1.0, NONE, 1.25, -0.5, NONE, NONE, -4.0]),
        ((3, 7, 4, 7), 1, [NONE, -2.0, NONE, 0.0, NONE, NONE, 2.0, 1.25, -0.5, NONE, NONE, -4.0]),
        ((3, 7, 4, 7, 0, 7, 0, 7, 0, 7), 7, [NONE] * 2 + [0.0] + [NONE] * 9),
    ],
)
def test_everything_at_once_is_as_in_transformers(sequence: tuple[int, ...], step: int, wanted: list[float]) -> None:
    np.testing.assert_array_equal(after(*build(EVERYTHING), sequences=[sequence], step=step)[0], wanted)


def test_the_order_is_that_of_transformers() -> None:
    assert build(EVERYTHING, vocab_size=11) == (
        Allowed(11),
        RepetitionPenalty(2.0),
        NoRepeatNGram(2),
        BadWords(((9,), (7, 5), (4, 7, 0))),  # without the 2, which is an end
        MinNewTokens(3, (2, 10)),
        ForcedBOS(8),
        ForcedEOS(2, 8),
        Suppress((4,)),
        BeginSuppress((6,), after_forced_bos=True),
    )


def test_only_what_is_needed_is_built() -> None:
    assert build(GenerationConfig()) == ()
    assert build(GenerationConfig(bad_words_ids=((2,), (10,)))) == ()
    assert build(GenerationConfig(min_new_tokens=3), end_ids=()) == ()


def test_the_configurations_ids_come_before_the_models() -> None:
    model = {"forced_bos_id": 5, "forced_eos_id": 6}
    assert build(GenerationConfig(), **model) == (ForcedBOS(5), ForcedEOS(6, 64))
    config = GenerationConfig(forced_bos_token_id=0, forced_eos_token_id=7, min_new_tokens=1, eos_token_id=9)
    assert build(config, **model) == (MinNewTokens(1, (9,)), ForcedBOS(0), ForcedEOS(7, 64))
    late = build(GenerationConfig(begin_suppress_tokens=(6,)), forced_bos_id=5)
    assert late == (ForcedBOS(5), BeginSuppress((6,), after_forced_bos=True))


def test_a_forced_token_may_lie_beyond_the_tokenizers() -> None:
    chain = build(GenerationConfig(forced_bos_token_id=11, forced_eos_token_id=10), vocab_size=9)
    np.testing.assert_array_equal(np.argmax(after(*chain, sequences=[(3,)]), axis=1), [11])
    np.testing.assert_array_equal(np.argmax(after(*chain, sequences=[(3, 4)], step=63), axis=1), [10])


def test_who_reads_the_tokens_says_so() -> None:
    """Where nobody does, other tokens make no difference, and where someone does, they do."""
    for processor in build(EVERYTHING, vocab_size=11):
        sequences = SEQUENCES[0], (7, 4, 7, 5, 4, 7)
        first, second = after(processor, sequences=sequences)
        assert processor.reads_history == (not np.array_equal(first, second))


def test_equal_processors_are_compiled_once() -> None:
    assert hash(build(EVERYTHING)) == hash(build(EVERYTHING))
    after(*build(EVERYTHING), sequences=[(3,)])
    compiled = run._cache_size()  # type: ignore[attr-defined]
    after(*build(EVERYTHING), sequences=[(4,)], step=1)
    assert run._cache_size() == compiled  # type: ignore[attr-defined]


@pytest.mark.parametrize("forced", ["forced_bos_id", "forced_eos_id"])
def test_what_the_model_forces_must_not_be_suppressed(forced: str) -> None:
    what = forced.replace("_id", "_token_id")
    with pytest.raises(InputError, match=f"suppress_tokens must not contain 4, which is the {what}"):
        build(GenerationConfig(suppress_tokens=(3, 4)), **{forced: 4})


@pytest.mark.parametrize("forced", ["forced_bos", "forced_eos"])
def test_what_is_forced_must_not_be_a_bad_word(forced: str) -> None:
    words: Any = {"bad_words_ids": ((5, 4), (4,))}
    for build_it in (
        lambda: build(GenerationConfig(**words), **{f"{forced}_id": 4}),
        lambda: build(GenerationConfig(**words, **{f"{forced}_token_id": 4})),
    ):
        with pytest.raises(InputError, match=f"bad_words_ids must not contain 4, which is the {forced}_token_id"):
            build_it()
    # An end of a sequence is no bad word.
    assert build(GenerationConfig(bad_words_ids=((2,),), forced_eos_token_id=2)) == (ForcedEOS(2, 64),)


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        (BadWords(((3, 12),)), "bad_words_ids"),
        (MinNewTokens(1, (2, 12)), "eos_token_id"),
        (ForcedBOS(12), "forced_bos_token_id"),
        (ForcedEOS(12, 8), "forced_eos_token_id"),
        (Suppress((12,)), "suppress_tokens"),
        (BeginSuppress((12,), False), "begin_suppress_tokens"),
    ],
)
def test_an_id_that_the_model_does_not_have(processor: Processor, name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} must be below the size of the vocabulary, 12, not 12"):
        after(processor)
