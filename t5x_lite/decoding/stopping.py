"""What ends a sequence: an end token, or a stop string somewhere in its text."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from t5x_lite.errors import InputError


@struct.dataclass
class Stopping:
    """Tells after which token a sequence has ended.

    A stop string is looked for in the bytes of the generated tokens, in whatever way they are divided among tokens and
    also in the middle of one, by an automaton for each string whose state is how much of the string the text so far
    ends with.

    Attributes:
      end_ids: token ids that end a sequence.
      table: int32 `[n, V, S]` of `stop_table`; None: there are no stop strings.
    """

    end_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    table: jax.Array | None = None

    def start(self, shape: tuple[int, ...]) -> jax.Array:
        """Returns the state of sequences without a generated token: int32 `[*shape, n]`, n the number of strings."""
        return jnp.zeros((*shape, 0 if self.table is None else self.table.shape[0]), jnp.int32)

    def advance(self, state: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the state after one more token for each sequence, and whether the sequence has ended.

        Args:
          state: int32 `[*shape, n]`.
          tokens: int32 `[*shape]`; an id that the table does not have stands for no text.

        Returns:
          The new state, and bool `[*shape]`: whether the token ends the sequence, or a stop string is in the text.
        """
        ended = jnp.isin(tokens, jnp.array(self.end_ids, jnp.int32))
        if self.table is None:
            return state, ended
        strings, vocab, states = self.table.shape
        token = tokens[..., None]
        following = self.table[jnp.arange(strings), jnp.minimum(token, vocab - 1), state]
        state = jnp.where(token < vocab, following, state)
        return state, ended | jnp.any(state == states - 1, axis=-1)


def stop_table(stop_strings: Sequence[str], token_bytes: Sequence[bytes]) -> np.ndarray:
    """Returns the automata of the stop strings, a transition per token.

    Args:
      stop_strings: n texts, matched as UTF-8.
      token_bytes: what each of V tokens adds to the text.

    Returns:
      int32 `[n, V, longest + 1]`: the state after a token in a state. State k < longest is that the text ends with the
      first k bytes of the string and no more of them; the last state, that the string is complete, is never left.

    Raises:
      InputError: for an empty stop string.
    """
    patterns = [text.encode() for text in stop_strings]
    if not all(patterns):
        raise InputError("stop_strings must not contain an empty text")
    longest = max(map(len, patterns), default=0)
    table = np.zeros((len(patterns), len(token_bytes), longest + 1), np.int32)
    # Tokens from the longest to the shortest: those that have a further byte are then always the first few.
    lengths = np.array([len(token) for token in token_bytes], np.int64)
    order = np.argsort(-lengths, kind="stable")
    text = np.frombuffer(b"".join(token_bytes), np.uint8)
    starts = np.cumsum(lengths) - lengths
    for pattern, states in zip(patterns, table, strict=True):
        automaton = _automaton(pattern, longest)
        after = np.tile(np.arange(longest + 1, dtype=np.int32), (len(token_bytes), 1))
        for place in range(lengths.max(initial=0)):
            longer = order[: np.count_nonzero(lengths > place)]
            byte = text[starts[longer] + place]
            after[: len(longer)] = automaton[byte[:, None], after[: len(longer)]]
        states[order] = after
    return table


def _automaton(pattern: bytes, longest: int) -> np.ndarray:
    """Returns int32 `[256, longest + 1]`: the state after a byte in a state (Knuth, Morris and Pratt 1977)."""
    table = np.zeros((256, longest + 1), np.int32)
    table[:, longest] = longest
    fallback = 0  # the state without the first byte of the text: where it continues after a mismatch
    for state, byte in enumerate(pattern):
        table[:, state] = table[:, fallback]
        following = table[byte, fallback]
        table[byte, state] = state + 1 if state + 1 < len(pattern) else longest
        fallback = following
    return table
