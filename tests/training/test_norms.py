"""Norms by module."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from t5x_lite.models import TransformerConfig
from t5x_lite.training.norms import TOTAL, module_norms, module_of, norm_metrics


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("embedding/table", "embedding"),
        ("encoder/position_bias/table", "encoder/position_bias"),
        ("encoder/layers/self_attention/query/kernel", "encoder/layers/self_attention"),
        ("decoder/layers/mlp_norm/scale", "decoder/layers/mlp_norm"),
        ("decoder/final_norm/scale", "decoder/final_norm"),
        ("next_sentence_head/bias", "next_sentence_head"),
    ],
)
def test_a_parameter_belongs_to_the_layer_that_a_reader_would_name(path: str, module: str) -> None:
    assert module_of(path) == module


def test_each_module_has_its_norm_and_their_squares_add_up(
    tiny_config: TransformerConfig, random_params: Callable[..., Any]
) -> None:
    params = random_params(tiny_config)
    norms = jax.jit(module_norms)(params)
    mlp = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params["encoder"]["layers"]["mlp"])])
    # Float32 sums in another order: 1e-6 is sixteen units in the last place.
    np.testing.assert_allclose(norms["encoder/layers/mlp"], np.linalg.norm(mlp.astype(np.float64)), rtol=1e-6)
    np.testing.assert_allclose(norms[TOTAL], optax.tree.norm(params), rtol=1e-6)
    parts = [float(norm) ** 2 for name, norm in norms.items() if name != TOTAL]
    np.testing.assert_allclose(sum(parts), float(norms[TOTAL]) ** 2, rtol=1e-5)
    assert len(parts) == 6 + 8 + 2  # encoder, decoder, embedding and head


def test_bfloat16_is_squared_and_summed_in_float32() -> None:
    kernel = jax.numpy.full((1000,), 1 + 2**-7, jax.numpy.bfloat16)  # neither square nor sum are bfloat16 numbers
    norm = module_norms({"head": {"kernel": kernel}})[TOTAL]
    np.testing.assert_allclose(norm, (1 + 2**-7) * 1000**0.5, rtol=1e-6)  # some units in the last place of float32


def test_metrics_have_the_total_without_a_slash() -> None:
    metrics = norm_metrics("gradient_norm", {"head": {"kernel": np.float32([3, 4])}})
    assert {name: float(value) for name, value in metrics.items()} == {"gradient_norm/head": 5.0, "gradient_norm": 5.0}
