"""The decoding loop: prompts are read in one pass, then one compiled loop over `(tokens, cache)` until all rows end."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.decoding.beam_search import BeamSearch, BeamState
from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.decoding.logits import History, Processor, process, processors
from t5x_lite.decoding.sampling import Greedy, Sample, row_keys, warpers
from t5x_lite.decoding.sequences import Sequences, SequencesState
from t5x_lite.decoding.stopping import Stopping
from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.transformer import Batch, Cache, Slots, Transformer, decoder_segments

# Slots for new tokens, and tokens of a sequence, from which on a cache has room for a quarter of them, then half, then
# all: a step reads what there is room for. Each time the loop is compiled anew, which fewer slots are not worth.
_MANY_SLOTS, _MANY_TOKENS = 192, 16

# Slots come in tiles of so many: then rows of logits and weights begin where a GPU can read several numbers at once.
_TILE = 16


def cache_slots(prompt: int, tokens: int, sequences: int) -> int:
    """Returns how many slots a cache has for a prompt of that length and so many new tokens of each sequence."""
    return -(-(prompt + (tokens - 1) * sequences) // _TILE) * _TILE


@struct.dataclass
class Generated:
    """What was generated; with R sequences for each of B examples those of one example follow each other, best first.

    Attributes:
      tokens: int32 `[B * R, N]`, EOS included, without prompt and start token, pads after the end.
      lengths: int32 `[B * R]`, tokens of each row.
      scores: float32 `[B * R]`, nats: of greedy decoding and sampling the sum of the tokens' log-probabilities under
        the model; of a beam search the length-penalised sum of the log-probabilities that it ranks by, in which a
        forced token is certain.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


@struct.dataclass
class Progress:
    """A generation under way: B examples with R sequences each, N new tokens at most, prompts of up to T tokens.

    Attributes:
      step: int32 scalar, how many tokens were chosen for each sequence.
      tokens: int32 `[B, R]`, the last of them, which the model has not read yet.
      search: what the strategy knows.
      cache: keys and values in M slots, see `cache_slots`: the prompt's, which all sequences of an example share, and
        from slot T + n * R on those of the n-th new token of each of them. The last token of all needs none.
      ancestors: int32 `[B or 1, R, N]`, by which sequence's slot the n-th token of each sequence came to be. A beam
        search changes these when a beam takes over another one's past; the cache stays where it is.
      prompt: int32 `[B, T]`, padded on the right.
      prompt_lengths: int32 `[B]`.
    """

    step: jax.Array
    tokens: jax.Array
    search: SequencesState | BeamState
    cache: Cache
    ancestors: jax.Array
    prompt: jax.Array
    prompt_lengths: jax.Array


@dataclass(frozen=True)
class Decoder:
    """How one model decodes; static, so that what is compiled for it is found again.

    Attributes:
      model: the model.
      config: how; the seed is an argument of `begin`.
      vocab_size: ids from here on are never generated; for a model that has more rows than its tokenizer has tokens.
    """

    model: Transformer
    config: GenerationConfig
    vocab_size: int | None = None

    def without_seed(self) -> "Decoder":
        """Returns self for any seed, which is no part of what is compiled."""
        return replace(self, config=replace(self.config, seed=0))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a sequence."""
        return self.config.end_ids(self.model.config.end_ids)

    @property
    def search(self) -> Sequences | BeamSearch:
        """The strategy."""
        config = self.config
        if config.num_beams > 1:
            return BeamSearch(
                num_beams=config.num_beams,
                max_new_tokens=config.max_new_tokens,
                num_return_sequences=config.num_return_sequences,
                length_penalty=config.length_penalty,
                length_penalty_style=config.length_penalty_style,
                early_stopping=config.early_stopping,
                fill_id=self.model.config.fill_id,
                num_end_ids=len(self.end_ids),
            )
        strategy = Sample(warpers(config)) if config.do_sample else Greedy()
        return Sequences(strategy, config.num_return_sequences, config.max_new_tokens, self.model.config.fill_id)

    @property
    def processors(self) -> tuple[Processor, ...]:
        """What is done to the model's logits before a token is chosen."""
        cfg = self.model.config
        return processors(
            self.config,
            end_ids=cfg.end_ids,
            vocab_size=self.vocab_size,
            forced_bos_id=cfg.forced_bos_id,
            forced_eos_id=cfg.forced_eos_id,
        )

    def check(self) -> None:
        """Raises the InputError, if any, with which decoding would begin, whatever the batch."""
        _ = self.search, self.processors

    def generate(
        self, params: Any, batch: Batch, seed: jax.Array, row_ids: jax.Array, stop_table: jax.Array | None
    ) -> Generated:
        """Generates from beginning to end; see the function `generate` for the arguments."""
        params = self.model.unstacked(params)
        rooms = self._rooms()
        progress = self.begin(params, batch, seed, row_ids, stop_table, rooms[0])
        for room in rooms:
            cache = self._with_room(progress.cache, progress.prompt, room)
            progress = self.advance(params, replace(progress, cache=cache), room)
        return self.finish(progress)

    def _rooms(self) -> list[int]:
        """Returns for how many new tokens of a sequence the cache has room, from the beginning to the end."""
        tokens = self.config.max_new_tokens
        if tokens < _MANY_TOKENS or tokens * self.search.number < _MANY_SLOTS:
            return [tokens]
        return [tokens // 4, tokens // 2, tokens]

    def _with_room(self, cache: Cache, prompt: jax.Array, tokens: int) -> Cache:
        """Returns the cache with room for a prompt `[B, T]` and as many new tokens of each sequence."""
        return cache.extended(cache_slots(prompt.shape[1], tokens, self.search.number) - cache.slots)

    def begin(
        self,
        params: Any,
        batch: Batch,
        seed: jax.Array,
        row_ids: jax.Array,
        stop_table: jax.Array | None,
        room: int | None = None,
    ) -> Progress:
        """Encodes, reads the prompts and chooses the first token; see `generate` for the arguments.

        The cache gets room for `room` new tokens of each sequence, by default for all.
        """
        cfg, search = self.model.config, self.search
        prompt, segments = self.prompt(batch)
        rows, length = prompt.shape
        check_positions(cfg, batch, length, self.config)
        prompt_lengths = jnp.sum(segments > 0, axis=1)
        encoded, encoder_length = None, 0
        if cfg.num_encoder_layers:
            encoded = self.model.apply({"params": params}, batch, method="encode")
            encoder_length = batch["encoder_input_tokens"].shape[1]
        places = jnp.arange(length)[None, :]
        logits, cache = self._decode(
            params,
            {**batch, "decoder_input_tokens": prompt, "decoder_segment_ids": segments, "decoder_positions": places},
            self.model.new_cache(rows, length, encoder_length, self.config.cache_dtype),
            Slots(jnp.zeros((), jnp.int32), places[:, None, :] <= places[:, :, None], places),
            encoded=encoded,
            only=prompt_lengths - 1,
        )
        stopping = Stopping(end_ids=self.end_ids, table=stop_table)
        number = search.number
        if isinstance(search, BeamSearch):
            state: Any = search.start(rows, stopping)
        else:
            state = search.start(row_keys(seed, row_ids, number), stopping)
        started = Progress(
            step=jnp.zeros((), jnp.int32),
            tokens=jnp.zeros((rows, number), jnp.int32),
            search=state,
            cache=self._with_room(cache, prompt, room or self.config.max_new_tokens),
            ancestors=jnp.broadcast_to(jnp.arange(number)[:, None], (1, number, self.config.max_new_tokens)),
            prompt=prompt,
            prompt_lengths=prompt_lengths,
        )
        if isinstance(search, BeamSearch):
            started = replace(started, ancestors=jnp.repeat(started.ancestors, rows, axis=0))
        return self._choose(started, jnp.broadcast_to(logits, (rows, number, logits.shape[-1])))

    def advance(self, params: Any, progress: Progress, until: jax.Array | int) -> Progress:
        """Goes on until every sequence has ended or has `until` tokens, at most as many as the cache has room for."""
        if self.config.max_new_tokens == 1:  # `begin` has chosen it
            return progress

        def unfinished(progress: Progress) -> jax.Array:
            return (progress.step < until) & self.search.unfinished(progress.search)  # type: ignore[arg-type]

        def extend(progress: Progress) -> Progress:
            read = progress.step - 1
            positions = progress.prompt_lengths[:, None] + jnp.broadcast_to(read, progress.tokens.shape)
            batch = {"decoder_input_tokens": progress.tokens, "decoder_positions": positions}
            logits, cache = self._decode(params, batch, progress.cache.with_batch(), self._slots(progress, read))
            return self._choose(replace(progress, cache=cache.without_batch()), logits)

        progress = replace(progress, cache=progress.cache.without_batch())
        progress = jax.lax.while_loop(unfinished, extend, progress)
        return replace(progress, cache=progress.cache.with_batch())

    def finish(self, progress: Progress) -> Generated:
        """Returns the result."""
        return Generated(*self.search.finish(progress.search))  # type: ignore[arg-type]

    def _decode(self, params: Any, batch: Batch, cache: Cache, slots: Slots, **kwargs: Any) -> tuple[jax.Array, Cache]:
        result: Any = self.model.apply({"params": params}, batch, cache=cache, slots=slots, method="decode", **kwargs)
        return result

    def _choose(self, progress: Progress, logits: jax.Array) -> Progress:
        search, step = self.search, progress.step
        if isinstance(search, BeamSearch):
            scores = self._process(progress, jax.nn.log_softmax(logits))
            state, tokens, parents = search.choose(progress.search, scores)  # type: ignore[arg-type]
            ancestors = jnp.take_along_axis(progress.ancestors, parents[:, :, None], axis=1)
            own = jnp.broadcast_to(jnp.arange(search.num_beams), tokens.shape)
            ancestors = jax.lax.dynamic_update_index_in_dim(ancestors, own, step, axis=2)
        else:
            scores = self._process(progress, logits)
            state, tokens = search.choose(progress.search, logits, scores, step)  # type: ignore[arg-type]
            ancestors = progress.ancestors
        return replace(progress, step=step + 1, tokens=tokens, search=state, ancestors=ancestors)

    def _process(self, progress: Progress, scores: jax.Array) -> jax.Array:
        chain = self.processors
        history = _history(progress, read=any(processor.reads_history for processor in chain))
        return process(chain, scores.reshape(-1, scores.shape[-1]), history).reshape(scores.shape)

    def _slots(self, progress: Progress, read: jax.Array) -> Slots:
        number = progress.tokens.shape[1]
        rows, length = progress.prompt.shape
        places = jnp.arange(length)[None, :]
        new = jnp.arange(min((progress.cache.slots - length) // number, progress.ancestors.shape[2]))
        unused = progress.cache.slots - length - new.size * number  # at the end, for the sake of tiles
        own = progress.ancestors[:, :, : new.size, None] == jnp.arange(number)
        own &= (new <= read)[:, None]
        own = jnp.pad(own.reshape(-1, number, new.size * number), ((0, 0), (0, 0), (0, unused)))
        prompt = jnp.broadcast_to((places < progress.prompt_lengths[:, None])[:, None, :], (rows, number, length))
        after = progress.prompt_lengths[:, None] + jnp.pad(jnp.repeat(new, number), (0, unused))
        return Slots(
            start=length + read * number,
            visible=jnp.concatenate([prompt, jnp.broadcast_to(own, (rows, *own.shape[1:]))], axis=2),
            positions=jnp.concatenate([jnp.broadcast_to(places, prompt.shape[::2]), after], axis=1),
        )

    def prompt(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns what the decoder starts from, `[B, T]`: the batch's prompt or start tokens, and their segment ids."""
        cfg = self.model.config
        if "decoder_input_tokens" in batch:
            return jnp.asarray(batch["decoder_input_tokens"]), decoder_segments(batch, cfg.pad_id)
        if not cfg.num_encoder_layers:
            raise InputError("a decoder alone continues a prompt: the batch needs decoder_input_tokens")
        given = self.config.decoder_start_token_id
        start_id = cfg.decoder_start_id if given is None else given
        start = jnp.full((batch["encoder_input_tokens"].shape[0], 1), start_id, jnp.int32)
        return start, jnp.ones_like(start)


def generate(
    model: Transformer,
    params: Any,
    batch: Batch,
    config: GenerationConfig,
    *,
    vocab_size: int | None = None,
    row_ids: jax.Array | None = None,
    stop_table: jax.Array | None = None,
) -> Generated:
    """Generates up to an end token, a stop string, or `max_new_tokens`.

    The model's `forced_bos_id` and `forced_eos_id` take the first and the last place of the output, unless the
    configuration has others.

    Args:
      model: the model.
      params: its parameters, as they are or as `model.unstacked(params)`, which is faster where the same parameters
        decode again and again.
      batch: `encoder_input_tokens` `[B, S]`, with or without `encoder_segment_ids`, if the model has an encoder.
        `decoder_input_tokens` `[B, T]`, start token first, make the decoder continue a prompt, which a decoder alone
        needs; rows of different length are right-padded with `decoder_segment_ids` 0.
      config: how.
      vocab_size: ids from here on are never generated; for a model that has more rows than its tokenizer has tokens.
      row_ids: int32 `[B]`, by default 0, 1, ...: what is sampled for a row depends on the seed and on this number, and
        not on the rows beside it.
      stop_table: of the configuration's stop strings, from `stopping.stop_table`.
    """
    decoder = Decoder(model, config, vocab_size).without_seed()
    return _generate(decoder, params, batch, *arguments(model, batch, config, row_ids, stop_table))


_generate = jax.jit(Decoder.generate, static_argnums=0)


def _history(progress: Progress, read: bool) -> History:
    rows, number = progress.tokens.shape
    lengths = jnp.repeat(progress.prompt_lengths, number)
    tokens = jnp.zeros((rows * number, 0), jnp.int32)
    if read:
        prompt = jnp.repeat(progress.prompt, number, axis=0)
        new = progress.search.tokens.reshape(rows * number, -1)
        # New tokens follow the prompt's own end, not its padding.
        places = jnp.arange(prompt.shape[1] + new.shape[1])[None, :]
        after = jnp.clip(places - lengths[:, None], 0, new.shape[1] - 1)
        before = jnp.minimum(places, prompt.shape[1] - 1) + jnp.zeros_like(after)
        tokens = jnp.where(
            places < lengths[:, None],
            jnp.take_along_axis(prompt, before, axis=1),
            jnp.take_along_axis(new, after, axis=1),
        )
    return History(tokens=tokens, lengths=lengths + progress.step, step=progress.step)


def arguments(
    model: Transformer,
    batch: Batch,
    config: GenerationConfig,
    row_ids: jax.Array | None,
    stop_table: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the last arguments of `Decoder.begin`, from those of `generate`: seed, row ids and stop table."""
    if config.stop_strings and stop_table is None:
        raise InputError("stop_strings need a tokenizer's pieces: give stop_table, or use LanguageModel.generate")
    if row_ids is None:
        source = "encoder_input_tokens" if model.config.num_encoder_layers else "decoder_input_tokens"
        row_ids = jnp.arange(batch[source].shape[0])
    return jnp.uint32(config.seed), row_ids, stop_table


def check_positions(
    model: TransformerConfig, batch: Batch, length: int, config: GenerationConfig, name: str = "the model"
) -> None:
    """Raises InputError where a prompt of `length` and what follows it take more positions than the model has."""
    # Where there may be padding only whoever has the numbers knows how long the prompts are.
    padded = model.pad_id is not None or "decoder_segment_ids" in batch
    ends = length + config.max_new_tokens - 1
    if model.positions == "learned" and ends > model.max_positions and not padded:
        raise InputError(
            f"a prompt of {length} tokens and max_new_tokens {config.max_new_tokens} take {ends} positions, but"
            f" {name} has {model.max_positions}"
        )
