"""TFDS, prepared as array_record, and directories of Hugging Face's `save_to_disk`; both without their libraries."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pytest

from t5x_lite.data.sources import check_columns, open_source, read_records
from t5x_lite.errors import InputError

PREPARE = 'python -c "import tensorflow_datasets as tfds; tfds.builder('


def example(number):
    texts = [f"answer {index}" for index in range(number % 3)]
    return {
        "question": f"é {number}?",
        "answers": {"text": texts, "answer_start": list(range(number % 3))},
        "label": number % 2,
        "meta": {"id": str(number), "score": number / 2},
        "tokens": [number] * (number % 4),
        "raw": b"\xff\x00",
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A TFDS directory with the dataset `questions/short`, version 1.2.0: 20 records to train on and 5 to test."""
    import tensorflow_datasets as tfds

    def records(count):
        for number in range(count):
            record = example(number)
            yield number, record | {"label": ("no", "yes")[number % 2]}

    features = tfds.features.FeaturesDict(
        {
            "question": tfds.features.Text(),
            "answers": tfds.features.Sequence({"text": tfds.features.Text(), "answer_start": np.int32}),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
            "meta": {"id": tfds.features.Text(), "score": np.float32},
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "raw": tfds.features.Tensor(shape=(), dtype=np.object_),
        }
    )

    class Questions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "questions"
        code_path = None  # there are no files of downloads' checksums beside this one
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="short", version="1.2.0")]

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": records(20), "test": records(5)}

        def _generate_examples(self):
            raise NotImplementedError

    directory = tmp_path_factory.mktemp("tfds")
    Questions(data_dir=directory, file_format="array_record").download_and_prepare(file_format="array_record")
    return str(directory)


def tfds(spec, data_dir, **more):
    return open_source({"path": f"tfds:{spec}", "data_dir": data_dir}, **more)


def test_tfds_gives_plain_python_values(data_dir):
    source = tfds("questions/short:train", data_dir)
    rows = list(source.records())
    assert [record for _, record in rows] == [example(number) for number in range(20)]
    assert rows[4][0] == "tfds:questions/short:1.2.0:train:5"
    assert json.loads(json.dumps(rows[4][1] | {"raw": None})) == example(4) | {"raw": None}
    assert type(rows[4][1]["label"]) is int
    check_columns(source, ["question", "answers"])
    with pytest.raises(InputError, match=r"column 'qestion' is not in tfds:.*did you mean 'question'"):
        check_columns(source, ["qestion"])


SLICES = {
    "train": range(20),
    "train[:25%]": range(5),
    "train[15:]": range(15, 20),
    "train[:1%]": [],
    "test": range(5),
    "test[1:3]+train[:2]": [1, 2, 0, 1],
}


@pytest.mark.parametrize("split", SLICES)
@pytest.mark.parametrize("part_bytes", [1, 1000, 10**9])
def test_tfds_slices(data_dir, split, part_bytes):
    if not SLICES[split]:
        with pytest.raises(InputError, match=r"no records in 'tfds:questions/short:1.2.0:train\[:1%\]'"):
            tfds(f"questions/short:{split}", data_dir)
        return
    source = pickle.loads(pickle.dumps(tfds(f"questions/short:{split}", data_dir, part_bytes=part_bytes)))
    assert len(source.parts) == len(SLICES[split]) if part_bytes == 1 else len(source.parts) < 20
    rows = [row for index in range(len(source.parts)) for row in source.read(index)]
    assert [record for _, record in rows] == [example(number) for number in SLICES[split]]
    assert [where.rpartition(":")[2] for where, _ in rows] == [str(n + 1) for n in range(len(rows))]


def test_tfds_names(data_dir, monkeypatch):
    count = lambda source: len(list(source.records()))  # noqa: E731
    assert count(tfds("questions/short", data_dir)) == 20
    assert count(tfds("questions", data_dir)) == 20
    assert count(tfds("questions/short:1.2.0", data_dir)) == 20
    assert count(tfds("questions/short:1.2.0:test[:2]", data_dir)) == 2
    assert count(open_source({"path": "tfds:questions/short", "split": "test", "data_dir": data_dir})) == 5
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", data_dir)
    spec = "tfds:questions/short:test,tfds:questions/short:train[:2]"
    assert [record["question"] for record in read_records(spec, ("question",))][4:] == ["é 4?", "é 0?", "é 1?"]
    with pytest.raises(InputError, match=r"names a split, and so does split=train"):
        open_source({"path": "tfds:questions/short:test", "split": "train"})


MISTAKES = {
    "questions/short:trian": r"has no split 'trian'; did you mean 'train'\?; its splits are: train, test",
    "questions/short:train[50:90]": r"has no split 'train\[50:90\]' \(Requested slice",
    "questions/short:train[:x%]": r"has no split 'train\[:x%\]' \(Error parsing split",
    "questions/shrt": r"'tfds:questions/shrt' is not prepared in DIR \(but questions/short/1\.2\.0 is\)",
    "questions/short:2.0.0": r"short:2\.0\.0' is not prepared in DIR \(but questions/short/1\.2\.0 is\)",
    "question": r"is not prepared in DIR; did you mean 'questions'; to prepare it: PREPARE'question', data_dir='DIR',",
    "squad": r"'tfds:squad' is not prepared in DIR; to prepare it: PREPARE'squad', data_dir='DIR', file_format=",
    "": "is not of the form tfds:NAME",
    "a b": "is not of the form tfds:NAME",
}


@pytest.mark.parametrize("spec", MISTAKES)
def test_tfds_mistakes(data_dir, spec):
    prepare = PREPARE.replace("(", r"\(")
    with pytest.raises(InputError, match=MISTAKES[spec].replace("PREPARE", prepare).replace("DIR", data_dir)) as error:
        tfds(spec, data_dir)
    assert "\n" not in str(error.value)


def test_tfds_in_another_format(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "tfds")
    info = tmp_path / "tfds" / "questions" / "short" / "1.2.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(InputError, match=r"prepared as tfrecord, not as array_record; .*tfds_array_record', file"):
        tfds("questions/short", str(tmp_path / "tfds"))


def test_the_command_that_prepares_a_dataset_does(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class PreparedByCommand(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": np.object_}))

        def _split_generators(self, dl_manager):
            return {"train": iter([(0, {"text": "one"})])}

        def _generate_examples(self):
            raise NotImplementedError

    spec = {"path": "tfds:prepared_by_command", "data_dir": str(tmp_path)}
    with pytest.raises(InputError, match="to prepare it: python -c") as error:
        open_source(spec)
    exec(str(error.value).partition('python -c "')[2].removesuffix('"'))
    assert [record for _, record in open_source(spec).records()] == [{"text": "one"}]


def test_the_files_of_a_tfds_dataset_are_not_read_without_it(data_dir):
    directory = f"{data_dir}/questions/short/1.2.0"
    for path in (directory, f"{directory}/*.array_record*"):
        with pytest.raises(InputError, match=r"of TFDS; read (it|that) as tfds:NAME, with its data_dir"):
            open_source(path)


def test_tfds_identity(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "tfds")
    first = tfds("questions/short:train", str(copy)).identity
    assert tfds("questions/short", str(copy), part_bytes=1).identity == first
    assert tfds("questions/short:test", str(copy)).identity != first
    assert tfds("questions/short", data_dir).identity != first
    info = copy / "questions" / "short" / "1.2.0" / "dataset_info.json"
    info.write_text(info.read_text())  # prepared anew
    assert tfds("questions/short", str(copy)).identity != first


def test_reading_tfds_imports_neither_tensorflow_nor_jax(data_dir):
    program = (
        "import sys\n"
        "from t5x_lite.data.sources import open_source\n"
        f"source = open_source({{'path': 'tfds:questions/short', 'data_dir': {data_dir!r}}})\n"
        "print(len(list(source.records())), {'tensorflow', 'jax', 'torch', 'datasets'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "20 set()\n", done.stderr


def save_to_disk(directory, rows, files=2, split="train"):
    """Writes what `datasets.Dataset.save_to_disk` does."""
    directory.mkdir(parents=True)
    names = [f"data-{index:05}-of-{files:05}.arrow" for index in range(files)]
    for index, name in enumerate(names):
        table = pyarrow.Table.from_pylist(rows[index::files])
        with pyarrow.OSFile(str(directory / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1", "_split": split}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text(json.dumps({"features": {}}))


def test_saved_dataset(tmp_path):
    rows = [{"text": f"é{number}", "label": number % 2, "tags": ["a"] * (number % 2)} for number in range(20)]
    save_to_disk(tmp_path / "saved", rows)
    for part_bytes in (200, 10**9):
        source = pickle.loads(pickle.dumps(open_source(str(tmp_path / "saved"), part_bytes=part_bytes)))
        assert (len(source.parts) == 2) == (part_bytes > 200)
        assert [record for _, record in source.records()] == rows[::2] + rows[1::2]
    assert next(read_records(str(tmp_path / "saved"), ("label",))) == {"label": "0"}
    check_columns(str(tmp_path / "saved"), ("text", "tags"))


def test_saved_datasets_by_split(tmp_path):
    root = tmp_path / "saved"
    for split, count in (("train", 6), ("validation", 2)):
        save_to_disk(root / split, [{"text": split}] * count, split=split)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    assert len(list(open_source(f"{root}/train").records())) == 6
    assert len(list(open_source({"path": str(root), "split": "validation"}).records())) == 2
    with pytest.raises(InputError, match=f"'{root}' needs a split; give one, such as '{root}/train', of: train, valid"):
        open_source(str(root))
    with pytest.raises(InputError, match=r"has no split 'validate'; .*did you mean 'validation'"):
        open_source({"path": str(root), "split": "validate"})
    with pytest.raises(InputError, match="is the split 'train', not 'test'"):
        open_source({"path": f"{root}/train", "split": "test"})
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["validation"]}))
    assert len(list(open_source(str(root)).records())) == 2


def test_saved_datasets_that_are_damaged(tmp_path):
    save_to_disk(tmp_path / "saved", [{"text": "x"}])
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match=r"cannot read '.*data-00001-of-00002\.arrow': No such file"):
        open_source(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json' is damaged: it has no '_data_files'"):
        open_source(str(tmp_path / "saved"))


def test_what_the_datasets_library_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"é{number}", "label": number % 2} for number in range(30)]
    made = datasets.Dataset.from_list(rows, features=features).select(range(5, 25))
    datasets.DatasetDict({"train": made, "test": made.select([0, 1])}).save_to_disk(
        tmp_path / "x", num_shards={"train": 3, "test": 1}
    )
    source = open_source({"path": str(tmp_path / "x"), "split": "train"})
    assert len(source.parts) == 3
    assert [record for _, record in source.records()] == rows[5:25]
    assert len(list(open_source(f"{tmp_path}/x/test").records())) == 2
