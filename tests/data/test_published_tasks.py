"""The published tasks against T5's own code on invented records (fixtures/make_published_tasks.py), and real data."""

import csv
import itertools
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from t5x_lite.data import published_tasks
from t5x_lite.data.preprocessors import LANGUAGES, Format, apply, question_answer, squad_paragraphs
from t5x_lite.data.published_tasks import find, mixture, task
from t5x_lite.data.sources import open_source
from t5x_lite.data.tasks import Task
from t5x_lite.errors import InputError
from t5x_lite.evaluation.task_metrics import METRICS, check_metrics

T5 = json.loads((Path(__file__).parents[1] / "fixtures" / "published_tasks.json").read_text())

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "tasks"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real data is not here")

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
SUPER_GLUE = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc_simple_train")
OTHERS = ("squad", "cnn_dailymail", "xsum", "wmt_t2t_ende", "wmt15_enfr", "wmt16_enro")


@pytest.mark.parametrize("name", T5["tasks"])
def test_examples_are_those_of_t5(name: str) -> None:
    records = T5["tasks"][name]["records"]
    assert len(records) >= 20
    for place, record in enumerate(records):
        made = [example for _, example in apply(task(name).preprocessors, [(f"{name}:{place}", record["record"])])]
        assert made == record["examples"]


def test_the_references_hold_what_is_hard() -> None:
    records = [record for of in T5["tasks"].values() for record in of["records"]]
    inputs = {example["inputs"] for record in records for example in record["examples"]}
    for what in ("\n", "\t", "  ", "\u00a0", "\u2014", "\u732b", "<unk>", "@highlight", " *it* ", " \\ ", "X X"):
        assert any(what in text for text in inputs | {e["targets"] for r in records for e in r["examples"]}), what
    assert {len(record["examples"]) for record in records} == {0, 1, 2, 3}


def test_every_task_of_the_references_reads_the_dataset_of_t5() -> None:
    for name, of in T5["tasks"].items():
        dataset = of["source"].partition(":")[0]
        ours = task(name)
        for source in (ours.source, ours.eval_source):
            assert source is None or source.startswith(f"tfds:{dataset}:")
        if of["splits"]:
            assert (ours.source is not None) == ("train" in of["splits"])
            assert (ours.eval_source is None) == (of["splits"] == ["train"])


def test_the_tasks_of_the_paper_are_there() -> None:
    names = [f"glue_{n}" for n in GLUE] + [f"super_glue_{n}" for n in SUPER_GLUE] + list(OTHERS)
    for name in names:
        found = task(name)
        assert found.name == name
        assert found.objective is None
        assert found.source is not None
    for name in ("glue_mnli_matched", "glue_mnli_mismatched", "super_glue_wsc_simple_eval"):
        assert task(name).source is None
    assert task("glue_mnli").eval_source == "tfds:glue/mnli:validation_matched"


def test_xsum_is_summarised_like_t5s_own_summaries() -> None:
    example = task("xsum").preprocessors[0]({"document": "Long.\nText.", "summary": "Short."})
    assert example == {"inputs": "summarize: Long.\nText.", "targets": "Short."}


@pytest.mark.parametrize("name", T5["mixtures"])
def test_mixtures_draw_in_t5s_proportions(name: str) -> None:
    found = mixture(name)
    rates = {task(t5_name).name: rate for t5_name, rate in T5["mixtures"][name].items()}
    total = sum(rates.values())
    assert dict(zip((each.name for each in found.tasks), found.rates().tolist(), strict=True)) == pytest.approx(
        {name: rate / total for name, rate in rates.items()}, rel=1e-15
    )


def test_mnli_and_its_evaluations_are_a_mixture() -> None:
    found = mixture("glue_mnli_and_dev_v002")
    assert {t.name for t in found.tasks} == {"glue_mnli", "glue_mnli_matched", "glue_mnli_mismatched"}
    assert found.rates().tolist() == [1, 0, 0]


def test_languages_are_called_as_in_babel() -> None:
    assert T5["languages"] == LANGUAGES


def test_metrics_are_known_or_refused_in_one_line() -> None:
    for found in published_tasks.TASKS.values():
        for name in found.metrics:
            if name in ("bleu", "rouge"):
                with pytest.raises(InputError, match=rf"^metric '{name}' is not there yet; those that are: accuracy, "):
                    check_metrics(found.metrics)
            else:
                assert name in METRICS


def test_names_that_are_not_known() -> None:
    with pytest.raises(InputError, match="no published task is called 'glue_sst'; did you mean 'glue_sst2'"):
        task("glue_sst")
    with pytest.raises(InputError, match="no published mixture is called 'super_glu'; did you mean 'super_glue'"):
        mixture("super_glu")
    with pytest.raises(InputError, match="no published task is called 'glue'"):
        task("glue")
    with pytest.raises(
        InputError, match=r"no published task or mixture is called 'wmt15_enfr_v004'; .*'wmt15_enfr_v003'"
    ):
        find("wmt15_enfr_v004")
    assert find("glue_v002_proportional") is mixture("glue")
    assert find("squad_v010_allanswers") is task("squad")


def test_the_registry_cannot_be_changed_and_goes_to_workers() -> None:
    with pytest.raises(TypeError):
        published_tasks.TASKS["mine"] = Task("mine", "f")  # type: ignore[index]
    for found in published_tasks.TASKS.values():
        assert pickle.loads(pickle.dumps(found)) == found


def texts(
    found: Task, records: Iterable[tuple[str, dict[str, Any]]], limit: int | None = None
) -> list[tuple[str, str]]:
    return [(e["inputs"], e["targets"]) for _, e in itertools.islice(apply(found.preprocessors, records), limit)]


def written(file: Path, columns: tuple[str, ...], rows: Iterable[list[str]]) -> str:
    file.write_text("\n".join("\t".join(row) for row in (list(columns), *rows)) + "\n")
    return str(file)


@needs_data
def test_real_sentiments_and_judgements(tmp_path: Path) -> None:
    for name, path, columns in (
        ("glue_sst2", "sst2/dev.tsv", ("sentence", "label")),
        ("glue_cola", "cola/in_domain_dev.tsv", ("source", "label", "mark", "sentence")),
    ):
        with (DATA / path).open(newline="") as lines:
            rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        local = task(name).with_source(written(tmp_path / f"{name}.tsv", columns, rows))
        made = texts(local, open_source(local.source).records())  # type: ignore[arg-type]
        sentence, label = columns.index("sentence"), columns.index("label")
        assert made == [
            (f"{name.removeprefix('glue_')} sentence: {row[sentence]}", local.labels[int(row[label])]) for row in rows
        ]
        assert len(made) > 500


@needs_data
def test_real_alternatives() -> None:
    local = task("super_glue_copa").with_source(str(DATA / "copa-superglue" / "dev.jsonl"))
    made = texts(local, open_source(local.source).records())  # type: ignore[arg-type]
    assert len(made) == 50
    assert {target for _, target in made} == {"choice1", "choice2"}
    assert made[0] == (
        "copa choice1: The ice cube stuck to my fingers. choice2: The ice cube vanished. premise: I ran the ice cube "
        "under warm water. question: effect",
        "choice2",
    )


@needs_data
def test_real_questions_in_several_languages() -> None:
    reading = Task("xquad", "xquad", (squad_paragraphs, question_answer), metrics=("squad",))
    files = sorted((DATA / "xquad-squad-en").glob("xquad.*.json"))
    assert len(files) > 1
    for file in files:
        made = [example for _, example in apply(reading.preprocessors, [(file.name, json.loads(file.read_text()))])]
        assert len(made) == 1190
        assert all(example["inputs"].startswith("question: ") for example in made)
        # Set apart alike, the answer is still a stretch of the context but for the spaces.
        squeezed = [(e["targets"].replace(" ", ""), e["context"].replace(" ", "")) for e in made]
        assert all(answer in context for answer, context in squeezed)


@needs_data
def test_real_sentence_pairs(tmp_path: Path) -> None:
    sides = [(DATA / "small-parallel-enja" / f"dev.{code}").read_text().splitlines() for code in ("en", "ja")]
    path = written(tmp_path / "pairs.tsv", ("en", "ja"), map(list, zip(*sides, strict=True)))
    pairs = Task("enja", path, (Format("translate English to Japanese: {en}", "{ja}"),))
    made = texts(pairs, open_source(path).records(), limit=1)
    assert made == [("translate English to Japanese: show your own business .", sides[1][0])]
