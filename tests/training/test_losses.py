"""Against values recorded from T5X, see `fixtures/make_t5x_losses.py`."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import InputError
from t5x_lite.models import build, preset
from t5x_lite.sharding import make_mesh
from t5x_lite.training.losses import (
    LossSettings,
    LossSums,
    chunked_cross_entropy,
    chunked_log_likelihood,
    cross_entropy,
    number_of_chunks,
)
from t5x_lite.training.step import batch_loss

T5X = np.load(Path(__file__).parents[1] / "fixtures" / "t5x_losses.npz")
LOGITS, TARGETS, WEIGHTS = (T5X[name] for name in ("logits", "targets", "weights"))
COEFFICIENTS = ("0", "1e-4", "1e-2")


@pytest.mark.parametrize("z", COEFFICIENTS)
def test_every_token(z: str) -> None:
    # T5X's loss includes the z-loss, ours is apart. One token at a time: the sums are then the token's own.
    for place in np.ndindex(TARGETS.shape):
        weights = np.zeros_like(WEIGHTS)
        weights[place] = 1.0
        sums = cross_entropy(LOGITS, TARGETS, weights, LossSettings(z_loss=float(z)))
        # The same float32 operations but for a logsumexp that is not split in the same places.
        assert sums.z_loss == pytest.approx(T5X[f"token/{z}/z_loss"][place], rel=1e-6)
        assert sums.cross_entropy + sums.z_loss == pytest.approx(T5X[f"token/{z}/loss"][place], rel=1e-6)


@pytest.mark.parametrize("z", COEFFICIENTS)
def test_weighted_sums_and_gradients(z: str) -> None:
    name = f"weighted/{z}/0/sum"

    def total(logits: jax.Array) -> jax.Array:
        sums = cross_entropy(logits, TARGETS, WEIGHTS, LossSettings(z_loss=float(z)))
        return sums.cross_entropy + sums.z_loss

    value, gradient = jax.value_and_grad(total)(jnp.asarray(LOGITS))
    assert value == pytest.approx(T5X[f"{name}/loss"], rel=1e-6)
    # Entries are up to 10 (z-loss of the large row), and T5X's backward pass is written by hand.
    np.testing.assert_allclose(gradient, T5X[f"{name}/grad"], rtol=1e-5, atol=1e-6)
    sums = cross_entropy(LOGITS, TARGETS, WEIGHTS, LossSettings(z_loss=float(z)))
    assert sums.z_loss == pytest.approx(T5X[f"{name}/z_loss"], rel=1e-6)
    assert sums.weight == T5X[f"{name}/weight_sum"] == 4.5


@pytest.mark.parametrize("z", COEFFICIENTS)
def test_per_real_target_token(z: str) -> None:
    # What training divides by is what T5X calls NUM_REAL_TARGET_TOKENS.
    sums = cross_entropy(LOGITS, TARGETS, WEIGHTS, LossSettings(z_loss=float(z)))
    expected = T5X[f"weighted/{z}/0/tokens/loss"]
    assert (sums.cross_entropy + sums.z_loss) / sums.weight == pytest.approx(expected, rel=1e-6)


def test_absent_weights_are_ones_in_t5x() -> None:
    sums = cross_entropy(LOGITS, TARGETS, np.ones_like(WEIGHTS), LossSettings(z_loss=1e-4))
    assert sums.cross_entropy + sums.z_loss == pytest.approx(T5X["unweighted/loss"], rel=1e-6)
    assert sums.z_loss == pytest.approx(T5X["unweighted/z_loss"], rel=1e-6)


def test_correct_counts_real_tokens_only() -> None:
    best = np.argmax(LOGITS, axis=-1).astype(np.int32)
    assert cross_entropy(LOGITS, best, WEIGHTS).correct == np.sum(WEIGHTS)
    assert cross_entropy(LOGITS, (best + 1) % 7, WEIGHTS).correct == 0
    mixed = np.where(np.arange(3) == 1, best, (best + 1) % 7).astype(np.int32)
    assert cross_entropy(LOGITS, mixed, WEIGHTS).correct == 2


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    sums = cross_entropy(jnp.zeros((2, 3, 7)), TARGETS, np.ones_like(WEIGHTS))
    assert sums.cross_entropy / sums.weight == pytest.approx(np.log(7), rel=1e-6)


# --- label smoothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", COEFFICIENTS)
def test_t5_smoothing_is_t5x_s(z: str) -> None:
    name, settings = f"weighted/{z}/0.1/sum", LossSettings(z_loss=float(z), label_smoothing=0.1)
    value, gradient = jax.value_and_grad(lambda logits: cross_entropy(logits, TARGETS, WEIGHTS, settings).trained)(
        LOGITS
    )
    assert value == pytest.approx(T5X[f"{name}/loss"], rel=1e-6)
    # As above; T5X's backward pass is written by hand.
    np.testing.assert_allclose(gradient, T5X[f"{name}/grad"], rtol=1e-5, atol=1e-6)
    sums, plain = (cross_entropy(LOGITS, TARGETS, WEIGHTS, s) for s in (settings, LossSettings()))
    assert sums.cross_entropy == plain.cross_entropy  # of the targets as they are
    assert abs(sums.trained - sums.cross_entropy) > 1


def test_hf_smoothing_is_the_cross_entropy_to_a_mixture_with_the_uniform_distribution() -> None:
    settings = LossSettings(label_smoothing=0.1, label_smoothing_style="hf")
    logits = np.asarray(LOGITS, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    soft = 0.9 * np.eye(7)[TARGETS] + 0.1 / 7
    # transformers' LabelSmoother: (1 - e) * nll + e * mean over the vocabulary of -log p.
    assert cross_entropy(LOGITS, TARGETS, WEIGHTS, settings).trained == pytest.approx(
        -np.sum((soft * log_p).sum(-1) * WEIGHTS), rel=1e-6
    )
    gradient = jax.grad(lambda x: cross_entropy(x, TARGETS, WEIGHTS, settings).trained)(LOGITS)
    np.testing.assert_allclose(gradient, (np.exp(log_p) - soft) * WEIGHTS[..., None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"label_smoothing": 1.0}, r"train.label_smoothing must be in \[0, 1\), not 1.0"),
        ({"label_smoothing_style": "t5x"}, "label_smoothing_style 't5x' is unknown, allowed: t5, hf"),
        ({"chunk": -1}, "train.loss_chunk must be at least 0, or null, not -1"),
    ],
)
def test_settings_that_make_no_loss_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LossSettings(**wrong)


# --- chunks ---------------------------------------------------------------------------------------------------------

HIDDEN = np.random.default_rng(0).normal(size=(4, 10, 6)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(6, 7)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(0, 7, (4, 10)).astype(np.int32)
SHARES = np.random.default_rng(3).uniform(0, 1, (4, 10)).astype(np.float32)


def head(params: Any, hidden: jax.Array) -> jax.Array:
    return hidden @ params["kernel"]


@pytest.mark.parametrize("chunks", [2, 3, 10])
@pytest.mark.parametrize("style", ["t5", "hf"])
def test_chunks_give_the_same_sums_and_gradients(chunks: int, style: str) -> None:
    settings = LossSettings(z_loss=1e-2, label_smoothing=0.1, label_smoothing_style=style)

    def whole(params: Any, hidden: jax.Array) -> LossSums:
        return cross_entropy(head(params, hidden), LABELS, SHARES, settings)

    def parts(params: Any, hidden: jax.Array) -> LossSums:
        return chunked_cross_entropy(head, params, hidden, LABELS, SHARES, settings, chunks)

    params = {"kernel": jnp.asarray(KERNEL)}
    np.testing.assert_allclose(parts(params, HIDDEN), whole(params, HIDDEN), rtol=1e-6)
    wanted, got = (
        jax.grad(lambda p, h, f=f: 3.0 * f(p, h).trained, argnums=(0, 1))(params, jnp.asarray(HIDDEN))
        for f in (whole, parts)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        # The same numbers, summed chunk by chunk.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.max(np.abs(b)))


@pytest.mark.parametrize("chunks", [1, 3, 10])
def test_chunks_give_the_log_likelihood_of_every_row(chunks: int) -> None:
    log_p = jax.nn.log_softmax(head({"kernel": KERNEL}, HIDDEN))
    expected = np.sum(np.take_along_axis(np.asarray(log_p), LABELS[..., None], axis=-1)[..., 0] * SHARES, axis=1)
    got = chunked_log_likelihood(head, {"kernel": KERNEL}, HIDDEN, LABELS, SHARES, chunks)
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # the same ten numbers, summed chunk by chunk


def test_no_array_of_a_chunked_program_has_all_logits() -> None:
    def sizes(chunks: int) -> set[int]:
        def loss(params: Any, hidden: jax.Array) -> jax.Array:
            return chunked_cross_entropy(head, params, hidden, LABELS, SHARES, LossSettings(), chunks).trained

        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower({"kernel": KERNEL}, HIDDEN).as_text()
        found = re.findall(r"tensor<((?:\d+x)*)7xf32>", text)
        return {math.prod(int(n) for n in shape.split("x") if n) for shape in found}

    assert max(sizes(1)) == 4 * 10
    assert max(sizes(5)) == 4 * 2 < 6 * 5


def test_chunks_lower_the_memory_of_the_gradients() -> None:
    # GPT-2 but for its size: of what a program holds, logits are most.
    sizes = {"embed_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 128, "num_decoder_layers": 2}
    model = build(dataclasses.replace(preset("gpt2"), **sizes))
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    batch = {f"decoder_{what}": tokens for what in ("input_tokens", "target_tokens", "loss_weights")}

    def memory(chunk: int | None) -> int:
        def loss(params: Any, batch: Any) -> jax.Array:
            return batch_loss(model, params, batch, LossSettings(chunk=chunk)).trained

        compiled = jax.jit(jax.grad(loss)).lower(model.param_shapes(), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 834 MB: the logits and their gradients. Then 62 MB with a 16th of them at a time, and 216 MB with the fourth that
    # is chosen where nothing is asked for.
    whole = memory(0)
    assert 10 * memory(16) < whole
    assert 3 * memory(None) < whole


def test_the_number_of_chunks_divides_the_length_if_one_does() -> None:
    assert number_of_chunks((8, 114), 32128, None) == 1  # 117 MB of logits
    assert number_of_chunks((8, 1024), 50257, None) == 16  # 1.6 GB; 13 would do, and 16 divides
    assert number_of_chunks((8, 1024), 50257, 128) == 8
    assert number_of_chunks((8, 1024), 50257, 0) == 1
    assert number_of_chunks((8, 101), 50257, 20) == 6  # 101 is prime: the last chunk is filled up
    assert number_of_chunks((2, 3), 7, 1) == 3
    with jax.set_mesh(make_mesh("data:2,context:2,model:2")):
        assert number_of_chunks((8, 1024), 50257, None) == 2
