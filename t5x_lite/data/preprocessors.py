"""From a record to text in and text out: the published tasks' own formats, and a few general pieces.

The formats are those of `t5.data.preprocessors`, to the character, trained checkpoints having seen no others; stored
outputs of T5's code are the test. Nothing is put in lower case: the strings go to the tokenizer as they are.
"""

import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from t5x_lite.data.parts import Record
from t5x_lite.errors import InputError, nearest

Preprocessor = Callable[[Record], Record | Iterable[Record] | None]
"""Gives a record's successor, None to drop it, or several. Picklable: a module's function or a dataclass's instance."""

UNLABELLED = "<unk>"
"""The target of an example whose label is held back (-1), as T5 writes it."""

# RE2, which T5 runs on, knows ASCII's white space and punctuation only (and no vertical tab).
_SPACE = re.compile(r"[\t\n\f\r ]+")
_PADDED = str.maketrans({mark: f" {mark} " for mark in string.punctuation})


def apply(preprocessors: Sequence[Preprocessor], records: Iterable[tuple[str, Record]]) -> Iterable[tuple[str, Record]]:
    """Returns what records become, each of them none or more records, as an iterable that works when it is read.

    Args:
        preprocessors: applied in this order, each to everything that the one before gave.
        records: (where, record) pairs; the records are not changed.

    Raises:
        InputError: a record that a preprocessor cannot use, whatever it raises; the message begins with `where`.
    """
    for preprocessor in preprocessors:
        records = _through(preprocessor, records)
    return records


def _through(preprocessor: Preprocessor, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    name = getattr(preprocessor, "__name__", type(preprocessor).__name__)
    for where, record in records:
        try:
            result = preprocessor(record)
            successors = () if result is None else (result,) if isinstance(result, Mapping) else tuple(result)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except (OSError, MemoryError):  # which are not the record's fault
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(f"{where}: preprocessor {name} failed: {reason}") from error
        for successor in successors:
            if not isinstance(successor, Mapping):
                raise InputError(f"{where}: preprocessor {name} gave {successor!r:.60}; it must give records")
            yield where, cast("Record", successor)


def column(record: Record, name: str) -> Any:
    """Returns a record's value; raises InputError where there is none."""
    if record.get(name) is None:
        problem = "is null" if name in record else f"is missing{nearest(name, record)}; there are {', '.join(record)}"
        raise InputError(f"column '{name}' {problem}")
    return record[name]


def text(record: Record, name: str) -> str:
    """Returns a record's string; raises InputError where there is none."""
    value = column(record, name)
    if not isinstance(value, str):
        raise InputError(f"column '{name}' holds {value!r:.60}, which is not text")
    return value


def texts(record: Record, name: str) -> list[str]:
    """Returns a record's list of strings, which may be empty; raises InputError where there is none."""
    values = column(record, name)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"column '{name}' holds {values!r:.60}, which is not a list of texts")
    return [text({name: value}, name) for value in values]


def inner(record: Record, name: str) -> Record:
    """Returns the record within a record; raises InputError where there is none."""
    value = column(record, name)
    if not isinstance(value, Mapping):
        raise InputError(f"column '{name}' holds {value!r:.60}, which has no columns of its own")
    return dict(value)


def number(record: Record, name: str) -> float:
    """Returns a record's finite number, which tables may hold as a string; raises InputError where there is none."""
    value = column(record, name)
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"column '{name}' holds {value!r:.60}, which is not a number")
    return found


def integer(record: Record, name: str) -> int:
    """Returns a record's whole number; raises InputError where there is none."""
    value = number(record, name)
    if not value.is_integer():
        raise InputError(f"column '{name}' holds {value}, which is not a whole number")
    return int(value)


def class_name(record: Record, labels: Sequence[str], name: str = "label") -> str:
    """Returns the class of a record, given by its id, -1 where it is held back, or by its name.

    Raises:
        InputError: it is neither; the message names what is allowed.
    """
    value = column(record, name)
    if isinstance(value, str) and value in labels:
        return value
    try:
        index = integer(record, name)
    except InputError:
        index = len(labels)
    if not -1 <= index < len(labels):
        allowed = f"0 to {len(labels) - 1}, -1 where held back, or one of {', '.join(labels)}"
        raise InputError(f"column '{name}' holds {value!r:.60}; a label is {allowed}")
    return UNLABELLED if index == -1 else labels[index]


def pad_punctuation(words: str) -> str:
    """Sets a space on both sides of ASCII's punctuation, and makes one of any white space."""
    return _SPACE.sub(" ", words.translate(_PADDED))


@dataclass(frozen=True)
class Rename:
    """Copies columns under new names, `{old: new}`; the others stay."""

    names: tuple[tuple[str, str], ...]

    def __init__(self, names: Mapping[str, str]) -> None:
        object.__setattr__(self, "names", tuple(dict(names).items()))

    def __call__(self, record: Record) -> Record:
        """Returns the record with its new columns; raises InputError for one that is not there."""
        return {**record, **{new: column(record, old) for old, new in self.names}}


@dataclass(frozen=True)
class Format:
    """Fills a record's columns into two templates (`str.format`): `Format("topic: {title}", "{subject}")`.

    The columns are kept, for metrics to read; those called `inputs` and `targets` are replaced.

    Raises:
        InputError: when called, for a column that is not there; when made, for braces that do not match.
    """

    inputs: str
    targets: str

    def __post_init__(self) -> None:
        for template in (self.inputs, self.targets):
            try:
                fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
            except ValueError as error:
                raise InputError(f"template '{template}': {error}") from None
            if not all(fields):
                raise InputError(f"template '{template}': each pair of braces has to hold a column's name")

    def __call__(self, record: Record) -> Record:
        """Returns the record with both texts; raises InputError for a column that is not there."""
        return {**record, "inputs": self._fill(self.inputs, record), "targets": self._fill(self.targets, record)}

    def _fill(self, template: str, record: Record) -> str:
        # A column may be called anything: `str.format` itself would read "a.b" as an attribute.
        parts = string.Formatter().parse(template)
        return "".join(before + ("" if name is None else str(column(record, name))) for before, name, _, _ in parts)


@dataclass(frozen=True)
class ClassLabels:
    """Names the class of one or several texts: `mnli hypothesis: ... premise: ...` (`t5.data.preprocessors.glue`).

    T5 takes all columns of the dataset in alphabetical order where its tasks name none. Here they are always named, so
    that a file with a column more gives the same text.

    Attributes:
        benchmark: what the input begins with.
        features: the columns, in order.
        labels: the classes by their id.
    """

    benchmark: str
    features: tuple[str, ...]
    labels: tuple[str, ...]

    def __call__(self, record: Record) -> Record:
        """Returns the texts and the name of their class; raises InputError for a record without them."""
        parts = [self.benchmark, *(part for name in self.features for part in (f"{name}:", text(record, name)))]
        return {"inputs": " ".join(parts), "targets": class_name(record, self.labels), **_indices(record)}


@dataclass(frozen=True)
class MultiSentenceAnswers(ClassLabels):
    """MultiRC: whether an answer to a question about a paragraph is right. As `ClassLabels`, without the markup."""

    def __call__(self, record: Record) -> Record:
        """As `ClassLabels`."""
        example = super().__call__(record)
        joined = example["inputs"].replace("<br>", " ")
        return {**example, "inputs": re.sub("</?b>", "", joined)}


def similarity_score(record: Record) -> Record:
    """STS-B: the similarity of two sentences, rounded to the nearest 0.2 (`t5.data.preprocessors.stsb`)."""
    joined = f"stsb sentence1: {text(record, 'sentence1')} sentence2: {text(record, 'sentence2')}"
    # In float32 and half to even, as TensorFlow does: 2.5 becomes 2.4.
    score = np.round(np.float32(number(record, "label")) * np.float32(5)) / np.float32(5)
    return {"inputs": joined, "targets": f"{score:.1f}", **_indices(record)}


def entity_query(record: Record) -> Iterator[Record]:
    """ReCoRD: which entity of a passage a query leaves out; one example an answer (`t5.data.preprocessors.record`).

    Every example keeps all `answers` and its `idx/passage` and `idx/query`, for the metric to count a query once.
    """
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", text(record, "passage"))
    passage = passage.replace("\n@highlight\n", ". ")
    entities = ", ".join(texts(record, "entities"))
    joined = f"record query: {text(record, 'query')} entities: {entities} passage: {passage}"
    answers = texts(record, "answers")
    for answer in answers or [UNLABELLED]:
        yield {"inputs": joined, "targets": answer, "answers": answers, **_indices(record)}


def question_answer(record: Record) -> Record:
    """SQuAD: `question: ... context: ...`, and the first answer (`t5.data.preprocessors.squad`).

    Punctuation is set apart in question, context and answers; the example keeps all `answers`.

    Raises:
        InputError: no answer; T5 fails on those too.
    """
    question, context = pad_punctuation(text(record, "question")), pad_punctuation(text(record, "context"))
    answers = [pad_punctuation(answer) for answer in texts(inner(record, "answers"), "text")]
    if not answers:
        raise InputError("column 'answers' holds no answer; SQuAD 1.1 has at least one for every question")
    joined = _SPACE.sub(" ", f"question: {question} context: {context}")
    example = {"inputs": joined, "targets": answers[0], "answers": answers, "question": question, "context": context}
    return {**example, **({"id": record["id"]} if "id" in record else {})}


def squad_paragraphs(record: Record) -> Iterator[Record]:
    """Flattens SQuAD's own JSON, an article's `paragraphs` or a file's `data`, to what `question_answer` reads."""
    if "data" in record:
        for article in record["data"]:
            yield from squad_paragraphs(article)
        return
    for paragraph in column(record, "paragraphs"):
        for question in column(paragraph, "qas"):
            answers = {"text": [text(answer, "text") for answer in column(question, "answers")]}
            yield {**question, "context": text(paragraph, "context"), "answers": answers}


@dataclass(frozen=True)
class Summarize:
    """`summarize: ...` and the summary (`t5.data.preprocessors.summarize`), from these two columns."""

    article: str
    summary: str

    def __call__(self, record: Record) -> Record:
        """Returns article and summary; raises InputError for a record without them."""
        return {"inputs": f"summarize: {text(record, self.article)}", "targets": text(record, self.summary)}


LANGUAGES = {
    "ar": "Arabic",
    "bn": "Bangla",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fi": "Finnish",
    "fr": "French",
    "gu": "Gujarati",
    "he": "Hebrew",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "kk": "Kazakh",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
"""English names of languages, by ISO 639-1 code: those of babel, which T5 takes them from."""


@dataclass(frozen=True)
class Translate:
    """`translate English to German: ...` (`t5.data.preprocessors.translate`), from the columns `en` and `de`.

    Attributes:
        source: the code of the language, and the column, to translate from; of `zh-cn` the first two letters name it.
        target: that to translate to.

    Raises:
        InputError: a code that `LANGUAGES` does not have.
    """

    source: str
    target: str

    def __post_init__(self) -> None:
        for code in (self.source, self.target):
            if code[:2] not in LANGUAGES:
                known = ", ".join(LANGUAGES)
                raise InputError(f"language '{code}' has no name here; those that have: {known}. See Format for others")

    def __call__(self, record: Record) -> Record:
        """Returns both sides; raises InputError for a record without them."""
        source, target = LANGUAGES[self.source[:2]], LANGUAGES[self.target[:2]]
        inputs = f"translate {source} to {target}: {text(record, self.source)}"
        return {"inputs": inputs, "targets": text(record, self.target)}


def resolve_pronoun(record: Record) -> Record:
    """Definite pronoun resolution: whom the marked pronoun means (`t5...definite_pronoun_resolution_simple`)."""
    pronoun = re.escape(text(record, "pronoun"))
    # The first of several is the one to resolve.
    marked = re.sub(rf" ({pronoun})([ .,])", r" *\1*\2", text(record, "sentence"), count=1)
    candidates = texts(record, "candidates")
    label = integer(record, "label")
    if not 0 <= label < len(candidates):
        raise InputError(f"column 'label' holds {label}; it has to be from 0 to {len(candidates) - 1}")
    return {"inputs": f"wsc: {marked}", "targets": candidates[label]}


@dataclass(frozen=True)
class WinogradSchema:
    """SuperGLUE's WSC in T5's own form: `wsc: ... *it* ...`, and the noun (`t5.data.preprocessors.wsc_simple`).

    The target is the noun that the record asks about, whether the pronoun means it or not. Training therefore takes
    those only where it does; evaluation takes all, and the metric `wsc` compares the answer with the noun.

    Attributes:
        correct_only: drop what is labelled False.
    """

    correct_only: bool

    def __call__(self, record: Record) -> Record | None:
        """Returns text and noun, or None; raises InputError for a record that does not have them."""
        label = class_name(record, ("False", "True"))
        if self.correct_only and label == "False":
            return None
        pronoun = text(record, "span2_text")
        blank = _blank_pronoun(text(record, "text"), pronoun, integer(record, "span2_index"))
        # All that is written X, as in T5, should the text itself have one.
        inputs = "wsc: " + blank.replace(" X ", f" *{pronoun}* ")
        targets = text(record, "span1_text")
        return {"inputs": inputs, "targets": targets, "label": _LABEL_IDS[label], **_indices(record)}


_LABEL_IDS = {"False": 0, "True": 1, UNLABELLED: -1}


def _blank_pronoun(words: str, pronoun: str, index: int) -> str:
    """Returns the text with X for the pronoun."""
    parts = words.split(" ")
    # Two texts of the dataset have the word before it marked, or punctuation on it; T5 spells out what becomes of them.
    for place in (index, index + 1):
        if 0 < place < len(parts) and re.fullmatch(re.escape(pronoun) + r"\W*", parts[place]):
            before, attached, after = parts[:place], parts[place][len(pronoun) :], parts[place + 1 :]
            if attached:
                return " ".join([*before, "X", attached, *after]).strip()
            return f"{' '.join(before)} X {' '.join(after)}"  # with a space after it where it is the last word
    raise InputError(f"column 'span2_index' holds {index}, where the text does not say '{pronoun}', or begins with it")


def _indices(record: Record) -> Record:
    """Returns the record's `idx` as T5 keeps it: nested ones as `idx/question` and so on. A file may have none."""
    idx = record.get("idx")
    if isinstance(idx, Mapping):
        return {f"idx/{name}": value for name, value in idx.items()}
    return {} if idx is None else {"idx": idx}
