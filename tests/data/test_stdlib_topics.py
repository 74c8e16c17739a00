import collections

import pytest

from t5x_lite.data import stdlib_topics
from t5x_lite.data.corpus import Document
from t5x_lite.data.stdlib_topics import stdlib_topic_pairs
from t5x_lite.errors import InputError
from t5x_lite.evaluation.metrics import majority_baseline


def test_topic_pairs_are_balanced_disjoint_and_do_not_name_their_topic():
    train, validation = stdlib_topic_pairs(num_classes=4, per_class=50, seed=3)
    assert (len(train), len(validation)) == (160, 40)
    for side in (train, validation):
        counts = collections.Counter(target for _, target in side)
        assert len(counts) == 4
        assert len(set(counts.values())) == 1
        assert majority_baseline([target for _, target in side]) == 0.25
        for text, _ in side:
            assert text.startswith("topic: ")
            assert len(text.split()) <= 31
            assert not any(name in text.lower() for name in counts)
    assert any("_" in text for text, _ in train)
    assert not {text for text, _ in train} & {text for text, _ in validation}
    assert len({text for text, _ in train}) == len(train)
    first = [target for _, target in train[:40]]
    assert len(set(first)) == 4  # the classes come mixed


def test_a_text_of_two_classes_is_left_out(monkeypatch):
    texts = [(name, f"text {i} about {name} in general") for name in ("alpha", "beta") for i in "abcdefghij"]
    documents = [Document(text + name[0], "comment", name, f"{name}.module") for name, text in texts]
    documents += [Document(f"both speak of {name}", "comment", name, f"{name}.module") for name in ("alpha", "beta")]
    monkeypatch.setattr(stdlib_topics, "stdlib_documents", lambda: iter(documents))
    train, validation = stdlib_topic_pairs(num_classes=2, per_class=10)
    assert (len(train), len(validation)) == (16, 4)
    assert not any("both" in text for text, _ in train + validation)
    with pytest.raises(InputError, match="has only 10 different texts"):
        stdlib_topic_pairs(num_classes=2, per_class=11)


def test_topic_pairs_follow_the_seed():
    pairs = stdlib_topic_pairs(num_classes=3, per_class=20, seed=1)
    assert pairs == stdlib_topic_pairs(num_classes=3, per_class=20, seed=1)
    assert pairs != stdlib_topic_pairs(num_classes=3, per_class=20, seed=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 10_000}, "num_classes 10000: must be from 2 to"),
        ({"num_classes": 1}, "num_classes 1"),
        ({"per_class": 100_000}, "has only [0-9]+ different texts"),
        ({"per_class": 1}, "leaves a side empty"),
    ],
)
def test_topic_pairs_that_cannot_be_made(arguments, message):
    with pytest.raises(InputError, match=message):
        stdlib_topic_pairs(**arguments)
