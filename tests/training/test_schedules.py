"""The T5 schedule against values recorded from T5X, see `fixtures/make_t5x_losses.py`."""

from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite.errors import InputError
from t5x_lite.training.schedules import SCHEDULES, make_schedule

T5X = np.load(Path(__file__).parents[1] / "fixtures" / "t5x_losses.npz")


@pytest.mark.parametrize("warmup", [None, 10_000])
def test_inverse_square_root_is_the_one_t5_was_pre_trained_with(warmup: int | None) -> None:
    schedule = make_schedule("inverse_square_root", 1.0, warmup, 1_000_000)
    got = [schedule(step) for step in T5X["schedule/steps"]]
    np.testing.assert_allclose(got, T5X["schedule/rsqrt"], rtol=3e-7)  # float32 rounding of rsqrt
    compiled = jax.jit(schedule)(T5X["schedule/steps"])  # an array of steps, as a traced step is
    np.testing.assert_allclose(compiled, T5X["schedule/rsqrt"], rtol=3e-7)


def test_inverse_square_root_of_another_warm_up() -> None:
    schedule = make_schedule("inverse_square_root", 0.5, 4, 10)
    np.testing.assert_allclose([schedule(step) for step in (0, 3, 4, 16)], [0.25, 0.25, 0.25, 0.125], rtol=3e-7)
    assert np.isfinite(make_schedule("inverse_square_root", 1.0, 0, 10)(0))


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("constant", (0, 50, 100, 10_000), (2.0, 2.0, 2.0, 2.0)),
        ("linear", (0, 25, 50, 100, 120), (2.0, 1.5, 1.0, 0.0, 0.0)),
        ("cosine", (0, 25, 50, 100, 120), (2.0, 1 + np.sqrt(0.5), 1.0, 0.0, 0.0)),
    ],
)
def test_ends(name: str, steps: tuple[int, ...], expected: tuple[float, ...]) -> None:
    schedule = make_schedule(name, 2.0, None, 100)
    np.testing.assert_allclose([schedule(step) for step in steps], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_linear_warm_up(name: str) -> None:
    schedule = make_schedule(name, 2.0, 20, 100)
    np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 20)], [0.0, 0.5, 1.0, 2.0], rtol=1e-6)
    end = {"constant": 2.0, "linear": 0.0, "cosine": 0.0}[name]
    middle = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[name]
    np.testing.assert_allclose([schedule(60), schedule(100)], [middle, end], rtol=1e-6, atol=1e-7)


def test_errors() -> None:
    with pytest.raises(InputError, match=r"'cosin' is unknown, allowed: .*did you mean 'cosine'"):
        make_schedule("cosin", 1.0, None, 10)
    for name in ("linear", "cosine"):
        for warmup in (10, 11):
            with pytest.raises(InputError, match=f"warmup_steps {warmup} must be less than train.steps 10"):
                make_schedule(name, 1.0, warmup, 10)
    make_schedule("constant", 1.0, 10, 10)  # has no end that the warm-up could overrun
    assert set(SCHEDULES) == {"inverse_square_root", "constant", "linear", "cosine"}
