"""Numbers that are compared with other people's; each says exactly what it counts."""

import collections
import math
import re
import string
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from t5x_lite.errors import InputError


def exact_match(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the share of predictions that equal their target, surrounding white space aside; in [0, 1]."""
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    return sum(p.strip() == t.strip() for p, t in zip(predictions, targets, strict=True)) / max(len(targets), 1)


def perplexity(nats_per_token: float) -> float:
    """Returns exp of the loss."""
    return math.exp(min(nats_per_token, 700.0))  # beyond, a float overflows


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Returns the code length of a text in bits per byte of its UTF-8 form; comparable across tokenizers."""
    return nats / math.log(2) / num_bytes


def majority_baseline(targets: Sequence[str]) -> float:
    """Returns the accuracy, in [0, 1], of always answering the most frequent target; raises InputError for none."""
    if not targets:
        raise InputError("no targets to take a majority of")
    return max(collections.Counter(targets).values()) / len(targets)


def unigram_entropy(token_counts: np.ndarray) -> float:
    """Returns the entropy, in nats a token, of tokens drawn by their counts [vocab]: the loss without context.

    Raises:
        InputError: if no token is counted.
    """
    counts = np.asarray(token_counts, np.float64)
    if not counts.sum() > 0:
        raise InputError("no tokens to measure the entropy of")
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def accuracy(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the share of predictions that are their target to the character, in [0, 1]."""
    return float(np.mean([p == t for p, t in _paired(predictions, targets)]))


def matthews_correlation(predictions: Sequence[Hashable], targets: Sequence[Hashable]) -> float:
    """Returns the correlation of two assignments to any number of classes, in [-1, 1] (Gorodkin 2004; scikit-learn).

    It is 0 where all predictions, or all targets, are of one class.
    """
    pairs = _paired(predictions, targets)
    said, true = collections.Counter(predictions), collections.Counter(targets)
    total, right = len(pairs), sum(p == t for p, t in pairs)
    covariance = right * total - sum(said[name] * true[name] for name in true)
    spread = [total**2 - sum(count**2 for count in counts.values()) for counts in (said, true)]
    return covariance / math.sqrt(spread[0] * spread[1]) if all(spread) else 0.0


def f1(predictions: Sequence[Hashable], targets: Sequence[Hashable], positive: Hashable) -> float:
    """Returns the harmonic mean of precision and recall of one class, in [0, 1]; 0 where it is never said rightly."""
    pairs = _paired(predictions, targets)
    right = sum(p == t == positive for p, t in pairs)
    counted = sum((p == positive) + (t == positive) for p, t in pairs)
    return 2 * right / counted if counted else 0.0


def f1_macro(predictions: Sequence[Hashable], targets: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """Returns the mean of the F1 of these classes, each counting the same however frequent it is; in [0, 1]."""
    return float(np.mean([f1(predictions, targets, label) for label in labels]))


def pearson(predictions: Sequence[float], targets: Sequence[float]) -> float:
    """Returns the linear correlation, in [-1, 1]; 0 where a side does not vary (SciPy's is not a number there)."""
    pairs = np.array(_paired(predictions, targets), np.float64)
    x, y = (pairs - pairs.mean(axis=0)).T
    spread = math.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / spread, -1, 1)) if spread else 0.0


def spearman(predictions: Sequence[float], targets: Sequence[float]) -> float:
    """Returns the linear correlation of the ranks, equal values sharing their mean rank; in [-1, 1]."""
    pairs = np.array(_paired(predictions, targets), np.float64)
    x, y = (_ranks(side) for side in pairs.T)
    return pearson(x.tolist(), y.tolist())


def answer_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns SQuAD's `exact_match` and `f1` (of words), in [0, 1], each against the best of a question's answers.

    Both texts are in lower case, without punctuation, articles and further white space, as in SQuAD's evaluation script
    and `t5.evaluation.metrics.squad`. Where nothing is left of an answer the F1 is 0, also if the prediction is empty.
    """
    if not all(answers):
        raise InputError("there are questions without any answer to compare with")
    pairs = [(_words(said), [_words(answer) for answer in right]) for said, right in _paired(predictions, answers)]
    exact = np.mean([any(said == answer for answer in right) for said, right in pairs])
    overlap = np.mean([max(_word_f1(said, answer) for answer in right) for said, right in pairs])
    return {"exact_match": float(exact), "f1": float(overlap)}


def means_noun(prediction: str, noun: str) -> bool | None:
    """Returns whether an answer names this noun (`t5.data.postprocessors.wsc_simple`); None if it names nothing.

    Determiners and upper case do not count, and one may say more than the other ("the old mill", "mill"), but not
    whose it is ("Ada", "Ada's mill").
    """
    said, asked = (_bare(text) for text in (prediction, noun))
    if not said:
        return None
    if ("'" in said) != ("'" in asked):
        return False
    said_words, asked_words = set(said.split(" ")), set(asked.split(" "))
    return said_words <= asked_words or asked_words <= said_words


_DETERMINERS = {"a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some", "that", "the"}
_DETERMINERS |= {"their", "these", "this", "those", "which", "whose", "your"}


def _bare(text: str) -> str:
    return " ".join(word for word in text.strip().lower().split(" ") if word not in _DETERMINERS)


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _word_f1(said: list[str], answer: list[str]) -> float:
    common = sum((collections.Counter(said) & collections.Counter(answer)).values())
    return 2 * common / (len(said) + len(answer)) if common else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _paired(predictions: Sequence[Any], targets: Sequence[Any]) -> list[tuple[Any, Any]]:
    if not targets:
        raise InputError("there are no examples to measure")
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    return list(zip(predictions, targets, strict=True))
