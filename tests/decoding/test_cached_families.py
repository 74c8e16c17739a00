"""Decoding with a cache is the model without one, for every shape that a published family has."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding import GenerationConfig
from t5x_lite.decoding.generate import Decoder, Progress, arguments
from t5x_lite.models import PRESETS, TransformerConfig, build
from t5x_lite.models.transformer import Slots
from t5x_lite.nn.attention import Attention, KeysValues

PROMPTS, NEW = (5, 2, 4), 6  # tokens of each row's prompt, and after it
ROWS, WIDTH = len(PROMPTS), max(PROMPTS)
LENGTH = WIDTH + NEW
SMALL = {"vocab_size": 67, "embed_dim": 24, "num_heads": 4, "head_dim": 6, "mlp_dim": 40, "num_decoder_layers": 2}
# Not one position too many: whatever reads a row that the table does not have gives NaN.
LEARNED = {"max_positions": LENGTH}
PAIR = {"num_encoder_layers": 2, "pad_id": 1, "bos_id": 0, "eos_id": 2, "decoder_start_id": 2}
ALONE = {"bos_id": None, "eos_id": 2, "decoder_start_id": 2}
# So few buckets that the logarithmic ones and the last, which all that is further away shares, are reached.
T5 = {**PAIR, "relative_bias_buckets": 8, "relative_bias_max_distance": 8}


def small(name: str, **changes: Any) -> TransformerConfig:
    return dataclasses.replace(PRESETS[name], **SMALL | changes)


CONFIGS = {
    "gpt": small("openai-gpt", **ALONE, **LEARNED),
    "gpt2": small("gpt2", **ALONE, **LEARNED),
    "gpt3": small("gpt3-175b", **ALONE, **LEARNED, attention_window=3, alternating_window=True),
    "llama": small("llama-3.1-8b", **ALONE, num_kv_heads=2, rotary_base=100.0, rotary_scaling=(8.0, 1.0, 4.0, 24)),
    "mistral": small("llama-2-7b", **ALONE, num_kv_heads=2, attention_window=4),
    "palm": small("palm-8b", **ALONE),
    "t5": small("t5-small", **T5),
    "umt5": small("umt5-small", **T5),
    "bart": small("bart-base", **PAIR, **LEARNED, decoder_num_heads=2, decoder_mlp_dim=32, forced_bos_id=None),
    "mbart": small("mbart-large-cc25", **PAIR, **LEARNED),
    "original": small(
        "bart-base", **PAIR, positions="sinusoidal", position_offset=0, embedding_norm=False, scaled_embedding=True
    ),
}


@pytest.fixture(scope="module")
def draw(random_params: Any, sharp_params: Any) -> Callable[[TransformerConfig], Any]:
    """A function `config -> params`, of a model whose attention chooses."""
    return lambda config: (random_params if config.positions == "relative" else sharp_params)(config)


def sources(config: TransformerConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns what the encoder reads, with padding in one row; nothing without an encoder."""
    if not config.num_encoder_layers:
        return {}
    inputs = rng.integers(3, 67, (ROWS, 7)).astype(np.int32)
    inputs[1, 4:] = config.pad_id
    return {"encoder_input_tokens": inputs}


def assert_equal_logits(got: np.ndarray, wanted: np.ndarray) -> None:
    # The same float32 sums in another order; logits are as large as 20.
    assert np.max(np.abs(got - wanted)) < 1e-5 * max(1.0, np.max(np.abs(wanted)))


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_the_uncached_at_every_position(name: str, draw: Any) -> None:
    config = CONFIGS[name]
    model, params = build(config), draw(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 67, (ROWS, LENGTH)).astype(np.int32)
    prompts = np.array(PROMPTS)[:, None]
    places = np.arange(LENGTH)[None, :]
    prompt_segments = (places[:, :WIDTH] < prompts).astype(np.int32)
    # What stands in the padding of a prompt is none of the tokens that follow it.
    prompt = np.where(prompt_segments, tokens[:, :WIDTH], rng.integers(3, 67, (ROWS, WIDTH))).astype(np.int32)
    source = sources(config, rng)
    following = np.stack([tokens[row, n : n + NEW] for row, n in enumerate(PROMPTS)])

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        def apply(*args: Any, **kwargs: Any) -> Any:
            return model.apply({"params": params}, *args, **kwargs)

        segments = (places < prompts + NEW).astype(np.int32)
        whole = apply({**source, "decoder_input_tokens": tokens, "decoder_segment_ids": segments})
        encoded = apply(source, method="encode") if source else None
        cache = model.new_cache(ROWS, LENGTH, 7 if source else 0)
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
        assert_equal_logits(got, wanted)
        assert np.mean(np.std(wanted, axis=0)) > 0.5  # positions differ, so a wrong one would show


# --- several sequences of one row ------------------------------------------------------------------------------------

# As many sequences as a prompt has places, so that reading prompts and going on are calls of one shape.
SEQUENCES, STEPS = WIDTH, 4
SLOTS = WIDTH + STEPS * SEQUENCES


@dataclasses.dataclass(frozen=True)
class Shared:
    """Sequences that share their row's prompt, and in every step take over the past of any of them.

    Attributes:
      source: of the encoder, `[B, 7]`.
      prompt: `[B, WIDTH]`, anything in the padding.
      tokens: `[B, R, N]`, what stands in the slot of each sequence in each step.
      pasts: `[N, B, R, N]`, after each step, the sequence whose slot the n-th token of each sequence is in.
    """

    source: dict[str, np.ndarray]
    prompt: np.ndarray
    tokens: np.ndarray
    pasts: np.ndarray

    @staticmethod
    def draw(config: TransformerConfig) -> "Shared":
        rng = np.random.default_rng(3)
        pasts, past = [], np.zeros((ROWS, SEQUENCES, STEPS), int)
        for step in range(STEPS):
            parents = rng.integers(0, SEQUENCES, (ROWS, SEQUENCES, 1)) if step else np.arange(SEQUENCES)[None, :, None]
            past = np.take_along_axis(past, parents, axis=1)
            past[:, :, step] = np.arange(SEQUENCES)
            pasts.append(past)
        return Shared(
            sources(config, rng),
            rng.integers(3, 67, (ROWS, WIDTH)).astype(np.int32),
            rng.integers(3, 67, (ROWS, SEQUENCES, STEPS)).astype(np.int32),
            np.stack(pasts),
        )

    def texts(self) -> dict[str, np.ndarray]:
        """Returns a batch of every sequence after every step, each in a row of its own: `[N * B * R, WIDTH + N]`."""
        shape = (STEPS, ROWS, SEQUENCES)
        following = np.take_along_axis(np.broadcast_to(self.tokens, self.pasts.shape), self.pasts, axis=2)
        texts = np.full((*shape, WIDTH + STEPS), 5, np.int32)
        segments = np.zeros_like(texts)
        for row, size in enumerate(PROMPTS):
            texts[:, row, :, :size] = self.prompt[row, :size]
            texts[:, row, :, size : size + STEPS] = following[:, row]
            for step in range(STEPS):
                segments[step, row, :, : size + step + 1] = 1
        whose = np.broadcast_to(np.arange(ROWS)[:, None], shape).ravel()
        return {
            **{name: array[whose] for name, array in self.source.items()},
            "decoder_input_tokens": texts.reshape(-1, texts.shape[-1]),
            "decoder_segment_ids": segments.reshape(-1, texts.shape[-1]),
        }

    def calls(self) -> list[tuple[dict[str, np.ndarray], Slots]]:
        """Returns the batch and the slots of the call that reads the prompts, and of one for each step."""
        prompts, places = np.array(PROMPTS)[:, None], np.broadcast_to(np.arange(WIDTH), (ROWS, WIDTH))
        positions = np.concatenate([places, prompts + np.repeat(np.arange(STEPS), SEQUENCES)], axis=1)

        def call(start: int, tokens: np.ndarray, at: np.ndarray, real: np.ndarray, visible: np.ndarray) -> Any:
            batch = {"decoder_input_tokens": tokens, "decoder_positions": at, "decoder_segment_ids": real.astype(int)}
            return batch, Slots(np.int32(start), visible, positions)  # type: ignore[arg-type]

        causal = np.broadcast_to(np.arange(SLOTS) <= np.arange(WIDTH)[:, None], (ROWS, WIDTH, SLOTS))
        calls = [call(0, self.prompt, places, places < prompts, causal)]
        for step, past in enumerate(self.pasts):
            own = (past[..., None] == np.arange(SEQUENCES)) & (np.arange(STEPS) <= step)[:, None]
            of_prompt = np.broadcast_to((places < prompts)[:, None, :], (ROWS, SEQUENCES, WIDTH))
            visible = np.concatenate([of_prompt, own.reshape(ROWS, SEQUENCES, -1)], axis=2)
            at = np.broadcast_to(prompts + step, (ROWS, SEQUENCES))
            calls.append(call(WIDTH + step * SEQUENCES, self.tokens[:, :, step], at, np.ones_like(at, bool), visible))
        return calls


def last_logits(logits: jax.Array, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the logits of each text's last token, `[N, B, R, V]`."""
    ends = np.sum(batch["decoder_segment_ids"], axis=1) - 1
    return np.asarray(logits)[np.arange(len(ends)), ends].reshape(STEPS, ROWS, SEQUENCES, -1)


@pytest.fixture(scope="module")
def uncached(draw: Any) -> Callable[[str], np.ndarray]:
    """A function `name -> logits [N, B, R, V]` of the model that reads every text at once."""

    @cache
    def run(name: str) -> np.ndarray:
        config = CONFIGS[name]
        batch = Shared.draw(config).texts()
        return last_logits(jax.jit(build(config).apply)({"params": draw(config)}, batch), batch)

    return run


@pytest.fixture(scope="module")
def in_cache(draw: Any) -> Callable[[str, str], np.ndarray]:
    """A function `(name, dtype) -> logits [N, B, R, V]` of sequences that share one cache of the dtype."""

    @cache
    def run(name: str, dtype: str) -> np.ndarray:
        config = CONFIGS[name]
        model, params, shared = build(config), draw(config), Shared.draw(config)

        @jax.jit
        def decode(params: Any, memory: Any, batch: Any, slots: Slots) -> Any:
            encoded = None
            if "encoder_input_tokens" in batch:
                encoded = model.apply({"params": params}, batch, method="encode")
            return model.apply({"params": params}, batch, encoded, memory, slots=slots, method="decode")

        (prompts, slots), *steps = shared.calls()
        memory = model.new_cache(ROWS, SLOTS, 7 if shared.source else 0, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(memory.layers)} <= {jnp.dtype(dtype), jnp.dtype("float32")}
        _, memory = decode(params, memory, {**shared.source, **prompts}, slots)
        made = []
        for batch, slots in steps:
            logits, memory = decode(params, memory, batch, slots)
            made.append(np.asarray(logits))
        return np.stack(made)

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_of_one_row_equal_texts_of_their_own(name: str, uncached: Any, in_cache: Any) -> None:
    wanted = uncached(name)
    # Tokens, prompts and pasts matter, so that those of another sequence would show.
    assert np.min(np.std(wanted, axis=2).mean(axis=-1)) > 0.3
    assert_equal_logits(in_cache(name, "float32"), wanted)


# --- smaller numbers in the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_an_int8_cache_changes_little(name: str, uncached: Any, in_cache: Any) -> None:
    wanted, got = uncached(name), in_cache(name, "int8")
    # A key or a value is off by at most 1/254 of the largest of its head, 0.4 %; over the keys and values that a token
    # sees that evens out, and two layers add up. Of the logits' spread it is 0.3 % to 0.5 % (T5, BART, mBART, GPT-2 and
    # 3, Llama, Mistral, PaLM), 0.7 % (GPT) and 1.0 % (the first Transformer, whose sinusoids make attention sharpest).
    share = np.sqrt(np.mean((got - wanted) ** 2)) / np.std(wanted)
    assert 0.001 < share < 0.02


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["umt5", "bart", "llama"])
def test_nothing_but_rounding_keys_and_values_changes(
    name: str, dtype: str, draw: Any, in_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, params = CONFIGS[name], draw(CONFIGS[name])
    got, project = in_cache(name, dtype), Attention.project

    def project_and_round(self: Attention, *args: Any) -> KeysValues:
        exact: Any = project(self, *args)
        if self.path[0] == "encoder":
            return exact
        if dtype == "bfloat16":
            return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), exact)
        x: Any = exact.quantized()
        return KeysValues(x.key * x.key_scale[..., None], x.value * x.value_scale[..., None])

    monkeypatch.setattr(Attention, "project", project_and_round)
    batch = Shared.draw(config).texts()
    # A function of its own, as jit knows the model's already.
    wanted = last_logits(jax.jit(lambda params: build(config).apply({"params": params}, batch))(params), batch)
    # In a text or two a number lies so close to the middle between two others that it is rounded the other way.
    equal = np.max(np.abs(got - wanted), axis=-1) < 1e-5 * max(1.0, np.max(np.abs(wanted)))
    assert np.mean(equal) > 0.9


# --- a cache that grows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [("t5", {"num_beams": 12}), ("mistral", {"do_sample": True, "num_return_sequences": 12, "cache_dtype": "int8"})],
)
def test_a_cache_that_grows_changes_nothing(
    name: str, how: dict[str, Any], draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(dataclasses.replace(CONFIGS[name], eos_id=None))
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = sources(model.config, rng)
    if not batch:
        batch["decoder_input_tokens"] = rng.integers(3, 67, (ROWS, WIDTH)).astype(np.int32)
        batch["decoder_segment_ids"] = (np.arange(WIDTH) < np.array(PROMPTS)[:, None]).astype(np.int32)
    config = GenerationConfig(max_new_tokens=17, **how)
    args = draw(model.config), batch, *arguments(model, batch, config, None, None)
    slots, advance = list[int](), Decoder.advance

    def noted(self: Decoder, params: Any, progress: Progress, until: int) -> Progress:
        slots.append(progress.cache.slots)
        return advance(self, params, progress, until)

    monkeypatch.setattr(Decoder, "advance", noted)
    grown = jax.jit(Decoder(model, config).generate)(*args)
    prompt = 1 if model.config.num_encoder_layers else WIDTH
    assert slots == [-(-(prompt + (room - 1) * 12) // 16) * 16 for room in (4, 8, 17)]
    monkeypatch.setattr(Decoder, "_rooms", lambda self: [17])
    whole = jax.jit(Decoder(model, config).generate)(*args)
    np.testing.assert_array_equal(grown.tokens, whole.tokens)
    np.testing.assert_allclose(grown.scores, whole.scores, rtol=1e-5)  # the same sums in another order
