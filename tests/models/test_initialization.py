"""Fresh parameters, by family: how large they are, and that the model they make predicts nothing in particular."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite.models import PRESETS, TransformerConfig, build
from t5x_lite.models.initialization import initializers
from t5x_lite.training.step import batch_loss

VOCAB, LENGTH, ROWS = 1024, 24, 16
SMALL = {"vocab_size": VOCAB, "embed_dim": 48, "num_heads": 4, "head_dim": 12, "mlp_dim": 80}
DECODER = {"num_decoder_layers": 3, "bos_id": None, "eos_id": 2, "decoder_start_id": 2}
PAIR = {"num_encoder_layers": 2, "num_decoder_layers": 3, "max_positions": 40}
CONFIGS = {
    "gpt2": dataclasses.replace(PRESETS["gpt2"], **SMALL, **DECODER, max_positions=40),
    "openai-gpt": dataclasses.replace(PRESETS["openai-gpt"], **SMALL, **DECODER, max_positions=40),
    "bart": dataclasses.replace(PRESETS["bart-base"], **SMALL, **PAIR),
    "mbart": dataclasses.replace(PRESETS["mbart-large-cc25"], **SMALL, **PAIR),
    "llama": dataclasses.replace(PRESETS["llama-3-8b"], **SMALL, **DECODER, num_kv_heads=2),
    "palm": dataclasses.replace(PRESETS["palm-8b"], **SMALL, **DECODER),
    "bert": dataclasses.replace(PRESETS["bert-base-uncased"], **SMALL, num_encoder_layers=3, max_positions=40),
}


def batch_of(config: TransformerConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    batch = {}
    for side in ("encoder", "decoder"):
        batch[f"{side}_input_tokens"] = rng.integers(3, VOCAB, shape).astype(np.int32)
        batch[f"{side}_target_tokens"] = rng.integers(3, VOCAB, shape).astype(np.int32)
        batch[f"{side}_loss_weights"] = np.ones(shape, np.float32)
    return batch | {"next_sentence_labels": rng.integers(0, 2, ROWS).astype(np.int32)}


@functools.cache
def fresh(name: str) -> tuple[dict[str, np.ndarray], float]:
    """Parameters by path, and the cross-entropy per token of a batch of random ones."""
    config = CONFIGS[name]
    model, batch = build(config), batch_of(config)

    @jax.jit
    def run(key: jax.Array) -> tuple[Any, jax.Array]:
        params = model.init_params(key)
        sums = batch_loss(model, params, batch)
        return params, sums.cross_entropy / sums.weight

    params, loss = run(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}, float(
        loss
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_model_predicts_nothing_in_particular(name: str) -> None:
    assert 0.0 <= fresh(name)[1] - math.log(VOCAB) <= 1.0


# By what the path ends in: the standard deviation of each kind of parameter. 0.8796: of a normal distribution cut off
# at two standard deviations, sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)), in units of the whole one's.
CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
GPT2_RESIDUAL = 0.02 / math.sqrt(2 * 3)
STANDARD = {"table": 0.02, "kernel": 0.02}
EXPECTED: dict[str, dict[str, float]] = {
    "gpt2": {
        "embedding/table": 0.02,
        "positions/table": 0.01,
        "out/kernel": GPT2_RESIDUAL,
        "down/kernel": GPT2_RESIDUAL,
        "kernel": 0.02,
    },
    "openai-gpt": STANDARD,
    "bart": STANDARD,
    "mbart": STANDARD,
    "llama": STANDARD,
    "palm": {"embedding/table": 1.0, "down/kernel": 80**-0.5, "kernel": 48**-0.5},  # 4 * 12 into `out`, too
    "bert": {"table": 0.02 * CUT, "kernel": 0.02 * CUT},
}


def test_the_cut_normal_is_narrower() -> None:
    assert pytest.approx(0.8796, abs=1e-4) == CUT


@pytest.mark.parametrize("name", CONFIGS)
def test_fresh_parameters_have_the_sizes_of_the_paper(name: str) -> None:
    for path, value in fresh(name)[0].items():
        assert value.dtype == np.float32, path
        if path.endswith(("scale", "bias")):
            np.testing.assert_array_equal(value, float(path.endswith("scale")), err_msg=path)
            continue
        std = next(std for ending, std in EXPECTED[name].items() if path.endswith(ending))
        layers = value if "/layers/" in path else value[None]
        for layer in layers:
            # Five standard errors, of a normal distribution's standard deviation and of its mean.
            assert np.std(layer) == pytest.approx(std, rel=5 / math.sqrt(2 * layer.size)), path
            assert abs(np.mean(layer)) < 5 * std / math.sqrt(layer.size), path
        flat = layers.reshape(len(layers), -1)
        assert len(np.unique(flat, axis=0)) == len(flat), path  # each layer has been drawn on its own


@pytest.mark.parametrize("name", CONFIGS)
def test_no_two_parameters_are_drawn_alike(name: str) -> None:
    drawn = [value for path, value in fresh(name)[0].items() if path.endswith(("table", "kernel"))]
    starts = {tuple(np.round(value.ravel()[:4] / np.std(value), 3)) for value in drawn}
    assert len(starts) == len(drawn)


def test_a_truncated_normal_has_no_tails_and_a_normal_has() -> None:
    for name, value in fresh("bert")[0].items():
        if name.endswith(("table", "kernel")):
            assert np.max(np.abs(value)) <= 0.04 * (1 + 1e-6), name
    assert np.max(np.abs(fresh("bert")[0]["embedding/table"])) > 0.0399
    for name in ("gpt2", "openai-gpt", "llama"):
        table = np.abs(fresh(name)[0]["embedding/table"])
        assert np.mean(table > 0.04) == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / table.size)), name


def test_residual_projections_are_smaller_the_deeper_the_model() -> None:
    def std(layers: int) -> float:
        config = dataclasses.replace(CONFIGS["gpt2"], num_decoder_layers=layers)
        return float(np.std(initializers(config).residual(jax.random.key(0), (200, 200))))

    assert std(2) / std(32) == pytest.approx(4.0, rel=1e-5)
    assert std(2) == pytest.approx(0.01, rel=5 / math.sqrt(2 * 40_000))
