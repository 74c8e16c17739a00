"""Greedy generation: a compiled loop over `(tokens, cache)` that ends when every row has."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.transformer import Batch, Cache, Transformer, decoder_segments


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate; the names are Hugging Face's.

    Attributes:
      max_new_tokens: tokens after which a row ends, EOS included.
    """

    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        """Raises InputError for a length that makes no sense."""
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")


@struct.dataclass
class Generated:
    """What was generated.

    Attributes:
      tokens: int32 `[B, N]`, EOS included, without prompt and start token, pads after the end.
      lengths: int32 `[B]`, tokens of each row.
      scores: float32 `[B]`, sum of the log-probabilities (nats) of those tokens.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


@struct.dataclass
class _State:
    """The loop's state: what is `Generated` so far, and

    Attributes:
      step: int32 scalar, tokens generated per row.
      cache: the decoder's memory of everything before `logits`.
      logits: float32 `[B, V]`, for the next token.
      finished: bool `[B]`, rows that have produced EOS.
    """

    step: jax.Array
    cache: Cache
    logits: jax.Array
    finished: jax.Array
    out: Generated


@partial(jax.jit, static_argnums=(0, 3), static_argnames=("vocab_size",))
def generate(
    model: Transformer, params: Any, batch: Batch, config: GenerationConfig, *, vocab_size: int | None = None
) -> Generated:
    """Generates the most likely token again and again, up to EOS or `max_new_tokens`.

    The model's `forced_bos_id` and `forced_eos_id` take the first and the last place of the output.

    Args:
      model: the model.
      params: its parameters.
      batch: `encoder_input_tokens` `[B, S]`, with or without `encoder_segment_ids`, if the model has an encoder.
        `decoder_input_tokens` `[B, T]`, start token first, make the decoder continue a prompt, which a decoder alone
        needs; rows of different length are right-padded with `decoder_segment_ids` 0.
      config: how.
      vocab_size: ids from here on are never generated; for a model that has more rows than its tokenizer has tokens.
    """
    cfg = model.config
    prompt, segments = _prompt(model, batch)
    rows, length = prompt.shape
    _check_positions(cfg, batch, length, config)
    allowed = jnp.arange(cfg.vocab_size) < (vocab_size or cfg.vocab_size)
    end_ids = jnp.array(cfg.end_ids, jnp.int32)

    def decode(tokens: jax.Array, cache: Cache, **kwargs: Any) -> tuple[jax.Array, Cache]:
        step_batch = {**batch, "decoder_input_tokens": tokens, "decoder_segment_ids": kwargs.pop("segments")}
        result: Any = model.apply({"params": params}, step_batch, cache=cache, method="decode", **kwargs)
        return result

    encoded, encoder_length = None, 0
    if cfg.num_encoder_layers:
        encoded = model.apply({"params": params}, batch, method="encode")
        encoder_length = batch["encoder_input_tokens"].shape[1]
    cache = model.new_cache(rows, length + config.max_new_tokens, encoder_length)
    logits, cache = decode(prompt, cache, segments=segments, encoded=encoded)
    last = jnp.take_along_axis(logits, (cache.position - 1)[:, None, None], axis=1)[:, 0]

    def unfinished(state: _State) -> jax.Array:
        return (state.step < config.max_new_tokens) & ~jnp.all(state.finished)

    def extend(state: _State) -> _State:
        log_probabilities = jax.nn.log_softmax(jnp.where(allowed[None, :], state.logits, -jnp.inf))
        token = jnp.argmax(log_probabilities, axis=-1).astype(jnp.int32)
        if cfg.forced_bos_id is not None:
            token = jnp.where(state.step == 0, cfg.forced_bos_id, token)
        if cfg.forced_eos_id is not None:
            token = jnp.where(state.step == config.max_new_tokens - 1, cfg.forced_eos_id, token)
        token = jnp.where(state.finished, cfg.fill_id, token)
        gained = jnp.take_along_axis(log_probabilities, token[:, None], axis=-1)[:, 0]
        out = Generated(
            tokens=state.out.tokens.at[:, state.step].set(token),
            lengths=state.out.lengths + ~state.finished,
            scores=state.out.scores + jnp.where(state.finished, 0.0, gained),
        )
        logits, cache = decode(token[:, None], state.cache, segments=jnp.ones_like(token[:, None]))
        return _State(
            step=state.step + 1,
            cache=cache,
            logits=logits[:, 0],
            finished=state.finished | jnp.isin(token, end_ids),
            out=out,
        )

    start = _State(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        logits=last,
        finished=jnp.zeros((rows,), bool),
        out=Generated(
            tokens=jnp.full((rows, config.max_new_tokens), cfg.fill_id, jnp.int32),
            lengths=jnp.zeros((rows,), jnp.int32),
            scores=jnp.zeros((rows,), jnp.float32),
        ),
    )
    return jax.lax.while_loop(unfinished, extend, start).out


def _check_positions(model: TransformerConfig, batch: Batch, length: int, config: GenerationConfig) -> None:
    # Where there may be padding only whoever has the numbers knows how long the prompts are.
    padded = model.pad_id is not None or "decoder_segment_ids" in batch
    ends = length + config.max_new_tokens - 1
    if model.positions == "learned" and ends > model.max_positions and not padded:
        raise InputError(
            f"a prompt of {length} tokens and max_new_tokens {config.max_new_tokens} take {ends} positions, but the"
            f" model has {model.max_positions}"
        )


def _prompt(model: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    if "decoder_input_tokens" in batch:
        return jnp.asarray(batch["decoder_input_tokens"]), decoder_segments(batch, model.config.pad_id)
    if not model.config.num_encoder_layers:
        raise InputError("a decoder alone continues a prompt: the batch needs decoder_input_tokens")
    start = jnp.full((batch["encoder_input_tokens"].shape[0], 1), model.config.decoder_start_id, jnp.int32)
    return start, jnp.ones_like(start)
