"""Parquet, Arrow and array_record files: parts, damage, and what their values become."""

import gzip
import json
import pickle
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from t5x_lite.data import binary_files
from t5x_lite.data.parts import Reading
from t5x_lite.data.sources import open_source, read_records
from t5x_lite.errors import InputError

ROWS = [{"a": f"{number}é" * 9, "n": number, "x": {"y": [number, None]}, "none": None} for number in range(50)]


def write_parquet(path, rows=ROWS, group=7):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def write_stream(path, rows=ROWS, batch=7, write=pyarrow.ipc.new_stream):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, write(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def write_file(path, rows=ROWS, batch=7):
    write_stream(path, rows, batch, pyarrow.ipc.new_file)


def write_array_record(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record if isinstance(record, bytes) else json.dumps(record).encode())
    writer.close()


WRITERS = {
    "x.parquet": write_parquet,
    "stream.arrow": write_stream,
    "file.arrow": write_file,
    "x.array_record": lambda path: write_array_record(path, ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("part_bytes", [100, 300, 1000, 4000, 10**9])
def test_every_record_is_in_one_part_whatever_the_size_of_parts(tmp_path, name, part_bytes, monkeypatch):
    WRITERS[name](tmp_path / name)
    monkeypatch.setattr(binary_files, "BATCH_BYTES", 500)
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path / name), part_bytes=part_bytes)))
    assert (len(source.parts) > 1) == (part_bytes < (tmp_path / name).stat().st_size)
    rows = [row for index in range(len(source.parts)) for row in source.read(index)]
    assert rows == [(f"{tmp_path}/{name}:{number}", row) for number, row in enumerate(ROWS, 1)]
    wanted = list(source.records(columns=("n", "a")))
    assert [record["n"] for _, record in wanted] == list(range(50))
    assert ("x" in wanted[0][1]) == (name == "x.array_record")  # whose records are not stored in columns
    assert next(source.records(columns=("absent",)))[1] == ROWS[0]


def test_parts_are_about_as_large_as_asked_for(tmp_path):
    rows = [{"a": str(number) * 300} for number in range(1000)]
    write_parquet(tmp_path / "x.parquet", rows, 20)
    write_stream(tmp_path / "x.arrow", rows, 20)
    write_array_record(tmp_path / "x.array_record", rows)
    for name in ("x.parquet", "x.arrow", "x.array_record"):
        size = (tmp_path / name).stat().st_size
        source = open_source(str(tmp_path / name), part_bytes=size // 5)
        assert 4 <= len(source.parts) <= 7, name
        assert [len(list(source.read(index))) for index in range(len(source.parts))] == pytest.approx(
            [1000 / len(source.parts)] * len(source.parts), rel=0.5
        )
        assert sum(part.size for part in source.parts) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("name", ["x.parquet.gz", "stream.arrow.gz"])
def test_compressed(tmp_path, name):
    WRITERS[name.removesuffix(".gz")](tmp_path / "plain")
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    source = open_source(str(tmp_path / name), part_bytes=1)
    assert len(source.parts) == 1
    assert [record for _, record in source.records()] == ROWS


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("part_bytes", [1000, 10**9])
@pytest.mark.parametrize("kept", [0.1, 0.5, -1, "a batch"])
def test_files_that_were_cut_short(tmp_path, name, part_bytes, kept):
    WRITERS[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    end = len(data) - 8 if kept == "a batch" else kept if kept < 0 else int(kept * len(data))
    if name == "x.array_record" and kept in (-1, "a batch"):
        end = len(data) - 70_000  # its last block is padding up to 64 KiB
    (tmp_path / name).write_bytes(data[:end])
    with pytest.raises(InputError, match=r"cannot read|no records in .*cut short") as error:
        list(open_source(str(tmp_path / name), part_bytes=part_bytes).records())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", WRITERS)
def test_files_that_are_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "this is JSON"}\n' * 20)
    with pytest.raises(InputError, match=r"cannot read .* as (Parquet|Arrow)|not an array_record file"):
        list(open_source(str(tmp_path / name)).records())


def test_array_record_of_texts(tmp_path):
    texts = ["one\ntwo", '{"a": 1}', "é"]
    write_array_record(tmp_path / "x.array_record-00000-of-00001", [text.encode() for text in texts])
    records = read_records(f"{tmp_path}/x.array_record*")
    assert list(records) == [{"text": text} for text in texts]
    write_array_record(tmp_path / "braces.array_record", [b"{not JSON", b"x"])
    assert next(read_records(f"{tmp_path}/braces.array_record")) == {"text": "{not JSON"}


def test_array_record_with_malformed_records(tmp_path):
    path = tmp_path / "x.array_record"
    write_array_record(path, [{"a": 1}, b"[2]", b"\xff", {"a": "long" * 9}, {"a": 3}])
    reasons = []
    source = open_source(str(path), Reading("skip", max_record_bytes=20))
    assert [record for _, record in source.records(lambda *why: reasons.append(why))] == [{"a": 1}, {"a": 3}]
    assert [where for where, _ in reasons] == [f"{path}:{number}" for number in (2, 3, 4)]
    assert "read as tfds:NAME" in reasons[1][1]
    with pytest.raises(InputError, match=rf"{path}:2: a JSON list, not an object"):
        list(open_source(str(path)).records())


@pytest.mark.parametrize("name", WRITERS)
def test_large_values_are_made_python_objects_a_few_at_a_time(tmp_path, name, monkeypatch):
    monkeypatch.setattr(binary_files, "BATCH_BYTES", 300_000)
    rows = [{"a": chr(48 + number) * 100_000} for number in range(40)]
    if name == "x.array_record":
        write_array_record(tmp_path / name, rows)
    else:
        {"x.parquet": write_parquet, "stream.arrow": write_stream, "file.arrow": write_file}[name](
            tmp_path / name, rows, 40
        )
    tracemalloc.start()
    try:
        assert sum(len(record["a"]) for _, record in open_source(str(tmp_path / name)).records()) == 4_000_000
        assert tracemalloc.get_traced_memory()[1] < 1_500_000
    finally:
        tracemalloc.stop()
