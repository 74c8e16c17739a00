"""When a run stops, and what it says was not finite."""

import math

import pytest

from t5x_lite.training.nonfinite import MOST_IN_A_ROW, NonFinite, only_the_update, what_was_not

FINE = {"finite": 1.0, "loss": 2.0, "gradient_norm": 1.0, "parameter_norm": 3.0, "update_norm": 0.1}
# A step that moves nothing has no update.
LOST = {**FINE, "finite": 0.0, "loss": math.nan, "gradient_norm": math.inf, "update_norm": math.nan}
TOO_FAR = {**FINE, "finite": 0.0, "update_norm": math.inf}


def test_what_was_not_finite() -> None:
    assert what_was_not(LOST) == "the loss is nan and the gradient norm is inf"
    assert what_was_not(TOO_FAR) == "the norm of the update is inf"
    assert [only_the_update(record) for record in (FINE, LOST, TOO_FAR)] == [False, False, True]


@pytest.mark.parametrize("record", [LOST, TOO_FAR])
def test_a_run_that_may_not_skip_stops_at_once(record: dict[str, float]) -> None:
    assert NonFinite("stop").reason_to_stop(FINE) is None
    assert NonFinite("stop").reason_to_stop(record) == what_was_not(record)


def test_one_that_may_stops_after_many_in_a_row() -> None:
    policy = NonFinite("skip")
    for record in (*[LOST] * (MOST_IN_A_ROW - 1), FINE, *[LOST] * (MOST_IN_A_ROW - 1)):
        assert policy.reason_to_stop(record) is None
    assert policy.reason_to_stop(LOST) == f"{what_was_not(LOST)}, as in the {MOST_IN_A_ROW - 1} steps before"


def test_a_scale_that_is_found_stops_nothing_unless_it_is_below_1() -> None:
    policy = NonFinite("stop")
    assert policy.reason_to_stop({**LOST, "loss_scale": 1.0}) is None
    assert "only scaled by 0.5" in str(policy.reason_to_stop({**LOST, "loss_scale": 0.5}))
