"""From the configuration to datasets."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_lite.config import RunConfig, resolve
from t5x_lite.data import recipe, sources
from t5x_lite.data.pipeline import Dataset
from t5x_lite.data.tasks import Mixture, Task
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.errors import InputError

BYTES = ByteTokenizer()


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(recipe.CACHE_VARIABLE, str(tmp_path / "caches"))


def write_lines(path: Path, count: int) -> Path:
    path.write_text("\n".join(f"line {n} of the text, which is neither long nor short" for n in range(count)))
    return path


def write_pairs(path: Path, count: int, **more: Any) -> Path:
    rows = [{"q": f"question {n % (count // 4)}", "a": f"answer {n}", **more} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def config_of(*settings: str) -> RunConfig:
    return resolve(None, ["train.input_length=32", "train.batch_size=4", *settings]).config


def datasets_of(*settings: str) -> recipe.Datasets:
    config = config_of(*settings)
    data = recipe.open_data(config.data)
    recipe.check_objectives(config, data)
    return recipe.datasets(data, config, BYTES)


def texts_of(dataset: Any, side: str = "encoder_input_tokens") -> list[str]:
    segments = side.replace("input_tokens", "segment_ids").replace("target_tokens", "segment_ids")
    return [
        BYTES.decode([token for token in row[marks == number].tolist() if token != BYTES.eos_id])
        for batch in dataset.eval_batches()
        for row, marks in zip(batch[side], batch[segments], strict=True)
        for number in range(1, marks.max() + 1)
    ]


# --- one source -----------------------------------------------------------------------------------------------------


def test_running_text_is_held_out_in_blocks_of_neighbours(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "text.txt", 20_000)
    config = config_of(
        f"data.path={path}", "data.eval_fraction=0.05", "data.objective=causal_lm", "model=decoder-small"
    )
    data = recipe.open_data(config.data)
    trained_on = list(recipe.training_texts(data, config.data))
    read = recipe.datasets(data, config, BYTES)
    validation = "".join(texts_of(read.validation, "decoder_target_tokens")).split("line ")[1:]
    assert len(trained_on) + len(validation) == 20_000
    # A tokenizer never sees what is held out.
    assert not {text.removeprefix("line ").split()[0] for text in trained_on} & {text.split()[0] for text in validation}
    numbers = [int(text.split()[0]) for text in validation]
    assert sum(b == a + 1 for a, b in itertools.pairwise(numbers)) > 0.9 * len(numbers)
    whole = sum(len(f"line {n} of the text, which is neither long nor short") + 1 for n in range(20_000))
    assert isinstance(read.train, Dataset)
    rows = read.train.num_examples + read.validation.num_examples
    assert rows == pytest.approx(whole / 32, abs=2)  # each side ends in a window that is not full


def test_pairs_take_the_prefix_and_equal_inputs_stay_on_one_side(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 200, extra=1)
    settings = (f"data.path={path}", "data.objective=text_to_text", "data.inputs=q", "data.targets=a")
    settings = (*settings, "data.prefix=answer: ", "data.eval_fraction=0.2")
    read = datasets_of(*settings)
    train, validation = texts_of(read.train), texts_of(read.validation)
    assert len(train) + len(validation) == 200
    # Four answers to every question: a question that is held out is held out with all of them.
    assert not set(train) & set(validation)
    assert all(source.startswith("answer: question ") for source in train)
    assert (read.train.layout.input_length, read.train.layout.target_length) == (24, 16)
    config = config_of(*settings)
    data = recipe.open_data(config.data)
    assert sorted(recipe.training_texts(data, config.data)) == sorted(
        [*train, *texts_of(read.train, "decoder_target_tokens")]
    )
    for split, inputs in (("train", train), ("validation", validation)):
        assert [pair[0] for pair, _ in recipe.pairs(data.tasks[0], config.data, split)] == inputs


def test_separate_files_for_evaluation(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / name, 30) for name in ("train.txt", "dev.txt")]
    read = datasets_of(f"data.path={paths[0]}", f"data.eval_path={paths[1]}")
    assert read.train.num_examples == read.validation.num_examples  # type: ignore[union-attr]
    (tmp_path / "dev.csv").write_text("body\nwords\n")
    with pytest.raises(InputError, match=r"dev\.csv.*body"):
        datasets_of(f"data.path={paths[0]}", f"data.eval_path={tmp_path / 'dev.csv'}")


def test_the_fingerprint_is_of_content_and_order(tmp_path: Path) -> None:
    def fingerprint(*lines: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
        path.write_text("\n".join(lines))
        return datasets_of(f"data.path={path}").fingerprint

    words = [f"word {n} and then some more of them" for n in range(8)]
    assert fingerprint(*words) == fingerprint(*words)  # of another file
    assert (
        len({fingerprint(*lines) for lines in (words, words[::-1], words[:-1], ["".join(words[:2]), *words[2:]])}) == 4
    )


def test_a_mapping_as_source(tmp_path: Path) -> None:
    (tmp_path / "data.log").write_bytes("".join(f'{{"body": "été numéro {n}"}}\n' for n in range(50)).encode("latin-1"))
    (tmp_path / "run.yaml").write_text(
        f"data:\n  path: {{path: {tmp_path / 'data.log'}, format: jsonl, encoding: latin-1, columns: {{text: body}}}}\n"
        "train: {input_length: 32, batch_size: 4}\n"
    )
    config = resolve(tmp_path / "run.yaml").config
    read = recipe.datasets(recipe.open_data(config.data), config, BYTES)
    assert "été numéro" in " ".join(texts_of(read.train))
    same = resolve(
        None,
        [f"data.path={{path: {tmp_path / 'data.log'}, format: jsonl, encoding: latin-1, columns: {{text: body}}}}"],
    )
    assert same.config.data == config.data


def test_records_that_are_skipped_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(
        "\n".join(['{"text": "fine, and long enough"}'] * 20 + ["{broken"] + ['{"text": "as fine as the others"}'] * 20)
    )
    with pytest.raises(InputError, match=r"some.jsonl:21: "):
        datasets_of(f"data.path={path}")
    (note,) = datasets_of(f"data.path={path}", "data.on_error=skip").notes
    assert note.startswith("some: 1 records were skipped, such as ")
    assert "some.jsonl:21" in note


def test_what_is_skipped_is_skipped_whoever_reads(tmp_path: Path) -> None:
    rows = [{"text": f"text {n} of some length", "q": f"question {n}", "a": f"answer {n}"} for n in range(400)]
    for n in range(0, 400, 7):  # a value that is not there: no reader minds, but an encoder does
        rows[n] |= {"text": None, "q": None} if n % 2 else {"text": [], "a": {}}
    lines = [*map(json.dumps, rows[:50]), "{not JSON", *map(json.dumps, rows[50:])]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    settings = (f"data.path={tmp_path / 'data.jsonl'}", "data.on_error=skip", "data.eval_fraction=0.2")

    config = config_of(*settings, "data.objective=causal_lm", "model=decoder-small")
    data = recipe.open_data(config.data)
    trained_on = set(recipe.training_texts(data, config.data))
    read = recipe.datasets(data, config, BYTES)
    assert read.notes[0].startswith("data: 59 records were skipped")
    held = "".join(texts_of(read.validation, "decoder_target_tokens")).replace("text ", "\ntext ").split("\n")[1:]
    assert len(trained_on) + len(held) == 400 - 58
    assert not trained_on & set(held)

    paired = (*settings, "data.objective=text_to_text", "data.inputs=q", "data.targets=a")
    config = config_of(*paired)
    data = recipe.open_data(config.data)
    read = recipe.datasets(data, config, BYTES)
    for split, dataset in (("train", read.train), ("validation", read.validation)):
        pairs = [pair for pair, _ in recipe.pairs(data.tasks[0], config.data, split)]
        assert pairs == list(zip(texts_of(dataset), texts_of(dataset, "decoder_target_tokens"), strict=True))

    streamed = datasets_of(*settings, "data.streaming=true", f"data.eval_path={tmp_path / 'data.jsonl'}")
    assert streamed.train.loader(0)(0)["encoder_input_tokens"].shape == (4, 32)


def test_a_record_in_a_later_part_is_named_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.open_source, "__defaults__", (None, 200))  # bytes of a part
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "some words"}\n' * 30 + '{"text": null}\n' + '{"text": "some words"}\n' * 9)
    config = config_of(f"data.path={path}", "data.streaming=true", f"data.eval_path={write_lines(tmp_path / 'e', 9)}")
    data = recipe.open_data(config.data)
    for read in (
        lambda: list(recipe.training_texts(data, config.data)),
        lambda: list(map(recipe.datasets(data, config, BYTES).train.loader(0), range(40))),
    ):
        with pytest.raises(InputError, match=r"data\.jsonl:31: column 'text' is null"):
            read()


def test_a_token_cache_is_a_source_and_knows_its_tokenizer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "text.txt", 50)
    first = datasets_of(f"data.path={path}")
    (directory,) = (child for child in (tmp_path / "caches").iterdir() if child.is_dir())
    again = datasets_of(f"data.path={directory}")
    assert again.fingerprint == first.fingerprint
    config = config_of(f"data.path={directory}", "data.objective=text_to_text")
    with pytest.raises(InputError, match=r"holds tokens; data\.objective=text_to_text needs inputs, targets"):
        recipe.datasets(recipe.open_data(config.data), config, BYTES)

    class Other(ByteTokenizer):
        def save(self, directory: str | Path) -> None:
            super().save(directory)
            (Path(directory) / "more").write_text("another")

    config = config_of(f"data.path={directory}")
    with pytest.raises(InputError, match=r"the token cache .* is of ByteTokenizer .*the tokenizer here is Other"):
        recipe.datasets(recipe.open_data(config.data), config, Other())
    with pytest.raises(InputError, match="holds tokens, not text: give the tokenizer="):
        list(recipe.training_texts(recipe.open_data(config.data), config.data))


# --- several --------------------------------------------------------------------------------------------------------


def mixture(tmp_path: Path, *more: str) -> list[str]:
    text, pairs = write_lines(tmp_path / "text.txt", 300), write_pairs(tmp_path / "sums.jsonl", 80)
    supervised = f"{{path: {pairs}, objective: text_to_text, inputs: q, targets: a, rate: 1}}"
    return [f"data.tasks=[{{path: {text}, rate: 3}}, {supervised}]", *more]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_mixture_of_pre_training_and_supervised_data(tmp_path: Path, packing: str) -> None:
    read = datasets_of(*mixture(tmp_path, f"data.packing={packing}", "train.input_length=64", "train.batch_size=8"))
    assert isinstance(read.train, Dataset)
    assert [component.name for component in read.train.components] == ["text", "sums"]
    counts = [0, 0]
    for step in range(60):
        batch = read.train.batch(step)
        for row, marks in zip(batch["encoder_input_tokens"], batch["encoder_segment_ids"], strict=True):
            kinds = {"question" in BYTES.decode(row[marks == n]) for n in range(1, marks.max() + 1)}
            assert len(kinds) == 1  # the examples of a row are of one task
            counts[kinds.pop()] += marks.max()
    # Three to one in examples, packed or not: mixing is within 1 %, and the last cycle is cut somewhere.
    assert counts[0] / sum(counts) == pytest.approx(0.75, abs=0.02)
    rows = list(read.validation.eval_batches())
    assert sum(batch["encoder_segment_ids"].max(axis=1).sum() for batch in rows) == read.validation.num_examples


def test_proportional_rates_temperature_and_limit(tmp_path: Path) -> None:
    paths = [write_pairs(tmp_path / f"{name}.jsonl", count) for name, count in (("small", 40), ("large", 360))]
    tasks = f"data.tasks=[{{path: {paths[0]}}}, {{path: {paths[1]}}}]"
    common = ("data.objective=text_to_text", "data.inputs=q", "data.targets=a", "data.eval_fraction=0.001")

    def shares(*settings: str) -> list[float]:
        read = datasets_of(tasks, *common, *settings)
        assert isinstance(read.train, Dataset)
        rates = np.array([component.rate for component in read.train.components])
        return (rates / rates.sum()).tolist()

    sizes = np.array([40 - 4, 360 - 4])  # without the one question that is held out of each, four times over
    assert shares() == pytest.approx((sizes / sizes.sum()).tolist())
    assert shares("data.temperature=2") == pytest.approx((sizes**0.5 / (sizes**0.5).sum()).tolist())
    assert shares("data.max_examples=36") == pytest.approx([0.5, 0.5])


def test_a_published_task_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text("\n".join(json.dumps({"sentence": f"film {n}", "label": n % 2, "idx": n}) for n in range(40)))
    settings = ("data.task=glue_sst2", f"data.path={path}", f"data.eval_path={path}")
    read = datasets_of(*settings)
    assert texts_of(read.validation)[:2] == ["sst2 sentence: film 0", "sst2 sentence: film 1"]
    assert texts_of(read.validation, "decoder_target_tokens")[:2] == ["negative", "positive"]
    data = recipe.open_data(config_of(*settings).data)
    (pair, record), *_ = recipe.pairs(data.tasks[0], config_of(*settings).data, "validation")
    assert (pair, record["idx"], data.tasks[0].metrics) == (("sst2 sentence: film 0", "negative"), 0, ("accuracy",))


# --- every objective ------------------------------------------------------------------------------------------------

T5, GPT, BERT = "model=t5-small", "model=decoder-small", "model=bert-base-uncased"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        (T5, "data.objective=span_corruption"),
        (T5, "data.objective=span_corruption", "data.random_roll=true", "data.noise_density=0.3"),
        (T5, "data.objective=iid_denoising"),
        (T5, "data.objective=prefix_lm"),
        (T5, "data.objective=bart"),
        (T5, "data.objective=bart", "data.noises=[masking, deletion, rotation]"),
        (T5, "data.objective=ul2", "data.mode_tokens=false", "train.input_length=50"),
        (GPT, "data.objective=causal_lm"),
        (GPT, "data.objective=prefix_lm"),
        (GPT, "data.objective=ul2", "data.mode_tokens=false", "train.input_length=50"),
        (BERT, "data.objective=masked_lm", "model.head=masked_lm"),
        (BERT, "data.objective=masked_lm", "model.head=masked_lm", "data.masking=huggingface"),
        (BERT, "data.objective=next_sentence"),
    ],
    ids=lambda settings: " ".join(settings).replace("data.", "").replace("objective=", ""),
)
def test_objectives_by_name(tmp_path: Path, settings: tuple[str, ...], packing: bool) -> None:
    text = "A sentence of some words. Another one, of others. A third? Yes! And a last one of nine more words."
    (tmp_path / "text.txt").write_text("\n".join(f"{n}. {text}" for n in range(60)))
    settings = (f"data.path={tmp_path / 'text.txt'}", "data.eval_fraction=0.1", *settings)
    if packing and "next_sentence" in settings[-1]:
        with pytest.raises(InputError, match="one label a row"):
            datasets_of(*settings, "data.packing=true")
        return
    read = datasets_of(*settings, f"data.packing={str(packing).lower()}")
    batch = read.train.loader(0)(0)
    shapes = {key: value.shape for key, value in batch.items()}
    assert {shape[0] for shape in shapes.values()} == {4}
    weights = [value for key, value in batch.items() if key.endswith("loss_weights")]
    assert weights[0].sum() > 0
    for batch in read.validation.eval_batches():
        assert {key: value.shape for key, value in batch.items()} == shapes
        assert batch.keys() == shapes.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((T5, "data.objective=causal_lm"), "causal_lm needs a decoder and no encoder; the model, of family t5"),
        (
            (GPT, "data.objective=span_corruption"),
            "span_corruption needs an encoder and a decoder; the model, of family",
        ),
        ((BERT, "data.objective=chat"), "chat needs an encoder and a decoder or a decoder and no encoder"),
        ((BERT, "data.objective=masked_lm"), "masked_lm needs model.head=masked_lm, not pretraining"),
        ((T5, "data.packing=true", "data.buckets=[8]"), "data.buckets and data.packing exclude each other"),
        ((T5, "data.packing=true", "data.streaming=true"), "data.packing and data.streaming exclude each other"),
        ((T5, "data.buckets=[16, 32]"), r"data.buckets \[16, 32\]: must be below train.input_length 32"),
        ((T5, "data.buckets=[16, 8]"), "ascending lengths"),
        ((T5, "data.streaming=true"), "data.streaming holds nothing out: give data.eval_path for text"),
        ((T5, "data.path=-"), "the standard input can be read only once"),
        ((T5, "data.task=glue_sst"), "glue_sst2"),
        ((T5, "data.task=glue", "data.path=a.txt"), "'glue' is a mixture; only a single task can be given files"),
        ((T5, "data.tasks=[{rate: 2}]"), "needs a task or a path"),
        ((T5, "data.tasks=[{path: text.txt, rate: 0}]"), "all its rates are 0"),
        ((T5, "data.tasks=[{path: text.txt, rat: 1}]"), "rat"),
        ((T5, "data.tasks=[{path: text.txt}, {path: text.txt}]"), "'text' twice"),
        ((T5, "data.task=glue", "data.tasks=[{task: glue}]"), "data.task=glue and data.tasks exclude each other"),
        ((T5, "data.encoding=utf-9"), "encoding 'utf-9' is unknown"),
        ((T5, "data.max_record_bytes=10"), "text.txt:1"),
        ((T5, "data.temperature=0"), "data.temperature must be above 0"),
        ((T5, "data.objective=ul2", "train.input_length=512"), "spans but the tokenizer has 11 sentinels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_one_line_about_what_cannot_be(tmp_path: Path, monkeypatch, settings: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "text.txt", 40)
    path = [] if any(word.startswith(("data.path", "data.task")) for word in settings) else ["data.path=text.txt"]
    with pytest.raises(InputError, match=message) as caught:
        datasets_of(*path, *settings)
    assert "\n" not in str(caught.value)


# --- the cache ------------------------------------------------------------------------------------------------------


def test_tokens_are_cached_where_the_configuration_says(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "text.txt", 50)
    told: list[Any] = []
    config = config_of(f"data.path={path}", f"data.cache_dir={tmp_path / 'mine'}")
    first = recipe.datasets(recipe.open_data(config.data), config, BYTES, lambda *done: told.append(done))
    assert told
    assert told[-1][:3] == ("text", 1, 1)
    assert not (tmp_path / "caches").exists()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "mine").rglob("*") if file.is_file()}
    again = recipe.datasets(recipe.open_data(config.data), config, BYTES)
    assert again.fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "mine").rglob("*") if file.is_file()} == before
    path.write_text(path.read_text() + "\nand a line more")
    assert recipe.datasets(recipe.open_data(config.data), config, BYTES).fingerprint != first.fingerprint


# --- from Python ----------------------------------------------------------------------------------------------------


def shout(record: dict[str, Any]) -> dict[str, Any]:
    return {"inputs": record["q"].upper(), "targets": record["a"]}


def test_a_published_task_is_evaluated_on_the_file_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(recipe, "open_records", lambda source, data: opened.append(source))
    recipe.open_data(config_of("data.task=glue_sst2", "data.eval_path=dev.jsonl").data)
    assert opened == ["tfds:glue/sst2:train", "dev.jsonl"]
    with pytest.raises(InputError, match="'glue' is a mixture; only a single task can be given files"):
        recipe.open_data(config_of("data.task=glue", "data.eval_path=dev.jsonl").data)


def test_tasks_of_one_s_own(tmp_path: Path) -> None:
    paths = [write_pairs(tmp_path / f"{name}.jsonl", 40) for name in ("one", "two")]
    tasks = [Task(path.stem, str(path), (shout,), eval_source=str(path)) for path in paths]
    config = config_of("train.batch_size=8")
    data = recipe.open_mixture(Mixture({tasks[0]: 3, tasks[1]: 1}), config.data)
    read = recipe.datasets(data, config, BYTES)
    assert isinstance(read.train, Dataset)
    assert [(component.name, component.rate) for component in read.train.components] == [("one", 0.75), ("two", 0.25)]
    assert set(texts_of(read.validation)) == {f"QUESTION {n}" for n in range(10)}


# --- lengths --------------------------------------------------------------------------------------------------------


def test_rows_are_no_longer_than_the_longest_pair(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 40)
    common = (f"data.path={path}", f"data.eval_path={path}", "data.inputs=q", "data.targets=a")
    layout = datasets_of(*common, "train.input_length=512").train.layout
    assert (layout.input_length, layout.target_length) == (
        16,
        16,
    )  # "question 9" and "answer 39" with EOS are 11 and 10
    layout = datasets_of(*common, "train.input_length=8", "train.target_length=4").train.layout
    assert (layout.input_length, layout.target_length) == (8, 4)
    layout = datasets_of(*common, "train.input_length=64", "data.packing=true").train.layout
    assert (layout.input_length, layout.target_length) == (64, 64)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_batches_of_a_bucket_are_short(tmp_path: Path, fraction: float) -> None:
    rows = [{"inputs": "x" * (n % 60 + 1), "targets": "y"} for n in range(600)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = (f"data.path={tmp_path / 'rows.jsonl'}", "data.inputs=inputs", "train.input_length=64")
    read = datasets_of(*common, f"data.buckets=[{int(64 * fraction)}]", "data.eval_fraction=0.01")
    assert isinstance(read.train, Dataset)
    lengths = {read.train.batch(step)["encoder_input_tokens"].shape[1] for step in range(50)}
    assert lengths == {int(64 * fraction), 64}
