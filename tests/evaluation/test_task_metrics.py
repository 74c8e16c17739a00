"""The tasks' metrics against those of T5's own code (fixtures/make_published_tasks.py), and what they refuse."""

import json
from pathlib import Path

import pytest

from t5x_lite.data.published_tasks import task
from t5x_lite.errors import InputError
from t5x_lite.evaluation.task_metrics import METRICS, check_metrics, task_metrics

T5 = json.loads((Path(__file__).parents[1] / "fixtures" / "published_tasks.json").read_text())
NAMES = {
    "matthews_corrcoef": "matthews_correlation",
    "pearson_corrcoef": "pearson",
    "spearman_corrcoef": "spearman",
    "mean_3class_f1": "f1_macro",
    "em": "exact_match",
}


@pytest.mark.parametrize("name", dict.fromkeys(score["task"] for score in T5["scores"]))
def test_scores_are_those_of_t5(name: str) -> None:
    records = [record for record in T5["tasks"][name]["records"] if record["record"].get("label") != -1]
    examples = [
        example for record in records if record["record"].get("answers") != [] for example in record["examples"]
    ]
    found = task(name)
    scores = [score for score in T5["scores"] if score["task"] == name]
    assert len(scores) == 3
    for score in scores:
        expected = {NAMES.get(metric, metric): value / 100 for metric, value in score["metrics"].items()}
        # Both are sums of a few dozen terms in float64.
        assert task_metrics(found.metrics, score["predictions"], examples, found.labels) == pytest.approx(
            expected, abs=1e-12
        )


def test_right_answers_are_right_by_every_metric() -> None:
    for name in dict.fromkeys(score["task"] for score in T5["scores"]):
        if name in ("super_glue_wsc_v102_simple_eval", "squad_v010_allanswers", "super_glue_record_v102"):
            continue  # the noun is not always the answer, and invented answers are in part empty
        records = [record for record in T5["tasks"][name]["records"] if record["record"].get("label") != -1]
        examples = [example for record in records for example in record["examples"]]
        found = task(name)
        scores = task_metrics(found.metrics, [e["targets"] for e in examples], examples, found.labels)
        assert scores == pytest.approx(dict.fromkeys(scores, 1.0), abs=1e-12)


def test_a_query_with_several_answers_counts_once() -> None:
    query = {"idx/passage": 1, "idx/query": 2, "answers": ["Ada", "Bea"]}
    other = {"idx/passage": 1, "idx/query": 3, "answers": ["Cy"]}
    examples = [{**query, "targets": "Ada"}, {**query, "targets": "Bea"}, {**other, "targets": "Cy"}]
    assert task_metrics(("record",), ["Bea", "no", "no"], examples) == {"exact_match": 0.5, "f1": 0.5}


def test_a_question_is_right_if_all_its_answers_are() -> None:
    examples = [{"targets": t, "idx/question": q} for q, t in ((1, "True"), (1, "False"), (2, "True"))]
    scores = task_metrics(("multirc",), ["True", "True", "True"], examples, ("False", "True"))
    assert scores == pytest.approx({"exact_match": 0.5, "f1": 0.8})


def test_what_is_no_number_counts_as_minus_one() -> None:
    examples = [{"targets": target} for target in ("1.0", "2.0", "3.0")]
    assert task_metrics(("pearson",), ["1.0", "2.0", "3.0"], examples)["pearson"] == pytest.approx(1)
    for nothing in ("three", "nan", ""):
        assert task_metrics(("pearson",), ["1.0", "2.0", nothing], examples) == task_metrics(
            ("pearson",), ["1.0", "2.0", "-1"], examples
        )


def test_what_cannot_be_measured_is_refused_in_one_line() -> None:
    example = [{"targets": "yes"}]
    for names, labels, message in (
        (("bleu",), (), "metric 'bleu' is not there yet; those that are: accuracy, "),
        (("rogue",), (), "unknown metric 'rogue'; known are accuracy, "),
        (("accurracy",), (), "did you mean 'accuracy'?"),
        (("squad",), (), "the metric needs the field 'answers'"),
        (("f1",), ("a", "b", "c"), "metric 'f1' needs a task of two classes, and this has 3; see 'f1_macro'"),
        (("f1_macro",), (), "the metric needs a task with at least two labels"),
        (("matthews_correlation",), (), "the metric needs a task with at least two labels"),
    ):
        with pytest.raises(InputError) as caught:
            task_metrics(names, ["yes"], example, labels)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    for name in METRICS:
        with pytest.raises(InputError, match="there are no examples to measure"):
            task_metrics((name,), [], [], ("a", "b"))
    with pytest.raises(InputError, match="without any answer to compare with"):
        task_metrics(("squad",), ["x"], [{"answers": []}])
    with pytest.raises(ValueError, match="2 predictions for 1 examples"):
        task_metrics(("accuracy",), ["x", "y"], example)
    check_metrics(tuple(METRICS))
