"""Beam search as pure array code: it is given log-probabilities and says which continuations of which beams to keep.

What it does not know is the model; `generate` owns the loop. Two styles:

* `"hf"` gives what transformers 5.23 gives (`GenerationMixin._beam_search`): of the candidates only the best
  `num_beams` may finish, a sequence scores its log-probability over `length ** length_penalty`, and the sequences cut
  off at `max_new_tokens` compete with the finished ones.
* `"t5"` gives what T5X gives (`decoding.beam_search`): every candidate may finish, the score is the log-probability
  over `((5 + length) / 6) ** length_penalty` (Wu et al. 2016, eq. 14), and sequences that were cut off count only where
  nothing has finished. A `length_penalty` below 0 works here; T5X with several beams then ends before the first token.

Lengths are those of the generated tokens, the end token included. In both styles the rows of a batch have nothing to do
with each other: a row is done when its own search is, and stays as it is while others go on. (Both peers search on in
every row until all are done, and rely on their bounds for that to change nothing.)

A score of minus infinity means that there is no such sequence: a continuation that is not possible, a beam that has
died, a place among the finished that is still free. Such sequences are never preferred to real ones, never finish, and
are returned with no tokens.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from t5x_lite.decoding.stopping import Stopping
from t5x_lite.errors import InputError

LengthPenaltyStyle = Literal["hf", "t5"]

# Ids searched as one when the best are looked for. On a CPU, with 32 or 50 thousand ids, four beams and one to eight
# rows, the two steps take a third to a sixth of the time of one `top_k` of all beams and ids; 32 and 128 are alike.
_GROUP = 64


@struct.dataclass
class BeamState:
    """Where the search stands. Beams are sorted, the best first.

    Attributes:
      step: int32 scalar, tokens that have been chosen for rows that are not done.
      tokens: int32 `[B, K, N]`, the live beams: what goes on. `fill_id` where nothing was chosen yet.
      scores: float32 `[B, K]`, log-probabilities (nats) of the live beams; minus infinity for a dead one.
      stopping: what ends a sequence.
      stops: int32 `[B, K, n]`, the state of each of the n stop strings' automata in each live beam.
      finished_tokens: int32 `[B, K, N]`, the best finished sequences so far, `fill_id` after the end.
      finished_scores: float32 `[B, K]`, their log-probabilities over the length penalty; minus infinity for a place
        that is still free.
      finished_lengths: int32 `[B, K]`, their tokens, the end token included.
      done: bool `[B]`, rows whose search is over. Nothing of them changes any more.
    """

    step: jax.Array
    tokens: jax.Array
    scores: jax.Array
    stopping: Stopping
    stops: jax.Array
    finished_tokens: jax.Array
    finished_scores: jax.Array
    finished_lengths: jax.Array
    done: jax.Array


@dataclass(frozen=True)
class BeamSearch:
    """How to search. The names are Hugging Face's where it has one.

    Attributes:
      num_beams: sequences that are followed at a time, K.
      max_new_tokens: tokens after which every sequence is cut off, N.
      num_return_sequences: sequences that are returned for each row, at most `num_beams`.
      length_penalty: the exponent of the style's length penalty (T5X's `alpha`). Above 0 long sequences gain.
      length_penalty_style: whose search it is, see the top of this file.
      early_stopping: when a row with `num_beams` finished sequences is done. `True`: at once. `False`: when the best
        live beam, if it ended with the length it has (`"hf"`) or with the greatest possible (`"t5"`), is no better than
        the worst of them. `"never"`: when no live beam can become better, so the greatest possible length also in
        `"hf"` if `length_penalty` is positive; in `"t5"` it is the same as `False`.
      fill_id: what stands after the end of a sequence.
      num_end_ids: how many token ids end a sequence. Of all continuations the best `(1 + num_end_ids) * num_beams`, but
        at least `2 * num_beams`, are candidates, so that enough are left to live on if some end.

    Raises:
      InputError: for a value that is not allowed.
    """

    num_beams: int
    max_new_tokens: int
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    length_penalty_style: LengthPenaltyStyle = "hf"
    early_stopping: bool | Literal["never"] = False
    fill_id: int = 0
    num_end_ids: int = 1

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, least in (("num_beams", 1), ("max_new_tokens", 1), ("num_return_sequences", 1), ("num_end_ids", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences {self.num_return_sequences} must not exceed num_beams {self.num_beams}"
            )
        if self.length_penalty_style not in (styles := get_args(LengthPenaltyStyle)):
            raise InputError(f"length_penalty_style must be one of {styles}, not {self.length_penalty_style!r}")
        if self.early_stopping not in (allowed := (False, True, "never")):
            raise InputError(f"early_stopping must be one of {allowed}, not {self.early_stopping!r}")
        penalties = self._penalties()
        if not np.all(np.isfinite(penalties) & (penalties > 0)):
            raise InputError(
                f"length_penalty {self.length_penalty} is too far from 0: the penalties of lengths up to"
                f" {self.max_new_tokens} must be float32 numbers"
            )

    @property
    def number(self) -> int:
        """How many sequences of an example are followed at a time."""
        return self.num_beams

    def start(self, rows: int, stopping: Stopping) -> BeamState:
        """Returns the state before the first token.

        Args:
          rows: examples in the batch, B.
          stopping: what ends a sequence.
        """
        beams = (rows, self.num_beams)
        nothing = jnp.full((*beams, self.max_new_tokens), self.fill_id, jnp.int32)
        free = jnp.full(beams, -jnp.inf, jnp.float32)
        return BeamState(
            step=jnp.zeros((), jnp.int32),
            tokens=nothing,
            # All beams are alike as yet. With more than one of them alive each would choose the same.
            scores=free.at[:, 0].set(0.0),
            stopping=stopping,
            stops=stopping.start(beams),
            finished_tokens=nothing,
            finished_scores=free,
            finished_lengths=jnp.zeros(beams, jnp.int32),
            done=jnp.zeros((rows,), bool),
        )

    def choose(self, state: BeamState, log_probabilities: jax.Array) -> tuple[BeamState, jax.Array, jax.Array]:
        """Takes one step.

        Args:
          state: so far.
          log_probabilities: float32 `[B, K, V]`, of the next token of every live beam, after all that changes them;
            minus infinity for what must not be chosen.

        Returns:
          The next state, and for each of its live beams the token it was extended by, int32 `[B, K]`, and the beam it
          continues, int32 `[B, K]`. The beams of a row that was done continue themselves with `fill_id`.
        """
        # What all rows share is kept apart from what each has of its own.
        rows = replace(state, step=None, stopping=None)
        after, tokens, parents = jax.vmap(partial(self._extend, state.step, state.stopping))(rows, log_probabilities)
        return replace(after, step=state.step + 1, stopping=state.stopping), tokens, parents

    def unfinished(self, state: BeamState) -> jax.Array:
        """Returns bool scalar, whether any row's search goes on."""
        return ~jnp.all(state.done)

    def finish(self, state: BeamState) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the best sequences of every row, once no search goes on.

        Where fewer than `num_return_sequences` were found the rest have length 0, no tokens and a score of minus
        infinity. In the style `"t5"` they are not filled up with live beams, as T5X does not; but where nothing has
        finished the live beams are returned, with their log-probabilities as scores (no length penalty).

        Returns:
          Tokens int32 `[B * num_return_sequences, N]`, a row's best first, `fill_id` after the end; lengths int32 and
          scores float32 (nats), both `[B * num_return_sequences]`.
        """
        tokens, lengths, scores = state.finished_tokens, state.finished_lengths, state.finished_scores
        if self.length_penalty_style == "t5":
            none = jnp.isneginf(scores[:, :1])
            tokens = jnp.where(none[:, :, None], state.tokens, tokens)
            lengths = jnp.where(none, state.step, lengths)
            scores = jnp.where(none, state.scores, scores)
        found = ~jnp.isneginf(scores)
        tokens = jnp.where(found[:, :, None], tokens, self.fill_id)
        lengths = jnp.where(found, lengths, 0)
        wanted = self.num_return_sequences
        return (
            tokens[:, :wanted].reshape(-1, self.max_new_tokens),
            lengths[:, :wanted].ravel(),
            scores[:, :wanted].ravel(),
        )

    def _extend(
        self, step: jax.Array, stopping: Stopping, row: BeamState, log_probabilities: jax.Array
    ) -> tuple[BeamState, jax.Array, jax.Array]:
        """Is `choose` for one row: arrays without their axis B."""
        scores, parents, tokens = self._candidates(row.scores, log_probabilities)
        stops, ended = stopping.advance(row.stops[parents], tokens)
        sequences = row.tokens[parents].at[:, step].set(tokens)
        length = step + 1

        live_scores, live = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), self.num_beams)
        finishing = ended
        if self.length_penalty_style == "hf":
            finishing = (ended | (length == self.max_new_tokens)) & (jnp.arange(scores.size) < self.num_beams)
        finished = jnp.where(finishing, scores / self._penalty(length), -jnp.inf)
        finished_scores, kept = jax.lax.top_k(jnp.concatenate([row.finished_scores, finished]), self.num_beams)
        after = replace(
            row,
            tokens=sequences[live],
            scores=live_scores,
            stops=stops[live],
            finished_tokens=jnp.concatenate([row.finished_tokens, sequences])[kept],
            finished_scores=finished_scores,
            finished_lengths=jnp.concatenate([row.finished_lengths, jnp.full_like(tokens, length)])[kept],
            done=self._is_done(live_scores[0], finished_scores[-1], length),
        )
        unchanged = row, jnp.full_like(live, self.fill_id), jnp.arange(self.num_beams, dtype=jnp.int32)
        return jax.tree.map(partial(jnp.where, row.done), unchanged, (after, tokens[live], parents[live]))

    def _candidates(self, scores: jax.Array, log_probabilities: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns scores, parents and tokens `[C]` of a row's best C continuations, the best first.

        Among equals the lower beam comes first, then the lower id.
        """
        count = max(2, 1 + self.num_end_ids) * self.num_beams
        # The best C ids of a beam are in those C groups whose best id is best, so that [K, V] need not be sorted.
        padding = -log_probabilities.shape[1] % _GROUP
        padded = jnp.pad(log_probabilities, ((0, 0), (0, padding)), constant_values=-jnp.inf)
        best = jnp.max(padded.reshape(self.num_beams, -1, _GROUP), axis=-1)
        groups = jnp.sort(jax.lax.top_k(best, min(count, best.shape[1]))[1], axis=-1)
        ids = (groups[:, :, None] * _GROUP + jnp.arange(_GROUP, dtype=jnp.int32)).reshape(self.num_beams, -1)
        gained = jnp.take_along_axis(log_probabilities, ids, axis=-1, mode="fill", fill_value=-jnp.inf)
        totals = (scores[:, None] + gained).ravel()
        totals, places = jax.lax.top_k(totals, min(count, totals.size))
        # The last group can reach beyond the vocabulary, where nothing is possible.
        tokens = jnp.where(jnp.isneginf(totals), self.fill_id, ids.ravel()[places])
        return totals, places // ids.shape[1], tokens

    def _is_done(self, live: jax.Array, finished: jax.Array, length: jax.Array) -> jax.Array:
        """Returns whether a row is done, from the scores of its best live and of its worst finished sequence."""
        t5 = self.length_penalty_style == "t5"
        # What a beam can score at best has the length that is penalised least: the greatest, or with an exponent below
        # 0 the shortest. T5X counts the start token in the greatest.
        if self.length_penalty > 0 and (t5 or self.early_stopping == "never"):
            length_at_best = self.max_new_tokens + t5
        else:
            length_at_best = length
        bound = live / self._penalty(length_at_best)
        beaten = bound < finished if t5 else bound <= finished
        done = beaten | jnp.isneginf(live) | (length == self.max_new_tokens)
        return done | ~jnp.isneginf(finished) if self.early_stopping is True else done

    def _penalty(self, length: jax.Array | int) -> jax.Array:
        return jnp.asarray(self._penalties())[length - 1]

    def _penalties(self) -> np.ndarray:
        """Float32 `[N + 1]`, of the lengths from 1."""
        lengths = np.arange(1, self.max_new_tokens + 2, dtype=np.float64)
        base = (5 + lengths) / 6 if self.length_penalty_style == "t5" else lengths
        with np.errstate(over="ignore", under="ignore"):
            return (base**self.length_penalty).astype(np.float32)
