import dataclasses

import jax.numpy as jnp
import pytest

from t5x_lite.errors import InputError
from t5x_lite.models import PRESETS, TransformerConfig, build, preset


def test_presets_by_name() -> None:
    config = preset("t5-small")
    assert config is PRESETS["t5-small"]
    assert (config.tied_head, config.scaled_head, config.gated, config.activation) == (True, True, False, "relu")
    config = preset("flan-t5-base")
    assert (config.tied_head, config.scaled_head, config.gated, config.activation) == (False, False, True, "gelu_tanh")
    assert preset("umt5-small").relative_bias_per_layer
    assert (preset("byt5-large").num_encoder_layers, preset("byt5-large").num_decoder_layers) == (36, 12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: preset("t5-smal"), ["'t5-smal'", "did you mean 't5-small'", "byt5-xxl"]),
        (lambda: build("t5_base"), ["'t5_base'", "did you mean 't5-base'"]),
        (lambda: build("t5-small", dtype="bfloat"), ["'bfloat'", "float32, bfloat16", "did you mean 'bfloat16'"]),
        (lambda: build("t5-small", dtype="float8"), ["'float8'", "float32, bfloat16, float16"]),
        (lambda: build("t5-small", dtype=jnp.float64), ["'float64'", "float32, bfloat16"]),
        (lambda: build("t5-small", remat="fulll"), ["'fulll'", "none, minimal, full", "did you mean 'full'"]),
    ],
)
def test_unknown_names(call, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_build_takes_a_dtype_or_its_name() -> None:
    assert build("t5-small", dtype="bfloat16") == build("t5-small", dtype=jnp.bfloat16)
    assert build("t5-small").dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 0}, ["model.num_heads", "at least 1", "0"]),
        ({"num_decoder_layers": -1}, ["model.num_decoder_layers", "at least 0", "-1"]),
        ({"dropout_rate": 1.0}, ["model.dropout_rate", "[0, 1)", "1.0"]),
        ({"pad_id": 32128}, ["model.pad_id", "32128"]),
        ({"eos_id": -1}, ["model.eos_id", "[0, vocab_size = 32128)", "-1"]),
        ({"activation": "tanh"}, ["model.activation", "'tanh'", "relu, gelu, gelu_tanh, silu"]),
        ({"family": "xlnet"}, ["model.family", "'xlnet'", "t5, bart"]),
        ({"relative_bias_buckets": 2}, ["model.relative_bias_buckets", "at least 4", "2"]),
        ({"relative_bias_max_distance": 16}, ["model.relative_bias_max_distance", "16"]),
    ],
)
def test_configurations_that_no_model_can_have(changes: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        TransformerConfig(**changes)
    for word in words:
        assert word in str(caught.value)
