"""Float16 as the dtype of the computation: as near to float32 as its eleven bits allow, and nowhere past its 65504."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite.models import TransformerConfig, build, preset
from t5x_lite.training.losses import LossSettings
from t5x_lite.training.step import loss_gradients

VOCAB, SCALE = 96, 2.0**12
FAMILIES = ("t5-small", "t5-v1.1-small", "bart-base", "gpt2", "bert-base-uncased", "llama-2-7b", "palm-8b")


def small(name: str) -> TransformerConfig:
    big = preset(name)
    sizes = {"vocab_size": VOCAB, "embed_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 64, "max_positions": 16}
    layers = {side: 2 if getattr(big, side) else 0 for side in ("num_encoder_layers", "num_decoder_layers")}
    ids = {"pad_id": 0, "bos_id": 2, "eos_id": 1, "decoder_start_id": 0, "stop_ids": ()}
    forced = {"forced_bos_id": None, "forced_eos_id": None}
    # Rounding that turns a relu on or off is an error of its own size.
    smooth = "gelu_tanh" if big.activation == "relu" else big.activation
    kv_heads = min(big.num_kv_heads, 1)
    rest = {"num_kv_heads": kv_heads, "activation": smooth, "dropout_rate": 0.0}
    return dataclasses.replace(big, **sizes, **layers, **ids, **forced, **rest)


@pytest.fixture
def batch(random_batch: Any) -> dict[str, np.ndarray]:
    made = random_batch(np.random.default_rng(1), 4, 12, 10, VOCAB)
    words = made["encoder_input_tokens"]
    targets = {"encoder_target_tokens": words, "encoder_loss_weights": (words > 0).astype(np.float32)}
    return {**made, **targets, "next_sentence_labels": np.array([0, 1, 1, 0], np.int32)}


def gradients(config: TransformerConfig, params: Any, batch: Any, dtype: str) -> tuple[Any, Any]:
    key = jax.random.key(0)
    scale = SCALE if dtype == "float16" else 1.0

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        return loss_gradients(
            build(config, dtype),
            params,
            batch,
            settings=LossSettings(z_loss=1e-4),
            microbatches=1,
            key=key,
            scale=scale,
        )

    grads, sums = run(params, batch)
    return grads, sums.cross_entropy / sums.weight


def distance(one: Any, other: Any) -> float:
    return float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, one, other)))


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_nearer_to_those_of_float32_than_bfloat16(
    name: str, batch: Any, sharp_params: Any
) -> None:
    config = small(name)
    params = sharp_params(config)
    wanted, loss = gradients(config, params, batch, "float32")
    halves, half_loss = gradients(config, params, batch, "float16")
    brains, _ = gradients(config, params, batch, "bfloat16")
    assert float(half_loss) == pytest.approx(float(loss), rel=1e-3)  # eleven bits; 5e-5 was seen
    assert {x.dtype for x in jax.tree.leaves(halves)} == {jnp.dtype("float32")}
    # Three bits more than bfloat16: an eighth of its distance, where rounding is all there is.
    assert distance(halves, wanted) < distance(brains, wanted) / 3
    size = float(optax.tree.norm(wanted))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(halves), strict=True):
        # Relu and attention that chooses make much of little. The other term is for gradients that cancel to nothing,
        # as those of the keys' biases.
        assert np.linalg.norm(b - a) < 0.2 * np.linalg.norm(a) + 1e-3 * size, (name, jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["t5-small", "t5-v1.1-small", "bart-base", "gpt2", "llama-2-7b"])
def test_the_residual_stream_may_be_larger_than_float16(name: str, batch: Any, sharp_params: Any) -> None:
    # As in trained T5s: what the feed-forward adds has numbers of a hundred thousand, each of its factors fits.
    config = small(name)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 3e4 if "down" in jax.tree_util.keystr(path) else x, sharp_params(config)
    )
    model, half = build(config), build(config, "float16")
    inputs = {"params": params}, batch
    wanted, got = model.apply(*inputs), half.apply(*inputs)
    assert got.dtype == jnp.float32
    assert np.all(np.isfinite(got))
    real = batch["decoder_loss_weights"] > 0
    assert np.std(got[real] - wanted[real]) < 0.02 * np.std(wanted[real])  # eleven bits; 0.9 % was seen
