"""Decoding with a cache is the model without one, for every shape that a published family has."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.models import PRESETS, TransformerConfig, build

PROMPTS, NEW = (5, 2, 4), 6  # tokens of each row's prompt, and after it
WIDTH = max(PROMPTS)
LENGTH = WIDTH + NEW
SMALL = {"vocab_size": 67, "embed_dim": 24, "num_heads": 4, "head_dim": 6, "mlp_dim": 40, "num_decoder_layers": 3}
# Not one position too many: whatever reads a row that the table does not have gives NaN.
LEARNED = {"max_positions": LENGTH}
PAIR = {"num_encoder_layers": 2, "pad_id": 1, "bos_id": 0, "eos_id": 2, "decoder_start_id": 2}
ALONE = {"bos_id": None, "eos_id": 2, "decoder_start_id": 2}


def small(name: str, **changes: Any) -> TransformerConfig:
    return dataclasses.replace(PRESETS[name], **SMALL | changes)


CONFIGS = {
    "gpt": small("openai-gpt", **ALONE, **LEARNED),
    "gpt2": small("gpt2", **ALONE, **LEARNED),
    "gpt3": small("gpt3-175b", **ALONE, **LEARNED, attention_window=3, alternating_window=True, num_decoder_layers=4),
    "llama": small("llama-3.1-8b", **ALONE, num_kv_heads=2, rotary_base=100.0, rotary_scaling=(8.0, 1.0, 4.0, 24)),
    "mistral": small("llama-2-7b", **ALONE, num_kv_heads=2, attention_window=4),
    "palm": small("palm-8b", **ALONE),
    "bart": small("bart-base", **PAIR, **LEARNED, decoder_num_heads=2, decoder_mlp_dim=32, forced_bos_id=None),
    "mbart": small("mbart-large-cc25", **PAIR, **LEARNED),
    "original": small(
        "bart-base", **PAIR, positions="sinusoidal", position_offset=0, embedding_norm=False, scaled_embedding=True
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_the_uncached_at_every_position(name: str, sharp_params: Any) -> None:
    config = CONFIGS[name]
    model, params = build(config), sharp_params(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 67, (3, LENGTH)).astype(np.int32)
    prompts = np.array(PROMPTS)[:, None]
    places = np.arange(LENGTH)[None, :]
    prompt_segments = (places[:, :WIDTH] < prompts).astype(np.int32)
    # What stands in the padding of a prompt is none of the tokens that follow it.
    prompt = np.where(prompt_segments, tokens[:, :WIDTH], rng.integers(3, 67, (3, WIDTH))).astype(np.int32)
    source = {}
    if config.num_encoder_layers:
        inputs = rng.integers(3, 67, (3, 7)).astype(np.int32)
        inputs[1, 4:] = config.pad_id
        source = {"encoder_input_tokens": inputs}
    following = np.stack([tokens[row, n : n + NEW] for row, n in enumerate(PROMPTS)])

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        def apply(*args: Any, **kwargs: Any) -> Any:
            return model.apply({"params": params}, *args, **kwargs)

        segments = (places < prompts + NEW).astype(np.int32)
        whole = apply({**source, "decoder_input_tokens": tokens, "decoder_segment_ids": segments})
        encoded = apply(source, method="encode") if source else None
        cache = model.new_cache(3, LENGTH, 7 if source else 0)
        batch = {**source, "decoder_input_tokens": prompt, "decoder_segment_ids": prompt_segments}
        first, cache = apply(batch, encoded, cache, method="decode")

        def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
            logits, cache = apply({"decoder_input_tokens": token[:, None]}, None, cache, method="decode")
            return cache, logits[:, 0]

        cache, rest = jax.lax.scan(step, cache, jnp.asarray(following.T))
        return whole, first, jnp.swapaxes(rest, 0, 1), cache.position

    whole, first, rest, position = (np.asarray(x) for x in run(params))
    np.testing.assert_array_equal(position, np.array(PROMPTS) + NEW)
    for row, n in enumerate(PROMPTS):
        got = np.concatenate([first[row, :n], rest[row]])
        wanted = whole[row, : n + NEW]
        # The same float32 sums in another order; logits are as large as 20.
        assert np.max(np.abs(got - wanted)) < 1e-5 * max(1.0, np.max(np.abs(wanted)))
        assert np.mean(np.std(wanted, axis=0)) > 0.5  # positions differ, so a wrong one would show
