"""The general preprocessors, and what the published ones refuse. Their texts are in test_published_tasks.py."""

import pickle

import pytest

from t5x_lite.data.preprocessors import (
    ClassLabels,
    Format,
    Rename,
    Summarize,
    Translate,
    WinogradSchema,
    apply,
    class_name,
    entity_query,
    integer,
    pad_punctuation,
    question_answer,
    resolve_pronoun,
    similarity_score,
    squad_paragraphs,
)
from t5x_lite.errors import InputError


def test_format_fills_columns_of_any_name_and_keeps_them() -> None:
    step = Format("{{topic}}: {a.b} by {who is it}", "{n}")
    record = {"a.b": "x{y}", "who is it": "Ada", "n": 3, "inputs": "old"}
    assert step(record) == {**record, "inputs": "{topic}: x{y} by Ada", "targets": "3"}
    assert record["inputs"] == "old"


@pytest.mark.parametrize("template", ["{", "a } b", "{}", "{!r}"])
def test_templates_that_name_no_column(template: str) -> None:
    with pytest.raises(InputError, match=r"^template '.*': "):
        Format(template, "x")


def test_rename_copies_columns() -> None:
    assert Rename({"a": "b", "c": "a"})({"a": 1, "c": 2, "d": 3}) == {"a": 2, "b": 1, "c": 2, "d": 3}
    with pytest.raises(InputError, match="column 'a' is missing; did you mean 'aa'"):
        Rename({"a": "b"})({"aa": 1})


def test_a_preprocessor_does_not_change_the_record_it_is_given() -> None:
    record = {"sentence": "x", "label": 0}
    list(apply((Rename({"sentence": "text"}), ClassLabels("b", ("text",), ("no", "yes"))), [("f:1", record)]))
    assert record == {"sentence": "x", "label": 0}


@pytest.mark.parametrize(
    ("value", "name"),
    [(0, "no"), (1, "yes"), (-1, "<unk>"), ("1", "yes"), ("-1", "<unk>"), ("no", "no"), (True, "yes")],
)
def test_labels_are_ids_or_names(value: object, name: str) -> None:
    assert class_name({"label": value}, ("no", "yes")) == name


@pytest.mark.parametrize("value", [2, -2, "maybe", "1.5", 0.5, [], None])
def test_labels_of_no_class(value: object) -> None:
    with pytest.raises(InputError, match=r"column 'label' (holds .*; a label is 0 to 1, -1 .* one of no, yes|is null)"):
        class_name({"label": value}, ("no", "yes"))


def test_numbers_are_whole() -> None:
    assert integer({"n": "7"}, "n") == 7
    with pytest.raises(InputError, match=r"column 'n' holds 7\.5, which is not a whole number"):
        integer({"n": 7.5}, "n")
    for value in ("nan", "inf"):
        with pytest.raises(InputError, match="not a number"):
            integer({"n": value}, "n")


def test_a_score_that_is_no_number_is_refused() -> None:
    pair = {"sentence1": "a", "sentence2": "b"}
    assert similarity_score({**pair, "label": "2.5"})["targets"] == "2.4"
    for value in ("?", "nan", float("inf")):
        with pytest.raises(InputError, match=r"column 'label' holds .*, which is not a number"):
            similarity_score({**pair, "label": value})


def test_punctuation_is_set_apart() -> None:
    assert pad_punctuation("Don't (stop)\t now.") == "Don ' t ( stop ) now . "
    assert (
        pad_punctuation("\u201cna\u00efve\u201d\u00a0\u2014") == "\u201cna\u00efve\u201d\u00a0\u2014"
    )  # ASCII only, as in T5


@pytest.mark.parametrize(
    ("step", "record", "message"),
    [
        (ClassLabels("b", ("s",), ("x", "y")), {"s": 3, "label": 0}, "column 's' holds 3, which is not text"),
        (
            question_answer,
            {"question": "q", "context": "c", "answers": {"text": []}},
            "column 'answers' holds no answer",
        ),
        (
            question_answer,
            {"question": "q", "context": "c", "answers": {"text": "a"}},
            "'text' holds 'a', which is not a list",
        ),
        (
            question_answer,
            {"question": "q", "context": "c", "answers": "a"},
            "'answers' holds 'a', which has no columns of its own",
        ),
        (
            entity_query,
            {"passage": "p", "query": "q", "entities": [1], "answers": []},
            "'entities' holds 1, which is not text",
        ),
        (Summarize("article", "highlights"), {"article": None}, "column 'article' is null"),
        (
            resolve_pronoun,
            {"sentence": "s", "pronoun": "p", "candidates": ["a"], "label": 1},
            "holds 1; it has to be from 0 to 0",
        ),
    ],
)
def test_records_that_cannot_be_used(step: object, record: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        list(apply((step,), [("f:3", record)]))  # type: ignore[arg-type]
    assert str(caught.value).startswith("f:3: ")
    assert message in str(caught.value)


def test_languages_without_a_name_are_refused() -> None:
    assert Translate("zh-cn", "en")({"zh-cn": "a", "en": "b"})["inputs"] == "translate Chinese to English: a"
    with pytest.raises(InputError, match="language 'xx' has no name here; those that have: ar, "):
        Translate("en", "xx")


SCHEMA = {"span1_text": "the jar", "span2_text": "it", "label": 1}


@pytest.mark.parametrize(
    ("text", "index", "inputs"),
    [
        # The place before the pronoun is given, as for one text of the dataset.
        ("They might use it , but why ?", 2, "wsc: They might use *it* , but why ?"),
        # Punctuation is attached to the pronoun, and a space ends the text, as for another.
        ('They said "fill it," and left. ', 3, 'wsc: They said "fill *it* ," and left.'),
    ],
)
def test_schemas_whose_place_is_not_exact(text: str, index: int, inputs: str) -> None:
    record = {**SCHEMA, "text": text, "span2_index": index}
    made = [example for _, example in apply((WinogradSchema(True),), [("f", record)])]
    assert made == [{"inputs": inputs, "targets": "the jar", "label": 1}]


@pytest.mark.parametrize(
    ("text", "index"), [("it broke", 0), ("now it broke", 2), ("now it broke", 9), ("the item fell", 1)]
)
def test_schemas_without_the_pronoun_at_its_place(text: str, index: int) -> None:
    with pytest.raises(InputError, match=f"column 'span2_index' holds {index}, where the text does not say 'it'"):
        WinogradSchema(False)({**SCHEMA, "text": text, "span2_index": index})


def test_schemas_are_trained_on_where_they_are_true() -> None:
    records = [{**SCHEMA, "text": "Now it broke .", "span2_index": 1, "label": label} for label in (0, 1)]
    assert [WinogradSchema(True)(record) is None for record in records] == [True, False]
    assert [WinogradSchema(False)(record)["label"] for record in records] == [0, 1]  # type: ignore[index]


def test_articles_of_squad_are_flattened() -> None:
    answers = [{"text": "Ada", "answer_start": 0}, {"text": "she", "answer_start": 9}]
    qas = [{"id": "1", "question": "Who?", "answers": answers}, {"id": "2", "question": "How?", "answers": answers[:1]}]
    article = {"title": "t", "paragraphs": [{"context": "Ada ran; she won.", "qas": qas}]}
    flat = list(squad_paragraphs(article))
    assert flat == list(squad_paragraphs({"version": "1.1", "data": [article]}))
    assert [(r["id"], r["question"], r["context"], r["answers"]) for r in flat] == [
        ("1", "Who?", "Ada ran; she won.", {"text": ["Ada", "she"]}),
        ("2", "How?", "Ada ran; she won.", {"text": ["Ada"]}),
    ]
    made = [example for _, example in apply((squad_paragraphs, question_answer), [("f", article)])]
    assert made[0]["inputs"] == "question: Who ? context: Ada ran ; she won . "
    assert made[0]["answers"] == ["Ada", "she"]


def test_workers_can_be_given_every_kind() -> None:
    steps = (
        ClassLabels("b", ("s",), ("x", "y")),
        Rename({"a": "b"}),
        Format("{a}", "{b}"),
        Translate("en", "de"),
        entity_query,
    )
    assert pickle.loads(pickle.dumps(steps)) == steps
