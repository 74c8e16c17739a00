"""The T5 schedule against values recorded from T5X, see `fixtures/make_t5x_losses.py`."""

from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite.errors import InputError
from t5x_lite.run_directory import ENDING
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
    assert {"constant", "inverse_square_root", *ENDING} == set(SCHEDULES)


@pytest.mark.parametrize(
    ("name", "warmup", "options", "values"),
    [
        ("linear", 20, {"final_share": 0.1}, {0: 0.0, 20: 2.0, 60: 1.1, 99: 0.2225, 100: 0.2, 500: 0.2}),
        ("cosine", 20, {"final_share": 0.1}, {0: 0.0, 20: 2.0, 60: 1.1, 100: 0.2, 500: 0.2}),
        ("linear", 0, {"final_share": 1.0}, {0: 2.0, 50: 2.0, 100: 2.0}),
        # By default the decay is a tenth of the run.
        ("warmup_stable_decay", 20, {}, {0: 0.0, 10: 1.0, 20: 2.0, 90: 2.0, 95: 1.0, 99: 0.2, 100: 0.0, 101: 0.0}),
        ("warmup_stable_decay", None, {"decay_steps": 40}, {0: 2.0, 60: 2.0, 70: 1.5, 80: 1.0, 100: 0.0}),
        ("warmup_stable_decay", 20, {"decay_steps": 40, "final_share": 0.5}, {60: 2.0, 80: 1.5, 100: 1.0, 200: 1.0}),
        # Nothing is left to be stable in: up, then down.
        ("warmup_stable_decay", 60, {"decay_steps": 40}, {0: 0.0, 30: 1.0, 60: 2.0, 80: 1.0, 100: 0.0}),
        ("warmup_stable_decay", 0, {"decay_steps": 100}, {0: 2.0, 50: 1.0, 100: 0.0}),
        # A default that would not fit beside the warm-up gives way.
        ("warmup_stable_decay", 95, {}, {95: 2.0, 98: 0.8, 100: 0.0}),
    ],
)
def test_corners(name: str, warmup: int | None, options: dict[str, float], values: dict[int, float]) -> None:
    schedule = make_schedule(name, 2.0, warmup, 100, **options)  # type: ignore[arg-type]
    for step, value in values.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-6, abs=1e-7), step  # float32
    steps = np.arange(120)
    # The compiled schedule of many steps at once, as that of one.
    np.testing.assert_allclose(jax.jit(schedule)(steps), [schedule(step) for step in steps], rtol=1e-5, atol=1e-7)


def test_a_run_of_few_steps_still_decays() -> None:
    schedule = make_schedule("warmup_stable_decay", 1.0, None, 3)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [1.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "warmup", "options", "message"),
    [
        ("linear", 0, {"decay_steps": 5}, "optimizer.decay_steps=5 belongs to warmup_stable_decay; .* with linear"),
        ("inverse_square_root", 0, {"decay_steps": 5}, "decay_steps=5 belongs to warmup_stable_decay"),
        ("constant", 0, {"final_share": 0.5}, "optimizer.final_share=0.5: the schedule constant has no end"),
        ("inverse_square_root", 0, {"final_share": 0.5}, "final_share=0.5: .* or use linear, cosine, warmup_stable"),
        ("warmup_stable_decay", 61, {"decay_steps": 40}, "warmup_steps 61 and .*decay_steps 40 are more than .* 100"),
        ("warmup_stable_decay", 0, {"decay_steps": 101}, "decay_steps 101 are more than train.steps 100 together"),
        ("warmup_stable_decay", 100, {}, "warmup_steps 100 must be less than train.steps 100"),
    ],
)
def test_numbers_that_contradict_each_other(name: str, warmup: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make_schedule(name, 1.0, warmup, 100, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
