"""Speculative decoding: a small draft model proposes tokens, and the model reads all of them in one pass.

Where reading the weights is what takes the time, a pass over a few tokens takes little longer than one over a single
token. The result is that of the model alone, whatever the draft proposes (Leviathan et al. 2023; Chen et al. 2023);
only the time depends on how often they agree, and on how much smaller the draft is.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.decoding.generate import Decoder, Generated, arguments, check_positions
from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.decoding.logits import History, process
from t5x_lite.decoding.sampling import row_keys, warp, warpers
from t5x_lite.decoding.stopping import Stopping
from t5x_lite.errors import InputError
from t5x_lite.models.transformer import Batch, Cache, Transformer


@struct.dataclass
class Acceptance:
    """How much a draft helped.

    Attributes:
      rounds: int32 `[B]`, passes of the model until the row ended; it would have taken as many as the row has tokens.
      accepted: int32 `[B]`, tokens of the row that are the draft's.
    """

    rounds: jax.Array
    accepted: jax.Array


@struct.dataclass
class Progress:
    """A generation under way: B rows with prompts of up to T tokens, N new tokens at most, G proposals in a round.

    Attributes:
      text: int32 `[B, T + N + G]`, from the left the prompt of each row and what was generated after it. Proposals are
        tried out behind the end; beyond them may be anything.
      prompt_lengths: int32 `[B]`.
      lengths: int32 `[B]`, how many tokens were generated.
      scores: float32 `[B]`, sum of their log-probabilities (nats) under the model.
      finished: bool `[B]`.
      matched: how much of each stop string a row ends in.
      stopping: what ends a row.
      keys: PRNG keys `[B]`.
      cache: the model's, of each row's text but its last token.
      draft_cache: the draft's; it lacks one token more where the draft has not read the last one that it proposed.
      acceptance: so far.
    """

    text: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array
    scores: jax.Array
    finished: jax.Array
    matched: jax.Array
    stopping: Stopping
    keys: jax.Array
    cache: Cache
    draft_cache: Cache
    acceptance: Acceptance

    @property
    def ends(self) -> jax.Array:
        """Where the next token of each row goes in its text: int32 `[B]`."""
        return self.prompt_lengths + self.lengths


@dataclass(frozen=True)
class Speculator:
    """How a model decodes with the help of a draft; static, so that what is compiled for it is found again.

    Attributes:
      decoder: how the model decodes alone.
      draft: the other model.
    """

    decoder: Decoder
    draft: Transformer

    def __post_init__(self) -> None:
        """Raises InputError for a draft that does not fit the model, and for several sequences of an example."""
        config = self.config
        if max(config.num_beams, config.num_return_sequences) > 1:
            raise InputError(
                f"a draft model needs num_beams 1 and num_return_sequences 1, not {config.num_beams} and"
                f" {config.num_return_sequences}"
            )
        _check_draft(self.decoder.model, self.draft)

    @property
    def config(self) -> GenerationConfig:
        """The settings."""
        return self.decoder.config

    def generate(self, params: Any, draft_params: Any, batch: Batch, *rest: Any) -> tuple[Generated, Acceptance]:
        """Generates from beginning to end; see the function `generate` for the arguments."""
        params = self.decoder.model.unstacked(params)
        draft_params = self.draft.unstacked(draft_params)
        progress = jax.lax.while_loop(
            lambda progress: ~jnp.all(progress.finished),
            lambda progress: self.round(params, draft_params, progress),
            self.begin(params, draft_params, batch, *rest),
        )
        return self.finish(progress)

    def begin(
        self,
        params: Any,
        draft_params: Any,
        batch: Batch,
        seed: jax.Array,
        row_ids: jax.Array,
        stop_table: jax.Array | None,
    ) -> Progress:
        """Makes both models read the prompts; see `generate` for the arguments."""
        model, config = self.decoder.model, self.config
        prompt, segments = self.decoder.prompt(batch)
        rows, length = prompt.shape
        check_positions(model.config, batch, length, config)
        check_positions(self.draft.config, batch, length, config, "the draft model")
        batch = {**batch, "decoder_input_tokens": prompt, "decoder_segment_ids": segments}
        stopping = Stopping(end_ids=self.decoder.end_ids, table=stop_table)
        zeros = jnp.zeros((rows,), jnp.int32)
        return Progress(
            text=jnp.pad(prompt, ((0, 0), (0, config.max_new_tokens + config.num_assistant_tokens))),
            prompt_lengths=jnp.sum(segments > 0, axis=1),
            lengths=zeros,
            scores=jnp.zeros((rows,), jnp.float32),
            finished=jnp.zeros((rows,), bool),
            matched=stopping.start((rows,)),
            stopping=stopping,
            keys=row_keys(seed, row_ids, 1),
            cache=self._prefill(model, params, batch),
            draft_cache=self._prefill(self.draft, draft_params, batch),
            acceptance=Acceptance(zeros, zeros),
        )

    def round(self, params: Any, draft_params: Any, progress: Progress) -> Progress:
        """Gives every unfinished row the proposals on which the models agree and one token more."""
        ahead = jnp.arange(self.config.num_assistant_tokens + 1)
        text, draft_scores, draft_cache = self._propose(draft_params, progress)
        until = self._limit(progress)
        logits, cache = self._read(self.decoder.model, params, progress.cache, text, until, ahead.size)
        scores = self._scores(logits, text, progress, ahead)
        places = progress.ends[:, None] + ahead
        proposals = jnp.take_along_axis(text, places[:, :-1], axis=1)
        chosen = self._choose(progress, scores, proposals, draft_scores)
        gained = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        text = jax.vmap(lambda row, to, what: row.at[to].set(what, mode="drop"))(text, places, chosen)
        progress = self._settle(replace(progress, text=text), proposals, chosen, gained)
        # Slots from here on are never seen, and overwritten when their turn comes.
        read = progress.ends - 1
        return replace(
            progress,
            cache=replace(cache, position=read),
            draft_cache=replace(draft_cache, position=jnp.minimum(draft_cache.position, read)),
        )

    def finish(self, progress: Progress) -> tuple[Generated, Acceptance]:
        """Returns the result."""
        new = jnp.arange(self.config.max_new_tokens)
        tokens = jnp.take_along_axis(progress.text, progress.prompt_lengths[:, None] + new, axis=1)
        tokens = jnp.where(new < progress.lengths[:, None], tokens, self.decoder.model.config.fill_id)
        return Generated(tokens, progress.lengths, progress.scores), progress.acceptance

    def _prefill(self, model: Transformer, params: Any, batch: Batch) -> Cache:
        encoded, encoder_length = None, 0
        if model.config.num_encoder_layers:
            encoded = model.apply({"params": params}, batch, method="encode")
            encoder_length = batch["encoder_input_tokens"].shape[1]
        rows, length = batch["decoder_input_tokens"].shape
        empty = model.new_cache(rows, length, encoder_length, self.config.cache_dtype)
        result: Any = model.apply({"params": params}, batch, encoded, empty, method="decode")
        cache: Cache = result[1]
        # The last token is read again, which makes the first round like any other.
        return replace(cache, position=cache.position - 1).extended(self.config.max_new_tokens - 1)

    def _limit(self, progress: Progress) -> jax.Array:
        # Nothing follows the last token, so nobody reads it: there may be no position for it, nor a slot.
        return jnp.where(progress.finished, 0, progress.prompt_lengths + self.config.max_new_tokens - 1)

    def _read(
        self,
        model: Transformer,
        params: Any,
        cache: Cache,
        text: jax.Array,
        until: jax.Array,
        width: int,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Reads up to `width` tokens of each row, from where the cache stands and before `until` `[B]`."""
        places = cache.position[:, None] + jnp.arange(width)
        batch = {
            "decoder_input_tokens": jnp.take_along_axis(text, places, axis=1),
            "decoder_segment_ids": (places < until[:, None]).astype(jnp.int32),
        }
        result: Any = model.apply({"params": params}, batch, cache=cache, only=only, method="decode")
        return result

    def _propose(self, params: Any, progress: Progress) -> tuple[jax.Array, jax.Array, Cache]:
        """Returns the text with proposals, the scores `[B, G, V]` they were chosen by, and the draft's cache."""

        def propose(width: int, carry: tuple[jax.Array, Cache], ahead: jax.Array) -> tuple[Any, jax.Array]:
            text, cache = carry
            ends = progress.ends + ahead
            until = jnp.minimum(ends, self._limit(progress))
            last = jnp.maximum(until - cache.position - 1, 0)
            logits, cache = self._read(self.draft, params, cache, text, until, width, last)
            scores = self._scores(logits, text, progress, ahead[None])
            if self.config.do_sample:
                tokens = _draw(self._keys(progress, ahead[None], _PROPOSE), scores)
            else:
                tokens = jnp.argmax(scores, axis=-1)
            text = text.at[jnp.arange(text.shape[0]), ends].set(tokens[:, 0].astype(jnp.int32))
            return (text, cache), scores[:, 0]

        # The first reads two tokens where the draft's last proposal was accepted, which it has not read itself.
        carry, first = propose(2, (progress.text, progress.draft_cache), jnp.zeros((), jnp.int32))
        further = jnp.arange(1, self.config.num_assistant_tokens)
        (text, cache), rest = jax.lax.scan(partial(propose, 1), carry, further)
        return text, jnp.swapaxes(jnp.concatenate([first[None], rest]), 0, 1), cache

    def _scores(self, logits: jax.Array, text: jax.Array, progress: Progress, ahead: jax.Array) -> jax.Array:
        """Returns scores `[B, T, V]` to choose tokens by, from the logits of those `ahead` `[T]` of each row's end."""
        chain = self.decoder.processors
        if chain:
            if not any(processor.reads_history for processor in chain):
                text = text[:, :0]

            def processed(scores: jax.Array, tokens: jax.Array, length: jax.Array, step: jax.Array) -> jax.Array:
                return process(chain, scores[None], History(tokens[None], length[None], step))[0]

            # Every place of every row has seen another number of tokens.
            each = jax.vmap(jax.vmap(processed, (0, None, 0, 0)))
            logits = each(logits, text, progress.ends[:, None] + ahead, progress.lengths[:, None] + ahead)
        return warp(logits.reshape(-1, logits.shape[-1]), warpers(self.config)).reshape(logits.shape)

    def _keys(self, progress: Progress, ahead: jax.Array, purpose: int) -> jax.Array:
        """Returns a key for each place `[B, T]` of each row.

        A place may be proposed for in several rounds, with the same keys. No draw that was made with them before had a
        part in the text up to there, or the place would be settled, so they are as good as new.
        """

        def key(row: jax.Array, place: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(row, place), purpose)

        return jax.vmap(jax.vmap(key, (None, 0)))(progress.keys, progress.lengths[:, None] + ahead)

    def _choose(
        self, progress: Progress, scores: jax.Array, proposals: jax.Array, draft_scores: jax.Array
    ) -> jax.Array:
        """Returns the model's tokens `[B, G + 1]`, each to follow the proposals before it.

        A sampled one is the proposal with probability min(1, p / q), else a draw from what p has more of than q: a draw
        from p that is the proposal as often as possible. After the last proposal comes a draw from p itself.
        """
        if not self.config.do_sample:
            return jnp.argmax(scores, axis=-1).astype(jnp.int32)
        ahead = jnp.arange(scores.shape[1])
        p = jax.nn.softmax(scores, axis=-1)
        q = jnp.pad(jax.nn.softmax(draft_scores, axis=-1), ((0, 0), (0, 1), (0, 0)))
        proposals = jnp.pad(proposals, ((0, 0), (0, 1)))
        p_proposal, q_proposal = (jnp.take_along_axis(x, proposals[..., None], axis=-1)[..., 0] for x in (p, q))
        uniform = jax.vmap(jax.vmap(jax.random.uniform))(self._keys(progress, ahead, _ACCEPT))
        accepted = (uniform * q_proposal < p_proposal) & (ahead < scores.shape[1] - 1)
        rest = jnp.maximum(p - q, 0.0)
        # Where p and q are equal only rounding rejects, and may leave nothing.
        rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)
        drawn = _draw(self._keys(progress, ahead, _REPLACE), jnp.log(rest))
        return jnp.where(accepted, proposals, drawn).astype(jnp.int32)

    def _settle(self, progress: Progress, proposals: jax.Array, chosen: jax.Array, gained: jax.Array) -> Progress:
        """Makes each row take `chosen` up to the first token that is not the proposal, or to its end."""
        agreed = jnp.sum(jnp.cumprod(chosen[:, :-1] == proposals, axis=1), axis=1)
        before = progress
        for place in range(chosen.shape[1]):
            takes = (place <= agreed) & ~progress.finished
            matched, ended = progress.stopping.advance(progress.matched, chosen[:, place])
            lengths = progress.lengths + takes
            progress = replace(
                progress,
                lengths=lengths,
                scores=progress.scores + jnp.where(takes, gained[:, place], 0.0),
                matched=jnp.where(takes[:, None], matched, progress.matched),
                finished=progress.finished | (takes & (ended | (lengths == self.config.max_new_tokens))),
            )
        acceptance = Acceptance(
            rounds=progress.acceptance.rounds + ~before.finished,
            accepted=progress.acceptance.accepted + jnp.minimum(agreed, progress.lengths - before.lengths),
        )
        return replace(progress, acceptance=acceptance)


def generate(
    model: Transformer,
    params: Any,
    draft_model: Transformer,
    draft_params: Any,
    batch: Batch,
    config: GenerationConfig,
    *,
    vocab_size: int | None = None,
    row_ids: jax.Array | None = None,
    stop_table: jax.Array | None = None,
) -> tuple[Generated, Acceptance]:
    """Generates what `generate.generate` does, faster if the draft is much smaller and often right.

    Greedy decoding gives the same tokens, but where two are equally likely up to rounding. Sampling draws from the same
    distribution, though not the same tokens for a seed.

    Args:
      model: the model.
      params: its parameters, as they are or as `model.unstacked(params)`.
      draft_model: a model with the same tokens, with or without an encoder as the model is.
      draft_params: its parameters, in either form.
      batch: as for `generate.generate`; an encoder of the draft reads it as well.
      config: how. `num_assistant_tokens` is what the draft proposes in a round.
      vocab_size: ids from here on are never generated.
      row_ids: int32 `[B]`, by default 0, 1, ...: what is sampled for a row depends on the seed and on this number, and
        not on the rows beside it.
      stop_table: of the configuration's stop strings, from `stopping.stop_table`.

    Raises:
      InputError: for a draft that does not fit the model, and for several sequences of an example.
    """
    speculator = Speculator(Decoder(model, config, vocab_size).without_seed(), draft_model)
    return _generate(speculator, params, draft_params, batch, *arguments(model, batch, config, row_ids, stop_table))


_PROPOSE, _ACCEPT, _REPLACE = range(3)  # what a draw is for


_generate = jax.jit(Speculator.generate, static_argnums=0)


def _draw(keys: jax.Array, scores: jax.Array) -> jax.Array:
    return jax.vmap(jax.vmap(jax.random.categorical))(keys, scores)


def _check_draft(model: Transformer, draft: Transformer) -> None:
    wanted, given = (
        f"{cfg.vocab_size} tokens and {'an encoder' if cfg.num_encoder_layers else 'no encoder'}"
        for cfg in (model.config, draft.config)
    )
    if wanted != given:
        raise InputError(f"the draft model must have {wanted} as the model has, not {given}")
    if not draft.config.num_decoder_layers:
        raise InputError("the draft model has no decoder: it cannot predict what comes next")
