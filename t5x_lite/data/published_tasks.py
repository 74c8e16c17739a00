"""The supervised tasks and mixtures of the T5 paper, by name (Raffel et al. 2020, section 2.3 and appendix D).

Names are those of T5's own registry without its version (`glue_cola`); T5's full names (`glue_cola_v002`) are accepted.
Data comes from TensorFlow Datasets; `Task.with_source` reads a file with the same columns instead. T5 pins versions of
its datasets that TensorFlow Datasets no longer prepares, so none is named here. XSum is not in T5's registry: its
format here is that of T5's other summaries. Further tasks need no registration: make a `Task` and use it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from t5x_lite.data.preprocessors import (
    ClassLabels,
    MultiSentenceAnswers,
    Preprocessor,
    Rename,
    Summarize,
    Translate,
    WinogradSchema,
    entity_query,
    question_answer,
    resolve_pronoun,
    similarity_score,
)
from t5x_lite.data.tasks import Mixture, Task
from t5x_lite.errors import InputError, nearest

T = TypeVar("T")

_MNLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")
_NO_YES = ("False", "True")

# Columns, in the order that T5 gives them, classes in the order of their ids in TFDS, and metrics.
_GLUE = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": (("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "mnli": (("hypothesis", "premise"), _MNLI, ("accuracy",)),
    "qnli": (("question", "sentence"), _RTE, ("accuracy",)),
    "rte": (("sentence1", "sentence2"), _RTE, ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}
_SUPER_GLUE = {
    "boolq": (("passage", "question"), _NO_YES, ("accuracy",)),
    "cb": (("hypothesis", "premise"), ("entailment", "contradiction", "neutral"), ("f1_macro", "accuracy")),
    "copa": (("choice1", "choice2", "premise", "question"), ("choice1", "choice2"), ("accuracy",)),
    "rte": (("hypothesis", "premise"), _RTE, ("accuracy",)),
    # The places of the word in both sentences are not used.
    "wic": (("sentence1", "sentence2", "word"), _NO_YES, ("accuracy",)),
}

# Number of training examples, by which T5 mixes (t5.data.glue_utils); 0: evaluated only. WNLI is in neither mixture.
_GLUE_SIZES = {
    "glue_cola": 8_551,
    "glue_sst2": 67_349,
    "glue_mrpc": 3_668,
    "glue_qqp": 363_849,
    "glue_stsb": 5_749,
    "glue_mnli": 392_702,
    "glue_qnli": 104_743,
    "glue_rte": 2_490,
    "glue_mnli_mismatched": 0,
    "glue_mnli_matched": 0,
    "glue_ax": 0,
}
_SUPER_GLUE_SIZES = {
    "dpr_simple": 1_322,
    "super_glue_wsc_simple_train": 259,
    "super_glue_wsc_simple_eval": 0,
    "super_glue_boolq": 9_427,
    "super_glue_cb": 250,
    "super_glue_copa": 400,
    "super_glue_multirc": 27_243,
    "super_glue_record": 138_854,
    "super_glue_rte": 2_490,
    "super_glue_wic": 5_428,
    "super_glue_axb": 0,
    "super_glue_axg": 0,
}


def task(name: str) -> Task:
    """Returns the published task of this name, T5's own or the short one; raises InputError for an unknown one."""
    return _look_up(name, TASKS, "task")


def mixture(name: str) -> Mixture:
    """Returns the published mixture of this name, T5's own or the short one; raises InputError for an unknown one."""
    return _look_up(name, MIXTURES, "mixture")


def find(name: str) -> Task | Mixture:
    """Returns the published task or mixture of this name; raises InputError for an unknown one."""
    return _look_up(name, {**TASKS, **MIXTURES}, "task or mixture")


def _look_up(name: str, published: Mapping[str, T], kind: str) -> T:
    name = ALIASES.get(name, name)
    if name not in published:
        names = [*published, *(alias for alias, of in ALIASES.items() if of in published)]
        hint = nearest(name, names) or f"; there are {', '.join(names)}"
        raise InputError(f"no published {kind} is called '{name}'{hint}")
    return published[name]


def _make(
    name: str,
    data: str,
    preprocessors: Preprocessor | tuple[Preprocessor, ...],
    metrics: tuple[str, ...],
    labels: tuple[str, ...] = (),
    train: str | None = "train",
    evaluation: str | None = "validation",
) -> Task:
    source, eval_source = (f"tfds:{data}:{split}" if split else None for split in (train, evaluation))
    steps = preprocessors if isinstance(preprocessors, tuple) else (preprocessors,)
    return Task(name, source, steps, None, metrics, eval_source, labels)


def _glue_tasks() -> list[Task]:
    tasks = []
    for name, (features, labels, metrics) in _GLUE.items():
        evaluation = "validation_matched" if name == "mnli" else "validation"
        step = ClassLabels(name, features, labels)
        tasks.append(_make(f"glue_{name}", f"glue/{name}", step, metrics, labels, evaluation=evaluation))
    features, labels, metrics = _GLUE["mnli"]
    mnli = ClassLabels("mnli", features, labels)
    for name in ("mnli_matched", "mnli_mismatched"):
        tasks.append(_make(f"glue_{name}", f"glue/{name}", mnli, metrics, labels, train=None))
    # The diagnostic set, of which only the part without labels was published.
    tasks.append(_make("glue_ax", "glue/ax", mnli, (), labels, train=None, evaluation="test"))
    tasks.append(_make("glue_stsb", "glue/stsb", similarity_score, ("pearson", "spearman")))
    return tasks


def _super_glue_tasks() -> list[Task]:
    tasks = []
    for name, (features, labels, metrics) in _SUPER_GLUE.items():
        step = ClassLabels(name, features, labels)
        tasks.append(_make(f"super_glue_{name}", f"super_glue/{name}", step, metrics, labels))
    multirc = MultiSentenceAnswers("multirc", ("question", "answer", "paragraph"), _NO_YES)
    tasks.append(_make("super_glue_multirc", "super_glue/multirc", multirc, ("multirc",), _NO_YES))
    tasks.append(_make("super_glue_record", "super_glue/record", entity_query, ("record",)))
    # Diagnostic sets, asked as RTE; the columns of AX-b have other names.
    rte = ClassLabels("rte", ("hypothesis", "premise"), _RTE)
    rename = Rename({"sentence1": "premise", "sentence2": "hypothesis"})
    for name, steps in (("axb", (rename, rte)), ("axg", rte)):
        data = f"super_glue/{name}"
        tasks.append(_make(f"super_glue_{name}", data, steps, (), _RTE, train=None, evaluation="test"))
    # Trained on what is true, evaluated on all; and on the data of definite pronoun resolution, which is like it.
    train, evaluation = WinogradSchema(correct_only=True), WinogradSchema(correct_only=False)
    tasks.append(_make("super_glue_wsc_simple_train", "super_glue/wsc.fixed", train, (), evaluation=None))
    tasks.append(_make("super_glue_wsc_simple_eval", "super_glue/wsc.fixed", evaluation, ("wsc",), train=None))
    dpr = "definite_pronoun_resolution"
    tasks.append(_make("dpr_simple", dpr, resolve_pronoun, ("accuracy",), evaluation="test"))
    return tasks


def _other_tasks() -> list[Task]:
    rouge, bleu = ("rouge",), ("bleu",)
    tasks = [
        _make("squad", "squad/v1.1", question_answer, ("squad",)),
        _make("cnn_dailymail", "cnn_dailymail", Summarize("article", "highlights"), rouge),
        _make("xsum", "xsum", Summarize("document", "summary"), rouge),
        _make("wmt_t2t_ende", "wmt_t2t_translate/de-en", Translate("en", "de"), bleu),
    ]
    for year, pair in (("14", "de-en"), ("14", "fr-en"), ("15", "fr-en"), ("16", "ro-en"), ("19", "de-en")):
        foreign = pair[:2]
        data = f"wmt{year}_translate/{pair}"
        tasks.append(_make(f"wmt{year}_en{foreign}", data, Translate("en", foreign), bleu))
    return tasks


TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (*_glue_tasks(), *_super_glue_tasks(), *_other_tasks())}
)


def _mixtures() -> dict[str, Mixture]:
    def of(name: str, rates: Mapping[str, float]) -> Mixture:
        return Mixture({TASKS[task]: rate for task, rate in rates.items()}, name)

    winograd = ("dpr_simple", "super_glue_wsc_simple_train", "super_glue_wsc_simple_eval")
    mixtures = (
        of("glue", _GLUE_SIZES),
        of("super_glue", _SUPER_GLUE_SIZES),
        of("wsc_dpr_simple", {name: _SUPER_GLUE_SIZES[name] for name in winograd}),
        # T5's gives 1 to all three; two of them have nothing to train on.
        of("glue_mnli_and_dev", {"glue_mnli": 1, "glue_mnli_mismatched": 0, "glue_mnli_matched": 0}),
    )
    return {mixture.name: mixture for mixture in mixtures}


MIXTURES: Mapping[str, Mixture] = MappingProxyType(_mixtures())


def _aliases() -> dict[str, str]:
    aliases = {
        "squad_v010_allanswers": "squad",
        "squad_v010": "squad",
        "cnn_dailymail_v002": "cnn_dailymail",
        "dpr_v001_simple": "dpr_simple",
        "super_glue_wsc_v102_simple_train": "super_glue_wsc_simple_train",
        "super_glue_wsc_v102_simple_eval": "super_glue_wsc_simple_eval",
        "glue_v002_proportional": "glue",
        "super_glue_v102_proportional": "super_glue",
        "glue_mnli_and_dev_v002": "glue_mnli_and_dev",
        "wsc_dpr_simple_proportional": "wsc_dpr_simple",
    }
    for name in TASKS:
        for prefix, version in (("glue_", "_v002"), ("super_glue_", "_v102"), ("wmt", "_v003")):
            if name.startswith(prefix) and "_wsc_" not in name:
                aliases[name + version] = name
    return aliases


ALIASES: Mapping[str, str] = MappingProxyType(_aliases())
"""T5's names of these tasks and mixtures."""
