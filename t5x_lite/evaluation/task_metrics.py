"""The metrics that a task can name, computed as T5 computes them."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from t5x_lite.errors import InputError, nearest
from t5x_lite.evaluation import metrics

Example = Mapping[str, Any]
Metric = Callable[[Sequence[str], Sequence[Example], Sequence[str]], dict[str, float]]
"""Of the predictions, the task's examples (`targets`, and what its preprocessors keep for this), and its classes."""


def task_metrics(
    names: Sequence[str], predictions: Sequence[str], examples: Sequence[Example], labels: Sequence[str] = ()
) -> dict[str, float]:
    """Returns the metrics of a task in [0, 1], correlations in [-1, 1]; T5 gives the same in percent.

    Args:
        names: of `METRICS`. They are the result's keys too, but for `squad`, `record` and `multirc`, which give
            `exact_match` and `f1`, and `wsc`, which gives `accuracy`.
        predictions: what the model says, as text.
        examples: what the task's preprocessors gave, in the order of the predictions.
        labels: the classes by their id, the second being the positive one of `f1`. What is none of them is wrong.

    Raises:
        InputError: no examples, an unknown metric, or examples or labels that a metric cannot be computed from.
    """
    check_metrics(names)
    if len(predictions) != len(examples):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples")
    if not examples:
        raise InputError("there are no examples to measure")
    results: dict[str, float] = {}
    for name in names:
        results |= METRICS[name](predictions, examples, labels)
    return results


def check_metrics(names: Sequence[str]) -> None:
    """Raises InputError if one of these names is not in `METRICS`."""
    for name in names:
        if name in ("bleu", "rouge"):
            raise InputError(f"metric '{name}' is not there yet; those that are: {', '.join(METRICS)}")
        if name not in METRICS:
            raise InputError(f"unknown metric '{name}'; known are {', '.join(METRICS)}{nearest(name, METRICS)}")


def _field(examples: Sequence[Example], name: str) -> list[Any]:
    if not all(name in example for example in examples):
        raise InputError(f"the metric needs the field '{name}', which not all examples of the task have")
    return [example[name] for example in examples]


def _on_texts(name: str, measure: Callable[[Sequence[str], Sequence[str]], float]) -> Metric:
    return lambda predictions, examples, labels: {name: measure(predictions, _field(examples, "targets"))}


def _on_numbers(name: str, measure: Callable[[Sequence[float], Sequence[float]], float]) -> Metric:
    return _on_texts(name, lambda predictions, targets: measure(_numbers(predictions), _numbers(targets)))


def _numbers(texts: Sequence[str]) -> list[float]:
    """Returns the numbers written, -1 for what is none, as T5 does."""
    numbers = []
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        numbers.append(value if math.isfinite(value) else -1.0)
    return numbers


def _matthews(predictions: Sequence[str], examples: Sequence[Example], labels: Sequence[str]) -> dict[str, float]:
    _require_labels(labels)
    # All that is no class is one class, as T5 counts it.
    known = [said if said in labels else None for said in predictions]
    return {"matthews_correlation": metrics.matthews_correlation(known, _field(examples, "targets"))}


def _f1(predictions: Sequence[str], examples: Sequence[Example], labels: Sequence[str]) -> dict[str, float]:
    if len(labels) != 2:
        raise InputError(f"metric 'f1' needs a task of two classes, and this has {len(labels)}; see 'f1_macro'")
    targets = _field(examples, "targets")
    # What is no class counts as the wrong one, so that it costs the same as saying that.
    wrong = {labels[0]: labels[1], labels[1]: labels[0]}
    said = [said if said in wrong else wrong.get(target) for said, target in zip(predictions, targets, strict=True)]
    return {"f1": metrics.f1(said, targets, labels[1])}


def _f1_macro(predictions: Sequence[str], examples: Sequence[Example], labels: Sequence[str]) -> dict[str, float]:
    _require_labels(labels)
    return {"f1_macro": metrics.f1_macro(predictions, _field(examples, "targets"), labels)}


def _require_labels(labels: Sequence[str]) -> None:
    if len(labels) < 2:
        raise InputError("the metric needs a task with at least two labels")


def _squad(predictions: Sequence[str], examples: Sequence[Example], labels: Sequence[str]) -> dict[str, float]:
    return metrics.answer_scores(predictions, _field(examples, "answers"))


def _record(predictions: Sequence[str], examples: Sequence[Example], labels: Sequence[str]) -> dict[str, float]:
    """Counts a query once, however many answers, and so examples, it has."""
    queries = zip(_field(examples, "idx/passage"), _field(examples, "idx/query"), strict=True)
    first: dict[tuple[Any, Any], int] = {}
    for place, query in enumerate(queries):
        first.setdefault(query, place)
    return _squad([predictions[place] for place in first.values()], [examples[i] for i in first.values()], labels)


def _multirc(predictions: Sequence[str], examples: Sequence[Example], labels: Sequence[str]) -> dict[str, float]:
    """F1 over all answers, and the share of questions all of whose answers are judged rightly."""
    judged = zip(predictions, _field(examples, "targets"), _field(examples, "idx/question"), strict=True)
    right: dict[Any, bool] = {}
    for said, target, question in judged:
        right[question] = right.get(question, True) and said == target
    return {**_f1(predictions, examples, labels), "exact_match": float(np.mean(list(right.values())))}


def _wsc(predictions: Sequence[str], examples: Sequence[Example], labels: Sequence[str]) -> dict[str, float]:
    """The share of answers that name the noun where it is the right one, and another where it is not."""
    judged = zip(predictions, _field(examples, "targets"), _field(examples, "label"), strict=True)
    right = [metrics.means_noun(said, noun) == label for said, noun, label in judged]
    return {"accuracy": float(np.mean(right))}


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": _on_texts("accuracy", metrics.accuracy),
        "exact_match": _on_texts("exact_match", metrics.exact_match),
        "matthews_correlation": _matthews,
        "f1": _f1,
        "f1_macro": _f1_macro,
        "pearson": _on_numbers("pearson", metrics.pearson),
        "spearman": _on_numbers("spearman", metrics.spearman),
        "squad": _squad,
        "record": _record,
        "multirc": _multirc,
        "wsc": _wsc,
    }
)
"""The metrics that a task can name. BLEU and ROUGE are not among them yet."""
