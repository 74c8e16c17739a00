"""Against values recorded from T5X, see `fixtures/make_t5x_losses.py`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.training.losses import cross_entropy

T5X = np.load(Path(__file__).parents[1] / "fixtures" / "t5x_losses.npz")
LOGITS, TARGETS, WEIGHTS = (T5X[name] for name in ("logits", "targets", "weights"))
COEFFICIENTS = ("0", "1e-4", "1e-2")


@pytest.mark.parametrize("z", COEFFICIENTS)
def test_every_token(z: str) -> None:
    # T5X's loss includes the z-loss, ours is apart. One token at a time: the sums are then the token's own.
    for place in np.ndindex(TARGETS.shape):
        weights = np.zeros_like(WEIGHTS)
        weights[place] = 1.0
        sums = cross_entropy(LOGITS, TARGETS, weights, float(z))
        # The same float32 operations but for a logsumexp that is not split in the same places.
        assert sums.z_loss == pytest.approx(T5X[f"token/{z}/z_loss"][place], rel=1e-6)
        assert sums.cross_entropy + sums.z_loss == pytest.approx(T5X[f"token/{z}/loss"][place], rel=1e-6)


@pytest.mark.parametrize("z", COEFFICIENTS)
def test_weighted_sums_and_gradients(z: str) -> None:
    name = f"weighted/{z}/0/sum"

    def total(logits: jax.Array) -> jax.Array:
        sums = cross_entropy(logits, TARGETS, WEIGHTS, float(z))
        return sums.cross_entropy + sums.z_loss

    value, gradient = jax.value_and_grad(total)(jnp.asarray(LOGITS))
    assert value == pytest.approx(T5X[f"{name}/loss"], rel=1e-6)
    # Entries are up to 10 (z-loss of the large row), and T5X's backward pass is written by hand.
    np.testing.assert_allclose(gradient, T5X[f"{name}/grad"], rtol=1e-5, atol=1e-6)
    sums = cross_entropy(LOGITS, TARGETS, WEIGHTS, float(z))
    assert sums.z_loss == pytest.approx(T5X[f"{name}/z_loss"], rel=1e-6)
    assert sums.weight == T5X[f"{name}/weight_sum"] == 4.5


@pytest.mark.parametrize("z", COEFFICIENTS)
def test_per_real_target_token(z: str) -> None:
    # What training divides by is what T5X calls NUM_REAL_TARGET_TOKENS.
    sums = cross_entropy(LOGITS, TARGETS, WEIGHTS, float(z))
    expected = T5X[f"weighted/{z}/0/tokens/loss"]
    assert (sums.cross_entropy + sums.z_loss) / sums.weight == pytest.approx(expected, rel=1e-6)


def test_absent_weights_are_ones_in_t5x() -> None:
    sums = cross_entropy(LOGITS, TARGETS, np.ones_like(WEIGHTS), 1e-4)
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
