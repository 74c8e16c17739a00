"""What all families share: packing, positions that a table does not have, and parts that a model does not have."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite.errors import InputError
from t5x_lite.models import PRESETS, TransformerConfig, build
from t5x_lite.models.stack import check_remat
from t5x_lite.training.step import batch_loss

LENGTH = 15
SMALL = {"vocab_size": 67, "embed_dim": 24, "num_heads": 4, "head_dim": 6, "mlp_dim": 40}
DECODER = {"num_decoder_layers": 3, "bos_id": None, "eos_id": 2, "decoder_start_id": 2}
PAIR = {"num_encoder_layers": 2, "num_decoder_layers": 3, "max_positions": LENGTH}
LABELS = {
    "decoder_target_tokens": np.full((2, 7), 5, np.int32),
    "decoder_loss_weights": np.ones((2, 7), np.float32),
}
CONFIGS = {
    "gpt2": dataclasses.replace(PRESETS["gpt2"], **SMALL, **DECODER, max_positions=LENGTH),
    "gpt3": dataclasses.replace(
        PRESETS["gpt3-175b"], **SMALL, **DECODER, max_positions=LENGTH, attention_window=3, alternating_window=True
    ),
    "llama": dataclasses.replace(PRESETS["llama-3-8b"], **SMALL, **DECODER, num_kv_heads=2, rotary_base=100.0),
    "palm": dataclasses.replace(PRESETS["palm-8b"], **SMALL, **DECODER),
    "bert": dataclasses.replace(
        PRESETS["bert-base-uncased"],
        **SMALL,
        num_encoder_layers=3,
        max_positions=LENGTH,
        head="masked_lm",
        pooler=False,
    ),
    "bart": dataclasses.replace(PRESETS["bart-base"], **SMALL, **PAIR, decoder_num_heads=2, decoder_mlp_dim=32),
    "mbart": dataclasses.replace(PRESETS["mbart-large-cc25"], **SMALL, **PAIR),
    "original": dataclasses.replace(
        PRESETS["bart-base"], **SMALL, **PAIR, positions="sinusoidal", position_offset=0, embedding_norm=False
    ),
}


def apply(config: TransformerConfig, params: Any, batch: Any, **options: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda params: build(config).apply({"params": params}, batch, **options))(params))


# --- packing --------------------------------------------------------------------------------------------------------


def packed_and_apart(rng: np.random.Generator, first: int, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and token types of four rows: both examples, each alone, and the second after padding."""
    tokens, types = rng.integers(3, 67, (4, LENGTH)), rng.integers(0, 2, (4, LENGTH))
    segments = np.zeros((4, LENGTH), np.int32)
    one, two, left = np.s_[:first], np.s_[first : first + second], np.s_[LENGTH - second :]
    segments[0, one], segments[0, two], segments[1, one], segments[2, :second], segments[3, left] = 1, 2, 1, 1, 1
    for values in (tokens, types):
        values[1, one], values[2, :second], values[3, left] = values[0, one], values[0, two], values[0, two]
    return tokens.astype(np.int32), segments, types.astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_examples_packed_in_a_row_are_as_they_are_apart(name: str, sharp_params: Any) -> None:
    config = CONFIGS[name]
    rng = np.random.default_rng(0)
    batch, lengths = {}, {"encoder": (4, 6), "decoder": (5, 7)}
    for side, (first, second) in lengths.items():
        tokens, segments, types = packed_and_apart(rng, first, second)
        batch |= {f"{side}_input_tokens": tokens, f"{side}_segment_ids": segments, f"{side}_token_types": types}
    got = apply(config, sharp_params(config), batch)
    assert np.all(np.isfinite(got))
    first, second = lengths["decoder" if config.num_decoder_layers else "encoder"]
    two = got[0, first : first + second]
    # Equal float32 sums but for zeros in other places.
    atol = 1e-5 * np.max(np.abs(got))
    np.testing.assert_allclose(got[1, :first], got[0, :first], atol=atol)
    np.testing.assert_allclose(got[2, :second], two, atol=atol)
    np.testing.assert_allclose(got[3, LENGTH - second :], two, atol=atol)
    assert np.max(np.abs(two[1:] - two[:-1])) > 0.5  # tokens differ, so a wrong place would show


def test_a_text_may_stand_anywhere_if_the_batch_says_where(random_params: Any) -> None:
    config = CONFIGS["gpt2"]
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(3, 67, (1, 6)).astype(np.int32)
    got = [
        apply(config, params, {"decoder_input_tokens": tokens, "decoder_positions": np.arange(start, start + 6)[None]})
        for start in (0, 0, 3)
    ]
    plain = apply(config, params, {"decoder_input_tokens": tokens})
    np.testing.assert_array_equal(got[0], plain)
    assert np.max(np.abs(got[2] - plain)) > 0.1


# --- positions that the table does not have -------------------------------------------------------------------------


def tokens_of(side: str, length: int) -> dict[str, np.ndarray]:
    return {f"{side}_input_tokens": np.full((2, length), 5, np.int32)}


@pytest.mark.parametrize(
    ("name", "lengths", "words"),
    [
        ("gpt2", {"decoder": 16}, "decoder_input_tokens has 16 tokens a row, but the model has 15 positions"),
        ("bert", {"encoder": 17}, "encoder_input_tokens has 17 tokens a row, but the model has 15 positions"),
        ("bart", {"encoder": 16, "decoder": 3}, "encoder_input_tokens has 16 tokens a row, but the model has 15"),
        ("bart", {"encoder": 3, "decoder": 16}, "decoder_input_tokens has 16 tokens a row, but the model has 15"),
    ],
)
def test_rows_longer_than_the_table_are_refused(name: str, lengths: dict[str, int], words: str) -> None:
    model = build(CONFIGS[name])
    batch = {key: value for side, n in lengths.items() for key, value in tokens_of(side, n).items()}
    with pytest.raises(InputError, match=words):
        jax.eval_shape(lambda params: model.apply({"params": params}, batch), model.param_shapes())
    fitting = {key: value[:, :15] for key, value in batch.items()}
    jax.eval_shape(lambda params: model.apply({"params": params}, fitting), model.param_shapes())


@pytest.mark.parametrize("name", ["llama", "original"])
def test_positions_without_a_table_have_no_end(name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], max_positions=15)
    model = build(config)
    batch = tokens_of("encoder", 40) | tokens_of("decoder", 40)
    logits = jax.eval_shape(lambda params: model.apply({"params": params}, batch), model.param_shapes())
    assert logits.shape == (2, 40, 67)


def is_nan(segments: list[int], random_params: Any) -> np.ndarray:
    """Which tokens of a row get NaN from a GPT-2 of seven positions."""
    config = dataclasses.replace(CONFIGS["gpt2"], num_decoder_layers=1, max_positions=7)
    batch = {"decoder_input_tokens": np.full((1, len(segments)), 5), "decoder_segment_ids": np.array([segments])}
    return np.isnan(apply(config, random_params(config), batch)).any(axis=-1)[0]


def test_packed_rows_may_be_longer_than_the_table_and_a_longer_text_shows(random_params: Any) -> None:
    assert not is_nan([1] * 7 + [2] * 6 + [3] * 5, random_params).any()
    assert is_nan([1] * 8 + [2] * 6, random_params)[:8].all()


def test_padding_needs_no_positions(random_params: Any) -> None:
    assert not is_nan([1] * 5 + [2] * 6 + [0] * 8, random_params)[:11].any()


# --- parts that a model does not have -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("gpt2", "encode", "the model has no encoder"),
        ("llama", "pool", "the model has no encoder"),
        ("bert", "decode", "the model has no decoder"),
    ],
)
def test_parts_that_a_model_does_not_have(name: str, method: str, words: str) -> None:
    model = build(CONFIGS[name])
    batch = tokens_of("encoder", 4) | tokens_of("decoder", 4)
    with pytest.raises(InputError, match=words) as caught:
        jax.eval_shape(lambda params: model.apply({"params": params}, batch, method=method), model.param_shapes())
    assert "\n" not in str(caught.value)


def test_hidden_states_are_those_of_the_stack_that_there_is() -> None:
    batch = tokens_of("encoder", 4) | tokens_of("decoder", 6)
    for name, length in (("gpt2", 6), ("bert", 4), ("bart", 4)):
        model = build(CONFIGS[name])
        shapes = model.param_shapes()
        hidden = jax.eval_shape(lambda p, m=model: m.apply({"params": p}, batch, method="hidden_states"), shapes)
        assert hidden.shape == (2, length, 24), name


# --- what the backward pass finds stored ----------------------------------------------------------------------------


def gradients_and_program(config: TransformerConfig, params: Any, **options: Any) -> tuple[Any, Any]:
    model, batch = build(config, **options), tokens_of("encoder", 9) | tokens_of("decoder", 7) | LABELS

    def loss(params: Any) -> jax.Array:
        return batch_loss(model, params, batch, dropout_key=jax.random.key(3)).cross_entropy

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    return compiled(params), compiled


@pytest.mark.parametrize("name", ["bart", "gpt3"])
def test_a_stack_that_is_not_scanned_computes_the_same(name: str, random_params: Any) -> None:
    config = CONFIGS[name]
    params = random_params(config)
    (scanned, loop), (unrolled, line) = (gradients_and_program(config, params, scan_layers=s) for s in (True, False))
    # The same keys of dropout, or the difference would be as large as the gradient; float32 sums in another order.
    for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * max(1e-3, np.max(np.abs(b))))
    depths = {config.num_encoder_layers, config.num_decoder_layers} - {0}

    def stacks(compiled: Any) -> int:  # arrays of what each layer leaves for the backward pass
        return sum(len(re.findall(rf"f32\[{depth},2,[79],24\]", compiled.as_text())) for depth in depths)

    assert stacks(line) == 0 < stacks(loop)


def test_layers_that_are_not_scanned_are_computed_again_where_asked_for(random_params: Any) -> None:
    config = CONFIGS["gpt2"]
    params = random_params(config)
    kept, again = (gradients_and_program(config, params, scan_layers=False, remat=r)[1] for r in ("none", "full"))
    kept, again = (sum(" tanh(" in line for line in compiled.as_text().splitlines()) for compiled in (kept, again))
    # Three layers' activations are there a second time, unless the compiler has found the first ones again.
    assert again >= kept + 3


class Device:
    """A device that cannot reach the memory of its host."""

    device_kind = "TPU v9"

    def addressable_memories(self) -> list[Any]:
        return [SimpleNamespace(kind="device")]


def test_offloading_is_refused_where_there_is_nowhere_to() -> None:
    words = "train.remat=offload needs pinned_host memory, and TPU v9 has device alone; allowed here: none, minimal"
    with pytest.raises(InputError, match=words):
        check_remat("offload", Device())
    check_remat("full", Device())
    check_remat("offload", jax.devices()[0])
