"""Beam search over toy models, whose log-probabilities are looked up; against T5X, transformers and all sequences.

What the stored searches are, and what a toy's place is, stands in `fixtures/make_t5x_beam_search.py`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding.beam_search import BeamSearch, BeamState
from t5x_lite.decoding.stopping import Stopping, stop_table
from t5x_lite.errors import InputError

STORED = np.load(Path(__file__).parents[1] / "fixtures" / "beam_search.npz")
ROWS = np.arange(32)
EOS = Stopping(end_ids=(1,))
ALPHAS = (0.6, 0.0, 1.0, 2.0)
PENALTIES = (1.0, 0.6, 0.0, 2.0, -0.5)
EARLY_STOPPING = (False, True, "never")
END_IDS = {"short": (1,), "sharp": (1, 2)}

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, lengths, scores: what `finish` returns
Step = tuple[BeamState, BeamState, jax.Array, jax.Array]  # state before, state after, tokens, parents


def move(place: Any, token: Any) -> Any:
    return (7 * place + token + 1) % 97


def toy(name: str) -> np.ndarray:
    """Log-probabilities `[97, V]` of the token that follows at each place."""
    return np.array(jax.nn.log_softmax(STORED[f"{name}/logits"]))


def random_toy(vocab: int, seed: int, never: Sequence[int] = ()) -> np.ndarray:
    logits = 2 * np.random.default_rng(seed).normal(size=(97, vocab)).astype(np.float32)
    logits[:, list(never)] = -np.inf
    return np.array(jax.nn.log_softmax(logits))


@partial(jax.jit, static_argnums=0)
def run(searches: tuple[BeamSearch, ...], table: jax.Array, rows: jax.Array, stopping: Stopping) -> list[Any]:
    """Runs several searches over one toy; compiling them together takes a quarter of the time."""

    def one(search: BeamSearch) -> Any:
        def step(carry: tuple[BeamState, jax.Array]) -> tuple[BeamState, jax.Array]:
            state, places = carry
            state, tokens, parents = search.choose(state, table[places])
            return state, move(jnp.take_along_axis(places, parents, axis=1), tokens)

        places = jnp.repeat(rows[:, None], search.num_beams, axis=1)
        carry = search.start(rows.shape[0], stopping), places
        return search.finish(jax.lax.while_loop(lambda carry: search.unfinished(carry[0]), step, carry)[0])

    return [one(search) for search in searches]


def found(search: BeamSearch, table: np.ndarray, rows: np.ndarray = ROWS, stopping: Stopping = EOS) -> Found:
    return tuple(map(np.asarray, run((search,), table, rows, stopping)[0]))  # type: ignore[return-value]


start = jax.jit(BeamSearch.start, static_argnums=(0, 1))
choose = jax.jit(BeamSearch.choose, static_argnums=0)
finish = jax.jit(BeamSearch.finish, static_argnums=0)


def walk(search: BeamSearch, table: np.ndarray) -> list[Step]:
    """Every step of a search."""
    state, places = start(search, len(ROWS), EOS), np.repeat(ROWS[:, None], search.num_beams, axis=1)
    steps = []
    while not np.all(state.done):
        after, tokens, parents = choose(search, state, table[places])
        steps.append((state, after, tokens, parents))
        state, places = after, move(np.take_along_axis(places, np.asarray(parents), axis=1), tokens)
    return steps


def penalised(search: BeamSearch, score: float, length: int) -> float:
    base = length if search.length_penalty_style == "hf" else (5 + length) / 6
    return score / base**search.length_penalty


def log_probability(table: np.ndarray, row: int, tokens: Sequence[int]) -> float:
    place, total = row, 0.0
    for token in tokens:
        total += float(table[place, token])
        place = move(place, token)
    return total


# --- against the peers ----------------------------------------------------------------------------------------------


def assert_equals_stored(search: BeamSearch, result: Any, tokens: np.ndarray, scores: np.ndarray) -> None:
    np.testing.assert_array_equal(np.reshape(result[0], tokens.shape), tokens, err_msg=str(search))
    # The peers' sums are float32 too, and divided by penalties that are rounded differently.
    np.testing.assert_allclose(np.reshape(result[2], scores.shape), scores, rtol=1e-5, err_msg=str(search))


@pytest.mark.parametrize("name", ["short", "sharp", "endless", "single"])
def test_finds_what_t5x_finds(name: str) -> None:
    tokens, scores = STORED[f"{name}/t5x/tokens"], STORED[f"{name}/t5x/scores"]
    scores = np.where(scores < -1e6, -np.inf, scores)  # T5X's way to say that there is no such sequence
    *_, beams, new = tokens.shape
    searches = tuple(BeamSearch(beams, new, beams, alpha, "t5") for alpha in ALPHAS)
    for case, result in enumerate(run(searches, toy(name), ROWS, EOS)):
        assert_equals_stored(searches[case], result, tokens[case], scores[case])


@pytest.mark.parametrize("name", END_IDS)
def test_finds_what_transformers_finds(name: str) -> None:
    tokens, scores, ends = STORED[f"{name}/transformers/tokens"], STORED[f"{name}/transformers/scores"], END_IDS[name]
    *_, beams, new = tokens.shape
    cases = list(itertools.product(range(len(PENALTIES)), range(len(EARLY_STOPPING))))
    searches = tuple(
        BeamSearch(beams, new, beams, PENALTIES[i], "hf", EARLY_STOPPING[j], num_end_ids=len(ends)) for i, j in cases
    )
    results = run(searches, toy(name), ROWS, Stopping(end_ids=ends))
    for search, case, result in zip(searches, cases, results, strict=True):
        assert_equals_stored(search, result, tokens[case], scores[case])


# --- against all sequences ------------------------------------------------------------------------------------------

VOCAB, NEW = 5, 4
WIDE = [
    BeamSearch(VOCAB**NEW, NEW, VOCAB**NEW, penalty, style)
    for style, penalty in itertools.product(("hf", "t5"), (1.0, 0.0, -0.5))
]


def all_sequences(ends: Callable[[tuple[int, ...]], bool]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Every sequence that ends, and every one that is cut off instead."""
    ended, live = [], [()]
    for _ in range(NEW):
        longer = [(*tokens, token) for tokens in live for token in range(VOCAB)]
        ended += [tokens for tokens in longer if ends(tokens)]
        live = [tokens for tokens in longer if not ends(tokens)]
    return ended, live


def assert_finds_all(search: BeamSearch, result: Any, table: np.ndarray, row: int, sequences: Any, raw: bool) -> None:
    """The result is all those sequences that are possible, sorted by score."""
    wanted = []
    for tokens in sequences:
        total = log_probability(table, row, tokens)
        wanted += [(total if raw else penalised(search, total, len(tokens)), tokens)] if total > -np.inf else []
    wanted.sort(reverse=True)
    tokens, lengths, scores = (np.asarray(part)[: len(wanted)] for part in result)
    assert [tuple(t[:n].tolist()) for t, n in zip(tokens, lengths, strict=True)] == [tokens for _, tokens in wanted]
    np.testing.assert_allclose(scores, [score for score, _ in wanted], rtol=1e-5)  # sums of four floats, up to 40
    assert all(not np.any(t[n:]) for t, n in zip(tokens, lengths, strict=True))
    rest = [np.asarray(part)[len(wanted) :] for part in result]
    assert rest[0].shape[0] > 0
    assert not np.any(rest[0])
    assert not np.any(rest[1])
    assert np.all(np.isneginf(rest[2]))


def test_so_many_beams_that_none_is_lost_find_all_sequences() -> None:
    table = random_toy(VOCAB, 0)
    ended, cut_off = all_sequences(lambda tokens: tokens[-1] == 1)
    assert (len(ended), len(cut_off)) == (1 + 4 + 16 + 64, 256)
    for search, result in zip(WIDE, run(tuple(WIDE), table, ROWS[:1], EOS), strict=True):
        sequences = ended + cut_off if search.length_penalty_style == "hf" else ended
        assert_finds_all(search, result, table, 0, sequences, raw=False)


def test_what_is_impossible_is_not_found() -> None:
    # Only 3 may come first, then 3 or the end: a few sequences for many beams, and beams without a token to go on with.
    table = random_toy(VOCAB, 1, never=(0, 2, 4))
    table[5, [1]] = -np.inf
    ended, cut_off = all_sequences(lambda tokens: tokens[-1] == 1)
    searches = tuple(BeamSearch(8, NEW, 8, 1.0, style) for style in ("hf", "t5"))
    for search, result in zip(searches, run(searches, table, ROWS[5:6], EOS), strict=True):
        sequences = ended + cut_off if search.length_penalty_style == "hf" else ended
        assert_finds_all(search, result, table, 5, sequences, raw=False)
        assert np.isfinite(result[2]).sum() == (4 if search.length_penalty_style == "hf" else 3)


def test_t5_returns_live_beams_where_nothing_has_finished() -> None:
    table = random_toy(VOCAB, 2, never=(1,))
    _, cut_off = all_sequences(lambda tokens: tokens[-1] == 1)
    search = WIDE[-1]
    assert search.length_penalty_style == "t5"
    assert_finds_all(search, found(search, table, ROWS[3:4]), table, 3, cut_off, raw=True)


def test_a_stop_string_ends_a_beam_wherever_it_began() -> None:
    pieces = [b"", b"x", b"a", b"b", b"ba"]
    stopping = Stopping(table=jnp.asarray(stop_table(["ab", "xx"], pieces)))

    def ends(tokens: tuple[int, ...]) -> bool:
        text = b"".join(pieces[token] for token in tokens)
        return b"ab" in text or b"xx" in text

    table = random_toy(VOCAB, 3)
    ended, cut_off = all_sequences(ends)
    assert len(ended) > 100
    search = WIDE[0]
    assert_finds_all(search, found(search, table, ROWS[7:8], stopping), table, 7, ended + cut_off, raw=False)


# --- what holds for any search --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "search",
    [
        BeamSearch(1, 8, length_penalty=0.0),
        BeamSearch(1, 8, early_stopping=True),
        BeamSearch(1, 8, length_penalty_style="t5"),
    ],
)
def test_one_beam_is_greedy(search: BeamSearch) -> None:
    table = toy("single")
    if search.length_penalty_style == "t5":
        table[:, 1] = -np.inf  # T5X lets the second best token end a sequence, which greedy decoding does not
    tokens, lengths, _ = found(search, table)
    for row in ROWS:
        place, wanted = row, []
        while len(wanted) < search.max_new_tokens and wanted[-1:] != [1]:
            wanted.append(int(np.argmax(table[place])))
            place = move(place, wanted[-1])
        assert tokens[row, : lengths[row]].tolist() == wanted


@pytest.mark.parametrize("style", ["hf", "t5"])
def test_scores_are_those_of_the_sequences(style: Any) -> None:
    table = toy("endless")
    search = BeamSearch(5, 6, 3, 0.6, style, fill_id=9)
    tokens, lengths, scores = found(search, table)
    assert (tokens.shape, lengths.shape, scores.shape) == ((96, 6), (96,), (96,))
    assert (tokens.dtype, lengths.dtype, scores.dtype) == (np.int32, np.int32, np.float32)
    unpenalised = 0
    for row, (sequence, length, score) in enumerate(zip(tokens, lengths, scores, strict=True)):
        assert np.all(sequence[length:] == 9)
        if np.isneginf(score):
            assert length == 0
            continue
        ends = np.flatnonzero(sequence[:length] == 1)
        assert ends.tolist() == [length - 1] or (ends.size == 0 and length == 6)
        total = log_probability(table, row // 3, sequence[:length])
        live = style == "t5" and ends.size == 0
        unpenalised += live
        assert score == pytest.approx(total if live else penalised(search, total, int(length)), rel=1e-5)
    assert (unpenalised > 0) == (style == "t5")
    assert np.all(np.diff(scores.reshape(-1, 3)[np.isfinite(scores.reshape(-1, 3)).all(axis=1)]) <= 0)


# Over the toy "sharp", in which rows are done after any number of steps.
NEVER, EAGER, T5, SHORT_T5 = (
    BeamSearch(3, 12, 3, 0.3, "hf", "never", fill_id=9),
    BeamSearch(3, 12, 3, 1.0, "hf", True, fill_id=9),
    BeamSearch(3, 12, 3, 0.6, "t5", fill_id=9),
    BeamSearch(3, 12, 3, -0.5, "t5", fill_id=9),
)


@pytest.mark.parametrize("search", [NEVER, EAGER, T5])
def test_a_row_does_not_depend_on_the_others(search: BeamSearch) -> None:
    table = toy("sharp")
    steps = walk(search, table)
    frozen = np.sum([np.asarray(before.done) for before, *_ in steps], axis=0)
    assert len(set(frozen.tolist())) > 2
    together = [np.asarray(part).reshape(len(ROWS), 3, -1) for part in finish(search, steps[-1][1])]
    for row in ROWS[::4]:
        for alone, all_rows in zip(found(search, table, ROWS[row : row + 1]), together, strict=True):
            np.testing.assert_array_equal(alone.reshape(3, -1), all_rows[row])


def test_every_step_is_what_its_parents_and_tokens_say() -> None:
    table = toy("sharp")
    steps = walk(NEVER, table)
    first = steps[0]
    assert not np.any(first[3])  # all alike as yet, so only one of them may go on
    for step, (before, after, tokens, parents) in enumerate(jax.tree.map(np.asarray, steps)):
        assert (before.step, after.step) == (step, step + 1)
        assert (tokens.dtype, parents.dtype) == (np.int32, np.int32)
        for row in np.flatnonzero(~before.done):
            wanted = before.tokens[row][parents[row]]
            wanted[:, step] = tokens[row]
            np.testing.assert_array_equal(after.tokens[row], wanted)
            beams = wanted[:, : step + 1]
            assert len({tuple(beam) for beam in beams.tolist()}) == 3
            assert not np.any(beams == 1)
            assert np.all(np.diff(after.scores[row]) <= 0)
            totals = [log_probability(table, row, beam) for beam in beams]
            np.testing.assert_allclose(after.scores[row], totals, rtol=1e-5)  # sums of twelve floats


def test_a_row_that_is_done_stays_as_it_is() -> None:
    steps = jax.tree.map(np.asarray, walk(NEVER, toy("sharp")))
    for before, after, tokens, parents in steps:
        done = before.done
        assert np.all(tokens[done] == 9)
        assert np.all(parents[done] == np.arange(3))
        for name in ("tokens", "scores", "finished_tokens", "finished_scores", "finished_lengths", "done"):
            np.testing.assert_array_equal(getattr(after, name)[done], getattr(before, name)[done])
    assert 0 < np.sum(steps[-1][0].done) < len(ROWS)


@pytest.mark.parametrize("search", [NEVER, T5, SHORT_T5])
def test_a_search_that_stops_early_has_missed_nothing(search: BeamSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = walk(search, toy("sharp"))
    assert np.any(steps[-1][0].done)
    stopped = finish(search, steps[-1][1])
    monkeypatch.setattr(BeamSearch, "_is_done", lambda self, live, finished, length: length == self.max_new_tokens)
    monkeypatch.setitem(globals(), "choose", jax.jit(lambda *args: BeamSearch.choose(*args), static_argnums=0))
    steps = walk(search, toy("sharp"))
    assert not np.any(steps[-1][0].done)
    for early, late in zip(stopped, finish(search, steps[-1][1]), strict=True):
        np.testing.assert_array_equal(early, late)


def test_enough_beams_live_on_where_all_would_rather_end() -> None:
    table = random_toy(12, 4)
    table[:, [0, *range(4, 12)]] -= 50  # less likely than the three ends, whatever the place
    search = BeamSearch(3, 4, num_end_ids=3)
    state = start(search, len(ROWS), Stopping(end_ids=(1, 2, 3)))
    state = dataclasses.replace(state, scores=jnp.full((len(ROWS), 3), -1.0))
    after, tokens, _ = choose(search, state, np.repeat(table[ROWS][:, None], 3, axis=1))
    assert np.all(np.isfinite(after.scores))
    assert not np.any(np.isin(tokens, [1, 2, 3]))


def test_the_best_of_a_large_vocabulary_and_among_equals_the_first() -> None:
    search = BeamSearch(2, 3)
    state = start(search, len(ROWS), EOS)
    rng = np.random.default_rng(0)
    for _ in range(2):
        # Multiples of 1/4 are added exactly, and of a thousand some are alike. The best ends, and so is not taken.
        table = -rng.integers(1, 400, (len(ROWS), 2, 1000)).astype(np.float32) / 4
        table[:, :, 1] = 0.0
        totals = np.asarray(state.scores)[..., None] + table
        totals[:, :, 1] = -np.inf
        best = np.argsort(-totals.reshape(len(ROWS), -1), axis=1, kind="stable")[:, :2]
        assert not np.any(state.done)
        state, tokens, parents = choose(search, state, table)
        np.testing.assert_array_equal(parents, best // 1000)
        np.testing.assert_array_equal(tokens, best % 1000)


def test_a_row_in_which_nothing_is_possible_is_done() -> None:
    search = BeamSearch(2, 3, 2, length_penalty_style="t5", fill_id=7)
    table = np.full((97, 4), -np.inf, np.float32)
    steps = walk(search, table)
    assert len(steps) == 1
    tokens, lengths, scores = finish(search, steps[0][1])
    assert np.all(tokens == 7)
    assert not np.any(lengths)
    assert np.all(np.isneginf(scores))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"num_return_sequences": 3}, "num_return_sequences 3 must not exceed num_beams 2"),
        ({"num_end_ids": -1}, "num_end_ids must be at least 0, not -1"),
        ({"length_penalty": 60.0}, "length_penalty 60.0 is too far from 0"),
        ({"length_penalty": float("nan")}, "length_penalty nan is too far from 0"),
        ({"length_penalty_style": "gnmt"}, r"length_penalty_style must be one of \('hf', 't5'\), not 'gnmt'"),
        ({"early_stopping": "always"}, r"early_stopping must be one of \(False, True, 'never'\), not 'always'"),
    ],
)
def test_values_that_are_not_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BeamSearch(**({"num_beams": 2, "max_new_tokens": 8} | settings))
