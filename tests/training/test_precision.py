"""Loss scaling against a plain-Python account of torch's GradScaler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.training.precision import GROWTH_INTERVAL, LossScale, initial_loss_scale


def grad_scaler(outcomes: list[bool]) -> list[tuple[float, int]]:
    """(scale, tracker) after each step, as torch's `_amp_update_scale_` has it: defaults 2**16, 2.0, 0.5, 2000."""
    scale, tracker, seen = 2.0**16, 0, []
    for finite in outcomes:
        if not finite:
            scale, tracker = scale * 0.5, 0
        elif tracker + 1 == 2000:
            scale, tracker = scale * 2.0, 0
        else:
            tracker += 1
        seen.append((scale, tracker))
    return seen


def test_the_scale_follows_torch() -> None:
    rng = np.random.default_rng(0)
    # Longer than the interval without an overflow, then overflows at random, two of them in a row.
    outcomes = [True] * 4500 + [False, False] + list(rng.random(3000) > 0.001) + [True] * 2500

    def step(scale: LossScale, finite: jax.Array) -> tuple[LossScale, tuple[jax.Array, jax.Array]]:
        scale = scale.next(finite)
        return scale, (scale.scale, scale.good_steps)

    first = initial_loss_scale("float16")
    assert first is not None
    assert (float(first.scale), int(first.good_steps)) == (65536.0, 0)
    _, (scales, counts) = jax.lax.scan(step, first, jnp.asarray(outcomes))
    wanted_scales, wanted_counts = zip(*grad_scaler(outcomes), strict=True)
    np.testing.assert_array_equal(scales, wanted_scales)
    np.testing.assert_array_equal(counts, wanted_counts)
    assert scales.dtype == jnp.float32
    assert counts.dtype == jnp.int32


def test_the_scale_never_becomes_infinite() -> None:
    last = LossScale(jnp.asarray(2.0**127, jnp.float32), jnp.asarray(GROWTH_INTERVAL - 1, jnp.int32))
    after = last.next(jnp.asarray(True))
    assert float(after.scale) == 2.0**127
    assert int(after.good_steps) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.bfloat16])
def test_only_float16_needs_a_scale(dtype: object) -> None:
    assert initial_loss_scale(dtype) is None
    assert initial_loss_scale(jnp.float16) is not None
