import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding.stopping import Stopping, stop_table
from t5x_lite.errors import InputError

# Tokens that divide texts in every way; one is empty, as special tokens are, and some are parts of a character.
TOKENS = [b"", b"a", b"b", b"ab", b"ba", b"aab", b"bbabab", b"\xc3", b"\xa9", "é".encode(), b"a" * 9]
STRINGS = ["b", "aab", "abab", "abaabab", "é", "béa", "aaaaaaaaaaaa"]

advance = jax.jit(Stopping.advance)


def states(stopping: Stopping, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States `[N, *shape, n]` and ends `[N, *shape]` after each of the tokens `[*shape, N]`."""

    def step(state: jax.Array, token: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        state, ended = stopping.advance(state, token)
        return state, (state, ended)

    after, ended = jax.lax.scan(step, stopping.start(tokens.shape[:-1]), jnp.moveaxis(jnp.array(tokens), -1, 0))[1]
    return np.asarray(after), np.asarray(ended)


def test_a_stop_string_is_found_however_it_is_divided() -> None:
    table = stop_table(STRINGS, TOKENS)
    assert (table.shape, table.dtype) == ((7, 11, 13), np.int32)
    tokens = np.random.default_rng(0).integers(0, len(TOKENS), (300, 8))
    tokens[150:] = np.where(np.isin(tokens[150:], [2, 4, 5, 6]), 1, tokens[150:])  # so that few have a b
    after, ended = states(Stopping(table=jnp.array(table)), tokens)
    found = np.zeros((8, 300, 7), bool)
    for row, ids in enumerate(tokens):
        for step in range(8):
            text = b"".join(TOKENS[i] for i in ids[: step + 1])
            found[step, row] = [string.encode() in text for string in STRINGS]
    np.testing.assert_array_equal(after == 12, found)
    np.testing.assert_array_equal(ended, np.any(found, axis=2))
    # Each of them is found in some rows and not in others.
    assert np.all(np.any(found[-1], axis=0) & ~np.all(found[-1], axis=0))


def test_a_state_is_how_much_of_the_string_the_text_ends_with() -> None:
    table = stop_table(["abaabab"], TOKENS)
    after, ended = states(Stopping(table=jnp.array(table)), np.array([3, 1, 1, 2, 0, 1, 1, 4, 2, 2]))
    # ab a a b - a a ba b b: abaab and then a, a second a falls back to the first
    np.testing.assert_array_equal(after[:, 0], [2, 3, 4, 5, 5, 6, 4, 6, 7, 7])
    np.testing.assert_array_equal(ended, [False] * 8 + [True] * 2)  # and stays found


def test_end_ids_end_a_sequence_and_are_forgotten() -> None:
    stopping = Stopping(end_ids=(3, 5))
    state = stopping.start((2, 2))
    assert state.shape == (2, 2, 0)
    state, ended = advance(stopping, state, jnp.array([[3, 4], [0, 5]]))
    np.testing.assert_array_equal(ended, [[True, False], [False, True]])
    assert not np.any(advance(stopping, state, jnp.array([[4, 4], [4, 4]]))[1])


def test_either_an_end_or_a_stop_string_ends_a_sequence() -> None:
    stopping = Stopping(end_ids=(0,), table=jnp.array(stop_table(["aa", "bb"], TOKENS)))
    state = stopping.start((4,))
    assert (state.shape, state.dtype) == ((4, 2), jnp.int32)
    state, ended = advance(stopping, state, jnp.array([0, 1, 2, 5]))
    np.testing.assert_array_equal(ended, [True, False, False, True])
    state, ended = advance(stopping, state, jnp.array([1, 1, 2, 2]))
    np.testing.assert_array_equal(ended, [False, True, True, True])


def test_nothing_ends_where_there_is_no_end() -> None:
    stopping = Stopping()
    assert not np.any(advance(stopping, stopping.start((3,)), jnp.arange(3))[1])


def test_an_id_without_text_changes_nothing() -> None:
    stopping = Stopping(table=jnp.array(stop_table(["ab"], TOKENS[:3])))
    np.testing.assert_array_equal(states(stopping, np.array([1, 3, 99, 2, 99]))[0][:, 0], [1, 1, 1, 2, 2])


def test_tables_of_nothing() -> None:
    assert stop_table([], TOKENS).shape == (0, 11, 1)
    assert stop_table(["ab"], []).shape == (1, 0, 3)
    with pytest.raises(InputError, match="stop_strings must not contain an empty text"):
        stop_table(["ab", ""], TOKENS)
