"""Sequences that do not compete: greedy decoding and sampling."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.decoding.sampling import Greedy, Sample, step_keys
from t5x_lite.decoding.stopping import Stopping


@struct.dataclass
class SequencesState:
    """What is known of R sequences for each of B examples.

    Attributes:
      tokens: int32 `[B, R, N]`, chosen so far; the fill id beyond.
      lengths: int32 `[B, R]`, how many those are, the end included.
      scores: float32 `[B, R]`, sum of their log-probabilities (nats) under the model.
      finished: bool `[B, R]`.
      matched: how much of each stop string a sequence ends in.
      keys: PRNG keys `[B * R]`, one for each sequence.
      stopping: what ends a sequence.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    finished: jax.Array
    matched: jax.Array
    keys: jax.Array
    stopping: Stopping


@dataclass(frozen=True)
class Sequences:
    """Chooses a token for each sequence on its own.

    Attributes:
      strategy: how.
      number: R, sequences of each example.
      max_new_tokens: N.
      fill_id: what follows the end of a sequence.
    """

    strategy: Greedy | Sample
    number: int
    max_new_tokens: int
    fill_id: int

    def start(self, keys: jax.Array, stopping: Stopping) -> SequencesState:
        """Returns the state before the first token; `keys` has one for each of B * R sequences."""
        shape = (keys.shape[0] // self.number, self.number)
        return SequencesState(
            tokens=jnp.full((*shape, self.max_new_tokens), self.fill_id, jnp.int32),
            lengths=jnp.zeros(shape, jnp.int32),
            scores=jnp.zeros(shape, jnp.float32),
            finished=jnp.zeros(shape, bool),
            matched=stopping.start(shape),
            keys=keys,
            stopping=stopping,
        )

    def choose(
        self, state: SequencesState, logits: jax.Array, processed: jax.Array, step: jax.Array
    ) -> tuple[SequencesState, jax.Array]:
        """Returns the next state and tokens `[B, R]`.

        Args:
          state: so far.
          logits: float32 `[B, R, V]`, as the model gives them: what a token gains is its log-probability there.
          processed: float32 `[B, R, V]`, from which it is chosen.
          step: int32 scalar, how many tokens were chosen before.
        """
        shape = state.finished.shape
        keys = step_keys(state.keys, step)
        tokens = self.strategy(processed.reshape(-1, processed.shape[-1]), keys).reshape(shape)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        gained = chosen - jax.nn.logsumexp(logits, axis=-1)
        tokens = jnp.where(state.finished, self.fill_id, tokens)
        matched, ended = state.stopping.advance(state.matched, tokens)
        state = replace(
            state,
            tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, tokens, step, axis=2),
            lengths=state.lengths + ~state.finished,
            scores=state.scores + jnp.where(state.finished, 0.0, gained),
            finished=state.finished | ended,
            matched=matched,
        )
        return state, tokens

    def unfinished(self, state: SequencesState) -> jax.Array:
        """Returns whether any sequence goes on."""
        return ~jnp.all(state.finished)

    def finish(self, state: SequencesState) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns tokens `[B * R, N]`, lengths and scores `[B * R]`."""
        return state.tokens.reshape(-1, self.max_new_tokens), state.lengths.reshape(-1), state.scores.reshape(-1)
