"""Tasks as records in and text out, and mixtures against shares worked out by hand."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from t5x_lite.data.preprocessors import Format, apply
from t5x_lite.data.published_tasks import task
from t5x_lite.data.sources import read_records
from t5x_lite.data.tasks import PROPORTIONAL, Mixture, Task
from t5x_lite.errors import InputError

A, B, C = (Task(name, f"{name}.jsonl", (Format("{text}", "{label}"),)) for name in "abc")
ONLY_EVALUATED = Task("held", None, eval_source="held.jsonl")


def shares(mixture: Mixture, sizes: dict[str, int] | None = None) -> dict[str, float]:
    return dict(zip((task.name for task in mixture.tasks), mixture.rates(sizes).tolist(), strict=True))


def test_a_task_gives_the_text_of_its_records() -> None:
    records = [("f:1", {"text": "one", "label": 1}), ("f:2", {"text": "two", "label": 0})]
    assert [(where, e["inputs"], e["targets"]) for where, e in apply(A.preprocessors, records)] == [
        ("f:1", "one", "1"),
        ("f:2", "two", "0"),
    ]


def test_preprocessors_may_drop_records_and_make_several_of_one() -> None:
    def halves(record: dict) -> list[dict] | None:
        return [{"text": half} for half in record["text"].split("|")] if record["text"] else None

    both = halves, Format("half: {text}", "{text}")
    records = [("f:1", {"text": "a|b"}), ("f:2", {"text": ""}), ("f:3", {"text": "c"})]
    assert [(where, e["inputs"]) for where, e in apply(both, records)] == [
        ("f:1", "half: a"),
        ("f:1", "half: b"),
        ("f:3", "half: c"),
    ]


def test_a_record_that_cannot_be_used_is_named() -> None:
    with pytest.raises(InputError, match=r"^f:7: column 'text' is missing; did you mean 'texts'\?; there are texts$"):
        list(apply(A.preprocessors, [("f:7", {"texts": "x"})]))
    with pytest.raises(InputError, match=r"^f:7: preprocessor <lambda> failed: ZeroDivisionError"):
        list(apply((lambda record: 1 // record["n"],), [("f:7", {"n": 0})]))
    with pytest.raises(InputError, match=r"^f:7: preprocessor <lambda> gave 'a'; it must give records$"):
        list(apply((lambda record: "ab",), [("f:7", {"n": 0})]))


def test_a_task_needs_a_name_and_data() -> None:
    with pytest.raises(InputError, match="a task needs a name"):
        Task("", "f")
    with pytest.raises(InputError, match="task 'x' needs a source or an eval_source"):
        Task("x", None)


def test_lists_as_yaml_gives_them_make_the_same_task() -> None:
    step = Format("{a}", "{b}")
    listed = Task("x", "f", [step], metrics=["f1"], labels=["no", "yes"])  # type: ignore[arg-type]
    assert listed == Task("x", "f", (step,), metrics=("f1",), labels=("no", "yes"))
    assert hash(listed) == hash("x")
    assert pickle.loads(pickle.dumps(listed)) == listed


def test_a_published_task_reads_a_local_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.tsv"
    file.write_text("extra\tsentence\tlabel\nx\tThe mill turns.\t1\ny\tMill the turns.\t0\nz\tSo?\tunacceptable\n")
    local = task("glue_cola").with_source(str(file), str(file))
    assert (local.source, local.eval_source, local.metrics) == (str(file), str(file), ("matthews_correlation",))
    made = list(apply(local.preprocessors, ((str(file), dict(record)) for record in read_records(str(file)))))
    assert [(e["inputs"], e["targets"]) for _, e in made] == [
        ("cola sentence: The mill turns.", "acceptable"),
        ("cola sentence: Mill the turns.", "unacceptable"),
        ("cola sentence: So?", "unacceptable"),
    ]
    assert task("glue_cola").source == "tfds:glue/cola:train"


def test_fixed_rates_are_shares_of_their_sum() -> None:
    assert shares(Mixture({A: 1, B: 3})) == {"a": 0.25, "b": 0.75}
    rates = Mixture({A: 1, B: np.float32(2), C: 0}).rates()
    assert rates.dtype == np.float64
    np.testing.assert_allclose(rates, [1 / 3, 2 / 3, 0], rtol=1e-15)


def test_proportional_rates_stop_at_the_limit() -> None:
    sizes = {"a": 100, "b": 300, "c": 10**9}
    assert shares(Mixture([A, B]), sizes) == {"a": 0.25, "b": 0.75}
    assert shares(Mixture([A, B], limit=100), sizes) == {"a": 0.5, "b": 0.5}
    # The default limit is 2**21 examples.
    assert shares(Mixture([A, C]), sizes)["a"] == pytest.approx(100 / (100 + 2**21), rel=1e-15)


def test_temperature_is_a_root_of_the_limited_size() -> None:
    sizes = {"a": 4, "b": 16, "c": 10**6}
    assert shares(Mixture([A, B], temperature=2), sizes) == pytest.approx({"a": 1 / 3, "b": 2 / 3}, rel=1e-15)
    limited = Mixture([A, B, C], temperature=2, limit=64)
    assert shares(limited, sizes) == pytest.approx({"a": 2 / 14, "b": 4 / 14, "c": 8 / 14}, rel=1e-15)
    # A large temperature is close to equal shares.
    np.testing.assert_allclose(Mixture([A, B, C], temperature=1e9).rates(sizes), [1 / 3] * 3, rtol=1e-7)


def test_numbers_and_sizes_stand_side_by_side() -> None:
    mixture = Mixture({A: 60, B: PROPORTIONAL}, temperature=2)
    assert shares(mixture, {"b": 400}) == pytest.approx({"a": 0.75, "b": 0.25}, rel=1e-15)


def test_mixtures_within_mixtures_divide_their_rate() -> None:
    inner = Mixture({A: 1, B: 3}, "inner")
    # a: 8 / 4 from within and 1 of its own; b: 3/4 of 8; c: 1.
    outer = Mixture({inner: 8, A: 1, C: 1})
    assert [task.name for task in outer.tasks] == ["a", "b", "c"]
    assert shares(outer) == {"a": 0.3, "b": 0.6, "c": 0.1}
    by_size = Mixture({Mixture([A, B]): 1, C: 1})
    assert shares(by_size, {"a": 100, "b": 300}) == {"a": 0.125, "b": 0.375, "c": 0.5}


def test_a_task_without_training_data_is_never_drawn() -> None:
    mixture = Mixture([A, ONLY_EVALUATED])
    assert shares(mixture, {"a": 5}) == {"a": 1.0, "held": 0.0}
    with pytest.raises(InputError, match="rate 1 of 'held': must be 0, for the task has no source to train on"):
        Mixture({A: 1, ONLY_EVALUATED: 1})
    with pytest.raises(InputError, match="no task of the mixture 'm' is ever drawn"):
        Mixture([ONLY_EVALUATED], "m")


def test_names_are_those_of_published_tasks() -> None:
    mixture = Mixture({"glue_cola_v002": 1, A: 1, "super_glue": 2})
    assert mixture.tasks[0] == task("glue_cola")
    assert shares(mixture)["a"] == 0.25
    assert [task.name for task in Mixture("squad").tasks] == ["squad"]


def test_mixtures_can_be_pickled() -> None:
    mixture = pickle.loads(pickle.dumps(Mixture({Mixture({A: 1, B: 1}): 1, C: PROPORTIONAL}, "m", limit=7)))
    assert (mixture.name, mixture.limit) == ("m", 7)
    assert shares(mixture, {"c": 7}) == {"a": 1 / 16, "b": 1 / 16, "c": 14 / 16}


def test_yaml_mappings_make_mixtures() -> None:
    members = json.loads('{"glue_cola": 1, "glue_sst2": "proportional"}')
    assert shares(Mixture(members), {"glue_sst2": 3}) == {"glue_cola": 0.25, "glue_sst2": 0.75}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "a mixture needs at least one task"),
        ([], "a mixture needs at least one task"),
        ({A: 0, B: 0.0}, "all its rates are 0"),
        ({A: -1, B: 2}, "rate -1 of 'a': must be at least 0 and finite"),
        ({A: float("nan")}, "rate nan of 'a': must be at least 0 and finite"),
        ({A: float("inf")}, "rate inf of 'a': must be at least 0 and finite"),
        ({A: "proportionate"}, "must be a number or 'proportional'; did you mean 'proportional'"),
        ({A: None}, "rate None of 'a': must be a number or 'proportional'"),
        ({A: True}, "rate True of 'a': must be a number or 'proportional'"),
        ({Mixture([A]): PROPORTIONAL}, "the rate of a mixture within a mixture must be a number"),
        ({"glue_colla": 1}, "no published task or mixture is called 'glue_colla'; did you mean 'glue_cola'?"),
        ({3: 1}, "3: a mixture is made of tasks, mixtures and names"),
        ({"glue_cola": 1, "glue_cola_v002": 2}, "task or mixture 'glue_cola' is named twice; give it one rate"),
        ([A, A], "task or mixture 'a' is named twice"),
        ([A, dataclasses.replace(A, source="other")], "two different tasks are both called 'a'; rename one"),
        ({Mixture([A]): 1, dataclasses.replace(A, metrics=("f1",)): 1}, "two different tasks are both called 'a'"),
    ],
)
def test_mixtures_that_make_no_sense(members: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Mixture(members)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit 0: must be at least 1 example"),
        ({"limit": 2.5}, "limit 2.5: must be at least 1 example"),
        ({"temperature": 0}, "temperature 0: must be above 0 and finite"),
        ({"temperature": float("nan")}, "temperature nan: must be above 0"),
    ],
)
def test_limits_and_temperatures_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mixture([A], **settings)


def test_sizes_that_are_needed_or_empty() -> None:
    with pytest.raises(InputError, match="task 'b' is drawn in proportion to its size, which is not known"):
        Mixture([A, B]).rates({"a": 1})
    for members in ([A, B], {A: 1, B: 1}):
        with pytest.raises(InputError, match="task 'b' has no examples, but a rate above 0"):
            Mixture(members).rates({"a": 1, "b": 0})
    assert shares(Mixture({A: 1, B: 0}), {"a": 1, "b": 0}) == {"a": 1.0, "b": 0.0}
