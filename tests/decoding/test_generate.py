import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding import Generated, GenerationConfig, generate
from t5x_lite.errors import InputError
from t5x_lite.models import PRESETS, TransformerConfig, build
from t5x_lite.models.transformer import Transformer

FAMILIES = ("v1_0_config", "tiny_config", "umt5_config")
NEW_TOKENS = 12
GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS)


def inputs(rows: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 256, (rows, 9)).astype(np.int32)
    tokens[1, 5:] = 0  # one row is padded
    return {"encoder_input_tokens": tokens}


def teacher_forced(config: TransformerConfig, params: Any, batch: Any) -> np.ndarray:
    """Log-probabilities `[B, T, V]` from the whole sequence at once, without a cache."""
    logits = jax.jit(build(config).apply)({"params": params}, batch)
    return np.asarray(jax.nn.log_softmax(logits))


def as_targets(config: TransformerConfig, tokens: jax.Array) -> np.ndarray:
    start = np.full((tokens.shape[0], 1), config.decoder_start_id)
    return np.concatenate([start, tokens[:, :-1]], axis=1).astype(np.int32)


def assert_is_the_argmax(config: TransformerConfig, params: Any, batch: Any, out: Generated) -> None:
    """Every token is the most likely after those before it, and the score adds up."""
    decoder_inputs = as_targets(config, out.tokens)
    segments = (np.arange(NEW_TOKENS)[None, :] < np.asarray(out.lengths)[:, None]).astype(np.int32)
    full = batch | {"decoder_input_tokens": decoder_inputs, "decoder_segment_ids": segments}
    log_probabilities = teacher_forced(config, params, full)
    real = segments > 0
    np.testing.assert_array_equal(np.argmax(log_probabilities, axis=-1)[real], np.asarray(out.tokens)[real])
    gained = np.take_along_axis(log_probabilities, np.asarray(out.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.scores, np.sum(gained * segments, axis=1), rtol=1e-4)  # sums of a dozen floats


@pytest.fixture(scope="session")
def ended(tiny_config: TransformerConfig, random_params: Any) -> tuple[TransformerConfig, Generated]:
    """A generation in which rows end at different times: EOS is made a token that the model likes to produce."""
    params = random_params(tiny_config)
    endless = generate(build(dataclasses.replace(tiny_config, eos_id=1)), params, inputs(), GREEDY).tokens
    eos = int(endless[0, 4])
    config = dataclasses.replace(tiny_config, eos_id=eos, pad_id=3)
    batch = inputs() | {"encoder_segment_ids": (inputs()["encoder_input_tokens"] > 0).astype(np.int32)}
    return config, generate(build(config), params, batch, GREEDY)


# --- greedy decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_the_teacher_forced_argmax(
    family: str, request: pytest.FixtureRequest, random_params: Any
) -> None:
    # So few buckets that a dozen tokens reach the logarithmic ones and the last, which all that is further away shares.
    buckets = {"relative_bias_buckets": 8, "relative_bias_max_distance": 10}
    config = dataclasses.replace(request.getfixturevalue(family), **buckets)
    params = random_params(config)
    # A tied head of random numbers says one and the same token for ever, unless the inputs are made to matter more.
    params["decoder"]["layers"]["cross_attention"]["out"]["kernel"] *= 20
    out = generate(build(config), params, inputs(), GREEDY)
    assert (out.tokens.shape, out.tokens.dtype, out.scores.dtype) == ((4, NEW_TOKENS), jnp.int32, jnp.float32)
    assert len({tuple(row) for row in np.asarray(out.tokens).tolist()}) == 4
    assert_is_the_argmax(config, params, inputs(), out)


# --- the end --------------------------------------------------------------------------------------------------------


def test_a_row_ends_with_eos_and_pads_follow(ended: tuple[TransformerConfig, Generated], random_params: Any) -> None:
    config, out = ended
    lengths = np.asarray(out.lengths)
    assert lengths[0] == 5
    assert len(set(lengths)) > 1
    for row, length in zip(np.asarray(out.tokens), lengths, strict=True):
        assert config.eos_id not in row[: length - 1]
        assert length == NEW_TOKENS or row[length - 1] == config.eos_id
        assert np.all(row[length:] == config.pad_id)
    batch = inputs() | {"encoder_segment_ids": (inputs()["encoder_input_tokens"] > 0).astype(np.int32)}
    assert_is_the_argmax(config, random_params(config), batch, out)


def test_stops_when_every_row_has_ended(
    ended: tuple[TransformerConfig, Generated], random_params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = ended
    calls = []
    apply = Transformer.apply

    def counting(self: Transformer, *args: Any, **kwargs: Any) -> Any:
        if kwargs["method"] == "decode":
            jax.debug.callback(lambda: calls.append(1))
        return apply(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "apply", counting)
    first_row = {name: value[:1] for name, value in inputs().items()}
    # A number of tokens that no other test asks for, so that this is compiled anew.
    alone = generate(build(config), random_params(config), first_row, GenerationConfig(max_new_tokens=1001))
    jax.block_until_ready(alone)
    jax.effects_barrier()
    assert alone.lengths[0] == out.lengths[0] == 5
    assert len(calls) == 1 + 4  # the prompt, and one for every token but the last, which nothing follows


def test_ids_beyond_the_tokenizer_are_never_generated(tiny_config: Any, random_params: Any) -> None:
    params = random_params(tiny_config)
    free = generate(build(tiny_config), params, inputs(), GREEDY)
    bounded = generate(build(tiny_config), params, inputs(), GREEDY, vocab_size=100)
    assert np.max(free.tokens) >= 100
    assert np.max(bounded.tokens) < 100
    # The probabilities are those among the allowed ids.
    assert np.all(np.isfinite(bounded.scores))
    first = teacher_forced(tiny_config, params, inputs() | {"decoder_input_tokens": np.zeros((4, 1), np.int32)})[:, 0]
    np.testing.assert_array_equal(bounded.tokens[:, 0], np.argmax(first[:, :100], axis=-1))


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -3])
def test_nothing_to_generate_is_an_error(number: int) -> None:
    with pytest.raises(InputError, match=f"max_new_tokens must be at least 1, not {number}"):
        GenerationConfig(max_new_tokens=number)


# --- positions that run out -----------------------------------------------------------------------------------------


def test_a_learned_table_is_not_left(random_params: Any) -> None:
    config = dataclasses.replace(
        PRESETS["gpt2"],
        vocab_size=32,
        embed_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_decoder_layers=2,
        max_positions=8,
        bos_id=None,
        eos_id=None,
        decoder_start_id=0,
    )
    model, params = build(config), random_params(config)
    batch = {"decoder_input_tokens": np.arange(1, 6)[None]}
    # The last token is not read again, so eight positions are enough for five and four.
    out = generate(model, params, batch, GenerationConfig(max_new_tokens=4))
    assert np.isfinite(out.scores).all()
    with pytest.raises(InputError, match=r"prompt of 5 tokens and max_new_tokens 5 take 9 positions, .* has 8"):
        generate(model, params, batch, GenerationConfig(max_new_tokens=5))
