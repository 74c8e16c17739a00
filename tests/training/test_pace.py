"""How fast training goes: times from a clock that the test turns."""

import os

import numpy as np
import pytest

from t5x_lite.training.pace import Pace, Work, memory, positions, resident_bytes


class Clock:
    """Stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


WORK = Work(tokens=600, positions=1000, flops=2e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(pace: Pace, clock: Clock, seconds: float, waited: float = 0.0) -> dict[str, float]:
    pace.waited(waited)
    clock.now += seconds
    return pace.step(WORK)


def test_a_line_sums_up_the_steps_since_the_last_one(clock: Clock) -> None:
    pace = Pace(peak=8e9, clock=clock)
    made(pace, clock, 30.0)  # compiling
    assert pace.line()["step_seconds_max"] == 30.0
    for seconds in range(1, 11):
        alone = made(pace, clock, float(seconds), waited=0.1)
    assert alone == {"tokens_per_second": 60.0, "data_wait": 0.01}
    line = pace.line()
    assert line == pytest.approx(
        {
            "tokens_per_second": 6000 / 55,
            "padding": 0.4,
            "flops_per_second": 2e10 / 55,
            "mfu": 2e10 / 55 / 8e9,
            "data_wait": 1 / 55,
            "step_seconds_p50": 5.0,
            "step_seconds_p90": 9.0,
            "step_seconds_p99": 10.0,
            "step_seconds_max": 10.0,
        }
    )
    assert pace.line() == {}


def test_compiling_is_no_step_s_time_where_there_are_others(clock: Clock) -> None:
    pace = Pace(clock=clock)
    for seconds in (30.0, 1.0, 1.0):
        made(pace, clock, seconds)
    assert pace.line()["step_seconds_max"] == 1.0


def test_what_lies_between_steps_is_left_out(clock: Clock) -> None:
    pace = Pace(clock=clock)
    made(pace, clock, 1.0)
    pace.line()
    pace.waited(5.0)
    clock.now += 50.0
    pace.pause()
    made(pace, clock, 2.0)
    line = pace.line()
    assert (line["step_seconds_max"], line["data_wait"]) == (2.0, 0.0)


def test_without_a_known_peak_there_is_no_mfu(clock: Clock) -> None:
    pace = Pace(clock=clock)
    made(pace, clock, 1.0)
    assert "mfu" not in pace.line()


def test_a_clock_that_stands_still_divides_by_no_zero(clock: Clock) -> None:
    assert np.isfinite(list(made(Pace(clock=clock), clock, 0.0).values())).all()


def test_rows_have_room_for_tokens() -> None:
    batch = {"encoder_input_tokens": np.zeros((4, 10)), "decoder_input_tokens": np.zeros((4, 3)), "labels": np.zeros(4)}
    assert positions(batch) == 4 * 10 + 4 * 3


def test_memory_is_the_process_s_where_devices_do_not_say() -> None:
    found = memory()
    assert list(found) == ["resident_bytes"]  # a CPU does not
    with open("/proc/self/status") as file:
        kilobytes = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    assert found["resident_bytes"] == pytest.approx(kilobytes * 1024, rel=0.05)  # the kernel counts in batches


def test_memory_of_devices_that_say(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, used: int):
            self.used = used

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used}

    monkeypatch.setattr("jax.local_devices", lambda: [Device(5), Device(7)])
    found = memory()
    assert (found["device_bytes"], found["device_peak_bytes"]) == (7, 14)


def test_resident_bytes_without_a_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> None:
        raise FileNotFoundError

    now = resident_bytes()
    monkeypatch.setattr("builtins.open", missing)
    assert resident_bytes() >= now * 0.9 > 10 * os.sysconf("SC_PAGE_SIZE")
